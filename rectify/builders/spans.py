"""Span annotations by a scorer: every two neighbouring words of a text are scored, and toxic pairs become spans."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rectify.builders.selection import TOXIC
from rectify.detectors.span_decoding import encode_windows, spans_of, whole_characters
from rectify.errors import InvalidArgumentError
from rectify.generation.output import GenerationFile
from rectify.json_files import sha256_of
from rectify.scoring.scores import Scorer

_WORD = re.compile(r"\w+(?:[^\w\s]+\w+)*")
_TEXTS = 64  # at a time
_LONGEST = 1 << 30  # tokens of a window that holds any text


@dataclass
class SpanCounts:
    """What a file of annotations holds; `str` of it is for people.

    Attributes:
        texts: all of them.
        toxic: those with a span.
        spans: of all texts.
        unscored: segments without a score.
        passing: texts of this run with a segment that may get a score another time.
    """

    texts: int = 0
    toxic: int = 0
    spans: int = 0
    unscored: int = 0
    passing: int = 0

    def __str__(self) -> str:
        found = f"texts: {self.texts}, {self.toxic} with {self.spans} toxic spans"
        return f"{found}; segments without a score: {self.unscored}"


def label_spans(
    texts: Sequence[str],
    scorer: Scorer,
    output: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tokenizer_name: str | None = None,
) -> SpanCounts:
    """Write texts with the spans that a scorer finds toxic, for `rectify train spans`; a file begun is gone on with.

    A record is `{"text": "…", "spans": [[start, end], …], "unscored": n}`, n the segments without a score. Segments are
    cut out of the text as it is, with its casing. See `toxic_units` for how they make spans.

    Args:
        texts: of any kind; those without a toxic pair have no spans, and are examples too.
        scorer: of TOXICITY.
        output: the JSON-lines file.
        tokenizer: whose tokens are taken in pairs, as published; `None` for words, which scorers know better.
        tokenizer_name: what the file's settings call it.

    Raises:
        InvalidArgumentError: the file was begun otherwise, or the tokenizer is slow.
        RectifyError: the scorer cannot go on.

    Source: Tang et al., "CMD", EMNLP 2024, where every pair of BERT's tokens is scored by Perspective.
    """
    if tokenizer is not None and not tokenizer.is_fast:
        raise InvalidArgumentError(
            f"tokenizer {tokenizer_name!r} does not say where tokens are: give a fast one, or none for words"
        )
    settings = {
        "scorer": scorer.name,
        "revision": scorer.revision,
        "tokenizer": tokenizer_name,
        "texts": sha256_of(list(texts)),
    }
    file = GenerationFile(output, settings)
    missed: list[str] = []
    file.complete(
        list(texts),
        _TEXTS,
        lambda some, _: _records(some, scorer, _units(some, tokenizer), missed),
        lambda record, text: record["text"] == text and record.keys() >= {"spans", "unscored"},
        "spans",
    )
    counts = _counted(file.path)
    counts.passing = len(missed)
    return counts


def toxic_units(scores: np.ndarray) -> np.ndarray:
    """Which words or tokens are to blame for toxic segments.

    A unit is toxic where both segments that hold it are, so that its neighbours are not; a toxic segment that this
    leaves without a toxic unit, such as a phrase of two harmless words, is toxic as a whole. Segments without a score
    count as neither.

    Args:
        scores: `[n + 1]` in [0, 1], NaN where there is none: of the first unit alone, of each unit with the next, and
            of the last alone. Above 0.5, a segment is toxic.

    Returns:
        `[n]` bool.
    """
    toxic, known = scores > TOXIC, ~np.isnan(scores)
    harmless = known & ~toxic
    blamed = (toxic[:-1] | toxic[1:]) & ~harmless[:-1] & ~harmless[1:]
    beside = np.concatenate([[False], blamed, [False]])
    unexplained = toxic & ~beside[:-1] & ~beside[1:]
    return blamed | unexplained[:-1] | unexplained[1:]


def _units(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase | None) -> list[np.ndarray]:
    """The words of each text, or its tokens: `[n, 2]` begin and end."""
    if tokenizer is None:
        rows = [[whole_characters(text, *found.span()) for found in _WORD.finditer(text)] for text in texts]
        return [np.array(row, np.int64).reshape(-1, 2) for row in rows]
    offsets = encode_windows(tokenizer, texts, _LONGEST, 0).offsets
    return [row[row[:, 0] < row[:, 1]] for row in offsets]


def _records(
    texts: Sequence[str], scorer: Scorer, units: Sequence[np.ndarray], missed: list[str]
) -> list[dict[str, Any]]:
    """The records of texts; those that may get another one another time are added to `missed`."""
    segments = [
        [text[start:end] for start, end in zip([*row[:1, 0], *row[:, 0]], [*row[:, 1], *row[-1:, 1]], strict=True)]
        for text, row in zip(texts, units, strict=True)
    ]
    distinct = list(dict.fromkeys(segment for row in segments for segment in row))
    scores = scorer.score(distinct) if distinct else None
    values = dict(zip(distinct, scores["TOXICITY"] if scores else (), strict=True))
    reasons = dict(zip(distinct, scores.reasons if scores else (), strict=True))
    passing = {segment for segment, reason in reasons.items() if reason is not None and reason.passing}
    missed += [text for text, row in zip(texts, segments, strict=True) if passing.intersection(row)]
    records = []
    for text, offsets, row in zip(texts, units, segments, strict=True):
        found = np.array([values[segment] for segment in row])
        blamed = toxic_units(found) if row else np.zeros(0, bool)
        spans = [[span.start, span.end] for span in spans_of(text, offsets, blamed.astype(float), 1.0)]
        records.append({"text": text, "spans": spans, "unscored": int(np.isnan(found).sum())})
    return records


def _counted(path: Path) -> SpanCounts:
    counts = SpanCounts()
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            counts.texts += 1
            counts.toxic += bool(record["spans"])
            counts.spans += len(record["spans"])
            counts.unscored += record["unscored"]
    return counts
