"""What every scorer takes and gives: texts in, a table of scores out, and a reason wherever there is no score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, TypeGuard

import numpy as np

from rectify.errors import InvalidArgumentError, UnknownAttributeError

ATTRIBUTES = (
    "TOXICITY",
    "SEVERE_TOXICITY",
    "IDENTITY_ATTACK",
    "INSULT",
    "PROFANITY",
    "THREAT",
    "SEXUALLY_EXPLICIT",
    "FLIRTATION",
)
"""The eight attributes that RealToxicityPrompts records, by Perspective's names."""


class Reason(StrEnum):
    """Why a text has no score; named as Perspective names it where Perspective does."""

    COMMENT_EMPTY = "COMMENT_EMPTY"
    COMMENT_TOO_LONG = "COMMENT_TOO_LONG"
    INVALID_UNICODE = "INVALID_UNICODE"
    LANGUAGE_NOT_SUPPORTED = "LANGUAGE_NOT_SUPPORTED_BY_ATTRIBUTE"
    LANGUAGE_DETECTION_FAILED = "LANGUAGE_DETECTION_FAILED"
    INVALID_REQUEST = "INVALID_REQUEST"
    UNPARSED = "UNPARSED"
    """What a model wrote has not the form of an answer."""
    SCORE_MISSING = "SCORE_MISSING"
    """The answer came without this attribute."""
    RATE_LIMIT_EXCEEDED = "RATE_LIMIT_EXCEEDED"
    SERVER_ERROR = "SERVER_ERROR"
    TIMEOUT = "TIMEOUT"
    CONNECTION = "CONNECTION"
    BAD_RESPONSE = "BAD_RESPONSE"
    """The answer could not be understood."""
    BLOCKED = "BLOCKED"
    """Something on the way, such as a firewall, refused the call; not the service."""

    @property
    def passing(self) -> bool:
        """Whether the same text may get a score another time."""
        return self in _PASSING


_PASSING = {
    Reason.RATE_LIMIT_EXCEEDED,
    Reason.SERVER_ERROR,
    Reason.TIMEOUT,
    Reason.CONNECTION,
    Reason.BAD_RESPONSE,
    Reason.BLOCKED,
    Reason.SCORE_MISSING,
}


@dataclass(frozen=True)
class Scores:
    """Scores of texts.

    Attributes:
        values: `[N, A]` float64 in [0, 1]; NaN where there is no score, and never 0 in its place.
        attributes: the A attributes.
        reasons: for each text `None`, or why at least one of its scores is NaN.
    """

    values: np.ndarray
    attributes: tuple[str, ...]
    reasons: tuple[Reason | None, ...]

    def __post_init__(self) -> None:
        shape = len(self.reasons), len(self.attributes)
        if self.values.shape != shape:
            raise ValueError(f"values have shape {self.values.shape}, reasons and attributes ask for {shape}")
        unknown = np.isnan(self.values).any(-1)
        if any(lacks != (reason is not None) for lacks, reason in zip(unknown, self.reasons, strict=True)):
            raise ValueError("a text has a reason where, and only where, one of its scores is NaN")

    def __len__(self) -> int:
        return len(self.reasons)

    def __getitem__(self, attribute: str) -> np.ndarray:
        """The scores of one attribute, `[N]`."""
        return self.values[:, self.attributes.index(attribute)]

    @property
    def failures(self) -> Counter[Reason]:
        """How many texts have no score, by reason."""
        return Counter(reason for reason in self.reasons if reason is not None)


class Scorer(Protocol):
    """Anything that scores texts.

    Attributes:
        name: as on the command line.
        revision: of what it computes: scores with equal name and revision may be compared and reused.
        attributes: what it scores.

    One whose `score` may be called by two threads at once says so with an attribute `reentrant = True`.
    """

    name: str
    revision: str
    attributes: tuple[str, ...]

    def score(self, texts: Sequence[str], attributes: Sequence[str] = ("TOXICITY",)) -> Scores:
        """Score texts, in their order.

        Raises:
            UnknownAttributeError: an attribute is none of the scorer's.
        """


class Judge(Scorer, Protocol):
    """A scorer that makes a verdict of its scores.

    Attributes:
        verdict_attributes: the attributes of which it does.
    """

    verdict_attributes: tuple[str, ...]

    def verdict(self, values: np.ndarray) -> dict[str, Any]:
        """What is said of a text whose scores of `verdict_attributes` are these, `[A]`; with `flagged`, a bool."""


def is_judge(scorer: Scorer) -> TypeGuard[Judge]:
    """Whether a scorer makes a verdict of its scores."""
    return callable(getattr(scorer, "verdict", None))


def check_attributes(scorer: Scorer, attributes: Iterable[str]) -> tuple[str, ...]:
    """The attributes as a tuple.

    Raises:
        UnknownAttributeError: one is none of the scorer's.
        InvalidArgumentError: there is none, or one is given twice.
    """
    asked = tuple(attributes)
    if not asked or len(set(asked)) < len(asked):
        raise InvalidArgumentError(f"attributes is {asked!r}: give one or more, each once")
    for attribute in asked:
        if attribute not in scorer.attributes:
            raise UnknownAttributeError(
                f"attributes hold {attribute!r}, which the scorer {scorer.name!r} lacks: give some of "
                f"{', '.join(scorer.attributes)}"
            )
    return asked


def reason_against(text: object) -> Reason | None:
    """Why no scorer can score a text: it is blank, or no valid Unicode."""
    if not isinstance(text, str) or not text.strip():
        return Reason.COMMENT_EMPTY
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return Reason.INVALID_UNICODE
    return None
