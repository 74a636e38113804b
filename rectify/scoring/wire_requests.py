"""Requests of Perspective's wire format: making, decoding and checking them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, NoReturn, TypeGuard

from rectify.errors import WireError
from rectify.scoring.wire_errors import (
    context_error,
    empty_error,
    field_error,
    language_error,
    length_error,
    missing_attributes_error,
    payload_error,
    score_type_error,
    text_type_error,
    unknown_attribute_error,
    unknown_field_error,
)

MAX_BYTES = 20_480
ANALYZE_PATH = "/v1alpha1/comments:analyze"
SUGGEST_PATH = "/v1alpha1/comments:suggestscore"
_MAX_BRACKETS = 2**16  # the longest text has a third of them; half a million of objects take as many seconds
_MAX_LANGUAGES = 100

_COMMON = {"comment", "context", "languages", "communityId", "sessionId", "clientToken"}
_ANALYZE = _COMMON | {"requestedAttributes", "doNotStore", "spanAnnotations", "dropUnsupportedAttributes"}
_SUGGEST = _COMMON | {"attributeScores"}
_KINDS = {dict: "TYPE_MESSAGE", list: "TYPE_REPEATED", str: "TYPE_STRING", bool: "TYPE_BOOL"}


@dataclass(frozen=True)
class AnalyzeRequest:
    """A checked request.

    Attributes:
        text: the comment.
        thresholds: for each attribute that was asked for, the least score to be answered.
        languages: as asked for; empty where the client leaves it to the server.
        span_annotations: whether each span is scored by itself.
        client_token: given back as it came.
    """

    text: str
    thresholds: dict[str, float]
    languages: tuple[str, ...] = ()
    span_annotations: bool = False
    client_token: str | None = None


@dataclass(frozen=True)
class SuggestRequest:
    """A checked suggestion of what a text should have scored; see `AnalyzeRequest`."""

    text: str
    languages: tuple[str, ...] = ()
    client_token: str | None = None


def analyze_body(
    text: str,
    attributes: Sequence[str],
    *,
    languages: Sequence[str] = ("en",),
    do_not_store: bool = True,
    span_annotations: bool = False,
) -> dict[str, Any]:
    """The JSON body of a request."""
    body: dict[str, Any] = {
        "comment": {"text": text, "type": "PLAIN_TEXT"},
        "requestedAttributes": {attribute: {} for attribute in attributes},
        "doNotStore": do_not_store,
        "spanAnnotations": span_annotations,
    }
    if languages:
        body["languages"] = list(languages)
    return body


# a string, with or without its end, or the bare name of a member; each is tried once from its first character on
_STRING_OR_NAME = re.compile(r'("(?:[^"\\]|\\.)*+"?)|(?<!\w)([A-Za-z_]\w*+)(?=\s*+:)', re.DOTALL)


def decode_body(data: bytes | bytearray) -> Any:
    """The JSON of a request's body; names of members may lack their quotes, as in Perspective's own examples.

    Raises:
        WireError: it is no JSON, or holds far more objects than any request.
    """
    if data.count(b"[") + data.count(b"{") > _MAX_BRACKETS:
        raise payload_error("It holds too many objects.")
    try:
        return json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError):
        pass
    try:
        text = _STRING_OR_NAME.sub(lambda found: found[1] or f'"{found[2]}"', data.decode("utf-8"))
        return json.loads(text, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        raise payload_error(f"{error.msg} at character {error.pos}.") from None
    except (ValueError, RecursionError):
        raise payload_error("It is no JSON of valid UTF-8.") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def parse_analyze_request(
    body: Any, attributes: Collection[str], languages: Collection[str] | None = None
) -> AnalyzeRequest:
    """Check a request as Perspective does.

    Args:
        body: the decoded JSON.
        attributes: those that the server scores.
        languages: those that it scores them in; `None` for any.

    Raises:
        WireError: the request is refused.
    """
    record = _object(body, _ANALYZE)
    text, asked_languages, token = _common(record)
    requested = _typed(record, "requestedAttributes", dict, {})
    spans = _typed(record, "spanAnnotations", bool, False)
    drop = _typed(record, "dropUnsupportedAttributes", bool, False)
    _typed(record, "doNotStore", bool, False)
    if not requested:
        raise missing_attributes_error()
    thresholds = {attribute: _threshold(attribute, settings, attributes) for attribute, settings in requested.items()}
    _check_text(text)
    foreign = _foreign(asked_languages, languages)
    if foreign and not drop:
        raise language_error(next(iter(thresholds)), foreign)
    return AnalyzeRequest(text, {} if foreign else thresholds, asked_languages, spans, token)


def parse_suggest_request(
    body: Any, attributes: Collection[str], languages: Collection[str] | None = None
) -> SuggestRequest:
    """Check a suggestion as Perspective does; see `parse_analyze_request`."""
    record = _object(body, _SUGGEST)
    text, asked_languages, token = _common(record)
    suggested = _typed(record, "attributeScores", dict, {})
    if not suggested:
        raise WireError("Missing attribute_scores", "INVALID_REQUEST")
    for attribute, settings in suggested.items():
        if attribute not in attributes:
            raise unknown_attribute_error(attribute)
        place = f"attribute_scores[{attribute}]"
        scores = _object(settings, {"summaryScore", "spanScores"}, place)
        spans = _typed(scores, "spanScores", list, [], place)
        summary = _typed(scores, "summaryScore", dict, {}, place)
        if not spans and not summary:
            raise WireError(f"Missing scores of attribute {attribute}", "INVALID_REQUEST")
        for span in spans:
            _object(span, {"begin", "end", "score"}, f"{place}.span_scores")
            if not {"begin", "end", "score"} <= span.keys():
                raise field_error(f"{place}.span_scores", "TYPE_MESSAGE")
        for score in [*([summary] if summary else []), *(span["score"] for span in spans)]:
            value = _object(score, {"value", "type"}, f"{place}.score").get("value")
            if not _is_number(value) or not 0 <= value <= 1:
                raise field_error(f"{place}.score.value", "TYPE_FLOAT")
    _check_text(text)
    foreign = _foreign(asked_languages, languages)
    if foreign:
        raise language_error(next(iter(suggested)), foreign)
    return SuggestRequest(text, asked_languages, token)


def _common(record: dict[str, Any]) -> tuple[str, tuple[str, ...], str | None]:
    """Text, languages and token of a request of either kind."""
    comment = _object(_typed(record, "comment", dict, {}), {"text", "type"}, "comment")
    text = _typed(comment, "text", str, "", "comment")
    kind = _typed(comment, "type", str, "PLAIN_TEXT", "comment")
    if kind not in ("PLAIN_TEXT", "TEXT_TYPE_UNSPECIFIED"):
        raise text_type_error(kind)
    context = _object(_typed(record, "context", dict, {}), {"entries", "articleAndParentComment"}, "context")
    if context.get("entries") and context.get("articleAndParentComment"):
        raise context_error()
    languages = tuple(_typed(record, "languages", list, []))
    if len(languages) > _MAX_LANGUAGES or not all(isinstance(language, str) for language in languages):
        raise field_error("languages", "TYPE_STRING")
    for name in ("communityId", "sessionId"):
        _typed(record, name, str, "")
    return text, languages, _typed(record, "clientToken", str, None)


def _threshold(attribute: str, settings: Any, attributes: Collection[str]) -> float:
    if attribute not in attributes:
        raise unknown_attribute_error(attribute)
    place = f"requested_attributes[{attribute}]"
    settings = _object(settings, {"scoreType", "scoreThreshold"}, place)
    score_type = _typed(settings, "scoreType", str, "PROBABILITY", place)
    if score_type not in ("PROBABILITY", "SCORE_TYPE_UNSPECIFIED"):
        raise score_type_error(score_type, attribute)
    threshold = settings.get("scoreThreshold")
    if threshold is None:
        return 0.0
    if not _is_number(threshold):
        raise field_error(f"{place}.score_threshold", "TYPE_FLOAT")
    return float(threshold)


def _check_text(text: str) -> None:
    if not text.strip():
        raise empty_error()
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise field_error("comment.text", "TYPE_STRING") from None
    if size > MAX_BYTES:
        raise length_error(size, MAX_BYTES)


def _foreign(asked: Sequence[str], known: Collection[str] | None) -> list[str]:
    """The languages that are not known: a known one may name a region (en-US), but no script (ja-Latn)."""
    if known is None:
        return []
    bases = {language: re.fullmatch(r"([A-Za-z]{2,3})(?:[-_](?:[A-Za-z]{2}|\d{3}))?", language) for language in asked}
    return [
        language
        for language, base in bases.items()
        if language not in known and (base is None or base[1].lower() not in known)
    ]


def _is_number(value: Any) -> TypeGuard[float]:
    """Whether a JSON value is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _object(value: Any, names: AbstractSet[str], place: str = "") -> dict[str, Any]:
    """A JSON object with the names of its members in camel case, which clients may write in snake case too."""
    if not isinstance(value, dict):
        raise field_error(place, "TYPE_MESSAGE") if place else payload_error("Expected an object.")
    if value.keys() <= names:
        return value
    record = {}
    for name, member in value.items():
        camel = re.sub("_([a-z])", lambda found: found[1].upper(), name)
        if camel not in names:
            raise unknown_field_error(name, place)
        record[camel] = member
    return record


def _typed(record: dict[str, Any], name: str, kind: type, default: Any, place: str = "") -> Any:
    value = record.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        snake = re.sub("([A-Z])", lambda found: f"_{found[1].lower()}", name)
        raise field_error(f"{place}.{snake}" if place else snake, _KINDS[kind])
    return value
