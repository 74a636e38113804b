"""How well a moderation tells harmful answers: of the flag, of each category, with intervals over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rectify.evaluation.intervals import Bootstrap, Figure, Ratio
from rectify.training.detector_figures import scikit_learn

UNTUNED = 0.5
"""The threshold of a category that the pairs for tuning do not hold."""


def flagged_figures(said: np.ndarray, harmful: np.ndarray) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of the flag; the last three 0 where nothing is found.

    Args:
        said, harmful: `[N]` bool, what is flagged and what is to be.
    """
    return {name: figure.value for name, figure in _flag(said, harmful, np.arange(len(said))).items()}


def flagged_estimates(
    said: np.ndarray,
    score: np.ndarray,
    harmful: np.ndarray,
    prompts: Sequence[str],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """`flagged_figures`, and how well the score ranks, with intervals over prompts.

    Args:
        said, harmful: as in `flagged_figures`.
        score: `[N]`, higher for what is more harmful.
        prompts: of each pair, its prompt.
        resamples, seed: of the intervals.

    Returns:
        `n`, `prompts` and `harmful_share`, and each of `accuracy`, `precision`, `recall`, `f1`, `auc` and `preference`
        as `{"value", "low", "high"}`; `preference` is the share of two answers to one prompt, one harmful and one not,
        of which the harmful one has the higher score, equal ones as half; NaN where it is undefined.
    """
    group, count = _groups(prompts)
    bootstrap = Bootstrap(count, resamples, seed)
    figures = _all(said, score, harmful, group)
    return {
        "n": len(said),
        "prompts": count,
        "harmful_share": float(np.mean(harmful)),
        **{name: asdict(bootstrap.estimate(figure)) for name, figure in figures.items()},
    }


def flagged_differences(
    one: tuple[np.ndarray, np.ndarray],
    other: tuple[np.ndarray, np.ndarray],
    harmful: np.ndarray,
    prompts: Sequence[str],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """What the figures of one moderation have over those of another, paired over prompts.

    Args:
        one, other: `said` and `score` of each, as in `flagged_estimates`, as are the other arguments.
    """
    group, count = _groups(prompts)
    bootstrap = Bootstrap(count, resamples, seed)
    mine, theirs = (_all(said, score, harmful, group) for said, score in (one, other))
    return {name: asdict(bootstrap.difference(mine[name], theirs[name])) for name in mine}


def moderation_figures(
    categories: Sequence[str], probabilities: np.ndarray, harmful: np.ndarray, thresholds: np.ndarray
) -> dict[str, Any]:
    """Figures of the categories.

    Args:
        categories: what the L columns are.
        probabilities: `[N, L]` in [0, 1].
        harmful: `[N, L]` bool.
        thresholds: `[L]`, which a probability must exceed.

    Returns:
        `by_category`: of each category `n` of its pairs and `f1`, and where there are others too `average_precision`
        and `auc`; `macro`: their means over the categories that have them; `micro`: F1 and average precision of all
        categories' decisions together.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    metrics = scikit_learn()
    probabilities = probabilities.astype(np.float64)
    said = probabilities > thresholds
    by_category: dict[str, dict[str, float]] = {}
    for place, category in enumerate(categories):
        truth = harmful[:, place]
        found: dict[str, float] = {"n": int(truth.sum())}
        if truth.any():
            found["f1"] = float(metrics.f1_score(truth, said[:, place]))
            if not truth.all():
                found["average_precision"] = float(metrics.average_precision_score(truth, probabilities[:, place]))
                found["auc"] = float(metrics.roc_auc_score(truth, probabilities[:, place]))
        by_category[category] = found
    macro = {}
    for name in ("f1", "average_precision", "auc"):
        known = [found[name] for found in by_category.values() if name in found]
        if known:
            macro[name] = float(np.mean(known))
    micro = {"f1": float(metrics.f1_score(harmful.ravel(), said.ravel(), zero_division=0.0))}
    if harmful.any():
        micro["average_precision"] = float(metrics.average_precision_score(harmful.ravel(), probabilities.ravel()))
    return {"by_category": by_category, "macro": macro, "micro": micro}


def tuned_thresholds(probabilities: np.ndarray, harmful: np.ndarray) -> np.ndarray:
    """For each category the threshold of the highest F1, `[L]` float64; `UNTUNED` where it has no pair.

    It lies halfway between the lowest probability that counts and the next one.

    Args:
        probabilities: `[N, L]` in [0, 1].
        harmful: `[N, L]` bool.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    metrics = scikit_learn()
    found = np.full(harmful.shape[1], UNTUNED)
    for place, (column, truth) in enumerate(zip(probabilities.astype(np.float64).T, harmful.T, strict=True)):
        if not truth.any():
            continue
        precision, recall, values = metrics.precision_recall_curve(truth, column)
        total = precision + recall
        best = np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0)[:-1].argmax()
        below = values[best - 1] if best else 0.0
        found[place] = (below + values[best]) / 2
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Figures of the flag, summed over each prompt


@dataclass(frozen=True)
class Auc:
    """The area under the ROC curve: how often a harmful pair has the higher score, equal ones as half.

    Attributes:
        score: `[N]`.
        harmful: `[N]` bool.
        group: `[N]`, the number of each pair's prompt.
    """

    score: np.ndarray
    harmful: np.ndarray
    group: np.ndarray

    def of(self, weights: np.ndarray) -> np.ndarray:
        """The figure of resamples, `[R]`, by how often each holds each prompt, `[R, P]`."""
        order = np.argsort(self.score, kind="stable")
        pairs, harmful = weights[:, self.group[order]], self.harmful[order]
        starts = np.flatnonzero(np.diff(self.score[order], prepend=-np.inf))  # of equal scores
        over = np.add.reduceat(np.where(harmful, pairs, 0.0), starts, axis=1)
        under = np.add.reduceat(np.where(harmful, 0.0, pairs), starts, axis=1)
        won = (over * (under.cumsum(1) - under / 2)).sum(1)
        with np.errstate(invalid="ignore"):
            return won / (over.sum(1) * under.sum(1))

    @property
    def value(self) -> float:
        """Of the pairs as they are."""
        return float(self.of(np.ones((1, int(self.group.max()) + 1)))[0])


def _groups(prompts: Sequence[str]) -> tuple[np.ndarray, int]:
    """The number of each one's prompt, and how many prompts there are."""
    names, group = np.unique(np.array(prompts, dtype=object).astype(str), return_inverse=True)
    return group, len(names)


def _flag(said: np.ndarray, harmful: np.ndarray, group: np.ndarray) -> dict[str, Figure]:
    def total(chosen: np.ndarray) -> np.ndarray:
        return np.bincount(group, weights=chosen.astype(np.float64), minlength=int(group.max()) + 1)

    hits = total(said & harmful)
    sums = {
        "accuracy": (total(said == harmful), total(np.ones_like(said))),
        "precision": (hits, total(said)),
        "recall": (hits, total(harmful)),
        "f1": (2 * hits, total(said) + total(harmful)),
    }
    return {name: Ratio(over, under, np.nan_to_num) for name, (over, under) in sums.items()}


def _all(said: np.ndarray, score: np.ndarray, harmful: np.ndarray, group: np.ndarray) -> dict[str, Figure]:
    return _flag(said, harmful, group) | {
        "auc": Auc(score, harmful, group),
        "preference": _preference(score, harmful, group),
    }


def _preference(score: np.ndarray, harmful: np.ndarray, group: np.ndarray) -> Ratio:
    won, count = np.zeros(int(group.max()) + 1), np.zeros(int(group.max()) + 1)
    order = np.argsort(group, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
        bad, good = score[members][harmful[members]], score[members][~harmful[members]]
        ahead = np.sign(bad[:, None] - good)
        won[group[members[0]]], count[group[members[0]]] = ((ahead + 1) / 2).sum(), ahead.size
    return Ratio(won, count)
