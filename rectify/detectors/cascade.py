"""Whom to believe, a small detector or a larger one: confidence, thresholds and curves, arrays in and arrays out.

The small detector says how sure it is, the probability of the label that it predicts; where that is below a threshold,
the larger one decides. Texts without an answer of the small one (NaN) are always the larger one's.

Source: the confidence cascade of mjy2357/Toxic_content_detection, which reads its confidence from scores after nucleus
sampling; here it is that of raw logits over the labels alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rectify.errors import InvalidArgumentError


def predicted(probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest label of each text, and the confidence in it.

    Args:
        probabilities: `[N, C]` of the C labels, which sum to 1; NaN where there is no answer.

    Returns:
        `[N]` int64 labels, −1 where there is no answer, and `[N]` float64 confidences in [0, 1], NaN there.
    """
    answered = ~np.isnan(probabilities).any(-1)
    filled = np.where(answered[:, None], probabilities, 0.0).astype(np.float64)
    return np.where(answered, filled.argmax(-1), -1), np.where(answered, filled.max(-1), np.nan)


def two_labels(positive: np.ndarray) -> np.ndarray:
    """The probabilities `[N, 2]` of no and yes, from those of yes, `[N]`; NaN stays."""
    positive = np.asarray(positive, dtype=np.float64)
    return np.stack((1 - positive, positive), -1)


def escalated(confidence: np.ndarray, threshold: float) -> np.ndarray:
    """Which texts the larger detector decides, `[N]` bool: those below the threshold, and those without an answer."""
    return ~(confidence >= threshold)


def least_confident(confidence: np.ndarray, share: float) -> np.ndarray:
    """The share of the texts that a small detector is least sure of, `[N]` bool: exactly `⌊share · N⌋` of them.

    Of texts with the same confidence, the first ones are taken.

    Raises:
        InvalidArgumentError: `share` is not from 0 to 1.
    """
    chosen = np.zeros(len(confidence), dtype=bool)
    chosen[_order(confidence)[: _count(share, len(confidence))]] = True
    return chosen


# ---------------------------------------------------------------------------------------------------------------------
# Thresholds


def threshold_for_budget(confidence: np.ndarray, share: float) -> float:
    """The highest threshold that leaves the larger detector no more than a share of the texts.

    A threshold cannot part texts with the same confidence: where there are ties, fewer are left to it, never more, save
    that texts without an answer are its in any case.

    Args:
        confidence: `[N]` of validation texts, NaN where there is no answer.
        share: from 0 to 1.

    Returns:
        The threshold: a confidence that occurs, −inf where only texts without an answer can be left to it, or inf where
        all can.

    Raises:
        InvalidArgumentError: there are no texts, or `share` is out of range.
    """
    _check(confidence)
    count = _count(share, len(confidence))
    ordered = np.sort(np.nan_to_num(confidence, nan=-np.inf))
    return float("inf") if count == len(ordered) else float(ordered[count])


def threshold_for_accuracy(
    confidence: np.ndarray, correct: np.ndarray, large_correct: np.ndarray, target: float
) -> float:
    """The lowest threshold at which the cascade is right on a share of validation texts.

    Args:
        confidence: `[N]` of the small detector, NaN where there is no answer.
        correct, large_correct: `[N]` bool, whether the small and the larger detector are right.
        target: the share of texts, from 0 to 1.

    Raises:
        InvalidArgumentError: there are no texts, the shapes differ, or no threshold reaches the target.
    """
    curve = accuracy_cost(confidence, correct, large_correct)
    reached = np.flatnonzero(curve.accuracy >= target)
    if not len(reached):
        best = curve.accuracy.max()
        raise InvalidArgumentError(
            f"target_accuracy is {target}, and no threshold reaches it, {best:.4f} being the most on these texts: give "
            f"{np.floor(best * 1e4) / 1e4:g} or less"
        )
    return float(curve.threshold[reached[0]])


