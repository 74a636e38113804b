"""Training of QA moderation: records of questions and answers in BeaverTails' format, their split, and thresholds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from transformers import TrainingArguments

from rectify.detectors.moderation import CATEGORIES, TUNED, Pair, QAModeration, Template
from rectify.errors import TrajectoryError, first_line
from rectify.evaluation.moderation import flagged_figures, moderation_figures, tuned_thresholds
from rectify.extras import need_extra
from rectify.record_files import read_rows
from rectify.splits import alike, split_by_hash
from rectify.text_files import check_unicode
from rectify.training.detector import DetectorSettings, train_detector

_FORM = 'give records {"prompt": "…", "response": "…", "category": {"name": true, …}}'


class JudgedPair(NamedTuple):
    """A question and its answer, and of each category the share of annotators who saw it there, from 0 to 1."""

    pair: Pair
    labels: tuple[float, ...]

    @property
    def prompt(self) -> str:
        """What keeps pairs of one question together, however it is spaced or capitalised; see `prompt_key`."""
        return prompt_key(self.pair)


@dataclass
class ModerationSettings(DetectorSettings):
    """What is trained; each field is a flag of `rectify train moderation`."""

    max_length: int = field(default=512, metadata={"help": "tokens of a pair, of which longer ones are cut"})
    lora_r: int = field(default=8, metadata={"help": "rank of the adapter; 0: none, all weights are trained"})
    template: Template = field(
        default="beavertails",
        metadata={
            "help": "chat: the backbone's chat template; answer: the answer alone, to see what the question adds"
        },
    )

    def classifier_settings(self) -> dict[str, Any]:
        return super().classifier_settings() | {"template": self.template}


def train_moderation(
    settings: ModerationSettings,
    arguments: TrainingArguments,
    train: Sequence[JudgedPair],
    validation: Sequence[JudgedPair],
    categories: Sequence[str] = CATEGORIES,
) -> QAModeration:
    """Train a `QAModeration`, tune its thresholds on the validation pairs, and save it in `arguments.output_dir`.

    See `train_detector`. `training` of the configuration, and `all_results.json`, also get `truncated`, how many pairs
    were cut, and `flagged`: for each of the thresholds `flagged_figures` of the validation pairs, and with them
    `categories`, the `moderation_figures`.

    Raises:
        InvalidArgumentError, CheckpointError, RectifyError: as in `train_detector`.
    """

    def finish(moderation: QAModeration, probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        config, harmful = moderation.config, labels >= 0.5
        flags = np.asarray(harmful.any(-1))
        config.thresholds[TUNED] = dict(
            zip(config.labels, tuned_thresholds(probabilities, harmful).tolist(), strict=True)
        )
        values = {name: config.threshold_values(name) for name in config.thresholds}
        return {
            "truncated": moderation.truncated,
            "flagged": {
                name: flagged_figures(np.asarray((probabilities > value).any(-1)), flags)
                for name, value in values.items()
            },
            "categories": moderation_figures(config.labels, probabilities, harmful, values[TUNED]),
        }

    trained = train_detector(
        settings, arguments, train, validation, labels=categories, kind=QAModeration, finish=finish
    )
    return cast(QAModeration, trained)


# ---------------------------------------------------------------------------------------------------------------------
# Records


def read_judged_pairs(specs: Iterable[str]) -> tuple[list[JudgedPair], list[str]]:
    """The pairs of several places, and their categories.

    Args:
        specs: files of JSON lines, `.json` files of one JSON list, or `NAME:SPLIT` of data sets on the Hub, all with
            records of BeaverTails' fields `prompt`, `response` and `category`. `is_safe` is not read, as in the
            published code.

    Returns:
        Pairs in their order, and the names of the categories: the published order where they are the published ones,
        else that of the first record.

    Raises:
        TrajectoryError: a place cannot be read, or a record, which is named, is of another form.
        MissingExtraError: a data set of the Hub is asked for, and `datasets` is not installed.
    """
    categories: list[str] = []
    pairs = []
    for spec in specs:
        for place, record in _records(spec):
            pair, found = _judged(record, place)
            if not categories:
                categories = list(CATEGORIES) if set(found) == set(CATEGORIES) else list(found)
            if set(found) != set(categories):
                differing = min(set(found) ^ set(categories))
                raise TrajectoryError(
                    f"{place}: the categories are not those of the first record, as to {differing!r}: give records of "
                    "the same ones"
                )
            pairs.append(JudgedPair(pair, tuple(found[name] for name in categories)))
    return pairs, categories


def _records(spec: str) -> Iterator[tuple[str, Any]]:
    if Path(spec).exists() or Path(spec).suffix.lower() in (".json", ".jsonl"):
        yield from read_rows(spec)
        return
    name, _, split = spec.partition(":")
    need_extra("datasets", f"{spec!r} is no file here, but may be a data set of the Hub")
    import datasets

    try:
        records = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, RuntimeError) as error:
        raise TrajectoryError(
            f"{spec!r} is neither a file here nor NAME:SPLIT of a data set that the Hub gives ({first_line(error)}): "
            "check both, as PKU-Alignment/BeaverTails:30k_train"
        ) from error
    for number, record in enumerate(records):
        yield f"{spec}, record {number}", record


def _judged(record: Any, place: str) -> tuple[Pair, dict[str, float]]:
    fields = ("prompt", "response", "category")
    if not isinstance(record, dict) or not set(fields) <= set(record):
        there = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
        raise TrajectoryError(f"{place}: there is {there or 'nothing'}: {_FORM}")
    question, answer, category = (record[name] for name in fields)
    for name, text in (("prompt", question), ("response", answer)):
        if not isinstance(text, str):
            raise TrajectoryError(f"{place}: {name} is {text!r}, where a text should be: give a string")
        check_unicode(text, place)
    if not isinstance(category, dict) or not category:
        raise TrajectoryError(f"{place}: category is {category!r}: {_FORM}")
    for name, value in category.items():
        if not isinstance(value, bool | int | float) or not 0 <= value <= 1:
            raise TrajectoryError(f"{place}: {name!r} is {value!r}: give true, false or a number between 0 and 1")
    return Pair(question, answer), {name: float(value) for name, value in category.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Splits and votes


def prompt_key(pair: tuple[str, str]) -> str:
    """The question without regard to spaces and capitals; the answer where there is no question."""
    question, answer = pair
    return alike(question.strip() or answer)


def split_by_prompt(rows: Sequence[JudgedPair], share: float) -> tuple[list[JudgedPair], list[JudgedPair]]:
    """Training and validation pairs, all of a question on one side.

    BeaverTails' larger set repeats pairs, judged by other annotators, and has several answers to a question: of a split
    by rows nearly all validation pairs have been seen in training.

    Raises:
        InvalidArgumentError: `share`, that of validation, is not between 0 and 1.
    """
    return split_by_hash(rows, share, lambda row: row.prompt)


def without_prompts_of(rows: Sequence[JudgedPair], others: Sequence[JudgedPair]) -> list[JudgedPair]:
    """The pairs whose question none of the others has."""
    taken = {row.prompt for row in others}
    return [row for row in rows if row.prompt not in taken]


def joined_votes(rows: Sequence[JudgedPair]) -> list[JudgedPair]:
    """Each pair once, where it first is, its labels the mean of all that it has been given."""
    votes: dict[Pair, list[tuple[float, ...]]] = {}
    for row in rows:
        votes.setdefault(row.pair, []).append(row.labels)
    return [JudgedPair(pair, tuple(np.mean(labels, axis=0).tolist())) for pair, labels in votes.items()]
