"""Scores that are paid for once: a SQLite file of them, and a scorer that asks it first."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from rectify.errors import InvalidArgumentError
from rectify.scoring.scores import Reason, Scorer, Scores, check_attributes, is_judge
from rectify.scoring.streams import Scored, gathered, parts
from rectify.sqlite_file import SqliteFile

_TABLES = """
CREATE TABLE IF NOT EXISTS scorers (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, revision TEXT NOT NULL, UNIQUE (name, revision)
);
CREATE TABLE IF NOT EXISTS scores (
    scorer INTEGER NOT NULL REFERENCES scorers, text BLOB NOT NULL, attribute TEXT NOT NULL,
    value REAL CHECK (value BETWEEN 0 AND 1), reason TEXT,
    PRIMARY KEY (scorer, text, attribute), CHECK ((value IS NULL) <> (reason IS NULL))
) WITHOUT ROWID;
"""
_HASHES_A_QUERY = 400
_Entry = tuple[float | None, Reason | None]
# what these say of a text may hold of one attribute among those that were asked for, without naming it
_OF_THE_REQUEST = {Reason.LANGUAGE_NOT_SUPPORTED, Reason.INVALID_REQUEST}


class Known(NamedTuple):
    """What a cache holds of a text.

    Attributes:
        values: `[A]` float64, NaN where it holds no score.
        reason: why a score is NaN for good.
        complete: whether nothing is left to ask for.
    """

    values: np.ndarray
    reason: Reason | None
    complete: bool


class ScoreCache(SqliteFile):
    """A SQLite file of scores and of permanent reasons, safe with several threads and processes.

    The key is the scorer's name and revision, the attribute, and the SHA-256 of the text. Neither texts nor keys of a
    service are kept, nor failures that may pass. What `put` was given survives the end of the process at any moment.

    Args:
        path: the file; it and its folder are made.

    Raises:
        InvalidArgumentError: the path is a folder.
        CacheError: the file is broken, something else, or cannot be written; it is left as it is.

    Example:
        >>> from rectify.scoring.cache import CachedScorer, ScoreCache
        >>> with ScoreCache("scores.sqlite") as cache:
        ...     scores = CachedScorer(scorer, cache).score(["A text"])
    """

    application_id = 0x72656374
    format_version = 2
    tables = _TABLES
    # the first format kept what proxies and firewalls answered as if the service had said it: it is asked for again
    upgrades = MappingProxyType({1: "DELETE FROM scores WHERE reason IN ('INVALID_REQUEST', 'COMMENT_TOO_LONG')"})

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._scorers: dict[tuple[str, str], int] = {}

    def __len__(self) -> int:
        """How many scores and reasons it holds."""
        with self._lock, self._errors():
            return self._connection.execute("SELECT count(*) FROM scores").fetchone()[0]

    # -----------------------------------------------------------------------------------------------------------------
    # Looking up, and keeping

    def get(self, scorer: Scorer, texts: Sequence[str], attributes: Sequence[str]) -> list[Known]:
        """What is known of each text.

        Raises:
            CacheError: the file cannot be read.
        """
        hashes = [_sha256(text) for text in texts]
        found: dict[bytes, dict[str, _Entry]] = {}
        with self._lock, self._errors():
            number = self._number(scorer)
            for start in range(0, len(hashes), _HASHES_A_QUERY):
                some = hashes[start : start + _HASHES_A_QUERY]
                rows = self._connection.execute(
                    "SELECT text, attribute, value, reason FROM scores WHERE scorer = ? AND text IN "
                    f"({','.join('?' * len(some))})",
                    [number, *some],
                )
                for text, attribute, value, reason in rows:
                    entry = value, None if reason is None else Reason(reason)
                    found.setdefault(text, {})[attribute] = entry
        return [self._known(found.get(text, {}), attributes) for text in hashes]

    @staticmethod
    def _known(found: dict[str, _Entry], attributes: Sequence[str]) -> Known:
        values = np.array([found.get(attribute, (None,))[0] for attribute in attributes], dtype=np.float64)
        lacking = [attribute for attribute, value in zip(attributes, values, strict=True) if np.isnan(value)]
        if not lacking:
            return Known(values, None, True)
        if (together := _together(attributes)) in found:
            return Known(values, found[together][1], True)
        reasons = [found[attribute][1] for attribute in lacking if attribute in found]
        if len(reasons) < len(lacking):
            return Known(values, None, False)
        return Known(values, reasons[0], True)

    def put(
        self, scorer: Scorer, attributes: Sequence[str], scored: Iterable[tuple[str, np.ndarray, Reason | None]]
    ) -> None:
        """Keep what a scorer made of texts; on return it outlives the process.

        Args:
            scorer: whose scores they are.
            attributes: those that it was asked for.
            scored: texts, each with its scores (`[A]`) and the reason where one is NaN. What is kept already stays.

        Raises:
            CacheError: the file cannot be written.
        """
        rows: list[tuple[bytes, str, float | None, str | None]] = []
        for text, values, reason in scored:
            key = _sha256(text)
            lacking = [attribute for attribute, value in zip(attributes, values, strict=True) if np.isnan(value)]
            rows += [
                (key, attribute, float(value), None)
                for attribute, value in zip(attributes, values, strict=True)
                if attribute not in lacking
            ]
            if reason is not None and not reason.passing:
                blamed = [_together(attributes)] if reason in _OF_THE_REQUEST and len(lacking) > 1 else lacking
                rows += [(key, attribute, None, reason.value) for attribute in blamed]
        if not rows:
            return
        with self._lock, self._errors():
            number = self._number(scorer)
            with self._transaction(self._connection):
                self._connection.executemany(
                    "INSERT INTO scores (scorer, text, attribute, value, reason) VALUES (?, ?, ?, ?, ?) "
                    "ON CONFLICT DO NOTHING",
                    [(number, *row) for row in rows],
                )

    def _number(self, scorer: Scorer) -> int:
        key = scorer.name, scorer.revision
        if key not in self._scorers:
            with self._transaction(self._connection):
                self._connection.execute(
                    "INSERT INTO scorers (name, revision) VALUES (?, ?) ON CONFLICT DO NOTHING", key
                )
            query = "SELECT id FROM scorers WHERE name = ? AND revision = ?"
            self._scorers[key] = self._connection.execute(query, key).fetchone()[0]
        return self._scorers[key]


class CachedScorer:
    """A scorer that asks a cache first, and keeps what it had to compute or to pay for.

    What a scorer streams is kept text by text, so that a process that is killed loses the calls in flight and no
    more; what it scores in batches is kept `chunk_size` texts at a time. Equal texts are scored once.

    Args:
        scorer: what scores the texts that the cache lacks.
        cache: where scores are looked up and kept.
        chunk_size: texts at a time for a scorer that does not stream.

    Attributes:
        reused: how many texts were found in the cache, or were equal to another text of the same call.
    """

    def __init__(self, scorer: Scorer, cache: ScoreCache, chunk_size: int = 256) -> None:
        if chunk_size < 1:
            raise InvalidArgumentError(f"chunk_size is {chunk_size}: give 1 or more")
        self.scorer, self.cache, self.chunk_size = scorer, cache, chunk_size
        self.name, self.revision, self.attributes = scorer.name, scorer.revision, scorer.attributes
        if is_judge(scorer):
            self.verdict, self.verdict_attributes = scorer.verdict, scorer.verdict_attributes
        self.reused = 0

    def score(self, texts: Sequence[str], attributes: Sequence[str] = ("TOXICITY",)) -> Scores:
        """Score texts, in their order; see `Scorer.score`.

        Raises:
            UnknownAttributeError: an attribute is none of the scorer's.
            CacheError: the cache cannot be read or written.
        """
        asked = check_attributes(self, attributes)
        return gathered(self._stream(texts, asked), len(texts), asked)

    def score_stream(self, texts: Sequence[str], attributes: Sequence[str] = ("TOXICITY",)) -> Iterator[Scored]:
        """Score texts, those that the cache knows first, the others as they come; see `score`."""
        return self._stream(texts, check_attributes(self, attributes))

    def _stream(self, texts: Sequence[str], attributes: tuple[str, ...]) -> Iterator[Scored]:
        places: dict[str, list[int]] = {}
        for place, text in enumerate(texts):
            places.setdefault(text, []).append(place)
        unique = list(places)
        known = self.cache.get(self.scorer, unique, attributes)
        missing = [index for index, entry in enumerate(known) if not entry.complete]
        self.reused += len(texts) - len(missing)
        for index, entry in enumerate(known):
            if entry.complete:
                for place in places[unique[index]]:
                    yield place, entry.values.copy(), entry.reason
        for part in parts(self.scorer, [unique[index] for index in missing], attributes, self.chunk_size):
            # an attribute that is known stays what it is
            merged = [_merged(known[missing[number]].values, row, reason) for number, row, reason in part]
            fresh = [unique[missing[number]] for number, _, _ in part]
            self.cache.put(self.scorer, attributes, [(text, *found) for text, found in zip(fresh, merged, strict=True)])
            for text, (row, reason) in zip(fresh, merged, strict=True):
                for place in places[text]:
                    yield place, row.copy(), reason


def _merged(known: np.ndarray, row: np.ndarray, reason: Reason | None) -> tuple[np.ndarray, Reason | None]:
    values = np.where(np.isnan(known), row, known)
    return values, reason if np.isnan(values).any() else None


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _together(attributes: Sequence[str]) -> str:
    """The key of a reason that holds of these attributes when they are asked for in one request."""
    return ",".join(sorted(attributes))
