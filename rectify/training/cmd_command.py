"""The command `rectify train cmd`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from rectify.builders.cmd_records import ChainExample, read_records
from rectify.builders.selection import TRAIN, VALIDATION
from rectify.command_line import execute, say
from rectify.dataclass_parser import DataclassParser
from rectify.training import detector_command
from rectify.training.cmd import ChainSettings, train_chains

DEFAULTS: dict[str, Any] = {
    **detector_command.DEFAULTS,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 32,
    "warmup_steps": 0.03,
    "lr_scheduler_type": "cosine",
    "logging_steps": 20,
}
"""The flags of `transformers.TrainingArguments` that have another default in trainings on chains."""


@dataclass
class ChainFiles:
    """What is trained on; its field is a flag of `rectify train cmd`."""

    data_dir: str = field(metadata={"help": "folder of `rectify build cmd`"})

    def read(self) -> tuple[list[ChainExample], list[ChainExample]]:
        """The examples for training, and those for validation.

        Raises:
            TrajectoryError: a file, or a line of one, cannot be used.
        """
        train, held = (list(read_records(Path(self.data_dir) / name, ChainExample)) for name in (TRAIN, VALIDATION))
        return train, held


def make_parser(prog: str) -> DataclassParser:
    """The flags of the command: `ChainSettings`, `ChainFiles` and `transformers.TrainingArguments`."""
    types: Any = (ChainSettings, ChainFiles, TrainingArguments)
    parser = DataclassParser(
        types,
        prog=prog,
        description="Train a model to detoxify itself: a LoRA adapter, on the chains of `rectify build cmd`.",
        epilog="Use it as the method cmd:OUTPUT_DIR.",
        allow_abbrev=False,
    )
    parser.set_defaults(**DEFAULTS)
    return parser


def run(arguments: tuple[ChainSettings, ChainFiles, TrainingArguments]) -> None:
    """Run the command.

    Raises:
        RectifyError: something that was given cannot be used.
    """
    settings, files, training = arguments
    train, held = files.read()
    toxic = sum(example.masked is not None for example in train)
    say(f"chains: {len(train)} for training, {toxic} of them of toxic prompts, {len(held)} for validation")
    figures = train_chains(settings, training, train, held).training
    if figures["too_long"]:
        say(f"chains: {figures['too_long']} longer than {settings.max_length} tokens, left out")
    if "contrastive_active" in figures:
        of_toxic = figures.get("contrastive_active_toxic")
        more = "" if of_toxic is None else f", {of_toxic:.1%} of those of toxic prompts"
        say(f"contrastive term: active in {figures['contrastive_active']:.1%} of the examples{more}")
    say(
        f"adapter: saved in {training.output_dir}; {figures['nll']:.4g} nats a token of the validation chains, "
        f"{figures['base_nll']:.4g} before training; use it as cmd:{training.output_dir}"
    )


def main(argv: list[str] | None = None, prog: str = "rectify train cmd") -> int:
    """The command; returns its exit code."""
    return execute(run, make_parser(prog), argv)
