"""What an instruction-style detector is trained on: questions with their answers, from files of several forms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rectify.detectors.templates import TEXT, Template
from rectify.errors import InvalidArgumentError, TrajectoryError, shown
from rectify.record_files import read_rows
from rectify.splits import alike
from rectify.text_files import check_unicode, named_rows

ALPACA = ("instruction", "output")


@dataclass(frozen=True)
class InstructionRow:
    """A question and its answer.

    Attributes:
        question: without the chat template; empty where it is the template's about `text`.
        text: the text; the whole question where the file does not tell it apart.
        answer: as it is to be written.
        label: that of the answer.
    """

    question: str
    text: str
    answer: str
    label: str

    def bare(self, template: Template) -> InstructionRow:
        """The same without anything but the label in its answer."""
        return replace(self, answer=template.write(self.label))


@dataclass
class Read:
    """The rows of files, and what was left out.

    Attributes:
        rows: them.
        blank: how many had no text.
        unlabelled: how many are left out by `label_classes`.
        unparsed: how many answers are not of the template's form.
        instructions: those of Alpaca files.
    """

    rows: list[InstructionRow] = field(default_factory=list)
    blank: int = 0
    unlabelled: int = 0
    unparsed: int = 0
    instructions: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        left_out = ((self.blank, "blank"), (self.unlabelled, "unlabelled"), (self.unparsed, "unparsed"))
        return f"{len(self.rows)} rows" + "".join(f", {count} {what} left out" for count, what in left_out if count)


def read_instruction_rows(
    paths: Sequence[str | Path],
    template: Template,
    text_columns: Sequence[str],
    label_columns: Sequence[str],
    label_classes: str = "",
    answer_marker: str = "### Assistant:",
) -> Read:
    """Questions and answers from files, each of one of three forms.

    Alpaca: `instruction`, `output`, and `input` if there is any. Ready text: the text column alone, question and answer
    with the marker between them. Tables: text and label columns, from which the template makes both; columns with the
    names of the template's fields, such as `rationale`, go into the answer.

    Args:
        paths: `.json` files of one list, `.csv` and `.tsv` files, and others of JSON lines.
        template: whose form the answers have.
        text_columns, label_columns: of each file.
        label_classes: `VALUE=LABEL` for each value of a label column, separated by commas; `VALUE=` leaves rows out.
            Not needed where the values are the labels themselves, or 0 and 1 in a template of two.
        answer_marker: ends the question in a ready text.

    Raises:
        InvalidArgumentError: a label name is none of the template's.
        TrajectoryError: a file or a line of it cannot be used.
    """
    names = parse_names(label_classes, template)
    found = Read()
    for path, text_column, label_column in zip(paths, text_columns, label_columns, strict=True):
        _, first = next(iter(read_rows(path)))
        if isinstance(first, dict) and all(column in first for column in ALPACA):
            _add_alpaca(found, path, template)
        elif isinstance(first, dict) and label_column not in first and answer_marker in str(first.get(text_column)):
            _add_ready(found, path, text_column, answer_marker, template)
        else:
            _add_table(found, named_rows(path, text_column, label_column, names), template)
    return found


def parse_names(label_classes: str, template: Template) -> dict[str, str]:
    """What each value of a label column means: a label of the template, or nothing.

    Raises:
        InvalidArgumentError: it has another form, or names no label of the template.
    """
    names = {label: label for label in template.labels}
    if len(template.labels) == 2:
        toxic = next(iter(template.toxic))
        other = next(label for label in template.labels if label != toxic)
        names |= {"0": other, "false": other, "1": toxic, "true": toxic}
    for entry in label_classes.split(",") if label_classes.strip() else ():
        value, sign, label = (part.strip() for part in entry.partition("="))
        if not sign or (label and label not in template.labels):
            raise InvalidArgumentError(
                f"label_classes is {label_classes!r}, and {entry.strip()!r} cannot be used: give VALUE=LABEL, with a "
                f"label of the template ({', '.join(template.labels)}), or none to leave such rows out"
            )
        names[value] = label
    return names


def _add_alpaca(found: Read, path: str | Path, template: Template) -> None:
    for place, row in read_rows(path):
        record = row if isinstance(row, dict) else {}
        values = (record.get(name) for name in ("instruction", "input", "output"))
        instruction, text, output = (_string(value, place) for value in values)
        if not instruction or not output:
            raise TrajectoryError(f"{place}: no instruction and output: give an Alpaca record")
        found.instructions.add(instruction)
        question = f"{instruction}\n{text}" if text else instruction
        _add_answer(found, place, question, text or instruction, output, template)


def _string(value: Any, place: str) -> str:
    if not isinstance(value, str | None):
        raise TrajectoryError(f"{place}: {shown(value)} stands where a text should be: give a string")
    return (value or "").strip()


def _add_ready(found: Read, path: str | Path, column: str, marker: str, template: Template) -> None:
    for place, row in read_rows(path):
        whole = row.get(column) if isinstance(row, dict) else None
        if not isinstance(whole, str) or marker not in whole:
            raise TrajectoryError(f"{place}: no {marker!r} in {column}: give the answer_marker of this file")
        question, _, answer = whole.partition(marker)
        _add_answer(found, place, f"{question}{marker}\n", question, answer.strip(), template)


def _add_answer(found: Read, place: str, question: str, text: str, answer: str, template: Template) -> None:
    check_unicode(f"{question} {text} {answer}", place)
    label = template.parse(answer).label
    if label is None:
        found.unparsed += 1
    else:
        found.rows.append(InstructionRow(question, text, answer, label))


def _add_table(found: Read, rows: Iterator[tuple[str, dict[str, Any], str, str]], template: Template) -> None:
    for place, row, text, label in rows:
        if not text.strip():
            found.blank += 1
        elif not label:
            found.unlabelled += 1
        else:
            # a field may hold what the parser looks for, as a rationale that ends with its label does
            _add_answer(found, place, "", text, template.write(label, fields_of(row, template)), template)


def asked_otherwise(rows: Iterable[InstructionRow], template: Template) -> int:
    """How many rows have a question of their own that is not the template's."""
    before, _, after = template.prompt.partition(TEXT)
    own = (row.question for row in rows if row.question)
    return sum(not (question.startswith(before) and question.endswith(after)) for question in own)


def without_texts_of(rows: Sequence[InstructionRow], others: Sequence[InstructionRow]) -> list[InstructionRow]:
    """The rows whose text none of the others has, but for spaces and capitals."""
    taken = {alike(row.text) for row in others}
    return [row for row in rows if alike(row.text) not in taken]


def fields_of(row: Mapping[str, Any], template: Template) -> dict[str, str]:
    """The fields of a template's answer that a row has."""
    names = [name for name, _ in template.before + template.after] or ["rationale"]
    return {name: str(row[name]) for name in names if row.get(name)}


def with_instruction(template: Template, instructions: Iterable[str]) -> Template:
    """The template with the instruction of Alpaca files as its question, where they share one."""
    shared = set(instructions)
    if len(shared) != 1 or TEXT in next(iter(shared)):
        return template
    return replace(template, prompt=f"{shared.pop()}\n{TEXT}")
