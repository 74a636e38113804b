"""Tables in text: rows of CSV and TSV files, of which none is merged, cut or shifted without a word."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate

from rectify.errors import RectifyError, shown
from rectify.text_lines import TextFile

DELIMITERS = {".csv": ",", ".tsv": "\t"}

_NAMES = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
_LONGEST_CELL = 2**24  # characters; the csv module's own limit, 2**17, is below what long documents need
_QUOTED = r'"[^"]*(?:""[^"]*)*"'
_ESCAPED = r'"(?:[^"\\]|\\.)*"'
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_LINE_END = re.compile(r"\r\n|\r|\n")

Lines = Callable[[], Iterable[tuple[int, str]]]


def table_rows(file: TextFile, delimiter: str) -> Iterator[tuple[int, dict[str, str | None]]]:
    """Read the rows under a header, each with the number of its first line; blank lines are passed over.

    Cells are quoted as in RFC 4180: `"` around what holds delimiters, line ends or quotes, and `""` for a quote. Where
    each line of a file has as many tabs, and its quotes are not put so, they are part of the text.

    Of a table with tabs, a row may lack cells at its end, as editors strip tabs there: they are `None`.

    Args:
        file: the table.
        delimiter: a comma or a tab.

    Raises:
        RectifyError: of the file's kind: a row has more cells than the header, or fewer, a quoted cell does not end or
            goes on after its end, quotes are escaped by backslashes, or the header cannot be used.
    """
    lines: Lines = file.lines
    if not file.is_regular:
        kept = list(file.lines())  # as a pipe can be read once
        lines = lambda: kept  # noqa: E731
    if delimiter == "\t" and _is_literal(file, lines):
        rows = _literal_rows(lines())
    else:
        rows = _quoted_rows(file, lines(), delimiter)
    header: _Header | None = None
    width = 0
    names: list[str] = []
    for number, cells in rows:
        if header is not None and len(cells) == width and header.is_full:
            yield number, dict(zip(names, cells, strict=True))
        elif len(cells) == 1 and width != 1 and not cells[0].strip():
            continue
        elif header is None:
            header = _Header(file, cells, delimiter, number)
            names, width = cells, len(cells)
        else:
            yield number, header.row(cells, number)


class _Header:
    """The names of the columns.

    Attributes:
        is_full: whether all have one; a first one without may be an index, as pandas writes it.
    """

    def __init__(self, file: TextFile, names: list[str], delimiter: str, number: int) -> None:
        self._file, self._names, self._delimiter = file, names, delimiter
        other = next((sign for sign in "\t;,|" if sign in names[0]), None) if len(names) == 1 else None
        if other is not None:
            raise file.refusal(
                f"the header is one column, {names[0][:60]!r}: write the table with a {_NAMES[delimiter]} between "
                f"cells, not a {_NAMES[other]}, or call it .tsv where it has tabs",
                number,
            )
        if names[0].lower().startswith("sep="):
            raise file.refusal(f"{names[0]!r} is Excel's word on the separator, no header: take out this line", number)
        twice = next((name for place, name in enumerate(names) if name and name in names[:place]), None)
        if twice is not None:
            raise file.refusal(f"the header names the column {twice!r} twice: give each column its own name", number)
        for place in range(1, next((place for place, name in enumerate(names) if name), 0)):
            names[place] = f"Unnamed: {place}"  # of an index in several columns; called so by pandas, which writes it
        self._unnamed = [place for place, name in enumerate(names) if not name][1:]  # as spreadsheets add at the right
        self.is_full = not self._unnamed

    def row(self, cells: Sequence[str | None], number: int) -> dict[str, str | None]:
        """The cells by their columns."""
        width, sign = len(self._names), _NAMES[self._delimiter]
        if len(cells) > width:
            raise self._file.refusal(
                f"{len(cells)} cells, more than the {width} of the header, from {shown(cells[width])} on: quote cells "
                f"that hold a {sign}, a quote or a line end",
                number,
            )
        lacking = width - len(cells)
        named = any(self._names[len(cells) :])
        if named and (len(cells) == 1 or self._delimiter != "\t"):
            raise self._file.refusal(
                f"{self._names[len(cells)]} is None, as there are {len(cells)} of {width} cells: quote cells that hold "
                f"a {sign}, a quote or a line end, and leave empty ones empty",
                number,
            )
        cells = [*cells, *[None] * lacking]
        full = next((place for place in self._unnamed if cells[place]), None)
        if full is not None:
            raise self._file.refusal(
                f"{shown(cells[full])} stands in column {full + 1}, which has no name: give it one", number
            )
        return {self._names[place]: cell for place, cell in enumerate(cells) if place not in self._unnamed}


# ---------------------------------------------------------------------------------------------------------------------
# Quoted cells


def _quoted_rows(file: TextFile, lines: Iterable[tuple[int, str]], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    if csv.field_size_limit() < _LONGEST_CELL:
        csv.field_size_limit(_LONGEST_CELL)  # and never back, as another reader may be under way
    numbered = iter(lines)
    pending = ""  # a line that the csv module has not taken yet
    more: list[str] = []  # the lines of a row but the first

    def rest() -> Iterator[str]:
        nonlocal pending
        while True:
            if pending:
                line, pending = pending, ""
            else:
                following = next(numbered, None)
                if following is None:
                    return
                line = following[1]
                more.append(line)
            yield line

    reader = csv.reader(rest(), delimiter=delimiter, strict=True)
    returns: bool | None = None  # whether lines end with carriage returns alone
    for number, line in numbered:
        if '"' in line:
            pending = line
            if more:
                more.clear()
            try:
                cells = next(reader)
            except csv.Error as error:
                raise _badly_quoted(file, [line, *more], number, delimiter, error) from error
            if "\\" in line or more:
                _check_escapes(file, line + "".join(more), number, delimiter, len(cells))
        else:
            cells = line.rstrip("\r\n").split(delimiter)
            if cells == [""]:
                continue
        end = more[-1] if more and '"' in line else line
        if end.endswith("\r") is not returns:
            if returns is not None and end.endswith(("\r", "\n")):
                raise file.refusal("lines end with carriage returns and with line feeds: let all end alike", number)
            returns = end.endswith("\r") if returns is None else returns
        yield number, cells


def _badly_quoted(file: TextFile, taken: list[str], first: int, delimiter: str, error: csv.Error) -> RectifyError:
    """The refusal of a row, by the line on which that cell begins which does not end as it should."""
    if "field limit" in str(error):
        return file.refusal(f"a cell of more than {_LONGEST_CELL} characters: close quotes, or give JSON lines", first)
    text = "".join(taken)
    cell = _cell(_QUOTED, delimiter)
    place = 0
    while (found := cell.match(text, place)) and text.startswith((delimiter, "\r", "\n"), found.end()):
        place = found.end() + 1
    number = first + sum(end <= place for end in accumulate(map(len, taken)))
    how = 'write quotes inside it as "", not as \\"' if '\\"' in text[place:] else 'write quotes inside it as ""'
    return file.refusal(f"a cell begins with a quote and does not end with one ({error}): close it, and {how}", number)


def _check_escapes(file: TextFile, text: str, first: int, delimiter: str, width: int) -> None:
    """Refuse lines that would make other rows, of the same width, if a backslash escaped a quote."""
    if '\\"' not in text:
        return
    escaped = _raw_rows(text, _cell(_ESCAPED, delimiter), delimiter)
    if any(len(row) != width for row in escaped) or escaped == _raw_rows(text, _cell(_QUOTED, delimiter), delimiter):
        return
    raise file.refusal('a backslash stands before a quote: write quotes in cells as "", not as \\"', first)


def _cell(quoted: str, delimiter: str) -> re.Pattern[str]:
    return re.compile(rf'{quoted}|[^"{delimiter}\r\n][^{delimiter}\r\n]*|', re.DOTALL)


def _raw_rows(text: str, cell: re.Pattern[str], delimiter: str) -> list[list[str]]:
    """The cells of rows as they are written; an empty row at last where something does not end as a cell does."""
    rows: list[list[str]] = [[]]
    place = 0
    while found := cell.match(text, place):
        rows[-1].append(found.group())
        place = found.end()
        if text.startswith(delimiter, place):
            place += 1
            continue
        end = _LINE_END.match(text, place)
        place = end.end() if end else place
        if place == len(text):
            break
        rows.append([])
        if end is None:
            break
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Quotes as text


def _literal_rows(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, list[str]]]:
    for number, line in lines:
        if text := line.rstrip("\r\n"):
            yield number, text.split("\t")


def _is_literal(file: TextFile, lines: Lines) -> bool:
    """Whether quotes are text in a table with tabs: each line has as many, and quotes are not put as in RFC 4180.

    Raises:
        RectifyError: they may be meant either way, and rows depend on it.
    """
    whole = re.compile(_QUOTED)
    cell = r'(?:"[^"\t]*(?:""[^"\t]*)*"|[^"\t]*)'
    as_quoted = re.compile(rf"{cell}(?:\t{cell})*")
    tabs, open_line = -1, 0
    quoted = inside = doubled = False
    for number, line in lines():
        text = line.rstrip("\r\n")
        if not text.strip(" "):
            continue
        if tabs < 0:
            tabs = text.count("\t")
        elif text.count("\t") != tabs:
            return False
        if '"' not in text:
            continue
        if as_quoted.fullmatch(text):
            quoted = True
            doubled = doubled or ('""' in text and any('""' in each[1:-1] for each in text.split("\t")))
        else:
            for each in text.split("\t"):
                if not each.startswith('"'):
                    inside = inside or '"' in each  # which no writer that quotes leaves so
                elif whole.fullmatch(each):
                    quoted, doubled = True, doubled or '""' in each[1:-1]
                else:
                    open_line = open_line or number
    if not open_line:
        return not quoted or (inside and not doubled)
    try:
        rows = [cells for _, cells in _quoted_rows(file, lines(), "\t")]
    except RectifyError:
        return True
    if not tabs:
        return False
    literal = [cells for _, cells in _literal_rows(lines())]
    if len(rows) < 2 or any(len(cells) != tabs + 1 for cells in rows):
        return True
    numbers = [place for place in range(tabs + 1) if _are_numbers(rows, place)]
    if not numbers:
        raise file.refusal(
            "a cell begins with a quote that ends on another line, or is part of the text, as each line has as many "
            'tabs: begin it with """ if it is text, or give a .csv file',
            open_line,
        )
    return all(_are_numbers(literal, place) for place in numbers)


def _are_numbers(rows: Sequence[list[str]], place: int) -> bool:
    """Whether a column holds numbers under its name."""
    return all(_NUMBER.fullmatch(row[place]) for row in rows[1:])