# ---------------------------------------------------------------------------------------------------------------------
# Curves


@dataclass(frozen=True)
class Curve:
    """What each threshold comes to, from leaving the larger detector as little as possible to leaving it everything.

    Attributes:
        threshold: `[K]`, ascending: each confidence that occurs, then inf. The first leaves no text with an answer.
        escalated: `[K]` the share of the texts that the larger detector decides.
        accuracy: `[K]` the share on which the cascade is right.
        cost: `[K]` what a text costs on average, in units of the small detector's.
    """

    threshold: np.ndarray
    escalated: np.ndarray
    accuracy: np.ndarray
    cost: np.ndarray


def accuracy_cost(
    confidence: np.ndarray, correct: np.ndarray, large_correct: np.ndarray, large_cost: float = 1.0
) -> Curve:
    """Accuracy and cost of a cascade at every threshold.

    Args:
        confidence: `[N]` of the small detector, NaN where there is no answer.
        correct, large_correct: `[N]` bool, whether the small and the larger detector are right.
        large_cost: of the larger detector, in units of the small one's.

    Raises:
        InvalidArgumentError: there are no texts, or the shapes differ.
    """
    _check(confidence, correct, large_correct)
    order, starts, thresholds = _ranks(confidence)
    gains = np.concatenate(([0], np.cumsum(large_correct[order].astype(int) - correct[order].astype(int))))
    count = len(confidence)
    share = starts / count
    return Curve(thresholds, share, (correct.sum() + gains[starts]) / count, 1 + share * large_cost)


def risk_coverage(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How often the small detector errs on the texts that it keeps.

    Source: El-Yaniv and Wiener, "On the Foundations of Noise-free Selective Classification", JMLR 2010.

    Args:
        confidence: `[N]`, NaN where there is no answer; such texts are never kept.
        correct: `[N]` bool, whether it is right.

    Returns:
        `[K]` thresholds, descending, the `[K]` share of texts that each keeps, above 0, and the `[K]` share of these on
        which it errs.

    Raises:
        InvalidArgumentError: there are no texts, or the shapes differ.
    """
    _check(confidence, correct)
    order, starts, thresholds = _ranks(confidence)
    errors = np.concatenate(([0], np.cumsum(~correct[order].astype(bool))))
    kept = len(confidence) - starts
    some = kept > 0
    risk = (errors[-1] - errors[starts[some]]) / kept[some]
    return thresholds[some][::-1], kept[some][::-1] / len(confidence), risk[::-1]


def share_of_gain(accuracy: float, small: float, large: float) -> float:
    """How much of what always asking the larger detector gains a cascade reaches; NaN where that gains nothing."""
    return (accuracy - small) / (large - small) if large > small else float("nan")


def _order(confidence: np.ndarray) -> np.ndarray:
    return np.argsort(np.nan_to_num(confidence, nan=-np.inf), kind="stable")


def _ranks(confidence: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The texts by confidence, how many of them are below each threshold, and the thresholds."""
    order = _order(confidence)
    known = np.unique(confidence[~np.isnan(confidence)])
    unknown = np.isnan(confidence).sum()
    below = np.searchsorted(np.sort(confidence[~np.isnan(confidence)]), known, side="left")
    starts = np.concatenate((below + unknown, [len(confidence)]))
    return order, starts, np.concatenate((known, [np.inf]))


def _count(share: float, texts: int) -> int:
    if not 0 <= share <= 1:
        raise InvalidArgumentError(f"share is {share}: give a number from 0 to 1")
    return int(share * texts + 1e-9)  # so that 0.3 of 10 are 3


def _check(confidence: np.ndarray, *others: np.ndarray) -> None:
    shapes = [np.shape(each) for each in (confidence, *others)]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1 or not shapes[0][0]:
        raise InvalidArgumentError(f"the arrays have shapes {shapes}: give lists of one length, 1 or more")
