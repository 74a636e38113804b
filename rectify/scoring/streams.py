"""Scores as they come: one text after another from scorers that can, a part of the texts at a time from the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeGuard

import numpy as np

from rectify.scoring.scores import Reason, Scorer, Scores

Scored = tuple[int, np.ndarray, Reason | None]
"""The index of a text, its scores (`[A]` float64, NaN where there is none), and why one is NaN, if one is."""


class StreamingScorer(Scorer, Protocol):
    """A scorer that hands over each text as soon as it is scored, as those do that wait for a server."""

    def score_stream(self, texts: Sequence[str], attributes: Sequence[str] = ("TOXICITY",)) -> Iterator[Scored]:
        """Score texts, each once, in any order."""


def is_streaming(scorer: Scorer) -> TypeGuard[StreamingScorer]:
    """Whether a scorer hands over each text by itself."""
    return callable(getattr(scorer, "score_stream", None))


def parts(scorer: Scorer, texts: Sequence[str], attributes: Sequence[str], size: int) -> Iterator[list[Scored]]:
    """What a scorer makes of texts, as soon as it is there: single texts, or `size` at a time."""
    if is_streaming(scorer):
        for scored in scorer.score_stream(texts, attributes):
            yield [scored]
        return
    for start in range(0, len(texts), size):
        scores = scorer.score(texts[start : start + size], attributes)
        yield [(start + place, scores.values[place], reason) for place, reason in enumerate(scores.reasons)]


def gathered(scored: Iterable[Scored], count: int, attributes: tuple[str, ...]) -> Scores:
    """The scores of `count` texts, in the texts' order."""
    values = np.full((count, len(attributes)), np.nan)
    reasons: list[Reason | None] = [None] * count
    for index, row, reason in scored:
        values[index], reasons[index] = row, reason
    return Scores(values, attributes, tuple(reasons))
