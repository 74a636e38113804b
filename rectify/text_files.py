"""Texts, and their labels or spans, from files of records; see `record_files`."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rectify.errors import InvalidArgumentError, TrajectoryError, shown
from rectify.record_files import is_missing, read_rows

TEXT_COLUMN = "text"
SPANS_COLUMN = "spans"

_WORDS = {"true": 1.0, "false": 0.0}


class LabelledText(NamedTuple):
    """A text, which may be blank, and how toxic it is, from 0 (clean) to 1."""

    text: str
    label: float


class AnnotatedText(NamedTuple):
    """A text and its toxic spans, `(start, end)` in Python's places, end exclusive; sorted, without overlaps."""

    text: str
    spans: tuple[tuple[int, int], ...]


def read_texts(paths: Sequence[str | Path], text_columns: Sequence[str] = (TEXT_COLUMN,)) -> list[str]:
    """The texts of files, in their order.

    Args:
        paths: `.csv` and `.tsv` files with a header, `.txt` files of one text a line, `.json` files of one list, and
            others of JSON lines: strings, objects with the column, or RealToxicityPrompts records. Blank lines are
            passed over.
        text_columns: where an object or a row holds the text, once for all files or once for each; its value may also
            be `{"text": …}`. An object without the column `text` may have `prompt` in its place.

    Raises:
        InvalidArgumentError: the columns are not as many as the files.
        TrajectoryError: a file cannot be read or holds no text, or a line, named by its number, cannot be used.
    """
    columns = one_a_file("text_column", text_columns, len(paths))
    return [
        _text(row, column, place) for path, column in zip(paths, columns, strict=True) for place, row in read_rows(path)
    ]


def read_labelled_texts(
    paths: Sequence[str | Path],
    text_columns: Sequence[str],
    label_columns: Sequence[str],
    label_values: Sequence[str] = ("",),
) -> list[LabelledText]:
    """The texts of CSV, TSV and JSON-lines files with their labels, in their order.

    Args:
        paths: as in `read_texts`; of JSON lines, objects alone have labels.
        text_columns: as in `read_texts`.
        label_columns: where the label is, once for all files or once for each; see `labelled_rows`.
        label_values: what labels mean, once for all files or once for each; see `LabelValues`. Rows without a label
            are left out.

    Raises:
        InvalidArgumentError: the columns are not as many as the files.
        TrajectoryError: as in `read_texts`, or a label is missing or none of these.
    """
    texts = one_a_file("text_column", text_columns, len(paths))
    labels = one_a_file("label_column", label_columns, len(paths))
    values = one_a_file("label_values", label_values, len(paths))
    return [
        LabelledText(text, label)
        for path, *columns in zip(paths, texts, labels, values, strict=True)
        for _, text, label in labelled_rows(path, *columns)
        if label is not None
    ]


def labelled_rows(
    path: str | Path, text_column: str, label_column: str, label_values: str = ""
) -> Iterator[tuple[str, str, float | None]]:
    """The rows of a file: how to name the place of each, its text, and its label, `None` where it is to be left out.

    Args:
        path: as in `read_labelled_texts`.
        text_column: where the text is.
        label_column: where the label is; `"a+b+c"` for the mean of several annotators' columns, of which those with an
            empty cell did not vote.
        label_values: see `LabelValues`.

    Raises:
        InvalidArgumentError, TrajectoryError: as in `read_labelled_texts`.
    """
    values = LabelValues(label_values)
    for place, row in read_rows(path):
        yield place, *_labelled_text(row, text_column, label_column, values, place)


