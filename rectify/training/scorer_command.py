"""The command `rectify train scorer`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from rectify.command_line import execute, say
from rectify.dataclass_parser import DataclassParser
from rectify.errors import InvalidArgumentError
from rectify.scoring.score_tables import ScoredText, read_scored_texts
from rectify.scoring.scores import ATTRIBUTES
from rectify.splits import split_by_hash
from rectify.text_files import TEXT_COLUMN, one_a_file
from rectify.training.detector import DetectorSettings, train_detector
from rectify.training.detector_command import DEFAULTS, draw_training


@dataclass
class ScorerFiles:
    """What a scorer is trained on; each field is a flag of `rectify train scorer`."""

    train_files: list[str] = field(
        metadata={
            "help": "texts with scores: tables, RealToxicityPrompts records, or what `rectify score` wrote. The test "
            "part of RealToxicityPrompts, by the hash rule, is left out, and its validation part validates"
        }
    )
    validation_files: list[str] = field(
        default_factory=list, metadata={"help": "as train_files, for validation; all files are then used whole"}
    )
    validation_share: float = field(
        default=0.1, metadata={"help": "without validation_files: the share of other texts, by hash, for validation"}
    )
    text_column: list[str] = field(
        default_factory=lambda: [TEXT_COLUMN],
        metadata={"help": "given once, or once for each training and then each validation file"},
    )
    score_columns: list[str] = field(
        default_factory=list,
        metadata={"help": "COLUMN=ATTRIBUTE, where names of columns do not say what they score, as score=TOXICITY"},
    )
    attributes: list[str] = field(
        default_factory=list, metadata={"help": "what the scorer is to score (default: all that is in the files)"}
    )

    def read(self) -> tuple[list[ScoredText], list[ScoredText], list[str]]:
        """Texts for training, texts for validation, and the attributes; says what is left out.

        Raises:
            InvalidArgumentError, TrajectoryError: a flag, a file, or a line of one cannot be used.
        """
        for attribute in self.attributes:
            if attribute not in ATTRIBUTES:
                raise InvalidArgumentError(f"attributes holds {attribute!r}: give some of {', '.join(ATTRIBUTES)}")
        pairs = [entry.partition("=") for entry in self.score_columns]
        wrong = next((column + sign + name for column, sign, name in pairs if not (column and name)), None)
        if wrong is not None:
            raise InvalidArgumentError(f"score_columns holds {wrong!r}: give COLUMN=ATTRIBUTE, as score=TOXICITY")
        names = {column: attribute for column, _, attribute in pairs} or None
        columns = one_a_file("text_column", self.text_column, len(self.train_files) + len(self.validation_files))
        cut = len(self.train_files)
        train = list(read_scored_texts(self.train_files, columns[:cut], names))
        held = list(read_scored_texts(self.validation_files, columns[cut:], names))
        known = {attribute for row in train for attribute in row.scores}
        attributes = [name for name in ATTRIBUTES if name in (self.attributes or known)]
        lacking = next((name for name in attributes if name not in known), None if attributes else ATTRIBUTES[0])
        if lacking:
            raise InvalidArgumentError(
                f"train_files hold no score of {lacking}: say which column is one, as score_columns COLUMN={lacking}, "
                "or give other files or attributes"
            )
        count = len(train) + len(held)
        train, held = (
            [row for row in rows if row.text.strip() and any(name in row.scores for name in attributes)]
            for rows in (train, held)
        )
        say(f"texts: {count - len(train) - len(held)} that are blank or have no score are left out")
        if not self.validation_files:
            train, held = self._split(train)
        return train, held, attributes

    def _split(self, rows: Sequence[ScoredText]) -> tuple[list[ScoredText], list[ScoredText]]:
        test = sum(row.split == "test" for row in rows)
        if test:
            say(f"texts: {test} of RealToxicityPrompts' test part are left out")
        train, held = split_by_hash(
            [row for row in rows if row.split is None], self.validation_share, lambda row: row.text
        )
        train += [row for row in rows if row.split == "train"]
        held += [row for row in rows if row.split == "validation"]
        return train, held


def make_parser(prog: str) -> DataclassParser:
    """The flags of the command: `DetectorSettings`, `ScorerFiles` and `transformers.TrainingArguments`."""
    types: Any = (DetectorSettings, ScorerFiles, TrainingArguments)
    parser = DataclassParser(
        types,
        prog=prog,
        description="Train a scorer: a LoRA adapter and a head on any encoder or causal backbone, calibrated.",
        epilog="Use it as `rectify score --scorer detector:OUTPUT_DIR`.",
        allow_abbrev=False,
    )
    parser.set_defaults(**DEFAULTS, lora_r=32, lora_alpha=64, calibration="curve")
    parser.set_defaults(learning_rate=1e-3, num_train_epochs=4.0, weight_decay=0.01)
    return parser


def run(arguments: tuple[DetectorSettings, ScorerFiles, TrainingArguments]) -> None:
    """Run the command.

    Raises:
        RectifyError: something that was given cannot be used.
    """
    settings, files, training = arguments
    train, held, attributes = files.read()
    say(f"texts: {len(train)} for training, {len(held)} for validation; attributes {', '.join(attributes)}")
    table, kept = ([(row.text, row.row(attributes)) for row in rows] for rows in (train, held))
    classifier = train_detector(settings, training, table, kept, labels=attributes)
    figures = classifier.config.training["validation"]
    for name in ("pearson", "auc"):
        found = {key.rpartition("/")[0] or attributes[0]: value for key, value in figures.items() if key.endswith(name)}
        say(f"validation {name}: " + ", ".join(f"{attribute} {value:.4f}" for attribute, value in found.items()))
    if curves := draw_training(training):
        say(f"curves: {curves}")
    say(f"scorer: saved in {training.output_dir}; use it as --scorer detector:{training.output_dir}")


def main(argv: list[str] | None = None, prog: str = "rectify train scorer") -> int:
    """The command; returns its exit code."""
    return execute(run, make_parser(prog), argv, extras=["train"])
