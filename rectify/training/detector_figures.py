"""How good the probabilities of a classifier are: figures of each of its labels, over all texts and by source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rectify.evaluation.calibration import expected_calibration_error
from rectify.extras import need_extra

FIGURES = (
    "n",
    "toxic_share",
    "auc",
    "average_precision",
    "accuracy",
    "f1",
    "f1_macro",
    "brier",
    "brier_constant",
    "ece",
    "pearson",
)


def validation_figures(probability: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """How good probabilities are.

    Args:
        probability: `[N]` in [0, 1].
        label: `[N]` in [0, 1]; from 0.5 on, a text counts as toxic.

    Returns:
        `n`, `toxic_share`; `accuracy` and `f1` of the toxic class at 0.5; `auc`, `average_precision` and `f1_macro`,
        the mean of both classes' F1, left out where all texts count alike; against the labels as they are `brier`,
        `brier_constant`, that of their mean, `ece`, the expected calibration error over ten bins, and, where labels
        are soft, their correlation `pearson`.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    metrics = scikit_learn()
    probability, label = probability.astype(np.float64), label.astype(np.float64)
    toxic, said = label >= 0.5, probability >= 0.5
    figures: dict[str, float] = {"n": len(label), "toxic_share": float(toxic.mean())}
    if toxic.any() and not toxic.all():
        figures["auc"] = float(metrics.roc_auc_score(toxic, probability))
        figures["average_precision"] = float(metrics.average_precision_score(toxic, probability))
        figures["f1_macro"] = float(metrics.f1_score(toxic, said, average="macro"))
    figures["accuracy"] = float(metrics.accuracy_score(toxic, said))
    figures["f1"] = float(metrics.f1_score(toxic, said, zero_division=0.0))
    figures["brier"] = float(np.mean((probability - label) ** 2))
    figures["brier_constant"] = float(np.var(label))
    figures["ece"] = expected_calibration_error(probability, label)
    if ((label > 0) & (label < 1)).any() and np.std(label) > 0 and np.std(probability) > 0:
        figures["pearson"] = float(np.corrcoef(probability, label)[0, 1])
    return {name: figures[name] for name in FIGURES if name in figures}


def label_figures(labels: Sequence[str], probabilities: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """`validation_figures` of each label; the names of those of several labels begin with `LABEL/`.

    Args:
        labels: what the columns are.
        probabilities: `[N, L]` in [0, 1].
        truth: `[N, L]` in [0, 1], NaN where a label is not known.
    """
    figures: dict[str, float] = {}
    for place, label in enumerate(labels):
        known = ~np.isnan(truth[:, place])
        if known.any():
            prefix = "" if len(labels) == 1 else f"{label}/"
            found = validation_figures(probabilities[known, place], truth[known, place])
            figures |= {prefix + name: value for name, value in found.items()}
    return figures


def scikit_learn() -> Any:
    """`sklearn.metrics`.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    need_extra("train")
    from sklearn import metrics

    return metrics
