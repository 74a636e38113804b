"""What rectification costs: time and memory with it over time and memory without it, in one run, on random weights."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import statistics
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import psutil
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

from rectify.processor import RectificationProcessor
from rectify.q_network import DeadEndQNetwork
from rectify.rule import make_rule

PROMPT_TOKENS = 16


@dataclass
class Shape:
    """The two networks and what runs them.

    Attributes:
        q_layers, q_width, q_rank: of the Q network; the language model is the 124 M GPT-2 shape.
        rule: name of the rule, with its default parameter.
        device, threads: where; 0 threads for torch's own choice.
    """

    q_layers: int = 4
    q_width: int = 256
    q_rank: int = 64
    rule: str = "tilt"
    device: str = "cpu"
    threads: int = 0


@dataclass
class Ratio:
    """Time per token of both arms in milliseconds, and the median of their ratios over interleaved repetitions."""

    batch: int
    new_tokens: int
    base_ms: float
    rectified_ms: float
    ratio: float
    lowest: float
    highest: float
    repetitions: int
    rule: str = field(default="tilt")


class Bench:
    """A language model of the 124 M GPT-2 shape and a processor beside it, both with random weights."""

    def __init__(self, shape: Shape) -> None:
        if shape.threads:
            torch.set_num_threads(shape.threads)
        torch.manual_seed(0)
        self.shape = shape
        self.model = cast(Any, GPT2LMHeadModel(GPT2Config())).to(shape.device).eval()
        trunk = GPT2Model(GPT2Config(n_embd=shape.q_width, n_layer=shape.q_layers, n_head=max(1, shape.q_width // 64)))
        q_network = DeadEndQNetwork.from_trunk(trunk, rank=shape.q_rank).to(shape.device).eval()
        with torch.no_grad():  # fresh heads value all tokens alike
            for parameter in q_network.head.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        self.processor = RectificationProcessor(q_network, make_rule(shape.rule), do_sample=True)

    @torch.no_grad()
    def generate(self, batch: int, new_tokens: int, rectified: bool) -> float:
        """Seconds that one call of `generate` takes."""
        torch.manual_seed(0)
        ids = torch.randint(0, 50_000, (batch, PROMPT_TOKENS), device=self.shape.device)
        how: dict[str, Any] = {"logits_processor": [self.processor]} if rectified else {}
        self.processor.reset()
        self._wait()
        start = time.perf_counter()
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=50256,
            **self.processor.generate_kwargs(),
            **how,
        )
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.shape.device != "cpu":
            torch.accelerator.synchronize()

    def ratio(self, batch: int, new_tokens: int, repetitions: int) -> Ratio:
        """The cost at one batch and length, the arms interleaved after one warm-up each."""
        for rectified in (False, True):
            self.generate(batch, min(new_tokens, 20), rectified)
        pairs = []
        for repetition in range(repetitions):
            order = (False, True) if repetition % 2 == 0 else (True, False)
            seconds = {rectified: self.generate(batch, new_tokens, rectified) for rectified in order}
            pairs.append((seconds[False], seconds[True]))
        ratios = [rectified / base for base, rectified in pairs]
        return Ratio(
            batch=batch,
            new_tokens=new_tokens,
            base_ms=statistics.median(base for base, _ in pairs) / new_tokens * 1e3,
            rectified_ms=statistics.median(rectified for _, rectified in pairs) / new_tokens * 1e3,
            ratio=statistics.median(ratios),
            lowest=min(ratios),
            highest=max(ratios),
            repetitions=repetitions,
            rule=self.shape.rule,
        )


class _PeakMemory:
    """The highest resident memory of this process while it is entered, above what it was before, in MiB."""

    def __enter__(self) -> _PeakMemory:
        self._process = psutil.Process()
        gc.collect()
        if sys.platform == "linux":  # what was freed while the networks were built must not hide what is taken now
            ctypes.CDLL(None).malloc_trim(0)
        self._before = self._highest = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._highest = max(self._highest, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.mib = (self._highest - self._before) / 2**20


def _peak(shape: Shape, batch: int, new_tokens: int, rectified: bool) -> float:
    bench = Bench(shape)
    bench.generate(1, 2, rectified)  # what is made once, at first use
    if shape.device == "cpu":
        with _PeakMemory() as peak:
            bench.generate(batch, new_tokens, rectified)
        return peak.mib
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    bench.generate(batch, new_tokens, rectified)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def peak_memory(shape: Shape, batch: int, new_tokens: int) -> dict[str, Any]:
    """Peak memory in MiB that one call of `generate` adds to the loaded networks, each arm in a process of its own."""
    context = multiprocessing.get_context("spawn")
    peaks = []
    for rectified in (False, True):
        with context.Pool(1) as pool:
            peaks.append(pool.apply(_peak, (shape, batch, new_tokens, rectified)))
    network = Bench(shape).processor.q_network
    weights = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters()) / 2**20
    return {
        "batch": batch,
        "new_tokens": new_tokens,
        "base_mib": peaks[0],
        "rectified_mib": peaks[1],
        "extra_mib": peaks[1] - peaks[0],
        "q_weights_mib": weights,
    }


def environment(shape: Shape) -> dict[str, Any]:
    """What a figure depends on besides the code."""
    return asdict(shape) | {"torch": torch.__version__, "torch_threads": torch.get_num_threads()}
