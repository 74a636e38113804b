"""Perspective's wire format, for client, server and stub alike: requests, answers, and errors, without any transport.

Source: `conversationai/perspectiveapi` (methods and limits) and the API's discovery document, revision 20260504.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rectify.errors import WireError
from rectify.scoring.wire_errors import key_error, quota_error
from rectify.scoring.wire_requests import (
    ANALYZE_PATH,
    MAX_BYTES,
    SUGGEST_PATH,
    AnalyzeRequest,
    SuggestRequest,
    analyze_body,
    decode_body,
    parse_analyze_request,
    parse_suggest_request,
)

__all__ = [
    "ANALYZE_PATH",
    "MAX_BYTES",
    "SUGGEST_PATH",
    "AnalyzeRequest",
    "AttributeScore",
    "Span",
    "SuggestRequest",
    "Utf16",
    "WireError",
    "analyze_body",
    "analyze_response",
    "decode_body",
    "key_error",
    "parse_analyze_request",
    "parse_analyze_response",
    "parse_suggest_request",
    "quota_error",
    "suggest_response",
]


@dataclass(frozen=True)
class Span:
    """A score of a part of a text.

    Attributes:
        begin, end: places in the Python string, end exclusive.
        value: from 0 to 1.
    """

    begin: int
    end: int
    value: float


@dataclass(frozen=True)
class AttributeScore:
    """The score of the whole text, and of its spans."""

    value: float
    spans: tuple[Span, ...] = field(default=())


def analyze_response(request: AnalyzeRequest, scores: Mapping[str, AttributeScore], language: str) -> dict[str, Any]:
    """The JSON body of an answer. Attributes below their threshold are left out, and so is an empty list of them.

    Args:
        request: what is answered.
        scores: of each attribute that was asked for; one without spans gets one over the whole text.
        language: named as the detected one, and where the request names none.

    Raises:
        ValueError: a score is none from 0 to 1; no answer holds such a one.
    """
    places = Utf16(request.text)
    attributes = {}
    for name, threshold in request.thresholds.items():
        score = scores[name]
        summary = _score(score.value)
        if score.value < threshold:
            continue
        spans = score.spans or (Span(0, len(request.text), score.value),)
        attributes[name] = {
            "spanScores": [
                {"begin": places.units(span.begin), "end": places.units(span.end), "score": _score(span.value)}
                for span in spans
            ],
            "summaryScore": summary,
        }
    answer: dict[str, Any] = {"attributeScores": attributes} if attributes else {}
    answer["languages"] = list(request.languages) or [language]
    answer["detectedLanguages"] = [language]
    if request.client_token is not None:
        answer["clientToken"] = request.client_token
    return answer


def suggest_response(request: SuggestRequest, language: str) -> dict[str, Any]:
    """The JSON body of an answer to a suggestion; see `analyze_response`."""
    answer: dict[str, Any] = {} if request.client_token is None else {"clientToken": request.client_token}
    if request.languages:
        answer["requestedLanguages"] = list(request.languages)
    return answer | {"detectedLanguages": [language]}


_OWN = {"attributeScores", "languages", "detectedLanguages", "clientToken"}
"""What one of them at least is in each answer of Perspective's form."""


def parse_analyze_response(body: Any, text: str, attributes: Sequence[str]) -> dict[str, AttributeScore]:
    """The scores in an answer; attributes that it lacks are lacking.

    Raises:
        ValueError: the answer is not of Perspective's form, or holds a score outside [0, 1].
    """
    if not isinstance(body, dict) or "error" in body or not _OWN & body.keys():
        raise ValueError("no answer of Perspective's form")
    found = body.get("attributeScores", {})
    if not isinstance(found, dict):
        raise ValueError("no answer of Perspective's form")
    places = Utf16(text)
    scores = {}
    try:
        for name in attributes:
            if name not in found or "summaryScore" not in found[name]:
                continue
            spans = tuple(
                # places that are lacking are the text's own
                Span(*places.indices(span.get("begin", 0), span.get("end", places.end)), _value(span["score"]))
                for span in found[name].get("spanScores", ())
            )
            scores[name] = AttributeScore(_value(found[name]["summaryScore"]), spans)
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"no answer of Perspective's form ({error!r})") from error
    return scores


def _score(value: float) -> dict[str, Any]:
    if not 0 <= value <= 1:
        raise ValueError(f"the score {value!r} is none from 0 to 1")
    return {"value": float(value), "type": "PROBABILITY"}


def _value(score: dict[str, Any]) -> float:
    value = score["value"]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"the score {value!r} is none from 0 to 1")
    return float(value)


class Utf16:
    """Places in a text: Perspective counts UTF-16 code units, Python characters."""

    def __init__(self, text: str) -> None:
        self._starts: list[int] | None = None
        if max(text, default="") > "\uffff":
            self._starts = [0]
            for character in text:
                self._starts.append(self._starts[-1] + (2 if character > "\uffff" else 1))
        self.end = len(text) if self._starts is None else self._starts[-1]
        """How many there are in the text."""

    def units(self, index: int) -> int:
        """The UTF-16 place of a character's place."""
        return index if self._starts is None else self._starts[index]

    def index(self, units: int) -> int:
        """The character's place at a UTF-16 place; that of the character itself from inside a surrogate pair.

        Raises:
            ValueError: the place is outside the text.
        """
        if isinstance(units, bool) or not isinstance(units, int) or not 0 <= units <= self.end:
            raise ValueError(f"the place {units!r} is outside the text, which has {self.end} UTF-16 units")
        return units if self._starts is None else bisect_right(self._starts, units) - 1

    def indices(self, begin: int, end: int) -> tuple[int, int]:
        """The characters' places of a span; see `index`."""
        first, last = self.index(begin), self.index(end)
        if first > last:
            raise ValueError(f"the span from {begin} to {end} ends before it begins")
        return first, last
