"""What rectification costs: time and memory of every arm over the base model's, in one run, on random weights.

The arms: `base`, the model alone; `external`, a Q network with a trunk of its own; `shared`, a head on the model's own
hidden states; `published`, the decoding that was published (`published_decoding`).
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2Model, LlamaConfig, LogitsProcessor

from rectify.errors import InvalidArgumentError
from rectify.evaluation.published_decoding import PublishedProcessor, PublishedQNetwork
from rectify.heads import LowRankHead
from rectify.hub import DTYPES
from rectify.methods.rectification import Rectify
from rectify.methods.specs import parse_method
from rectify.processor import RectificationProcessor
from rectify.q_network import DeadEndQNetwork
from rectify.rule import Rule
from rectify.sampling import Sampling
from rectify.version import __version__

ARMS = ("base", "external", "shared", "published")
PROMPT_TOKENS = 16
WARM_UP_TOKENS = 20

_LLAMA_3 = {"vocab_size": 128_256, "num_key_value_heads": 8, "intermediate_size": 8192, "tie_word_embeddings": True}
_SHAPES: dict[str, tuple[type[GPT2Config] | type[LlamaConfig], dict[str, Any]]] = {
    "tiny": (GPT2Config, {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 2}),
    "gpt2": (GPT2Config, {}),  # 124 M
    "gpt2-large": (GPT2Config, {"n_embd": 1280, "n_layer": 36, "n_head": 20}),  # 0.8 B
    "llama-1b": (LlamaConfig, {**_LLAMA_3, "hidden_size": 2048, "num_hidden_layers": 16}),
    "llama-3b": (LlamaConfig, {**_LLAMA_3, "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24}),
    "llama-7b": (LlamaConfig, {}),  # LlamaConfig's own defaults are this shape
}
MODEL_SHAPES = tuple(_SHAPES)


def _ends(vocab_size: int) -> dict[str, Any]:
    return {"vocab_size": vocab_size, "bos_token_id": vocab_size - 1, "eos_token_id": vocab_size - 1}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The networks, how they decode, and what runs them.

    Attributes:
        model_shape: of the language model, a name in `MODEL_SHAPES`.
        q_layers, q_width: of the external Q network's trunk, a GPT-2 of the model's vocabulary; the published
            algorithm has the same.
        q_rank: of the external and of the shared head.
        shared_mlp_size: of the shared head, 0 for none.
        rule: of the external and of the shared arm, such as `tilt` or `tilt,beta=3,epsilon=0.1`.
        top_k, top_p: of the sampling in all arms; `None` for none.
        seed: of weights, prompts and samples.
        device, threads: where; 0 threads for torch's own choice.
        dtype, q_dtype: of the model's weights, and of those of the Q networks and heads.

    Raises:
        InvalidArgumentError: a value is out of range.
    """

    model_shape: str = "gpt2"
    q_layers: int = 4
    q_width: int = 256
    q_rank: int = 64
    shared_mlp_size: int = 0
    rule: str = "tilt"
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    device: str = "cpu"
    threads: int = 0
    dtype: str = "float32"
    q_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.model_shape not in _SHAPES:
            raise InvalidArgumentError(f"model_shape is {self.model_shape!r}: give one of {', '.join(_SHAPES)}")
        for name in ("dtype", "q_dtype"):
            if getattr(self, name) not in DTYPES:
                raise InvalidArgumentError(f"{name} is {getattr(self, name)!r}: give one of {', '.join(DTYPES)}")
        for name in ("q_layers", "q_width", "q_rank"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"{name} is {getattr(self, name)}: give 1 or more")
        self.made_rule()
        self.sampling()

    def made_rule(self) -> Rule:
        """The rule."""
        return _method(self.rule).make_rule()

    def sampling(self, do_sample: bool = True) -> Sampling:
        """How all arms sample."""
        return Sampling(do_sample=do_sample, top_k=self.top_k, top_p=self.top_p)


