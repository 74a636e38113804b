"""Whether predicted probabilities are what is observed: numpy arrays in, numbers out.

AUC and Brier scores come from scikit-learn, which the extra `train` brings.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rectify.errors import InvalidArgumentError
from rectify.extras import need_extra


@dataclass(frozen=True)
class Calibration:
    """How well probabilities predict labels.

    Attributes:
        count: how many predictions.
        base_rate: share of positive labels, 0 to 1.
        auc: area under the ROC curve, 0 to 1; NaN where all labels are alike.
        brier: mean squared error of the probabilities.
        brier_constant: that of always predicting the base rate, `r·(1 − r)`.
        ece: expected calibration error, 0 to 1.
    """

    count: int
    base_rate: float
    auc: float
    brier: float
    brier_constant: float
    ece: float


def reliability(
    probability: np.ndarray, label: np.ndarray, bins: int = 10
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The points of a reliability diagram, over equal-width bins of the probability.

    Args:
        probability: `[N]` predictions in [0, 1].
        label: `[N]` in [0, 1], soft or hard.
        bins: how many; bin `i` holds probabilities from `i/bins` up to, not including, `(i + 1)/bins`, and the last
            one holds 1 too.

    Returns:
        `(mean_predicted, observed, count)`, each `[bins]`, float64, float64 and int64: the mean probability and the
        mean label of each bin, NaN where it is empty, and its size.

    Raises:
        InvalidArgumentError: nothing is given, the shapes differ, a probability or a label is out of range, or `bins`
            is under 1.
    """
    probability, label = _checked(probability, label)
    if bins < 1:
        raise InvalidArgumentError(f"bins is {bins}: give 1 or more")
    # i/bins as a caller would write it: np.linspace puts the third of ten at 0.30000000000000004
    edges = np.arange(bins + 1) / bins
    place = np.clip(np.searchsorted(edges, probability, side="right") - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean_predicted = np.bincount(place, probability, bins) / count
        observed = np.bincount(place, label, bins) / count
    return mean_predicted, observed, count


def expected_calibration_error(probability: np.ndarray, label: np.ndarray, bins: int = 10) -> float:
    """`Σ count/N · |observed − mean predicted|` over equal-width bins, from 0 to 1; arguments as in `reliability`.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    mean_predicted, observed, count = reliability(probability, label, bins)
    filled = count > 0
    return float((count * np.abs(observed - mean_predicted))[filled].sum() / count.sum())


def calibration(probability: np.ndarray, label: np.ndarray, bins: int = 10) -> Calibration:
    """AUC, Brier scores and calibration error of predictions.

    Arguments and errors as in `reliability`, but labels are 0 and 1.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    need_extra("train")
    from sklearn.metrics import brier_score_loss, roc_auc_score

    ece = expected_calibration_error(probability, label, bins)
    probability, label = _checked(probability, label)
    if not np.isin(label, (0, 1)).all():
        raise InvalidArgumentError(f"label holds {label[~np.isin(label, (0, 1))][0]}: give 0 and 1")
    rate = float(label.mean())
    return Calibration(
        count=len(label),
        base_rate=rate,
        auc=float(roc_auc_score(label, probability)) if 0 < rate < 1 else float("nan"),
        brier=float(brier_score_loss(label, probability, pos_label=1)),
        brier_constant=rate * (1 - rate),
        ece=ece,
    )


def _checked(probability: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    probability, label = np.asarray(probability, dtype=np.float64), np.asarray(label, dtype=np.float64)
    if probability.ndim != 1 or probability.shape != label.shape or not probability.size:
        raise InvalidArgumentError(
            f"probability has shape {probability.shape}, label {label.shape}: give two lists of one length, 1 or more"
        )
    for name, values in (("probability", probability), ("label", label)):
        outside = values[~((values >= 0) & (values <= 1))]
        if outside.size:
            raise InvalidArgumentError(f"{name} holds {outside[0]}: give numbers from 0 to 1")
    return probability, label
