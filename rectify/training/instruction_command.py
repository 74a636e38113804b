"""The command `rectify train instruction`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from rectify.command_line import execute, say
from rectify.dataclass_parser import DataclassParser
from rectify.errors import InvalidArgumentError
from rectify.splits import split_by_hash
from rectify.text_files import TEXT_COLUMN, one_a_file
from rectify.training.detector_command import DEFAULTS
from rectify.training.instruction import InstructionSettings, train_instruction
from rectify.training.instruction_rows import (
    Read,
    asked_otherwise,
    read_instruction_rows,
    with_instruction,
    without_texts_of,
)


@dataclass
class InstructionFiles:
    """What a detector is trained on; each field is a flag of `rectify train instruction`."""

    train_files: list[str] = field(
        metadata={"help": "tables with text and label, Alpaca records, or ready texts: .json, .jsonl, .csv, .tsv"}
    )
    rationale_files: list[str] = field(
        default_factory=list, metadata={"help": "as train_files, with rationales: what the first stage learns"}
    )
    validation_files: list[str] = field(default_factory=list, metadata={"help": "as train_files, for validation"})
    validation_share: float = field(
        default=0.1, metadata={"help": "without validation_files: the share of train_files' texts, by hash, for it"}
    )
    text_column: list[str] = field(
        default_factory=lambda: [TEXT_COLUMN],
        metadata={"help": "given once, or once for each training, then rationale, then validation file"},
    )
    label_column: list[str] = field(default_factory=lambda: ["label"], metadata={"help": "as text_column"})
    label_classes: str = field(
        default="", metadata={"help": "what labels mean: 0=hate,1=offensive,2=neutral,3= (which leaves the last out)"}
    )
    answer_marker: str = field(
        default="### Assistant:", metadata={"help": "what stands between question and answer in a ready text"}
    )


def make_parser(prog: str) -> DataclassParser:
    """The flags of the command: `InstructionSettings`, `InstructionFiles` and `transformers.TrainingArguments`."""
    types: Any = (InstructionSettings, InstructionFiles, TrainingArguments)
    parser = DataclassParser(
        types,
        prog=prog,
        description="Train a causal language model, by a LoRA adapter, to answer a question about a text with its "
        "label, or with an explanation and its label; from rationales first, where there are any.",
        epilog="Use it as the detector, or scorer, instruction:OUTPUT_DIR.",
        allow_abbrev=False,
    )
    parser.set_defaults(**DEFAULTS)
    return parser


def run(arguments: tuple[InstructionSettings, InstructionFiles, TrainingArguments]) -> None:
    """Run the command.

    Raises:
        RectifyError: something that was given cannot be used.
    """
    settings, files, training = arguments
    template = settings.chosen_template
    kinds = {"train": files.train_files, "rationale": files.rationale_files, "validation": files.validation_files}
    every = [file for paths in kinds.values() for file in paths]
    texts = one_a_file("text_column", files.text_column, len(every))
    labels = one_a_file("label_column", files.label_column, len(every))
    parts: dict[str, Read] = {}
    for kind, paths in kinds.items():
        start = sum(len(kinds[earlier]) for earlier in parts)
        some = slice(start, start + len(paths))
        parts[kind] = read_instruction_rows(
            paths, template, texts[some], labels[some], files.label_classes, files.answer_marker
        )
        if paths:
            say(f"{kind}: {parts[kind]}")
    if settings.prompt is None:
        template = with_instruction(template, set().union(*(part.instructions for part in parts.values())))
    train, rationales, held = (parts[kind].rows for kind in ("train", "rationale", "validation"))
    if not files.validation_files:
        train, held = split_by_hash(train, files.validation_share, lambda row: row.text)
    known = len(train) + len(rationales)
    train, rationales = (without_texts_of(some, held) for some in (train, rationales))
    if left_out := known - len(train) - len(rationales):
        say(f"validation: {len(held)} rows; {left_out} train and rationale rows with their texts left out")
    if files.rationale_files and not rationales:
        raise InvalidArgumentError(f"rationale_files is {files.rationale_files}: no row of them is left, give others")
    if others := asked_otherwise([*train, *rationales, *held], template):
        say(f"questions: {others} rows have another than the detector will ask: give --prompt to have it ask theirs")
    records = train_instruction(settings, training, template, train, held, rationales)
    for stage, record in records.items():
        figures = ", ".join(f"{name} {value:.4g}" for name, value in record["validation"].items())
        cut = f", {record['too_long']} too long ones left out" if record["too_long"] else ""
        say(f"{stage}: {record['rows']} rows{cut}; on the validation rows: {figures}")
    say(f"detector: saved in {training.output_dir}; use it as instruction:{training.output_dir}")


def main(argv: list[str] | None = None, prog: str = "rectify train instruction") -> int:
    """The command; returns its exit code."""
    return execute(run, make_parser(prog), argv, extras=["train"])
