"""Recalibration of a trained Q network on rollouts: training texts are more toxic than what a model says by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from rectify.errors import InvalidArgumentError
from rectify.extras import need_extra
from rectify.heads import LowRankHead
from rectify.q_network import DeadEndQNetwork
from rectify.training.q_metrics import network_logits


def recalibrate(network: DeadEndQNetwork, items: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Fit scale and shift of the risk's logits to the outcome of rollouts (Platt scaling), and fold them into the head.

    The order of the risks, and so every AUC, stays.

    Returns:
        Scale and shift.

    Raises:
        InvalidArgumentError: the rollouts are all toxic or all harmless.
    """
    need_extra("train")
    from sklearn.linear_model import LogisticRegression

    rows, labels = network_logits(network, items)
    counted = ~np.isnan(rows)
    logits, toxic = rows[counted], np.broadcast_to(labels[:, None], rows.shape)[counted]
    if not len(toxic) or toxic.all() or not toxic.any():
        raise InvalidArgumentError("the calibration trajectories have only one outcome: give toxic and harmless ones")
    fitted = LogisticRegression(C=1e6).fit(logits[:, None], toxic)
    scale, shift = float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
    cast(LowRankHead, network.head).rescale(scale, shift)
    return scale, shift
