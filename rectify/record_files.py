"""Files of records, whatever their form: JSON lines, JSON lists, CSV, TSV and plain text, as rows with their places."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from rectify.json_files import parse_json, parse_json_at
from rectify.tables import DELIMITERS, table_rows
from rectify.text_lines import TextFile

_MISSING = ("nan", "NaN", "<NA>")
"""Cells that other programs write where there is nothing."""
_WHOLE = "give a whole one, or a value a line"
_BLANKS = re.compile(r"[ \t\r\n]*")


def read_rows(path: str | Path | TextFile) -> Iterator[tuple[str, Any]]:
    """Read the rows of a file, each with how to name its place in a message.

    Args:
        path: of a `.csv` or `.tsv` file with a header, a `.txt` file of one text a line, a `.json` file of one list, or
            else JSON lines; or a `TextFile`, whose messages are then its own. Blank lines are passed over.

    Raises:
        TrajectoryError: the file cannot be read or holds no row, or a line cannot be used; of a `TextFile`, its error.
    """
    file = path if isinstance(path, TextFile) else TextFile(Path(path))
    before = file.before_number
    rows: Iterator[tuple[str, Any]]
    if file.kind in DELIMITERS:
        rows = ((f"{before}{number}", row) for number, row in table_rows(file, DELIMITERS[file.kind]))
    elif file.kind == ".txt":
        rows = ((f"{before}{number}", text) for number, text in file.texts())
    else:
        rows = _json_rows(file)
    empty = True
    for each in rows:
        empty = False
        yield each
    if empty:
        raise file.refusal("holds no text: give one JSON value, row or text a line")


def parse_line(line: str) -> Any:
    """Return the JSON value of a line that is not blank.

    Raises:
        ValueError: it is none; the message says what to give.
    """
    try:
        return parse_json(line)
    except ValueError as error:
        line = line.strip()
        open_end = line[:1] in ("{", "[") and line[-1:] not in ("}", "]")
        how = " (jq -c . makes them of values over several lines)" if open_end else ""
        raise ValueError(f"no JSON ({error}): give one JSON value a line{how}") from error


def is_missing(row: Any, text: str) -> bool:
    """Whether a text is what other programs write into tables, of strings alone, where there is none, as `nan`."""
    return text in _MISSING and isinstance(row, dict) and all(isinstance(cell, str | None) for cell in row.values())


def _json_rows(file: TextFile) -> Iterator[tuple[str, Any]]:
    lines = file.lines()
    first = next(((number, line) for number, line in lines if line.strip()), None)
    if first is None:
        return
    if file.kind == ".json" and first[1].lstrip().startswith("["):
        yield from list(_listed(file, first[0], "".join([first[1], *(line for _, line in lines)])))
        return
    before = file.before_number
    for number, value in _parsed(file, chain([first], lines)):
        yield f"{before}{number}", value


def _parsed(file: TextFile, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, Any]]:
    for number, line in lines:
        if line.isspace():
            continue
        try:
            value = parse_line(line)
        except ValueError as error:
            raise file.refusal(f"{error}, or a .csv, .tsv or .txt file", number) from error
        yield number, value


def _listed(file: TextFile, line: int, text: str) -> Iterator[tuple[str, Any]]:
    """The values of a JSON list, numbered from 0, and by the lines on which they begin."""
    place = _after_blanks(text, text.index("[") + 1)
    counted = number = 0
    while number or not text.startswith("]", place):
        line += _line_ends(text, counted, place)
        counted = place
        where = f"{file.place(line)}, record {number}"
        try:
            value, place = parse_json_at(text, place)
        except ValueError as error:
            raise file.error(f"{where}: it begins a JSON list and is none ({error}): {_WHOLE}") from error
        yield where, value
        place = _after_blanks(text, place)
        if not text.startswith(",", place):
            break
        place = _after_blanks(text, place + 1)
        number += 1
    ends = text.startswith("]", place)
    place = _after_blanks(text, place + ends)
    rest = text[place:].strip()
    if rest or not ends:
        line += _line_ends(text, counted, place)
        found = f"{rest[:20]!r} stands {'after' if ends else 'in'} it" if rest else "it does not end"
        raise file.refusal(f"it begins a JSON list and is none ({found}): {_WHOLE}", line)


def _after_blanks(text: str, place: int) -> int:
    found = _BLANKS.match(text, place)
    return found.end() if found else place


def _line_ends(text: str, start: int, end: int) -> int:
    return text.count("\n", start, end) + text.count("\r", start, end) - text.count("\r\n", start, end)
