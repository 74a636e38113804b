"""The command `rectify train gate`."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments

from rectify.command_line import execute, say
from rectify.dataclass_parser import DataclassParser
from rectify.training.detector_command import DEFAULTS, DetectorFiles
from rectify.training.gate import GateSettings, train_gate


def make_parser(prog: str) -> DataclassParser:
    """The flags of the command: `GateSettings`, `DetectorFiles` and `transformers.TrainingArguments`."""
    types: Any = (GateSettings, DetectorFiles, TrainingArguments)
    parser = DataclassParser(
        types,
        prog=prog,
        description="Train a gate that weights detectors of several platforms for each text, and save it with them as "
        "one detector.",
        epilog="Use it as `rectify score --scorer detector:OUTPUT_DIR`.",
        allow_abbrev=False,
    )
    parser.set_defaults(**DEFAULTS)
    parser.set_defaults(learning_rate=1e-2, num_train_epochs=20.0, per_device_train_batch_size=256)
    parser.set_defaults(train_sampling_strategy="random")
    return parser


def run(arguments: tuple[GateSettings, DetectorFiles, TrainingArguments]) -> None:
    """Run the command.

    Raises:
        RectifyError: something that was given cannot be used.
    """
    settings, files, training = arguments
    train, held, left_out = files.read()
    say(f"texts: {len(train)} for training, {len(held)} for validation, {left_out}")
    detector = train_gate(settings, training, train, held)
    figures = detector.gating.training["validation"]
    for source, found in figures["sources"].items():
        gates = ", ".join(f"{name} {value:.2f}" for name, value in found["gates"].items())
        say(f"{source}: mean gates {gates}")
        _say_table(source, found)
    if "source_accuracy" in figures:
        say(f"all: the source is told of {figures['source_accuracy']:.1%} of the texts")
    _say_table("all", figures)
    say(f"detector: saved in {training.output_dir}; use it as --scorer detector:{training.output_dir}")


def _say_table(source: str, figures: dict[str, Any]) -> None:
    for name, what in (("log_loss", "log loss"), ("f1_macro", "macro F1")):
        if name in figures:
            said = ", ".join(f"{detector} {value:.4f}" for detector, value in figures[name].items())
            say(f"{source}: {what} {said}")


def main(argv: list[str] | None = None, prog: str = "rectify train gate") -> int:
    """The command; returns its exit code."""
    return execute(run, make_parser(prog), argv, extras=["train"])
