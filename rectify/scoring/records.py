"""Records that hold texts, whatever their form: read from files, and given back with scores beside each text."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rectify.errors import TrajectoryError, shown
from rectify.record_files import read_rows
from rectify.scoring.scores import Reason
from rectify.text_files import TEXT_COLUMN, check_present, one_a_file

SCORES, ERROR, VERDICT = "scores", "score_error", "moderation"

_SINGLE = ("prompt", "continuation")
_SEVERAL = ("generations", "base_generations")
_ANSWERS = ("continuation", "response")
_FORMS = 'give a string, {"text": "…"}, or a record with prompt, continuation or generations'

Place = tuple[str | int, ...]


@dataclass(frozen=True)
class Record:
    """A record, and where its texts are.

    Attributes:
        value: the JSON value, or the row of a table as an object.
        places: the way to each text, or to the object that holds it as `text`.
        texts: them, or each with the prompt that it answers, as `pair_text` writes the two.
    """

    value: Any
    places: tuple[Place, ...]
    texts: tuple[str, ...]

    @classmethod
    def of(cls, value: Any, text_column: str = TEXT_COLUMN, where: str = "record", pairs: bool = False) -> Record:
        """Find the texts of a record.

        Args:
            value: a string, an object with the column, or a record with any of `prompt`, `continuation`,
                `generations` and `base_generations`, each of which holds strings or `{"text": …}`.
            text_column: of the text.
            where: how messages call the place of the record.
            pairs: of an object with a prompt, take the answers to it alone, `response` among them, and each together
                with the prompt.

        Raises:
            TrajectoryError: there is no text in it, or something else in a text's place.
        """
        if isinstance(value, str):
            return cls(value, ((),), (value,))
        places: list[Place] = []
        question = None
        if pairs and isinstance(value, dict) and text_column not in value and "prompt" in value:
            question = value["prompt"].get(TEXT_COLUMN) if isinstance(value["prompt"], dict) else value["prompt"]
            if not isinstance(question, str):
                raise TrajectoryError(f"{where}: prompt is {shown(question)}, where a text should be: give a string")
        if isinstance(value, dict) and text_column in value:
            places.append((text_column,) if isinstance(value[text_column], dict) else ())
        elif isinstance(value, dict) and text_column == TEXT_COLUMN:
            places += [(name,) for name in (_SINGLE if question is None else _ANSWERS) if name in value]
            for name in (name for name in _SEVERAL if name in value):
                if not isinstance(value[name], list):
                    raise TrajectoryError(f"{where}: {name} is no list: give a list of texts")
                places += [(name, number) for number in range(len(value[name]))]
        if not places and question is not None:
            raise TrajectoryError(
                f"{where}: no answer to its prompt: give continuation, response or generations beside it"
            )
        if not places:
            if isinstance(value, dict):
                there = ", ".join(map(repr, list(value)[:8])) or "none"
                raise TrajectoryError(
                    f"{where}: no column {text_column!r}: set text_column to one of those there ({there}), or {_FORMS}"
                )
            raise TrajectoryError(f"{where}: no text in it: {_FORMS}")
        texts = []
        for place in places:
            text = at(value, place)
            if isinstance(text, dict):
                text = text.get(TEXT_COLUMN if place else text_column)
            if not isinstance(text, str):
                name = ".".join(map(str, place)) or text_column
                raise TrajectoryError(f"{where}: {name} is {shown(text)}, where a text should be: give a string")
            if not place:
                check_present(value, text, where)
            texts.append(text if question is None else pair_text(question, text))
        return cls(value, tuple(places), tuple(texts))

    def scored(
        self,
        attributes: Sequence[str],
        values: np.ndarray,
        reasons: Sequence[Reason | None],
        verdicts: Sequence[dict[str, Any] | None] = (),
    ) -> dict[str, Any]:
        """The record with `scores` beside each of its texts, and `score_error` where one is lacking.

        A text that stands for itself becomes `{"text": …}`. Scores that an earlier `rectify score` left are replaced,
        everything else stays.

        Args:
            attributes: the A attributes.
            values: `[texts, A]`, NaN where there is no score.
            reasons: for each text `None`, or why it lacks one.
            verdicts: of a scorer that makes some, for each text what stands beside it as `moderation`, or `None`.
        """
        value = copy.deepcopy(self.value)
        for number, (place, row, reason) in enumerate(zip(self.places, values, reasons, strict=True)):
            holder = at(value, place)
            if not isinstance(holder, dict):
                holder = {TEXT_COLUMN: holder}
                if place:
                    at(value, place[:-1])[place[-1]] = holder
                else:
                    value = holder
            holder.pop(SCORES, None)
            holder.pop(ERROR, None)
            if verdicts:
                holder.pop(VERDICT, None)
                if (verdict := verdicts[number]) is not None:
                    holder[VERDICT] = verdict
            known = {name: float(score) for name, score in zip(attributes, row, strict=True) if not np.isnan(score)}
            if known:
                holder[SCORES] = known
            if reason is not None:
                holder[ERROR] = reason.value
        return value


def pair_text(question: str, answer: str) -> str:
    """A question and its answer as one text for a scorer that judges such pairs: a JSON list of the two."""
    return json.dumps([question, answer])


def at(value: Any, place: Place) -> Any:
    """What stands at a place."""
    for step in place:
        value = value[step]
    return value


def read_records(
    paths: Sequence[str | Path], text_columns: Sequence[str] = (TEXT_COLUMN,), pairs: bool = False
) -> Iterator[Record]:
    """The records of files, one after another.

    Args:
        paths: `.csv` and `.tsv` files with a header, `.txt` files of one text a line, and others of JSON lines.
        text_columns: where an object or a row holds the text, once for all files or once for each.
        pairs: see `Record.of`.

    Raises:
        InvalidArgumentError: the columns are not as many as the files.
        TrajectoryError: a file cannot be read or holds no text, or a line, named by its number, cannot be used.
    """
    columns = one_a_file("text_column", text_columns, len(paths))
    for path, column in zip(paths, columns, strict=True):
        for where, value in read_rows(path):
            yield Record.of(value, column, where, pairs)
