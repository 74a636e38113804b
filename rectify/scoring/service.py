"""What the server answers to a call: Perspective's methods on any scorer, without any transport."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rectify.errors import InvalidArgumentError, ScoringError, UnavailableError, WireError
from rectify.scoring.access import Access
from rectify.scoring.batching import Batcher
from rectify.scoring.scores import Reason, Scores
from rectify.scoring.sentences import sentence_spans
from rectify.scoring.wire import (
    ANALYZE_PATH,
    SUGGEST_PATH,
    AnalyzeRequest,
    AttributeScore,
    Span,
    analyze_response,
    decode_body,
    parse_analyze_request,
    parse_suggest_request,
    suggest_response,
)
from rectify.scoring.wire_errors import detection_error, empty_error, language_error, path_error

logger = logging.getLogger(__name__)

MAX_SPANS = 256


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        content: its JSON.
        status: of HTTP.
        headers: further ones of HTTP.
    """

    content: dict[str, Any] = field(repr=False)
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_error(cls, error: WireError) -> Reply:
        """An error as an answer."""
        return cls(error.body(), error.code, error.headers)

    @property
    def data(self) -> bytes:
        """The JSON encoded, all but ASCII escaped: what clients send may hold halves of surrogate pairs."""
        return json.dumps(self.content, allow_nan=False, separators=(",", ":")).encode("ascii")


class Service:
    """Perspective's methods.

    No text leaves it but to the scorer, and none is kept.

    Args:
        batcher: what scores.
        access: who may call.
        attributes: those that are scored.
        languages: those that are scored, the first one for requests that name none; `None` for any.
        time_limit: seconds until a call is given up.

    Raises:
        InvalidArgumentError: an argument is out of range.
    """

    def __init__(
        self,
        batcher: Batcher,
        access: Access,
        attributes: Sequence[str],
        languages: Sequence[str] | None = ("en",),
        time_limit: float = 60.0,
    ) -> None:
        if isinstance(languages, str) or (languages is not None and not languages):
            raise InvalidArgumentError(f"languages is {languages!r}: give some, as ('en',), or None for any")
        if not time_limit > 0:
            raise InvalidArgumentError(f"time_limit is {time_limit}: give seconds above 0")
        self.batcher, self.access, self.time_limit = batcher, access, time_limit
        self.attributes = tuple(attributes)
        self.languages = None if languages is None else tuple(languages)
        self._language = self.languages[0] if self.languages else "und"  # undetermined, in BCP 47's words

    async def answer(self, path: str, key: str, body: bytes) -> Reply:
        """Answer a call; what goes wrong is an answer too.

        Args:
            path: of the method.
            key: the API key, empty where there is none.
            body: JSON.
        """
        try:
            caller = self.access.enter(key)
            if path == ANALYZE_PATH:
                self.access.count(caller)
                return Reply(await self._analyze(body))
            if path == SUGGEST_PATH:
                suggestion = parse_suggest_request(decode_body(body), self.attributes, self.languages)
                return Reply(suggest_response(suggestion, self._effective(suggestion.languages)))
            raise path_error(path)
        except WireError as error:
            return Reply.of_error(error)
        except UnavailableError:
            return Reply.of_error(_unavailable("The service is currently unavailable."))
        except TimeoutError:
            return Reply.of_error(_late())
        except ScoringError:  # in the log already
            return Reply.of_error(_internal())
        except Exception as error:  # the server would log its message, which may hold a text
            place = "".join(traceback.format_tb(error.__traceback__)[-1:]).strip()
            logger.error("a call failed: %s, %s", type(error), place)
            return Reply.of_error(_internal())

    async def _analyze(self, body: bytes) -> dict[str, Any]:
        request = parse_analyze_request(decode_body(body), self.attributes, self.languages)
        language = self._effective(request.languages)
        if not request.thresholds:  # all of them were dropped
            return analyze_response(request, {}, language)
        spans = sentence_spans(request.text, MAX_SPANS) if request.span_annotations else []
        if len(spans) < 2:
            spans = []  # the score of the whole is that of its one sentence
        texts = [request.text, *(request.text[begin:end] for begin, end in spans)]
        async with asyncio.timeout(self.time_limit):
            scores = await self.batcher.score(texts, tuple(request.thresholds))
        found = {name: _attribute_score(name, request, scores, spans, language) for name in request.thresholds}
        return analyze_response(request, found, language)

    def _effective(self, languages: Sequence[str]) -> str:
        return languages[0] if languages else self._language


def _attribute_score(
    name: str, request: AnalyzeRequest, scores: Scores, spans: Sequence[tuple[int, int]], language: str
) -> AttributeScore:
    """The score of an attribute, for the whole text and its spans; a span that can have none is left out.

    Raises:
        WireError: there is no score of the whole, or for the moment none of a span.
    """
    whole, *parts = (float(value) for value in scores[name])
    found = []
    for value, reason, (begin, end) in zip(
        [whole, *parts], scores.reasons, [(0, len(request.text)), *spans], strict=True
    ):
        if not math.isnan(value):
            found.append(Span(begin, end, value))
        elif not found or reason is None or reason.passing:
            raise _reason_error(reason or Reason.SCORE_MISSING, request, name, language)
    return AttributeScore(whole, tuple(found[1:]))


def _reason_error(reason: Reason, request: AnalyzeRequest, attribute: str, language: str) -> WireError:
    """What Perspective would say where a scorer gives a reason in place of a score."""
    match reason:
        case Reason.COMMENT_EMPTY:
            return empty_error()
        case Reason.COMMENT_TOO_LONG:
            return WireError("Comment text too long.", "COMMENT_TOO_LONG")  # what its limit is, the scorer does not say
        case Reason.LANGUAGE_NOT_SUPPORTED:
            return language_error(attribute, request.languages or (language,))
        case Reason.LANGUAGE_DETECTION_FAILED:
            return detection_error()
        case Reason.RATE_LIMIT_EXCEEDED:
            message = "The quota that the scorer itself has is used up."
            return WireError(message, None, 429, "RESOURCE_EXHAUSTED", headers={"Retry-After": "60"})
        case Reason.TIMEOUT:
            return _late()
    if reason.passing:
        return _unavailable(f"The scorer gives no score at present ({reason}).")
    return WireError(f"The scorer cannot score this comment ({reason}).", "INVALID_REQUEST")


def _unavailable(message: str) -> WireError:
    return WireError(message, None, 503, "UNAVAILABLE", headers={"Retry-After": "1"})


def _late() -> WireError:
    return WireError("Deadline expired before operation could complete.", None, 504, "DEADLINE_EXCEEDED")


def _internal() -> WireError:
    return WireError("Internal error encountered.", None, 500, "INTERNAL")
