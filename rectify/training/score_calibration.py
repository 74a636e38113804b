"""Calibration of a classifier's probabilities to the labels of held-out texts."""

from __future__ import annotations

from typing import Any

import numpy as np

from rectify.extras import need_extra

_KNOTS = np.linspace(0, 1, 41)
_LOG_TEMPERATURES = tuple(np.log((0.1, 100)))


def calibration_curve(probability: np.ndarray, label: np.ndarray) -> list[list[float]]:
    """A logistic curve, quadratic in the logit, as the knots of a piecewise linear map.

    With three parameters it errs less on a thousand texts than an isotonic fit, which follows their noise.

    Args:
        probability: `[N]` in [0, 1].
        label: `[N]` in [0, 1], soft or hard.

    Returns:
        `[probabilities, calibrated ones]`, both ascending, the first from 0 to 1, for `numpy.interp`.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    curve = _model()
    given, wanted = probability.astype(np.float64), label.astype(np.float64)
    # a share of each text is toxic, the rest of it is not
    outcomes, shares = np.repeat((True, False), len(given)), np.concatenate((wanted, 1 - wanted))
    counted = shares > 0
    if len(set(outcomes[counted])) < 2:  # all labels are 0, or all are 1: nothing can be learnt of the scale
        return [[0.0, 1.0], [0.0, 1.0]]
    curve.fit(np.tile(given, 2)[counted, None], outcomes[counted], logisticregression__sample_weight=shares[counted])
    knots = np.unique(np.quantile(given, _KNOTS).round(5))
    values = np.maximum.accumulate(curve.predict_proba(knots[:, None])[:, 1]).round(5)
    return [[0.0, *knots.tolist(), 1.0], [float(values[0]), *values.tolist(), float(values[-1])]]


def calibration_temperature(logit: np.ndarray, label: np.ndarray) -> float:
    """The temperature `T` by which `sigmoid(logit / T)` predicts the labels with the least log loss.

    It changes neither order nor what is above 0.5, and with its one parameter it cannot follow the noise of few texts.
    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.

    Args:
        logit: `[N]`, or `[N, L]` logits of L labels of which each text has one, for `softmax(logit / T)`.
        label: as `logit`, in [0, 1], soft or hard; of L labels, rows of sum 1.

    Returns:
        From 0.1, where separable labels end, to 100; 1 where all labels are 0, or all are 1, which say nothing of the
        scale.

    Raises:
        MissingExtraError: scikit-learn, and scipy with it, is not installed.
    """
    need_extra("train")
    from scipy.optimize import minimize_scalar

    logit, label = logit.astype(np.float64), label.astype(np.float64)
    if (label == 0).all() or (label == 1).all():
        return 1.0

    def loss(log_temperature: float) -> float:
        scaled = logit / np.exp(log_temperature)
        if scaled.ndim == 2:
            return float(np.mean(np.logaddexp.reduce(scaled, axis=-1) - (label * scaled).sum(-1)))
        return float(np.mean(np.logaddexp(0, scaled) - label * scaled))

    # the loss is convex in 1 / T, and so has one minimum in log T
    found = minimize_scalar(loss, bounds=_LOG_TEMPERATURES, method="bounded", options={"xatol": 1e-6})
    return round(float(np.exp(found.x)), 5)


def _model() -> Any:
    need_extra("train")
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, PolynomialFeatures

    return make_pipeline(
        FunctionTransformer(_logit), PolynomialFeatures(2, include_bias=False), LogisticRegression(C=1e6)
    )


def _logit(probability: np.ndarray) -> np.ndarray:
    inside = probability.clip(1e-4, 1 - 1e-4)
    return np.log(inside / (1 - inside))
