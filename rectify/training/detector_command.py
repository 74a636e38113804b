"""The command `rectify train detector`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from transformers import TrainingArguments

from rectify.command_line import execute, say
from rectify.dataclass_parser import DataclassParser
from rectify.splits import Split, split_by_hash, split_of
from rectify.text_files import TEXT_COLUMN, labelled_rows, one_a_file
from rectify.training.detector import DetectorSettings, train_detector
from rectify.training.plots import plot_detector
from rectify.training.running import RESULTS_FILE

DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-4,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "warmup_steps": 0.05,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "logging_steps": 0.05,
    "train_sampling_strategy": "group_by_length",
    "dataloader_pin_memory": False,
    "report_to": "none",
}
"""The flags of `transformers.TrainingArguments` that have another default in trainings of classifiers."""


class SourcedText(NamedTuple):
    """A text, how toxic it is from 0 (clean) to 1, and the data that it is from."""

    text: str
    label: float
    source: str


@dataclass
class LeftOut:
    """How many rows are not used, and why.

    Attributes:
        blank: without a word.
        first_blank: where the first of them is.
        unlabelled: as `label_values` say.
        test: of the fixed test part.
        votes: joined with an earlier row of the same text.
    """

    blank: int = 0
    first_blank: str = ""
    unlabelled: int = 0
    test: int = 0
    votes: int = 0

    def __str__(self) -> str:
        parts = [f"{self.blank} blank ones left out" + (f" (the first: {self.first_blank})" if self.blank else "")]
        parts += [f"{self.votes} joined with others of the same text"] * bool(self.votes)
        parts += [f"{self.unlabelled} left out by label_values"] * bool(self.unlabelled)
        parts += [f"{self.test} of the fixed test part left out"] * bool(self.test)
        return ", ".join(parts)


@dataclass
class DetectorFiles:
    """What a detector is trained on; each field is a flag of `rectify train detector`."""

    train_files: list[str] = field(metadata={"help": "labelled texts: .csv, .tsv or JSON-lines files"})
    validation_files: list[str] = field(default_factory=list, metadata={"help": "as train_files, for validation"})
    validation_share: float = field(
        default=0.1,
        metadata={"help": "without validation_files and fixed_split: the share of texts, by hash, for validation"},
    )
    fixed_split: bool = field(
        default=False,
        metadata={
            "help": "leave the texts of the fixed test part out, a tenth by hash; without validation_files, another "
            "tenth, the fixed validation part, validates"
        },
    )
    text_column: list[str] = field(
        default_factory=lambda: [TEXT_COLUMN],
        metadata={"help": "given once, or once for each training and then each validation file"},
    )
    label_column: list[str] = field(
        default_factory=lambda: ["label"],
        metadata={
            "help": "as text_column; labels are 0, 1, true, false, or numbers between; a+b+c is the mean of several "
            "annotators' columns"
        },
    )
    label_values: list[str] = field(
        default_factory=lambda: [""],
        metadata={
            "help": "as text_column, what other labels mean: hate=1,noHate=0,unclear= (which leaves the last out)"
        },
    )
    sources: list[str] = field(
        default_factory=list,
        metadata={"help": "what data each file is of, once for all or once for each (default: the files' names)"},
    )
    join_votes: bool = field(
        default=False,
        metadata={"help": "rows of one text and source are votes: make them one row with their mean label"},
    )

    def read(self) -> tuple[list[SourcedText], list[SourcedText], LeftOut]:
        """Texts for training, texts for validation, and what was left out.

        Raises:
            InvalidArgumentError, TrajectoryError: a flag, a file, or a line of one cannot be used.
        """
        files = [*self.train_files, *self.validation_files]
        columns = [
            one_a_file(name, getattr(self, name), len(files))
            for name in ("text_column", "label_column", "label_values")
        ]
        sources = one_a_file("sources", self.sources or [Path(file).stem for file in files], len(files))
        left_out = LeftOut()
        parts: tuple[list[SourcedText], list[SourcedText]] = ([], [])
        for index, (file, source, *how) in enumerate(zip(files, sources, *columns, strict=True)):
            parts[index >= len(self.train_files)].extend(_file_rows(file, source, how, left_out))
        if self.join_votes:
            parts = (_joined(parts[0], left_out), _joined(parts[1], left_out))
        train, held = parts
        if self.fixed_split:
            train, held = self._fixed_parts(train, held, left_out)
        elif not self.validation_files:
            train, held = split_by_hash(train, self.validation_share, lambda row: row.text)
        return train, held, left_out

    def _fixed_parts(
        self, train: list[SourcedText], held: list[SourcedText], left_out: LeftOut
    ) -> tuple[list[SourcedText], list[SourcedText]]:
        parts: dict[Split, list[SourcedText]] = {"train": [], "validation": [], "test": []}
        for row in train:
            parts[split_of(row.text)].append(row)
        kept = [row for row in held if split_of(row.text) != "test"]
        left_out.test = len(parts["test"]) + len(held) - len(kept)
        if self.validation_files:
            return parts["train"] + parts["validation"], kept
        return parts["train"], parts["validation"]


def _file_rows(file: str, source: str, how: Sequence[str], left_out: LeftOut) -> Iterator[SourcedText]:
    for place, text, label in labelled_rows(file, *how):
        if not text.strip():
            left_out.blank += 1
            left_out.first_blank = left_out.first_blank or place
        elif label is None:
            left_out.unlabelled += 1
        else:
            yield SourcedText(text, label, source)


def _joined(rows: Sequence[SourcedText], left_out: LeftOut) -> list[SourcedText]:
    """One row for each text of a source, with the mean of its labels, where the first of them was."""
    votes: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        votes.setdefault((row.text, row.source), []).append(row.label)
    left_out.votes += len(rows) - len(votes)
    return [SourcedText(text, fmean(labels), source) for (text, source), labels in votes.items()]


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
    train, held, left_out = files.read()
    say(f"texts: {len(train)} for training, {len(held)} for validation, {left_out}")
    record = train_detector(settings, training, train, held).config.training
    sources = record["sources"] if len(record["sources"]) > 1 else {}
    for name, found in {"all validation texts": record, **sources}.items():
        figures = ", ".join(f"{figure} {value:.4g}" for figure, value in found["validation"].items())
        calibrated = found.get("calibrated", {})
        after = [f"{figure} {calibrated[figure]:.4g}" for figure in ("ece", "brier") if figure in calibrated]
        say(f"{name}: {figures}" + (f"; calibrated: {', '.join(after)}" if after else ""))
    if curves := draw_training(training):
        say(f"curves: {curves}")
    say(f"classifier: saved in {training.output_dir}; use it as --scorer detector:{training.output_dir}")


def draw_training(training: TrainingArguments) -> Path | None:
    """Draw what `all_results.json` says of a training; returns the picture, or `None` where nothing can be drawn."""
    folder = Path(str(training.output_dir))
    history = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))["history"]
    return folder / "training.png" if plot_detector(history, folder / "training.png") else None


def main(argv: list[str] | None = None, prog: str = "rectify train detector") -> int:
    """The command; returns its exit code."""
    return execute(run, make_parser(prog), argv, extras=["train"])