class LabelValues:
    """What the values of a label column mean.

    Args:
        mapping: `VALUE=LABEL` for each value, separated by commas, as `"hate=1,noHate=0"`; `VALUE=` leaves the rows
            with it out. Empty for labels that are 0, 1, true, false, or a number between.

    Raises:
        InvalidArgumentError: it has another form.
    """

    def __init__(self, mapping: str = "") -> None:
        self._mapping = mapping
        self._labels: dict[str, float | None] = {}
        for entry in mapping.split(",") if mapping.strip() else ():
            value, sign, label = (part.strip() for part in entry.partition("="))
            word = _word(value)
            try:
                number = float(label) if label else None
            except ValueError:
                number = float("nan")
            if not sign or word in self._labels or not (number is None or 0 <= number <= 1):
                raise InvalidArgumentError(
                    f"label_values is {mapping!r}, and {entry.strip()!r} cannot be used: give each value once, as "
                    "hate=1,noHate=0,unclear= with labels from 0 to 1, or none to leave rows out"
                )
            self._labels[word] = number

    def __call__(self, value: Any, column: str, place: str) -> float | None:
        """The label that a value stands for, or `None` where it is to be left out.

        Raises:
            TrajectoryError: it stands for none.
        """
        word = _word(value)
        if not self._labels:
            return _label(value, word, column, place)
        if word not in self._labels:
            raise TrajectoryError(
                f"{place}: {column} is {shown(value)}, which label_values {self._mapping!r} does not name: add "
                f"{word}=1, {word}=0 or, to leave such rows out, {word}="
            )
        return self._labels[word]


def named_rows(
    path: str | Path, text_column: str, label_column: str, names: Mapping[str, str]
) -> Iterator[tuple[str, dict[str, Any], str, str]]:
    """The rows of a file whose labels are classes: how to name the place of each, the row, its text, and its class.

    Args:
        path: as in `read_labelled_texts`.
        text_column, label_column: where text and label are.
        names: the class that each value of the label column means; an empty one where such rows are left out.

    Raises:
        TrajectoryError: as in `read_labelled_texts`, or `names` lacks a value.
    """
    known = {_word(value): name for value, name in names.items()}
    for place, row in read_rows(path):
        if not isinstance(row, dict):
            raise TrajectoryError(f"{place}: no object with columns: give JSON objects, or a .csv or .tsv file")
        value = _cell(row, label_column, "label_column", place)
        word = _word(value)
        if word not in known:
            raise TrajectoryError(
                f"{place}: {label_column} is {shown(value)}, which is none of {', '.join(known)}: say what it means in "
                "label_classes, or give another label_column"
            )
        yield place, row, _text(row, text_column, place), known[word]


def read_annotated_texts(paths: Sequence[str | Path]) -> list[AnnotatedText]:
    """The texts of CSV, TSV and JSON-lines files with their toxic spans, in their order.

    A row or object has a `text`, and `spans` that are either characters, `[4, 5, 6]`, as in the files of SemEval-2021
    Task 5, where they stand as a literal of Python, or pairs of start and end, `[[4, 7]]`. Spans may begin or end with
    blanks, overlap, and have any order.

    Args:
        paths: as in `read_labelled_texts`.

    Raises:
        TrajectoryError: as in `read_texts`, or spans are missing, none of these, or not in the text.
    """
    return [_annotated_text(row, place) for path in paths for place, row in read_rows(path)]


def one_a_file(name: str, columns: Sequence[str], files: int) -> list[str]:
    """A column for each file, where it is given once for all of them, or once a file.

    Raises:
        InvalidArgumentError: it is given another number of times.
    """
    if len(columns) not in (1, files):
        raise InvalidArgumentError(
            f"{name} is given {len(columns)} times for {files} files: give it once for all, or once for each file"
        )
    return list(columns) * files if len(columns) == 1 else list(columns)


# ---------------------------------------------------------------------------------------------------------------------
# Rows to texts and labels


def _labelled_text(
    row: Any, text_column: str, label_column: str, values: LabelValues, place: str
) -> tuple[str, float | None]:
    _check_object(row, label_column, place)
    text = _text(row, text_column, place)
    if label_column in row or "+" not in label_column:
        return text, values(_cell(row, label_column, "label_column", place), label_column, place)
    cells = [(name, _cell(row, name, "label_column", place)) for name in label_column.split("+")]
    votes = [values(cell, name, place) for name, cell in cells if cell is not None and str(cell).strip()]
    known = [vote for vote in votes if vote is not None]
    return text, sum(known) / len(known) if known else None


