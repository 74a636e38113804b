"""Pictures of a training; they need matplotlib, the extra `[plots]`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rectify.evaluation.calibration import reliability
from rectify.evaluation.plotting import can_plot

logger = logging.getLogger(__name__)


def plot_training(history: Sequence[dict[str, Any]], risks: np.ndarray, toxic: np.ndarray, path: Path) -> bool:
    """Draw the loss curves and the calibration of `1 + Q` as survival probability.

    Args:
        history: the Trainer's log.
        risks: `[N, T]` risk of each token, NaN where it does not count.
        toxic: `[N]` bool.
        path: PNG to be written.

    Returns:
        Whether it was drawn; not without matplotlib.
    """
    if not can_plot():
        logger.info("no curves are drawn without matplotlib: pip install 'rectify[plots]'")
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    curves, calibration = figure.subplots(1, 2)
    for name, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        curves.plot(*zip(*points, strict=True) if points else ((), ()), marker=".", label=label)
    curves.set(xlabel="step", ylabel="TD loss")
    curves.legend()
    counted = ~np.isnan(risks)
    labels = np.broadcast_to(~toxic[:, None], risks.shape)[counted]
    predicted, observed, count = reliability(1 - risks[counted], labels, 10)
    shown = count > 0
    calibration.plot((0, 1), (0, 1), color="0.8")
    calibration.plot(predicted[shown], observed[shown], marker="o")
    calibration.set(xlabel="survival probability 1 + Q", ylabel="share that survived", xlim=(0, 1), ylim=(0, 1))
    figure.savefig(path, dpi=120)
    return True
