"""The command `train_q.py` / `rectify train q`: trajectories in, a dead-end Q network out."""

from __future__ import annotations

import logging
import shlex
from typing import Any

from transformers import TrainingArguments

from rectify.command_line import execute, say
from rectify.dataclass_parser import DataclassParser
from rectify.training.q_arguments import DataArguments, LossArguments, ModelArguments

# those of the flags of transformers.TrainingArguments that have another default here
_DEFAULTS: dict[str, Any] = {
    "learning_rate": 3e-4,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 64,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 50,
    "train_sampling_strategy": "group_by_length",
    "dataloader_pin_memory": False,
}


def main(argv: list[str] | None = None, prog: str = "train_q.py") -> int:
    """Run the command. Returns the exit code."""
    types: Any = (ModelArguments, DataArguments, LossArguments, TrainingArguments)
    parser = DataclassParser(
        types,
        prog=prog,
        allow_abbrev=False,
        description="Train a dead-end Q network on trajectories. Flags not listed first are those of "
        "transformers.TrainingArguments; run again after an interruption, it goes on where it was.",
    )
    parser.set_defaults(**_DEFAULTS)
    return execute(_run, parser, argv, extras=["train"])


def _run(parsed: tuple[Any, ...]) -> None:
    from rectify.training.q_strength import generating_model
    from rectify.training.q_training import train_q_network

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    figures = train_q_network(*parsed)
    for name in ("eval_loss", "eval_auc_25", "eval_auc_50", "eval_auc_75", "eval_auc_100", "eval_brier",
                 "eval_brier_constant", "eval_calibration_error"):  # fmt: skip
        if name in figures:
            say(f"{name.removeprefix('eval_'):<18} {figures[name]}")
    if figures.get("warning"):
        say(f"warning: {figures['warning']}")
    if strength := figures.get("strength"):
        say(
            f"strength: beta {strength['beta']:g}, stored as the network's default: "
            f"{strength['clean_perplexity_ratio']} times the perplexity of {strength['texts']} clean texts under "
            f"{strength['model']!r}"
        )
    elif "no_strength" in figures:
        say(f"strength: none chosen: {figures['no_strength']}")
    folder, name = str(parsed[-1].output_dir), parsed[0].strength_model
    model = name if name not in (None, "none") else generating_model(parsed[1].train_file, parsed[0].model_name_or_path)
    command = shlex.join(["rectify", "generate", "--model", model, "--rectify", "--q", folder])
    say(f"saved to {folder}; to use it: {command}")