class Bench:
    """A language model and what rectifies it, all with random weights; a network is made when an arm first needs it."""

    def __init__(self, shape: Shape) -> None:
        if shape.threads:
            torch.set_num_threads(shape.threads)
        self.shape = shape
        kind, sizes = _SHAPES[shape.model_shape]
        if "vocab_size" in sizes:
            sizes = _ends(sizes["vocab_size"]) | sizes
        config = kind(**sizes)
        torch.manual_seed(shape.seed)
        with torch.device(shape.device):
            self.model = cast(Any, AutoModelForCausalLM.from_config(config, dtype=DTYPES[shape.dtype]).eval())
        self.model.generation_config.pad_token_id = config.eos_token_id
        self._networks: dict[str, Any] = {}

    @property
    def context(self) -> int:
        """Tokens of the longest text."""
        return self.model.config.max_position_embeddings

    def network(self, arm: str) -> Any:
        """The Q network of an arm: its own, also where two arms have equal ones."""
        if arm not in self._networks:
            torch.manual_seed(self.shape.seed)
            with torch.device(self.shape.device):
                self._networks[arm] = self._make_network(arm).to(DTYPES[self.shape.q_dtype]).eval()
        return self._networks[arm]

    def _make_network(self, arm: str) -> DeadEndQNetwork | PublishedQNetwork:
        shape = self.shape
        width = shape.q_width
        if arm == "shared":
            width = self.model.config.hidden_size
            network = DeadEndQNetwork.from_trunk(
                self.model, shared=True, rank=shape.q_rank, mlp_size=shape.shared_mlp_size
            )
        else:
            heads = max(1, width // 64)
            sizes = _ends(self.model.config.vocab_size) | {"n_positions": self.context}
            trunk = GPT2Model(GPT2Config(n_embd=width, n_layer=shape.q_layers, n_head=heads, **sizes))
            if arm == "published":
                return PublishedQNetwork(trunk)
            network = DeadEndQNetwork.from_trunk(trunk, rank=shape.q_rank)
        with torch.no_grad():
            # A fresh head values all tokens alike. These risks spread as trained ones, their logits by 2 or so; far
            # wider ones make numbers so small that a CPU computes with them many times slower.
            head = cast(LowRankHead, network.head)
            head.project.weight.normal_(std=0.25 * width**-0.5)
            head.tokens.bias.normal_()
        return network

    def processor(self, arm: str, do_sample: bool = True) -> RectificationProcessor | PublishedProcessor:
        """A new processor of an arm; while one of the shared arm lives, the model has its hooks."""
        if arm == "published":
            return PublishedProcessor(
                self.network(arm), pad_token_id=cast(int, self.model.generation_config.pad_token_id)
            )
        shape, network = self.shape, self.network(arm)
        sampling: dict[str, Any] = {"do_sample": do_sample, "top_k": shape.top_k, "top_p": shape.top_p}
        return RectificationProcessor(network, shape.made_rule(), model=self.model, **sampling)

    def reference(self, arm: str) -> RectificationProcessor:
        """The slow way to what the greedy processor of an arm does: its trunk is run over whole prefixes, each step."""
        return RectificationProcessor(self.network(arm), self.shape.made_rule(), use_cache=False, do_sample=False)

    def prompts(self, batch: int) -> Tensor:
        """The prompts of all arms: `[batch, PROMPT_TOKENS]` ids."""
        draw = torch.Generator().manual_seed(self.shape.seed)
        return torch.randint(3, self.model.config.vocab_size - 1, (batch, PROMPT_TOKENS), generator=draw)

    def run(self, processor: LogitsProcessor | None, batch: int, new_tokens: int, do_sample: bool = True) -> Any:
        """Prompts continued by exactly `new_tokens` tokens, with the processed scores of each step where greedy.

        Args:
            processor: `None` for the base model alone.
            batch: prompts.
            new_tokens: tokens of each.
            do_sample: or greedy.

        Raises:
            InvalidArgumentError: the model's context is shorter.
        """
        if PROMPT_TOKENS + new_tokens > self.context:
            raise InvalidArgumentError(
                f"lengths hold {new_tokens}: with {PROMPT_TOKENS} tokens of prompt, give {self.context} at most in all"
            )
        sampling = self.shape.sampling(do_sample)
        # a processor of ours has applied the warpers; after all others `generate` does
        own = isinstance(getattr(processor, "processor", processor), RectificationProcessor)
        torch.manual_seed(self.shape.seed)
        ids = self.prompts(batch).to(self.shape.device)
        return self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            logits_processor=[] if processor is None else [processor],
            return_dict_in_generate=not do_sample,
            output_scores=not do_sample,
            **(sampling.generate_kwargs() if own else sampling.plain_kwargs()),
        )

    def seconds(self, arm: str, batch: int, new_tokens: int) -> float:
        """How long one call of `generate` takes."""
        processor = None if arm == "base" else self.processor(arm)
        self.wait()
        start = time.perf_counter()
        self.run(processor, batch, new_tokens)
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Until the device is done."""
        if self.shape.device != "cpu":
            torch.accelerator.synchronize()


# ---------------------------------------------------------------------------------------------------------------------
# Time


@dataclass(frozen=True)
class Ratio:
    """Time of one arm over that of another, at one batch and length.

    Attributes:
        arm, against: which over which.
        batch, new_tokens: of each call of `generate`.
        ms, against_ms: per new token of all rows together, medians.
        ratio: median of the ratios within a repetition.
        low, high, coverage: an interval for that median, and the probability that it holds it (`median_interval`).
        ratios: one a repetition.
    """

    arm: str
    against: str
    batch: int
    new_tokens: int
    ms: float
    against_ms: float
    ratio: float
    low: float
    high: float
    coverage: float
    ratios: list[float]


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """The narrowest interval between equally ranked values from both ends that holds the median of what they come from.

    It needs no distribution: of n values all are on one side of the median with probability `2⁻ⁿ`.

    Returns:
        Both ends and the probability; the lowest and the highest value where the values are too few for `confidence`.
    """
    ordered, n = sorted(values), len(values)
    rank, outside = 1, 2 * 0.5**n
    while outside + (more := 2 * math.comb(n, rank) * 0.5**n) <= 1 - confidence:
        rank, outside = rank + 1, outside + more
    return ordered[rank - 1], ordered[-rank], max(0.0, 1 - outside)


def orders(arms: Sequence[str], repetitions: int) -> Iterator[list[str]]:
    """The order of the arms in each repetition: every one comes first, second … in turn."""
    for repetition in range(repetitions):
        turn = repetition % len(arms)
        yield [*arms[turn:], *arms[:turn]]


def time_arms(
    bench: Bench,
    arms: Sequence[str],
    batch: int,
    new_tokens: int,
    repetitions: int,
    published_repetitions: int | None = None,
) -> list[Ratio]:
    """Every arm over `base`, and `published` over `external` where both are there, after one warm-up each.

    The latter also without the base model's time, as `published − base` against `external − base`: what rectification
    adds. `published`, which is slow, takes part in the first `published_repetitions` only; `None` for all of them.
    """
    for arm in arms:
        bench.seconds(arm, batch, min(new_tokens, WARM_UP_TOKENS))
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for repetition, order in enumerate(orders(arms, repetitions)):
        for arm in order:
            if arm != "published" or published_repetitions is None or repetition < published_repetitions:
                seconds[arm].append(bench.seconds(arm, batch, new_tokens))
    pairs = [(arm, "base") for arm in arms if arm != "base"]
    if "published" in arms and "external" in arms:
        pairs += [("published", "external"), ("published − base", "external − base")]
        for arm in ("published", "external"):
            added = zip(seconds[arm], seconds["base"], strict=False)
            seconds[f"{arm} − base"] = [mine - base for mine, base in added]
    return [make_ratio(arm, other, batch, new_tokens, seconds[arm], seconds[other]) for arm, other in pairs]


def make_ratio(
    arm: str, against: str, batch: int, new_tokens: int, seconds: Sequence[float], others: Sequence[float]
) -> Ratio:
    """The ratio of paired times in seconds: those of the repetitions in which both were measured, the first ones."""
    paired = min(len(seconds), len(others))
    seconds, others = seconds[:paired], others[:paired]
    ratios = [mine / other for mine, other in zip(seconds, others, strict=True)]
    ms, against_ms = (statistics.median(times) / new_tokens * 1e3 for times in (seconds, others))
    low, high, coverage = median_interval(ratios)
    return Ratio(
        arm, against, batch, new_tokens, ms, against_ms, statistics.median(ratios), low, high, coverage, ratios
    )


def cells(
    arms: Sequence[str],
    batches: Sequence[int],
    lengths: Sequence[int],
    published_batches: Sequence[int],
    published_lengths: Sequence[int],
) -> Iterator[tuple[int, int, list[str]]]:
    """Batch, new tokens and arms of each measurement; `published`, which is slow, only where it is asked for.

    Its lengths are measured for the other arms too, in the batches that it has.
    """
    for batch in batches:
        slow = {*published_lengths} if "published" in arms and batch in published_batches else set()
        for length in sorted({*lengths, *slow}):
            yield batch, length, [arm for arm in arms if arm != "published" or length in slow]


def environment(bench: Bench) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    shape = bench.shape
    return asdict(shape) | {
        "rule": repr(shape.made_rule()),
        "prompt_tokens": PROMPT_TOKENS,
        "model_parameters": bench.model.num_parameters(),
        "rectify": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "torch_threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cpu": cpu_name(),
        "accelerator": torch.cuda.get_device_name(shape.device) if shape.device.startswith("cuda") else None,
    }


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _method(rule: str) -> Rectify:
    return cast(Rectify, parse_method(f"rectify,rule={rule}"))
