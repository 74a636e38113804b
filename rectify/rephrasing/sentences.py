"""Toxic sentences with the rewrites that people made of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rectify.errors import TrajectoryError
from rectify.record_files import is_missing, read_rows

_COLUMN = "toxic"
_REFERENCES = "neutral"


@dataclass(frozen=True)
class Sentence:
    """A toxic sentence and its rewrites by people, one or more."""

    text: str
    references: tuple[str, ...]


def read_sentences(path: str | Path) -> list[Sentence]:
    """The sentences of a file with a column `toxic` and rewrites in those that begin with `neutral`, as in ParaDetox.

    Raises:
        TrajectoryError: the file cannot be read, or a row has no sentence or no rewrite.
    """
    found = []
    for place, row in read_rows(path):
        cells = row if isinstance(row, dict) else {}
        text = str(cells.get(_COLUMN) or "").strip()
        references = tuple(
            value.strip()
            for name, value in cells.items()
            if name.startswith(_REFERENCES)
            and isinstance(value, str)
            and value.strip()
            and not is_missing(cells, value)
        )
        if not text or is_missing(cells, text) or not references:
            raise TrajectoryError(f"{place}: no {_COLUMN!r} or no {_REFERENCES!r} text in it: give both")
        found.append(Sentence(text, references))
    return found
