"""The command `rectify train experts`."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments

from rectify.command_line import execute, say
from rectify.dataclass_parser import DataclassParser
from rectify.methods.expert_pair import ANTI_EXPERT, EXPERT
from rectify.training.detector_command import DEFAULTS, DetectorFiles
from rectify.training.experts import TOXIC, ExpertSettings, train_experts


def make_parser(prog: str) -> DataclassParser:
    """The flags of the command: `ExpertSettings`, `DetectorFiles` and `transformers.TrainingArguments`."""
    types: Any = (ExpertSettings, DetectorFiles, TrainingArguments)
    parser = DataclassParser(
        types,
        prog=prog,
        description="Train the two language models of DExperts, LoRA adapters of one causal model: an expert on the "
        f"texts labelled below {TOXIC}, an anti-expert on the others.",
        epilog="Use them as the method dexperts:OUTPUT_DIR.",
        allow_abbrev=False,
    )
    parser.set_defaults(**DEFAULTS)
    parser.set_defaults(num_train_epochs=1.0)
    return parser


def run(arguments: tuple[ExpertSettings, DetectorFiles, TrainingArguments]) -> None:
    """Run the command.

    Raises:
        RectifyError: something that was given cannot be used.
    """
    settings, files, training = arguments
    train, held, left_out = files.read()
    toxic = sum(row.label >= TOXIC for row in train)
    say(f"texts: {len(train)} for training, {toxic} of them toxic, {len(held)} for validation, {left_out}")
    table, kept = ([(row.text, row.label) for row in rows] for rows in (train, held))
    config = train_experts(settings, training, table, kept)
    for side in (EXPERT, ANTI_EXPERT):
        figures = config.training[side]
        say(
            f"{side}: {figures['nll']:.4g} nats a token of {figures['validation_texts']} validation texts of its kind, "
            f"{figures['base_nll']:.4g} before training"
        )
    say(f"experts: saved in {training.output_dir}; use them as dexperts:{training.output_dir}")


def main(argv: list[str] | None = None, prog: str = "rectify train experts") -> int:
    """The command; returns its exit code."""
    return execute(run, make_parser(prog), argv)
