"""A word list as a scorer: the baseline that others are to beat."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rectify.errors import InvalidArgumentError
from rectify.json_files import sha256_of
from rectify.record_files import is_missing, read_rows
from rectify.scoring.scores import Scores, check_attributes, reason_against
from rectify.tables import DELIMITERS
from rectify.text_lines import TextFile

_LONGEST_TERM = 100  # characters
_SEVERITY_COLUMNS = ("severity", "severity_rating")


class KeywordScorer:
    """Scores 1 where a text holds a term of a list as a whole word, in whatever case, else 0: nothing between.

    Args:
        path: a term of one or more words a line; or a `.csv` or `.tsv` file with a column `text` and, where there are
            severities, a column `severity` or `severity_rating`.
        min_severity: take the terms of at least this severity only.

    Raises:
        InvalidArgumentError: the file cannot be read or has no such term, or a severity is lacking that is asked for.
    """

    attributes: tuple[str, ...] = ("TOXICITY", "PROFANITY")

    def __init__(self, path: str | Path, *, min_severity: float | None = None) -> None:
        self.name = f"keywords:{path}"
        terms = sorted({_folded(term) for term in read_terms(Path(path), min_severity)} - {""})
        if not terms:
            least = "" if min_severity is None else f" of severity {min_severity:g} or above"
            raise InvalidArgumentError(f"keywords {str(path)!r} holds no term{least}: give a term a line")
        self.revision = sha256_of(terms)[:12]
        self._pattern = re.compile(rf"(?<!\w){alternatives(terms)}(?!\w)")

    def score(self, texts: Sequence[str], attributes: Sequence[str] = ("TOXICITY",)) -> Scores:
        """Score texts; see `Scorer.score`."""
        asked = check_attributes(self, attributes)
        reasons = tuple(reason_against(text) for text in texts)
        values = np.full((len(texts), len(asked)), np.nan)
        for place, (text, reason) in enumerate(zip(texts, reasons, strict=True)):
            if reason is None:
                values[place] = float(self._pattern.search(_folded(text)) is not None)
        return Scores(values, asked, reasons)


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text.casefold()).split())


def alternatives(terms: Iterable[str]) -> str:
    """A pattern of any of the terms, as a tree of their letters: the time of a search hardly grows with the list."""
    root: dict[str, Any] = {}
    for term in terms:
        node = root
        for letter in term:
            node = node.setdefault(letter, {})
        node[""] = {}
    return _branch(root)


def _branch(node: dict[str, Any]) -> str:
    branches = [re.escape(letter) + _branch(below) for letter, below in node.items() if letter]
    if len(branches) < 2 and not (branches and "" in node):
        return "".join(branches)
    return f"(?:{'|'.join(branches)}){'?' if '' in node else ''}"


def read_terms(path: Path, min_severity: float | None = None) -> list[str]:
    """The terms of a word list as they stand there; see `KeywordScorer`."""
    file = TextFile(path, "keywords", InvalidArgumentError)
    if file.kind in DELIMITERS:
        return [_term(row, place) for place, row in read_rows(file) if _taken(row, min_severity, place)]
    if min_severity is not None:
        raise InvalidArgumentError(
            f"min_severity is {min_severity:g}, but keywords {str(path)!r} has no severities: leave it out or give a "
            ".csv file with a column severity"
        )
    return [_short(term, file.place(number)) for number, term in file.texts()]


def _taken(row: dict[str, str | None], min_severity: float | None, place: str) -> bool:
    if min_severity is None:
        return True
    found = next((row[column] for column in _SEVERITY_COLUMNS if column in row), None)
    try:
        return float(found or "") >= min_severity
    except ValueError as error:
        raise InvalidArgumentError(
            f"{place}: severity is {found!r}: give a number in the column severity, or leave out min_severity"
        ) from error


def _term(row: dict[str, str | None], place: str) -> str:
    term = row.get("text")
    if term is None:
        raise InvalidArgumentError(f"{place}: no column 'text': call the column of the terms so")
    if is_missing(row, term):
        raise InvalidArgumentError(f"{place}: {term!r} stands where a term should be: leave out rows without one")
    return _short(term, place)


def _short(term: str, place: str) -> str:
    if len(term) > _LONGEST_TERM:  # a pattern of it might be nested too deeply
        raise InvalidArgumentError(
            f"{place}: a term of {len(term)} characters: give {_LONGEST_TERM} at most, one a line"
        )
    return term