def _check_object(row: Any, column: str, place: str) -> None:
    if not isinstance(row, dict):
        raise TrajectoryError(
            f"{place}: no column {column!r} in a value of type {type(row).__name__}: "
            "give JSON objects, or a .csv or .tsv file"
        )


def _text(row: Any, column: str, place: str) -> str:
    text = row
    if isinstance(row, dict):
        name = "prompt" if column == TEXT_COLUMN and column not in row and "prompt" in row else column
        text = _cell(row, name, "text_column", place)
        if isinstance(text, dict):
            text = text.get("text")
    if not isinstance(text, str):
        raise TrajectoryError(f"{place}: {shown(text)} stands where the text should be: give a string")
    check_present(row, text, place)
    check_unicode(text, place)
    return text


def check_present(row: Any, text: str, place: str) -> None:
    """Refuse a text that stands in a table for none.

    Raises:
        TrajectoryError: it does; `place` names it.
    """
    if is_missing(row, text):
        raise TrajectoryError(f"{place}: {text!r} stands where the text should be: leave out rows without a text")


def check_unicode(text: str, place: str) -> None:
    """Refuse a text that holds half of a surrogate pair, as JSON may.

    Raises:
        TrajectoryError: it does; `place` names it.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TrajectoryError(f"{place}: no valid Unicode text ({error.reason}): encode it as UTF-8") from error


def _word(value: Any) -> str:
    """A value of a label column, alike for what means the same, as 1, 1.0 and "1"."""
    word = str(value).strip().casefold()
    try:
        return f"{float(word):g}"
    except ValueError:
        return word


def _label(value: Any, word: str, column: str, place: str) -> float:
    try:
        label = _WORDS[word] if word in _WORDS else float(str(value))
    except ValueError:
        label = float("nan")
    if not 0 <= label <= 1:
        raise TrajectoryError(
            f"{place}: {column} is {shown(value)}: give 0, 1, true, false or a number between, another label_column, "
            "or label_values"
        )
    return label


def _cell(row: dict[str, Any], column: str, argument: str, place: str) -> Any:
    if column not in row:
        columns = ", ".join(map(repr, list(row)[:8])) or "none"
        raise TrajectoryError(f"{place}: no column {column!r}: set {argument} to one of those there ({columns})")
    return row[column]


def _annotated_text(row: Any, place: str) -> AnnotatedText:
    _check_object(row, SPANS_COLUMN, place)
    text = _text(row, TEXT_COLUMN, place)
    if SPANS_COLUMN not in row:
        raise TrajectoryError(f"{place}: no column {SPANS_COLUMN!r}: give a text and its spans in each row")
    value = row[SPANS_COLUMN]
    try:
        spans = ast.literal_eval(value) if isinstance(value, str) else value
        if not isinstance(spans, list):
            raise TypeError
        return AnnotatedText(text, _joined(_pair(one, len(text)) for one in spans))
    except _OutsideError as error:
        raise TrajectoryError(
            f"{place}: spans hold {error.args[0]}, which is not in the text of {len(text)} characters: count Python's "
            "characters from 0, end exclusive"
        ) from error
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise TrajectoryError(
            f"{place}: spans is {shown(value)}: give a list of characters, [4, 5, 6], or of starts and ends, [[4, 7]]"
        ) from error


class _OutsideError(Exception):
    pass


def _pair(one: Any, length: int) -> tuple[int, int]:
    start, end = (one, one + 1) if type(one) is int else one
    if type(start) is not int or type(end) is not int:
        raise TypeError
    if not 0 <= start < end <= length:
        raise _OutsideError(one)
    return start, end


def _joined(pairs: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    runs: list[tuple[int, int]] = []
    for start, end in sorted(pairs):
        if runs and start <= runs[-1][1]:
            runs[-1] = runs[-1][0], max(end, runs[-1][1])
        else:
            runs.append((start, end))
    return tuple(runs)
