"""How well detectors tell toxic texts from others: probabilities and labels in, figures with intervals out."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from rectify.evaluation.intervals import Bootstrap, Figure, accuracy, macro_f1

THRESHOLD = 0.5


def detector_figures(
    probability: np.ndarray, label: np.ndarray, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """The figures of one detector on the texts of one source.

    Args:
        probability: `[N]` of being toxic, NaN where there is none.
        label: `[N]` in [0, 1]; from 0.5 on, a text counts as toxic.
        resamples, seed: of the intervals, over texts.

    Returns:
        `n` and `unscored`; `f1_macro` and `accuracy`, each `{"value", "low", "high"}`; and the other figures of
        `rectify.training.detector_figures.validation_figures`.
    """
    from rectify.training.detector_figures import validation_figures

    known = ~np.isnan(probability)
    figures: dict[str, Any] = {"n": int(known.sum()), "unscored": int((~known).sum())}
    if not known.any():
        return figures
    probability, label = probability[known], label[known]
    bootstrap = Bootstrap(len(label), resamples, seed)
    figures |= {name: value for name, value in validation_figures(probability, label).items() if name not in figures}
    for name, figure in _figures(probability, label).items():
        figures[name] = asdict(bootstrap.estimate(figure))
    return figures


def detector_difference(
    probability: np.ndarray, other: np.ndarray, label: np.ndarray, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """What the macro F1 of a detector has over that of another, on the texts that both score, paired.

    Arguments as in `detector_figures`.

    Returns:
        `n`, and `value`, `low` and `high` of the difference.
    """
    known = ~np.isnan(probability) & ~np.isnan(other)
    mine, theirs = (_figures(each[known], label[known])["f1_macro"] for each in (probability, other))
    found = Bootstrap(int(known.sum()), resamples, seed).difference(mine, theirs)
    return {"n": int(known.sum()), **asdict(found)}


def _figures(probability: np.ndarray, label: np.ndarray) -> dict[str, Figure]:
    said, toxic = probability >= THRESHOLD, label >= THRESHOLD
    return {
        "f1_macro": macro_f1(said, toxic),
        "accuracy": accuracy(said, toxic),
    }
