"""How good values are: does the risk predict the text's label, and is `1 + Q` a probability?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from transformers import EvalPrediction

from rectify.evaluation.calibration import expected_calibration_error
from rectify.heads import LowRankHead
from rectify.q_network import DeadEndQNetwork
from rectify.training.detector_figures import scikit_learn
from rectify.training.trajectory_data import collate

FRACTIONS = (25, 50, 75, 100)
_BATCH = 256


def value_metrics(risks: np.ndarray, toxic: np.ndarray) -> dict[str, float]:
    """Figures of the risks along finished texts.

    Args:
        risks: `[N, T]` risk `−Q` of each token, in [0, 1]; NaN where a token does not count.
        toxic: `[N]` bool, the text's label.

    Returns:
        `auc_25` … `auc_100`: area under the ROC curve of the risk after that share of each text's tokens;
        `auc_all_positions`; `brier`, and `brier_constant`, that of the base rate; `calibration_error` (10 bins) of
        `1 + Q` as survival probability. The AUC are left out where all texts have one label.
    """
    metrics = scikit_learn()
    counted = ~np.isnan(risks)
    kept = counted.any(-1)
    risks, counted, toxic = risks[kept], counted[kept], toxic[kept]
    lengths = counted.sum(-1)
    order = counted.cumsum(-1)
    labels = np.broadcast_to(toxic[:, None], risks.shape)[counted]
    figures: dict[str, float] = {"texts": float(len(risks)), "toxic_share": float(toxic.mean()) if len(toxic) else 0.0}
    if toxic.any() and not toxic.all():
        for percent in FRACTIONS:
            place = np.maximum(1, np.ceil(lengths * percent / 100)).astype(int)
            at = (counted & (order == place[:, None])).argmax(-1)
            figures[f"auc_{percent}"] = float(metrics.roc_auc_score(toxic, risks[np.arange(len(risks)), at]))
        figures["auc_all_positions"] = float(metrics.roc_auc_score(labels, risks[counted]))
    if len(labels):
        figures["brier"] = float(metrics.brier_score_loss(labels, risks[counted]))
        figures["brier_constant"] = float(labels.mean() * (1 - labels.mean()))
        figures["calibration_error"] = expected_calibration_error(risks[counted], labels)
    return figures


def compute_metrics(prediction: EvalPrediction) -> Mapping[str, float]:
    """`value_metrics` in the form that `transformers.Trainer` calls."""
    risks = np.asarray(prediction.predictions, dtype=np.float64)
    # the Trainer pads rows with −100, as the network's uncounted tokens already are
    return value_metrics(np.where(risks < 0, np.nan, risks), np.asarray(prediction.label_ids) <= -0.5)


@torch.no_grad()
def network_logits(network: DeadEndQNetwork, items: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """What a network says of trajectories.

    Args:
        network: the Q network; put in evaluation mode.
        items: as `TrajectoryDataset` holds them.

    Returns:
        `[N, T]` float64 logits of the risk of each token, NaN where it does not count, and `[N]` bool, whether the
        text ended toxic (a reward of −0.5 or less).
    """
    network.eval()
    head = cast(LowRankHead, network.head)
    logits = np.full((len(items), max((len(item["input_ids"]) for item in items), default=1)), np.nan)
    for start in range(0, len(items), _BATCH):
        batch = {name: part.to(network.device) for name, part in collate(items[start : start + _BATCH]).items()}
        hidden = network.encode(batch["input_ids"], batch["attention_mask"])
        rows = head.risk_logits(hidden[:, :-1], batch["input_ids"][:, 1:]).masked_fill(~batch["counted"][:, 1:], np.nan)
        logits[start : start + len(rows), 1 : 1 + rows.shape[1]] = rows.cpu().numpy()
    return logits, np.array([item["reward"] <= -0.5 for item in items], dtype=bool)


def network_risks(network: DeadEndQNetwork, items: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """As `network_logits`, with risks in [0, 1] in place of their logits."""
    logits, toxic = network_logits(network, items)
    return 1 / (1 + np.exp(-logits)), toxic
