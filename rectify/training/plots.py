"""Pictures of a training; they need matplotlib, the extra `[plots]`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rectify.errors import install_line
from rectify.evaluation.calibration import reliability
from rectify.evaluation.plotting import can_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
    if not _can_plot():
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    curves, calibration = figure.subplots(1, 2)
    _plot_loss(curves, history, "TD loss")
    counted = ~np.isnan(risks)
    labels = np.broadcast_to(~toxic[:, None], risks.shape)[counted]
    predicted, observed, count = reliability(1 - risks[counted], labels, 10)
    shown = count > 0
    calibration.plot((0, 1), (0, 1), color="0.8")
    calibration.plot(predicted[shown], observed[shown], marker="o")
    calibration.set(xlabel="survival probability 1 + Q", ylabel="share that survived", xlim=(0, 1), ylim=(0, 1))
    figure.savefig(path, dpi=120)
    return True


def plot_detector(history: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draw the loss curves of a classifier, and how its AUC on the validation texts went.

    Args:
        history: the Trainer's log, `history` in `all_results.json`.
        path: PNG to be written.

    Returns:
        Whether it was drawn; not without matplotlib.
    """
    if not _can_plot():
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    curves, areas = figure.subplots(1, 2)
    _plot_loss(curves, history, "cross-entropy")
    for name in dict.fromkeys(name for entry in history for name in entry if name.endswith("auc")):
        label = name.removeprefix("eval_").rpartition("/")[0]
        _plot_figure(areas, history, name, label)
    areas.set(xlabel="step", ylabel="AUC, validation")
    if len(areas.lines) > 1:
        areas.legend()
    figure.savefig(path, dpi=120)
    return True


def _can_plot() -> bool:
    if not can_plot():
        logger.info("no curves are drawn without matplotlib: %s", install_line("plots"))
    return can_plot()


def _plot_loss(axes: Axes, history: Sequence[dict[str, Any]], what: str) -> None:
    for name, label in (("loss", "training"), ("eval_loss", "validation")):
        _plot_figure(axes, history, name, label)
    axes.set(xlabel="step", ylabel=what)
    if axes.lines:
        axes.legend()


def _plot_figure(axes: Axes, history: Sequence[dict[str, Any]], name: str, label: str) -> None:
    points = [(entry["step"], entry[name]) for entry in history if name in entry]
    if points:
        axes.plot(*zip(*points, strict=True), marker=".", label=label)
