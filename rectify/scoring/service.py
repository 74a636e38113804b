"""What the server answers to a call: Perspective's methods on any scorer, without any transport."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rectify.errors import InvalidArgumentError, ScoringError, UnavailableError, WireError
from rectify.scoring.access import Access
from rectify.scoring.batching import Batcher, Flow
from rectify.scoring.failures import kind_and_place
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
from rectify.scoring.wire_errors import (
    detection_error,
    empty_error,
    internal_error,
    language_error,
    path_error,
    size_error,
    unavailable_error,
)

logger = logging.getLogger(__name__)

MAX_SPANS = 256
MAX_BODY = 2**20
"""Bytes of a call; the longest text, with every character escaped, has an eighth of them."""
_QUICKLY_READ = 2**15

Result = TypeVar("Result")


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
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self._language = self.languages[0] if self.languages else "und"  # undetermined, in BCP 47's words

    def admit(self, key: str) -> None:
        """Refuse whoever may not call now, before anything else of a call is read.

        Raises:
            WireError: the key is missing or wrong, or its quota is used up.
        """
        self.access.count(self.access.enter(key), calls=0)

    async def answer(self, path: str, key: str, body: bytes | bytearray, flow: Flow | None = None) -> Reply:
        """Answer a call, which counts whatever is wrong with it; what goes wrong is an answer too.

        Args:
            path: of the method.
            key: the API key, empty where there is none.
            body: JSON.
            flow: what the call came with; by default it came alone.
        """
        try:
            self.access.count(self.access.enter(key))
            if path not in (ANALYZE_PATH, SUGGEST_PATH):
                raise path_error(path)
            if len(body) > MAX_BODY:
                raise size_error(MAX_BODY)
            now = asyncio.get_running_loop().time()
            deadline = min(now + self.time_limit, math.inf if flow is None else flow.deadline)
            if now > deadline:
                raise TimeoutError
            async with asyncio.timeout_at(deadline):
                record = await self.read(decode_body, body)
                if path == ANALYZE_PATH:
                    return Reply(await self._analyze(record, flow))
                suggestion = parse_suggest_request(record, self.attributes, self.languages)
                return Reply(suggest_response(suggestion, self._effective(suggestion.languages)))
        except WireError as error:
            return Reply.of_error(error)
        except UnavailableError:
            return Reply.of_error(unavailable_error())
        except TimeoutError:
            return Reply.of_error(_late())
        except ScoringError:  # in the log already
            return Reply.of_error(internal_error())
        except Exception as error:  # the server would log its message, which may hold a text
            logger.error("a call failed: %s", kind_and_place(error))
            return Reply.of_error(internal_error())

    async def read(self, reader: Callable[[bytes | bytearray], Result], body: bytes | bytearray) -> Result:
        """Give what a reader makes of a body; the event loop does not wait for long ones."""
        if len(body) <= _QUICKLY_READ:
            return reader(body)
        return await asyncio.get_running_loop().run_in_executor(self._reader, reader, body)

    async def close(self) -> None:
        """Take no more calls."""
        self._reader.shutdown(wait=False, cancel_futures=True)
        await self.batcher.close()

    async def _analyze(self, record: Any, flow: Flow | None) -> dict[str, Any]:
        request = parse_analyze_request(record, self.attributes, self.languages)
        language = self._effective(request.languages)
        if not request.thresholds:  # all of them were dropped
            return analyze_response(request, {}, language)
        spans = sentence_spans(request.text, MAX_SPANS) if request.span_annotations else []
        if len(spans) < 2:
            spans = []  # the score of the whole is that of its one sentence
        texts = [request.text, *(request.text[begin:end] for begin, end in spans)]
        scores = await self.batcher.score(texts, tuple(request.thresholds), flow)
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
        return unavailable_error(f"The scorer gives no score at present ({reason}).")
    return WireError(f"The scorer cannot score this comment ({reason}).", "INVALID_REQUEST")


def _late() -> WireError:
    return WireError("Deadline expired before operation could complete.", None, 504, "DEADLINE_EXCEEDED")
