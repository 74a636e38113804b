"""The command `rectify train moderation`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from rectify.command_line import execute, say
from rectify.dataclass_parser import DataclassParser
from rectify.errors import InvalidArgumentError
from rectify.training.detector_command import DEFAULTS, draw_training
from rectify.training.moderation import (
    JudgedPair,
    ModerationSettings,
    joined_votes,
    read_judged_pairs,
    split_by_prompt,
    train_moderation,
    without_prompts_of,
)


@dataclass
class ModerationFiles:
    """What a moderation is trained on; each field is a flag of `rectify train moderation`."""

    train_files: list[str] = field(
        metadata={
            "help": "records of BeaverTails' form: JSON lines, a JSON list, or NAME:SPLIT of a data set on the Hub, as "
            "PKU-Alignment/BeaverTails:330k_train"
        }
    )
    validation_files: list[str] = field(
        default_factory=list,
        metadata={"help": "as train_files, for validation; training pairs with one of their prompts are left out"},
    )
    validation_share: float = field(
        default=0.1, metadata={"help": "without validation_files: the share of prompts, by hash, for validation"}
    )
    soft_labels: bool = field(
        default=False,
        metadata={"help": "make one record of those of the same pair, with the share of annotators as its labels"},
    )

    def read(self) -> tuple[list[JudgedPair], list[JudgedPair], list[str]]:
        """Pairs for training, pairs for validation, and the categories; what is left out is said.

        Raises:
            InvalidArgumentError, TrajectoryError, RectifyError: a flag, a file, or a record of one cannot be used.
        """
        train, categories = read_judged_pairs(self.train_files)
        held, others = read_judged_pairs(self.validation_files)
        if held and set(others) != set(categories):
            raise InvalidArgumentError(
                f"train_files and validation_files differ in the category {min(set(others) ^ set(categories))!r}: give "
                "files of the same ones"
            )
        if held:
            kept = without_prompts_of(train, held)
            say(f"pairs: {len(train) - len(kept)} of train_files left out, as validation_files have their prompts")
            train = kept
        else:
            train, held = split_by_prompt(train, self.validation_share)
        if self.soft_labels:
            count = len(train) + len(held)
            train, held = joined_votes(train), joined_votes(held)
            say(f"pairs: {count - len(train) - len(held)} joined with others of the same question and answer")
        return train, held, categories


def make_parser(prog: str) -> DataclassParser:
    """The flags of the command: `ModerationSettings`, `ModerationFiles` and `transformers.TrainingArguments`."""
    types: Any = (ModerationSettings, ModerationFiles, TrainingArguments)
    parser = DataclassParser(
        types,
        prog=prog,
        description="Train a moderation of questions with their answers in categories of harm, on any backbone.",
        epilog="Use it as `rectify score --scorer moderation:OUTPUT_DIR`.",
        allow_abbrev=False,
    )
    parser.set_defaults(**DEFAULTS)
    return parser


def run(arguments: tuple[ModerationSettings, ModerationFiles, TrainingArguments]) -> None:
    """Run the command.

    Raises:
        RectifyError: something that was given cannot be used.
    """
    settings, files, training = arguments
    train, held, categories = files.read()
    prompts = len({row.prompt for row in held})
    say(f"pairs: {len(train)} for training, {len(held)} of {prompts} other prompts for validation")
    record = train_moderation(settings, training, train, held, categories).config.training
    say(f"pairs: {record['truncated']} cut to {settings.max_length} tokens")
    for name, figures in record["flagged"].items():
        shown = ", ".join(f"{figure} {value:.4g}" for figure, value in figures.items() if figure != "n")
        say(f"flagged, thresholds {name}: {shown}")
    for mean in ("macro", "micro"):
        shown = ", ".join(f"{figure} {value:.4g}" for figure, value in record["categories"][mean].items())
        say(f"categories, {mean}: {shown}")
    if curves := draw_training(training):
        say(f"curves: {curves}")
    say(f"moderation: saved in {training.output_dir}; use it as --scorer moderation:{training.output_dir}")


def main(argv: list[str] | None = None, prog: str = "rectify train moderation") -> int:
    """The command; returns its exit code."""
    return execute(run, make_parser(prog), argv, extras=["train"])
