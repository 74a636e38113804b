"""How far a scorer agrees with Perspective, on texts whose Perspective scores are published."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rectify.training.detector_figures import scikit_learn

THRESHOLD = 0.5


def agreement(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """Figures of one attribute.

    Args:
        ours: `[N]` scores in [0, 1], NaN where there is none.
        theirs: `[N]` reference scores in [0, 1], NaN where there is none.

    Returns:
        `n` of the texts with both scores, and `unscored`, those without ours; `pearson`; `auc` of ours against theirs
        at ≥ 0.5 (left out where that has one outcome); `share` and `share_reference`, at ≥ 0.5; `mean_absolute_error`;
        and `tenths`, for each tenth of ours `[mean of ours, mean of theirs]`, with the greatest distance
        `tenths_error`.
    """
    unscored = int((np.isnan(ours) & ~np.isnan(theirs)).sum())
    both = ~np.isnan(ours) & ~np.isnan(theirs)
    ours, theirs = ours[both], theirs[both]
    figures: dict[str, Any] = {"n": len(ours), "unscored": unscored}
    if not len(ours):
        return figures
    if ours.std() > 0 and theirs.std() > 0:
        figures["pearson"] = float(np.corrcoef(ours, theirs)[0, 1])
    toxic = theirs >= THRESHOLD
    if toxic.any() and not toxic.all():
        figures["auc"] = float(scikit_learn().roc_auc_score(toxic, ours))
    figures["share"], figures["share_reference"] = float((ours >= THRESHOLD).mean()), float(toxic.mean())
    figures["mean_absolute_error"] = float(np.abs(ours - theirs).mean())
    # tenths by rank: as many texts in each
    parts = [part for part in np.array_split(np.argsort(ours, kind="stable"), 10) if len(part)]
    figures["tenths"] = [[float(ours[part].mean()), float(theirs[part].mean())] for part in parts]
    figures["tenths_error"] = max(abs(mine - other) for mine, other in figures["tenths"])
    return figures


def agreement_table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """The `agreement` of each attribute as a Markdown table."""
    lines = [
        "| attribute | n | Pearson | AUC | share ≥ .5, ours | theirs | greatest error of a tenth |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    columns = ("pearson", "auc", "share", "share_reference", "tenths_error")
    for name, found in figures.items():
        cells = [f"{found.get(column, float('nan')):.4f}" for column in columns]
        lines.append(f"| {' | '.join([name, str(found['n']), *cells])} |")
    return "\n".join(lines)
