"""Character-level F1 of toxic spans, as SemEval-2021 Task 5 defines it.

Source: Pavlopoulos et al., "SemEval-2021 Task 5: Toxic Spans Detection", after Da San Martino et al., EMNLP 2019.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rectify.errors import InvalidArgumentError
from rectify.evaluation.intervals import Ratio

Spans = Sequence[Sequence[Any]]
"""Spans of a text: `(start, end)`, whatever follows, in Python's places, end exclusive."""


def characters(spans: Spans) -> set[int]:
    """The places of all characters in spans."""
    return {place for span in spans for place in range(span[0], span[1])}


def text_f1(predicted: Iterable[int], annotated: Iterable[int]) -> float:
    """The F1 of one text, from 0 to 1: 1 where both are empty, 0 where one is.

    Args:
        predicted, annotated: places of characters.
    """
    found, wanted = set(predicted), set(annotated)
    if not found or not wanted:
        return float(found == wanted)
    # 2PR/(P + R), with P = |both|/|found| and R = |both|/|wanted|
    return 2 * len(found & wanted) / (len(found) + len(wanted))


def character_f1(predicted: Sequence[Spans], annotated: Sequence[Spans]) -> np.ndarray:
    """The F1 of each text, `[N]` float64; their mean is the task's figure.

    Raises:
        InvalidArgumentError: there are not as many texts on both sides.
    """
    if len(predicted) != len(annotated):
        raise InvalidArgumentError(f"predicted has {len(predicted)} texts, annotated {len(annotated)}: give the same")
    pairs = zip(predicted, annotated, strict=True)
    return np.array([text_f1(characters(found), characters(wanted)) for found, wanted in pairs], dtype=np.float64)


def mean_f1(f1: np.ndarray, where: np.ndarray | None = None) -> Ratio:
    """The mean over texts, in the form that `Bootstrap` resamples.

    Args:
        f1: `[N]`, of each text.
        where: `[N]` bool, the texts that count; all by default.
    """
    counted = np.ones(len(f1)) if where is None else where.astype(np.float64)
    return Ratio(f1 * counted, counted)
