"""Training of the pocket Q network: a LoRA adapter on the pocket language model and a low-rank head."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from rectify.pocket.language_model import training_arguments
from rectify.q_network import CONFIG_FILE, DeadEndQNetwork
from rectify.quiet_peft import PeftModel
from rectify.training.q_arguments import DataArguments, LossArguments, ModelArguments
from rectify.training.q_training import train_q_network

logger = logging.getLogger(__name__)

OWN: dict[str, Any] = {"rank": 64, "mlp_size": 256, "lora_r": 16}
SHARED: dict[str, Any] = {"trunk": "shared", "rank": 96, "mlp_size": 512}


def train_pocket_q(
    language_model: Path,
    train: Sequence[Path],
    rollouts: Sequence[Path],
    output: Path,
    epochs: float,
    seed: int,
    shared: bool = False,
) -> None:
    """Train on trajectory files, recalibrate on validation rollouts, and save in bfloat16 under `output`.

    The trunk is recorded as the bundled `"pocket"`; a shared one stays as it is.
    """
    network_of = SHARED if shared else OWN
    work = output.with_name(output.name + ".work")
    held = [str(path) for path in rollouts]
    if not (work / CONFIG_FILE).exists():
        figures = train_q_network(
            ModelArguments(str(language_model), **network_of),
            DataArguments(
                train_file=[str(path) for path in train], validation_file=held, calibration_file=held, block_size=256
            ),
            LossArguments(td_lambda=0.9),
            training_arguments(
                work,
                seed=seed,
                learning_rate=2e-3,
                weight_decay=0.01,
                num_train_epochs=epochs,
                per_device_train_batch_size=96,
                per_device_eval_batch_size=256,
                eval_steps=500,
                save_steps=250,
                train_sampling_strategy="group_by_length",
            ),
        )
        logger.info("Q network: %s", figures)
    network = DeadEndQNetwork.from_pretrained(work, is_trainable=True)
    network.config.base_model = "pocket"
    if not shared:
        cast(PeftModel, network.trunk).peft_config["default"].base_model_name_or_path = "pocket"
    network.config.training = {
        name: value for name, value in network.config.training.items() if not name.endswith(("_file", "_path"))
    }
    network.to(torch.bfloat16).save_pretrained(output)
