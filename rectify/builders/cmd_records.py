"""The records of self-detoxification data, from prompt to training example; each stage adds what it finds out.

A line of a stage's file is a JSON object with every field of the stage's record and `schema`, the version of all of
them; a line that lacks a field, or has one too many, is refused by name, so that no part of a pipeline can miss another
in silence.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from rectify.chain import Steps
from rectify.errors import shown
from rectify.json_files import parse_json
from rectify.text_lines import TextFile

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class ScoredPrompt:
    """A prompt and how toxic it is.

    Attributes:
        prompt: the text.
        toxicity: by the scorer, from 0 to 1; `None` where it could not tell.
        dropped: why the prompt is not in later stages; `None` for one that is.
    """

    prompt: str
    toxicity: float | None
    dropped: str | None = None


@dataclass(frozen=True, kw_only=True)
class SpannedPrompt(ScoredPrompt):
    """A prompt with its toxic spans.

    Attributes:
        toxic: whether it is to be masked and rephrased.
        spans: `[start, end, score]` of each span, in Python's places, end exclusive; none for a prompt that is not
            toxic.
    """

    toxic: bool
    spans: list[list[float]]


@dataclass(frozen=True, kw_only=True)
class MaskedPrompt(SpannedPrompt):
    """A prompt with `<MASK>` for what is toxic.

    Attributes:
        masked: `None` for a prompt that is not toxic.
    """

    masked: str | None


@dataclass(frozen=True, kw_only=True)
class RephrasedPrompt(MaskedPrompt):
    """A prompt with other words for what was toxic.

    Attributes:
        rephrased: `None` for a prompt that is not toxic.
        rephrased_toxicity: by the scorer.
        similarity: cosine of the prompt's and the rephrased text's embeddings; `None` where no gate asks.
        attempts: fillings that were tried.
    """

    rephrased: str | None
    rephrased_toxicity: float | None
    similarity: float | None
    attempts: int

    @property
    def steps(self) -> Steps:
        """What the chain says before the continuation."""
        return Steps(self.masked, self.rephrased)


@dataclass(frozen=True, kw_only=True)
class ContinuedPrompt(RephrasedPrompt):
    """A safe prompt with the target model's continuations.

    Attributes:
        continuations: the texts alone, with their leading space.
    """

    continuations: list[str]


@dataclass(frozen=True, kw_only=True)
class ScoredContinuations(ContinuedPrompt):
    """Continuations with scores.

    Attributes:
        continuation_toxicity: by the scorer, from 0 to 1; `None` where it could not tell, as of a blank text.
    """

    continuation_toxicity: list[float | None]


@dataclass(frozen=True, kw_only=True)
class ChainExample:
    """What a model is trained on: a prompt, the steps of its chain, and continuations to seek and to shun.

    Attributes:
        prompt: the text.
        masked, rephrased: see `Steps`; `None` for a prompt that is not toxic.
        positive: the continuation that the chain ends with, the least toxic one.
        negatives: toxic continuations, the most toxic one first; the contrastive loss has no effect without any.
    """

    prompt: str
    masked: str | None
    rephrased: str | None
    positive: str
    negatives: list[str]

    @property
    def steps(self) -> Steps:
        """What the chain says before the continuation."""
        return Steps(self.masked, self.rephrased)


Record = TypeVar("Record", bound=ScoredPrompt | ChainExample)


def to_json(record: ScoredPrompt | ChainExample) -> dict[str, Any]:
    """The JSON object of a record."""
    return {"schema": SCHEMA, **asdict(record)}


def read_records(path: str | Path, kind: type[Record]) -> Iterator[Record]:
    """The records of a stage's file.

    Raises:
        TrajectoryError: the file cannot be read, or a line, named by its number, is no record of this kind.
    """
    file = TextFile(Path(path), "records")
    for number, line in file.texts():
        try:
            yield _record(parse_json(line), kind)
        except ValueError as error:
            raise file.refusal(f"{error}: give a file written by `rectify build cmd`", number) from error


def _record(value: Any, kind: type[Record]) -> Record:
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        found = repr(value.get("schema")) if isinstance(value, dict) else "none"
        raise ValueError(f"its schema is {found}, not {SCHEMA}")
    given = {name: item for name, item in value.items() if name != "schema"}
    names = {each.name for each in fields(kind)}
    for name in sorted(names ^ given.keys()):
        raise ValueError(f"{kind.__name__} has {'no' if name in given else 'a'} field {name!r}")
    for name, hint in typing.get_type_hints(kind).items():
        if not _fits(given[name], hint):
            raise ValueError(f"{name} is {shown(given[name])}, no {hint}")
    return kind(**given)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a type: of `str`, `float`, `int`, `bool`, `None`, lists and unions of these."""
    if isinstance(hint, types.UnionType):
        return any(_fits(value, each) for each in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        (inner,) = typing.get_args(hint)
        return isinstance(value, list) and all(_fits(item, inner) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return type(value) is hint
