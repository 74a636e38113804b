"""Texts that come with scores: what a scorer learns from, and what it is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rectify.errors import InvalidArgumentError, TrajectoryError, shown
from rectify.record_files import read_rows
from rectify.scoring.labels import attribute_of
from rectify.scoring.records import SCORES, Record, at
from rectify.scoring.scores import ATTRIBUTES
from rectify.splits import Split, record_key, split_of
from rectify.text_files import TEXT_COLUMN, one_a_file

_WORDS = {"true": 1.0, "false": 0.0}


class ScoredText(NamedTuple):
    """A text, which may be blank; its scores in [0, 1], those that are known; the fixed split of its record, if any."""

    text: str
    scores: Mapping[str, float]
    split: Split | None

    def row(self, attributes: Sequence[str]) -> list[float]:
        """The scores of these attributes, NaN where one is not known."""
        return [self.scores.get(attribute, float("nan")) for attribute in attributes]


def read_scored_texts(
    paths: Sequence[str | Path],
    text_columns: Sequence[str] = (TEXT_COLUMN,),
    score_columns: Mapping[str, str] | None = None,
) -> Iterator[ScoredText]:
    """The texts of files with their scores, in their order.

    Scores stand beside a text: as columns of a table or fields of an object (`toxicity` as in RealToxicityPrompts, or
    `toxic` as in Jigsaw's), or in `scores`, as `rectify score` writes them. Empty cells and `null` are not known.

    Args:
        paths: as `read_records` takes them.
        text_columns: where an object or a row holds the text, once for all files or once for each.
        score_columns: what columns score, where their names do not say it; all others are then passed over.

    Raises:
        InvalidArgumentError: the columns are not as many as the files, or an attribute is none of Perspective's.
        TrajectoryError: a file or a line cannot be used, or a score is no number from 0 to 1.
    """
    columns = one_a_file("text_column", text_columns, len(paths))
    for column, attribute in (score_columns or {}).items():
        if attribute not in ATTRIBUTES:
            raise InvalidArgumentError(
                f"score_columns holds {column}={attribute}: give one of {', '.join(ATTRIBUTES)} for it"
            )
    for path, column in zip(paths, columns, strict=True):
        for where, value in read_rows(path):
            record = Record.of(value, column, where)
            split = _split(value)
            for place, text in zip(record.places, record.texts, strict=True):
                holder = at(value, place)
                yield ScoredText(text, _scores(holder, score_columns, where), split)


def perspective_scores(prompts: str | Path, split: Split) -> list[tuple[str, list[float]]]:
    """Prompts and continuations of a RealToxicityPrompts file with Perspective's scores, one for each of `ATTRIBUTES`.

    Args:
        prompts: the records.
        split: the part of them, by the hash rule.

    Returns:
        Text and scores, NaN where one is not known; texts without words or scores are left out.
    """
    return [
        (text.text, text.row(ATTRIBUTES))
        for text in read_scored_texts([prompts])
        if text.split == split and text.text.strip() and text.scores
    ]


def _split(value: Any) -> Split | None:
    """The split of a RealToxicityPrompts record; other texts have none of their own."""
    try:
        return split_of(record_key(value))
    except (KeyError, TypeError):
        return None


def _scores(holder: Any, columns: Mapping[str, str] | None, where: str) -> dict[str, float]:
    if not isinstance(holder, dict):
        return {}
    beside = holder.get(SCORES)
    given = {**holder, **(beside if isinstance(beside, dict) else {})}
    if columns is not None:
        lacking = next((name for name in columns if name not in given), None)
        if lacking is not None:
            there = ", ".join(map(repr, list(given)[:12]))
            raise TrajectoryError(f"{where}: no column {lacking!r}: give score_columns of those there ({there})")
    found: dict[str, float] = {}
    for name, value in given.items():
        attribute = attribute_of(name) if columns is None else columns.get(name)
        if attribute is None or value is None or str(value).strip() == "":
            continue
        if attribute in found and name != attribute:
            continue  # two names of one thing: Perspective's own goes before
        found[attribute] = _score(value, name, where)
    return found


def _score(value: Any, name: str, where: str) -> float:
    word = str(value).strip().lower()
    try:
        score = _WORDS[word] if word in _WORDS else float(word)
    except ValueError:
        score = float("nan")
    if not 0 <= score <= 1:
        raise TrajectoryError(f"{where}: {name} is {shown(value)}: give a score from 0 to 1, or leave it empty")
    return score
