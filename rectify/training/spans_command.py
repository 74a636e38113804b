"""The command `rectify train spans`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from rectify.command_line import execute, say
from rectify.dataclass_parser import DataclassParser
from rectify.splits import split_of
from rectify.text_files import AnnotatedText, read_annotated_texts
from rectify.training import detector_command
from rectify.training.spans import SpanSettings, train_spans

DEFAULTS: dict[str, Any] = {
    **detector_command.DEFAULTS,
    "learning_rate": 1e-4,
    "per_device_train_batch_size": 16,
    "load_best_model_at_end": True,
    "metric_for_best_model": "character_f1",
}
"""The flags of `transformers.TrainingArguments` that have another default in trainings of span detectors."""


@dataclass
class SpanFiles:
    """What a span detector is trained on; each field is a flag of `rectify train spans`."""

    train_files: list[str] = field(
        metadata={"help": ".csv, .tsv or JSON lines of text and spans: characters [4, 5], or starts and ends [[4, 6]]"}
    )
    validation_files: list[str] = field(
        default_factory=list,
        metadata={"help": "as train_files (default: a tenth of train_files by hash; another tenth is held out)"},
    )

    def read(self) -> tuple[list[AnnotatedText], list[AnnotatedText], int]:
        """Texts for training, texts for validation, and how many were held out as the fixed split's test part.

        Raises:
            TrajectoryError: a file, or a line of one, cannot be used.
        """
        rows = read_annotated_texts(self.train_files)
        if self.validation_files:
            return rows, read_annotated_texts(self.validation_files), 0
        parts: dict[str, list[AnnotatedText]] = {"train": [], "validation": [], "test": []}
        for row in rows:
            parts[split_of(row.text)].append(row)
        return parts["train"], parts["validation"], len(parts["test"])


def make_parser(prog: str) -> DataclassParser:
    """The flags of the command: `SpanSettings`, `SpanFiles` and `transformers.TrainingArguments`."""
    types: Any = (SpanSettings, SpanFiles, TrainingArguments)
    parser = DataclassParser(
        types,
        prog=prog,
        description="Train a detector of toxic spans, on any causal or encoder backbone, whole or as a LoRA adapter.",
        allow_abbrev=False,
    )
    parser.set_defaults(**DEFAULTS)
    return parser


def run(arguments: tuple[SpanSettings, SpanFiles, TrainingArguments]) -> None:
    """Run the command.

    Raises:
        RectifyError: something that was given cannot be used.
    """
    settings, files, training = arguments
    train, held, left = files.read()
    say(f"texts: {len(train)} for training, {len(held)} for validation, {left} held out for a test")
    config = train_spans(settings, training, train, held).config
    f1 = config.training["validation"]["character_f1"]
    say(f"span detector: saved in {training.output_dir}; validation character F1 {f1:.4f} at {config.threshold:g}")


def main(argv: list[str] | None = None, prog: str = "rectify train spans") -> int:
    """The command; returns its exit code."""
    return execute(run, make_parser(prog), argv)
