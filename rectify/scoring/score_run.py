"""A run of a scorer over records: what comes in, what goes out, and where it goes on after an interruption."""

from __future__ import annotations

import hashlib
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rectify.command_line import say
from rectify.errors import InvalidArgumentError
from rectify.generation.output import GenerationFile
from rectify.json_files import json_line, sha256_of
from rectify.resumable import same_json
from rectify.scoring.records import ERROR, SCORES, VERDICT, Place, Record, at, read_records
from rectify.scoring.scores import Judge, Reason, Scorer, Scores, check_attributes, is_judge
from rectify.scoring.streams import gathered, parts
from rectify.text_files import TEXT_COLUMN

TOXIC = 0.5
"""A text counts as toxic from this score on."""


@dataclass(frozen=True)
class Inputs:
    """The records of a run; files are read anew each time, so that no more than a part is in memory.

    Attributes:
        files, texts: where they come from, one of the two.
        text_columns, pairs: see `read_records`.
    """

    files: tuple[str, ...]
    texts: tuple[str, ...]
    text_columns: tuple[str, ...] = (TEXT_COLUMN,)
    pairs: bool = False

    def __iter__(self) -> Iterator[Record]:
        if self.files:
            return read_records(self.files, self.text_columns, self.pairs)
        return map(Record.of, self.texts)

    @cached_property
    def total(self) -> int:
        """How many texts the records hold; every record is checked for it.

        Raises:
            InvalidArgumentError: a file is none that can be read several times.
            TrajectoryError: a record cannot be used; see `read_records`.
        """
        for file in self.files:
            if Path(file).exists() and not Path(file).is_file():
                raise InvalidArgumentError(f"FILE {file!r} is a folder or a pipe: give a file, as it is read twice")
        return sum(len(record.texts) for record in self)

    def digest(self) -> str:
        """SHA-256 of all that the records depend on."""
        contents = []
        for file in self.files:
            with open(file, "rb") as stream:
                contents.append([Path(file).suffix.lower(), hashlib.file_digest(stream, "sha256").hexdigest()])
        return sha256_of([contents, list(self.texts), list(self.text_columns)])


@dataclass
class Tally:
    """What a run comes to.

    Attributes:
        attributes: what was scored.
        judged: whether there are verdicts.
        texts: how many there were.
        failures: how many lack a score, by reason.
        flagged: how many verdicts flag a text, and how many do not.
        counts, totals, toxic: of each attribute how many scores, their sum, and how many of 0.5 or more.
    """

    attributes: tuple[str, ...]
    judged: bool = False
    texts: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    flagged: Counter[bool] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    totals: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    toxic: Counter[str] = field(default_factory=Counter)

    def add(self, record: Any, places: Sequence[Place]) -> None:
        """Count a record that holds scores."""
        for place in places:
            holder = at(record, place)
            self.texts += 1
            if ERROR in holder:
                self.failures[holder[ERROR]] += 1
            elif self.judged:
                self.flagged[holder[VERDICT]["flagged"]] += 1
            for attribute, value in holder.get(SCORES, {}).items():
                self.counts[attribute] += 1
                self.totals[attribute] += value
                self.toxic[attribute] += value >= TOXIC

    def is_scored(self, holder: Any) -> bool:
        """Whether what holds a text has all that such a run leaves there, as JSON values."""
        scores, error = holder.get(SCORES, {}), holder.get(ERROR)
        if not all(type(score) is float and math.isfinite(score) for score in scores.values()):
            return False
        if error is not None:
            return error in set(Reason) and scores.keys() <= set(self.attributes)
        return scores.keys() == set(self.attributes) and (not self.judged or VERDICT in holder)

    @property
    def passing(self) -> int:
        """How many texts lack a score that they may get another time."""
        return sum(count for reason, count in self.failures.items() if Reason(reason).passing)

    def lines(self, scorer: Scorer) -> list[str]:
        """What is said at the end."""
        failed = sum(self.failures.values())
        said = [f"texts: {self.texts}, {self.texts - failed} scored by {scorer.name} ({scorer.revision})"]
        for attribute in self.attributes:
            if count := self.counts[attribute]:
                mean, share = self.totals[attribute] / count, self.toxic[attribute] / count
                said.append(f"{attribute}: mean {mean:.4f}, {share:.2%} at {TOXIC} or above")
            else:
                said.append(f"{attribute}: no score")
        if verdicts := self.flagged.total():
            said.append(f"flagged: {self.flagged[True]} of {verdicts}, {self.flagged[True] / verdicts:.2%}")
        if failed:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.failures.most_common())
            said.append(f"without a score: {failed} ({reasons})")
        if self.passing:
            said.append(
                f"{self.passing} of them may get one another time: run again with the same cache and a new output"
            )
        return said


