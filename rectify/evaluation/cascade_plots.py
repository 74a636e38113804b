"""Pictures of a cascade; they need matplotlib, the extra `[plots]`."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from rectify.detectors.cascade import Curve, risk_coverage
from rectify.errors import install_line
from rectify.evaluation.plotting import can_plot

logger = logging.getLogger(__name__)


def draw_curves(
    confidence: np.ndarray, correct: np.ndarray, curve: Curve, share: float | None, path: Path
) -> Path | None:
    """Draw risk against coverage of the small detector, and accuracy against cost of the cascade.

    Args:
        confidence: `[N]` of the small detector, NaN where there is no answer.
        correct: `[N]` bool, whether it is right.
        curve: of the cascade.
        share: of the texts that the larger detector decides at the chosen threshold, if one is chosen.
        path: PNG to be written.

    Returns:
        The picture; `None` without matplotlib.
    """
    if not can_plot():
        logger.info("no curves are drawn without matplotlib: %s", install_line("plots"))
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _, coverage, risk = risk_coverage(confidence, correct)
    left.plot(coverage, risk, color="#0072B2")
    left.set(xlabel="share of texts that the small detector keeps", ylabel="share of these where it errs", xlim=(0, 1))
    right.plot(curve.cost, curve.accuracy, color="#0072B2")
    right.set(xlabel="cost per text, in the small detector's", ylabel="accuracy of the cascade")
    if share is not None:
        left.axvline(1 - share, color="#D55E00", linestyle=":")
        right.axvline(np.interp(share, curve.escalated, curve.cost), color="#D55E00", linestyle=":")
    for axes in (left, right):
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=120)
    return path
