"""What reading candidate next tokens costs over a single-token step of the same backbone, along a model's own texts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rectify.causal_states import CausalStates
from rectify.evaluation.overhead import Ratio, make_ratio, orders
from rectify.prefix_memo import MASKED, PrefixMemo
from rectify.sampling import Sampling
from rectify.support import Support, candidates_of
from rectify.trunk_states import input_device

STEP = "step"


@dataclass(frozen=True)
class Walk:
    """Texts as they were generated, a token at a time.

    Attributes:
        ids: `[B, T]` int64, `MASKED` at padding.
        policies: the `[B, V]` warped scores of each token that was generated.
    """

    ids: Tensor
    policies: list[Tensor]

    def prefixes(self, step: int) -> Tensor:
        """What was there before a step."""
        return self.ids[:, : self.ids.shape[1] - len(self.policies) + step]


@dataclass(frozen=True)
class Way:
    """Which tokens are read.

    Attributes:
        name: of the row.
        threshold, k: see `candidates_of`.
        padded: whether rows are filled up to the largest, in place of being packed.
    """

    name: str
    threshold: float | None
    k: int | None = None
    padded: bool = False


@dataclass(frozen=True)
class CandidateCost:
    """The cost of one way.

    Attributes:
        ratio: time over that of a step, paired at the same place of the same texts.
        candidates: mean of their number.
        largest: mean of the largest number in a batch.
    """

    ratio: Ratio
    candidates: float
    largest: float


@torch.no_grad()
def walk(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
) -> Walk:
    """Sample a continuation of each prompt, `new_tokens` long."""
    tokenizer.padding_side = "left"
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True).to(input_device(model))
    torch.manual_seed(seed)
    made = cast(Any, model).generate(
        **inputs,
        **sampling.plain_kwargs(),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        return_dict_in_generate=True,
        output_scores=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    padding = torch.nn.functional.pad(inputs["attention_mask"] == 0, (0, new_tokens))
    return Walk(made.sequences.masked_fill(padding, MASKED), list(made.scores))


@torch.no_grad()
def candidate_costs(trunk: PreTrainedModel, texts: Walk, ways: Sequence[Way], repetitions: int) -> list[CandidateCost]:
    """Each way over a single-token step, in turn at each place of the texts after the first, which reads the prompt.

    Args:
        trunk: a causal backbone whose vocabulary holds the ids.
        texts: see `walk`.
        ways: what is read.
        repetitions: of the whole texts; one more warms up.
    """
    names = [STEP, *(way.name for way in ways)]
    chosen = {way.name: [candidates_of(policy, way.threshold, way.k) for policy in texts.policies] for way in ways}
    padded = {way.name for way in ways if way.padded}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(repetitions + 1):
        memos = {name: PrefixMemo(CausalStates(trunk)) for name in names}
        for step, order in enumerate(orders(names, len(texts.policies))):
            for name in order:
                candidates = chosen[name][step] if name in chosen else None
                taken = _seconds(memos[name], texts.prefixes(step), candidates, name in padded)
                if step and repetition:
                    seconds[name].append(taken)
    batch = len(texts.ids)
    costs = []
    for way in ways:
        counts = torch.stack([each.real.sum(-1) for each in chosen[way.name]]).double()
        ratio = make_ratio(way.name, STEP, batch, 1, seconds[way.name], seconds[STEP])
        costs.append(CandidateCost(ratio, float(counts.mean()), float(counts.amax(-1).mean())))
    return costs


def _seconds(memo: PrefixMemo, prefixes: Tensor, candidates: Support | None, padded: bool) -> float:
    _wait(prefixes)
    start = time.perf_counter()
    if candidates is None:
        memo.last_hidden(prefixes)
    else:
        memo.branch_states(prefixes, candidates.tokens, None if padded else candidates.real)
    _wait(prefixes)
    return time.perf_counter() - start


def _wait(prefixes: Tensor) -> None:
    if prefixes.device.type != "cpu":
        torch.accelerator.synchronize()
