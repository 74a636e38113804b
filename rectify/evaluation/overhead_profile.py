"""Which part of a rectified step costs what, and whether the fast way chooses what the slow reference does."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import LogitsProcessor

from rectify import processor as processor_module
from rectify.evaluation.overhead import PROMPT_TOKENS, WARM_UP_TOKENS, Bench, orders
from rectify.processor import RectificationProcessor
from rectify.q_value import QValue

MARGIN = 1e-4
"""Where the two best rectified scores are nearer than this, rounding may choose between them."""


class _Spans:
    """Seconds of each step in the calls that are watched; what an inner one takes is not counted for the outer."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait
        self._inner = [0.0]
        self.starts: list[float] = []
        self.steps: list[dict[str, float]] = []

    def begin(self) -> None:
        """A processor is called: the next step's."""
        self._wait()
        self.starts.append(time.perf_counter())
        self.steps.append({})

    def call(self, part: str, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Call a function and count its time for a part of the step."""
        self._wait()
        start = time.perf_counter()
        self._inner.append(0.0)
        result = function(*args, **named)
        self._wait()
        taken = time.perf_counter() - start
        step = self.steps[-1]
        step[part] = step.get(part, 0.0) + taken - self._inner.pop()
        self._inner[-1] += taken
        return result


class _Watched(LogitsProcessor):
    """A processor, or none, that tells when each step begins; what no part accounts for is `bookkeeping`."""

    def __init__(self, spans: _Spans, processor: RectificationProcessor | None) -> None:
        self.spans, self.processor = spans, processor

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.spans.begin()
        if self.processor is None:
            return scores
        return self.spans.call("bookkeeping", self.processor, input_ids, scores)


PARTS = ("trunk", "states", "head", "warpers", "support", "rule", "statistics", "bookkeeping")


def _watched_calls(processor: RectificationProcessor) -> list[tuple[str, Any, str]]:
    """The part, the owner and the name of each function that is watched; of `PARTS`, but the rest."""
    q = cast(QValue, processor._q)
    network: Any = q.q_network
    return [
        ("trunk", network, "encode"),
        ("states", q.memo, "last_hidden"),  # the memo around the trunk, or the tap instead of it
        ("head", network.head, "log_survival"),
        ("warpers", processor, "_warped"),
        ("support", processor_module, "support_of"),
        ("rule", processor_module, "rectify"),
        ("rule", processor_module, "rectify_support"),
        ("statistics", processor, "_count"),
    ]


def step_spans(bench: Bench, arm: str, batch: int, new_tokens: int) -> tuple[list[float], list[dict[str, float]]]:
    """Seconds of each step of one generation after the first, which reads the prompt: in all, and in the parts."""
    processor = None if arm == "base" else cast(RectificationProcessor, bench.processor(arm))
    spans = _Spans(bench.wait)
    with ExitStack() as stack:
        for part, owner, name in [] if processor is None else _watched_calls(processor):
            watched = partial(spans.call, part, getattr(owner, name))
            stack.enter_context(patch.object(owner, name, watched))
        bench.run(_Watched(spans, processor), batch, new_tokens)
    ends = [after - before for before, after in zip(spans.starts, spans.starts[1:], strict=False)]
    return ends[1:], spans.steps[1:]


def profile(
    bench: Bench, arms: Sequence[str], batch: int, new_tokens: int, repetitions: int
) -> Iterator[dict[str, Any]]:
    """The cost of each part of a rectified step in ms, and as a share of the base model's step; medians over steps.

    The parts are timed where they run, in generation, so that they meet the caches as the model leaves them; on an
    accelerator each is waited for, and a step is longer than without a profile. `outside` is what a step has above the
    base model's and above its processor: the hooks of a shared trunk, and less than nothing where the processor does
    what `generate` does in the base arm.

    Yields:
        A row for each of the arms that is `external` or `shared`.
    """
    arms = ["base", *(arm for arm in arms if arm in ("external", "shared"))]
    steps: dict[str, list[float]] = {arm: [] for arm in arms}
    parts: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    for arm in arms:
        step_spans(bench, arm, batch, min(new_tokens, WARM_UP_TOKENS))
    for order in orders(arms, repetitions):
        for arm in order:
            found = step_spans(bench, arm, batch, new_tokens)
            steps[arm] += found[0]
            parts[arm] += found[1]
    base = statistics.median(steps["base"]) * 1e3
    for arm in arms[1:]:
        step = statistics.median(steps[arm]) * 1e3
        ms = {part: statistics.median(one.get(part, 0.0) for one in parts[arm]) * 1e3 for part in PARTS}
        ms["outside"] = step - base - sum(ms.values())
        yield {
            "arm": arm,
            "batch": batch,
            "new_tokens": new_tokens,
            "repetitions": repetitions,
            "steps": len(steps[arm]),
            "base_step_ms": base,
            "step_ms": step,
            "ms": ms,
            "share": {part: value / base for part, value in ms.items()},
        }


# ---------------------------------------------------------------------------------------------------------------------
# Agreement with the slow reference path


def compare_greedy(ids: Tensor, reference: Tensor, margins: Tensor) -> dict[str, Any]:
    """Greedy decisions against those of the reference, in each row up to the first that differs.

    Args:
        ids, reference: `[B, T]` tokens chosen.
        margins: `[B, T]` the reference's best rectified score less its second best.

    Returns:
        How many decisions were compared, differ, differ at a margin under `MARGIN` (`under_margin`), and have such a
        margin, differing or not (`near_ties`).
    """
    same = ids == reference
    # after a row differs, its prefixes do
    compared = (~same).cumsum(-1) - (~same).int() == 0
    differing, near = compared & ~same, margins < MARGIN
    counts = {
        "decisions": compared,
        "differing": differing,
        "under_margin": differing & near,
        "near_ties": compared & near,
    }
    return {name: int(chosen.sum()) for name, chosen in counts.items()}


def agreement(bench: Bench, arm: str, batch: int = 4, new_tokens: int = 64) -> dict[str, Any]:
    """The greedy decisions of an arm against its slow reference (`Bench.reference`); see `compare_greedy`."""
    fast = bench.run(bench.processor(arm, do_sample=False), batch, new_tokens, do_sample=False)
    slow = bench.run(bench.reference(arm), batch, new_tokens, do_sample=False)
    best = torch.stack([scores.float().topk(2).values for scores in slow.scores], dim=1)
    chosen, wanted = (found.sequences[:, PROMPT_TOKENS:] for found in (fast, slow))
    counts = compare_greedy(chosen, wanted, best[..., 0] - best[..., 1])
    return {"arm": arm, "batch": batch, "new_tokens": new_tokens, "margin": MARGIN} | counts
