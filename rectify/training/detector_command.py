"""The command `rectify train detector`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from rectify.command_line import DataclassParser, execute, say
from rectify.splits import split_by_hash
from rectify.text_files import TEXT_COLUMN, LabelledText, one_a_file, read_labelled_texts
from rectify.training.detector import DetectorSettings, train_detector

DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-4,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "warmup_steps": 0.05,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "train_sampling_strategy": "group_by_length",
    "dataloader_pin_memory": False,
    "report_to": "none",
}
"""The flags of `transformers.TrainingArguments` that have another default in trainings of classifiers."""


@dataclass
class DetectorFiles:
    """What a detector is trained on; each field is a flag of `rectify train detector`."""

    train_files: list[str] = field(metadata={"help": "labelled texts: .csv, .tsv or JSON-lines files"})
    validation_files: list[str] = field(default_factory=list, metadata={"help": "as train_files, for validation"})
    validation_share: float = field(
        default=0.1, metadata={"help": "without validation_files: the share of texts, by hash, kept for validation"}
    )
    text_column: list[str] = field(
        default_factory=lambda: [TEXT_COLUMN],
        metadata={"help": "given once, or once for each training and then each validation file"},
    )
    label_column: list[str] = field(
        default_factory=lambda: ["label"],
        metadata={"help": "as text_column; labels are 0, 1, true, false, or numbers between"},
    )

    def read(self) -> tuple[list[LabelledText], list[LabelledText], int]:
        """Texts for training, texts for validation, and how many blank ones were left out.

        Raises:
            InvalidArgumentError, TrajectoryError: a flag, a file, or a line of one cannot be used.
        """
        files = [*self.train_files, *self.validation_files]
        texts = one_a_file("text_column", self.text_column, len(files))
        labels = one_a_file("label_column", self.label_column, len(files))
        cut = len(self.train_files)
        train = read_labelled_texts(files[:cut], texts[:cut], labels[:cut])
        held = read_labelled_texts(files[cut:], texts[cut:], labels[cut:])
        count = len(train) + len(held)
        train, held = ([row for row in rows if row.text.strip()] for rows in (train, held))
        blank = count - len(train) - len(held)
        if not self.validation_files:
            train, held = split_by_hash(train, self.validation_share, lambda row: row.text)
        return train, held, blank


def make_parser(prog: str) -> DataclassParser:
    """The flags of the command: `DetectorSettings`, `DetectorFiles` and `transformers.TrainingArguments`."""
    types: Any = (DetectorSettings, DetectorFiles, TrainingArguments)
    parser = DataclassParser(
        types,
        prog=prog,
        description="Train a toxicity classifier: a LoRA adapter and a head on any causal or encoder backbone.",
        allow_abbrev=False,
    )
    parser.set_defaults(**DEFAULTS)
    return parser


def run(arguments: tuple[DetectorSettings, DetectorFiles, TrainingArguments]) -> None:
    """Run the command.

    Raises:
        RectifyError: something that was given cannot be used.
    """
    settings, files, training = arguments
    train, held, blank = files.read()
    say(f"texts: {len(train)} for training, {len(held)} for validation, {blank} blank ones left out")
    classifier = train_detector(settings, training, train, held)
    figures = classifier.config.training["validation"]
    said = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    say(f"classifier: saved in {training.output_dir}; on the validation texts: {said}")


def main(argv: list[str] | None = None, prog: str = "rectify train detector") -> int:
    """The command; returns its exit code."""
    return execute(run, make_parser(prog), argv)