def scored_parts(
    records: Iterable[Record],
    scorer: Scorer,
    attributes: Sequence[str],
    batch_size: int = 256,
    progress: Callable[[int], Any] = lambda count: None,
) -> Iterator[list[tuple[Record, dict[str, Any]]]]:
    """Score records, some at a time; what a scorer that is a `Judge` says of each text goes beside the scores.

    Args:
        records: them.
        scorer: what scores their texts.
        attributes: what to score.
        batch_size: texts at a time, or those of one record where it has more.
        progress: told of how many more texts are scored.

    Yields:
        Some records, each with what `Record.scored` makes of it.

    Raises:
        UnknownAttributeError: an attribute is none of the scorer's.
    """
    asked = check_attributes(scorer, attributes)
    judge = scorer if is_judge(scorer) else None
    every = tuple(dict.fromkeys((*asked, *(judge.verdict_attributes if judge is not None else ()))))
    decisive = [every.index(name) for name in judge.verdict_attributes] if judge is not None else []
    for some in _parts_of(records, batch_size):
        texts = [text for record in some for text in record.texts]
        found = []
        for part in parts(scorer, texts, every, len(texts)):
            found += part
            progress(len(part))
        scores = gathered(found, len(texts), every)
        verdicts = [] if judge is None else _verdicts(judge, scores, decisive)
        done, start = [], 0
        for record in some:
            end = start + len(record.texts)
            values, reasons = scores.values[start:end, : len(asked)], scores.reasons[start:end]
            done.append((record, record.scored(asked, values, reasons, verdicts[start:end])))
            start = end
        yield done


def _verdicts(judge: Judge, scores: Scores, columns: list[int]) -> list[dict[str, Any] | None]:
    """What is said of each text that has all its scores."""
    return [
        judge.verdict(row[columns]) if reason is None else None
        for row, reason in zip(scores.values, scores.reasons, strict=True)
    ]


def _parts_of(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    some: list[Record] = []
    count = 0
    for record in records:
        if some and count + len(record.texts) > size:
            yield some
            some, count = [], 0
        some.append(record)
        count += len(record.texts)
    if some:
        yield some


def write_scores(
    inputs: Inputs, scorer: Scorer, attributes: Sequence[str], output: str | Path | None = None, batch_size: int = 256
) -> Tally:
    """Score all records and write them, to a file or to standard output; a file that was begun is gone on with.

    Args:
        inputs: the records.
        scorer: what scores them; a `CachedScorer`, so that a killed run pays twice for the calls in flight at most.
        attributes: what to score.
        output: the file; `None` for standard output.
        batch_size: texts at a time.

    Raises:
        TrajectoryError: a record cannot be used; then nothing is scored.
        InvalidArgumentError: the file is there and was begun otherwise.
        RectifyError: the scorer cannot go on.
    """
    total, asked = inputs.total, check_attributes(scorer, attributes)
    tally = Tally(asked, is_judge(scorer))
    records = iter(inputs)
    file = None
    if output is not None:
        settings = {"scorer": scorer.name, "revision": scorer.revision, "attributes": asked, "inputs": inputs.digest()}
        file = GenerationFile(output, settings)
        file.check(records, partial(_counted, tally))
        if file.done:
            say(f"output: {file.path} holds {tally.texts} of {total} texts; going on from there")
    with tqdm(total=total, initial=tally.texts, unit="text", disable=None) as progress:
        for part in scored_parts(records, scorer, asked, batch_size, progress.update):
            done = [value for _, value in part]
            if file is not None:
                file.append(done)
            else:
                sys.stdout.writelines(map(json_line, done))
                sys.stdout.flush()
            for record, value in part:
                tally.add(value, record.places)
    return tally


def _counted(tally: Tally, found: dict[str, Any], record: Record) -> bool:
    """Whether what a file holds is a record with scores; it is counted then."""
    if not same_json(*(_without_scores(value, record) for value in (found, record.value))):
        return False
    if not all(tally.is_scored(at(found, place)) for place in record.places):
        return False
    tally.add(found, record.places)
    return True


def _without_scores(value: Any, record: Record) -> dict[str, Any]:
    count = len(record.places)
    return replace(record, value=value).scored((), np.empty((count, 0)), [None] * count, [None] * count)
