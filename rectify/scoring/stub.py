"""A stand-in for Perspective, for tests without a network: made-up scores, in process or over HTTP, with faults."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

import numpy as np
import requests
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from urllib3 import HTTPResponse

from rectify.errors import WireError
from rectify.scoring.scores import ATTRIBUTES, Scores, check_attributes, reason_against
from rectify.scoring.wire import (
    ANALYZE_PATH,
    AnalyzeRequest,
    AttributeScore,
    Span,
    analyze_response,
    key_error,
    parse_analyze_request,
    quota_error,
)

logger = logging.getLogger(__name__)


def pseudo_score(text: str, attribute: str) -> float:
    """A number in [0, 1) that depends on text and attribute alone, and says nothing of either."""
    digest = hashlib.sha256(f"{attribute}\0{text}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


class StubScorer:
    """A `Scorer` whose scores are made up, to try the machinery around scorers; it warns of that when it is made."""

    name = "stub"
    revision = "sha256"
    attributes: tuple[str, ...] = ATTRIBUTES

    def __init__(self) -> None:
        logger.warning(
            "the scorer 'stub' makes its numbers up: THEY MEAN NOTHING; give another one to measure anything"
        )

    def score(self, texts: Sequence[str], attributes: Sequence[str] = ("TOXICITY",)) -> Scores:
        """Made-up scores; see `Scorer.score`."""
        asked = check_attributes(self, attributes)
        reasons = tuple(reason_against(text) for text in texts)
        rows = [
            [np.nan if reason else pseudo_score(text, attribute) for attribute in asked]
            for text, reason in zip(texts, reasons, strict=True)
        ]
        return Scores(np.array(rows, dtype=np.float64).reshape(len(reasons), len(asked)), asked, reasons)


# ---------------------------------------------------------------------------------------------------------------------
# Faults


class FaultKind(StrEnum):
    """What can go wrong with one call."""

    RATE_LIMIT = "rate_limit"
    """HTTP 429; `seconds` is its `Retry-After`."""
    SERVER_ERROR = "server_error"
    """HTTP 500."""
    SLOW = "slow"
    """The right answer, `seconds` late; a timeout for whoever does not wait so long."""
    DROPPED = "dropped"
    """The connection ends without an answer."""
    TRUNCATED = "truncated"
    """The connection ends in the middle of the answer."""
    GARBAGE = "garbage"
    """An answer that is no JSON."""
    MISSING_ATTRIBUTE = "missing_attribute"
    """The answer lacks the first attribute that was asked for."""
    MISSING_SCORES = "missing_scores"
    """The answer has no `attributeScores`."""


@dataclass(frozen=True)
class Fault:
    """A fault of one call; what `seconds` are depends on the kind, and `None` is none of them."""

    kind: FaultKind
    seconds: float | None = None


Faults = Callable[[str, int], Fault | None]
"""The fault of a call, by its text and by how many calls came with that text before; `None` for a right answer."""


def random_faults(share: float, faults: Sequence[Fault], seed: int = 0) -> Faults:
    """Faults, each as often as another, in a share of the calls; the same ones whenever the same texts are sent."""

    def script(text: str, attempt: int) -> Fault | None:
        draw = pseudo_score(text, f"{seed} {attempt}")
        return faults[int(draw / share * len(faults))] if draw < share else None

    return script


def first_faults(*faults: Fault) -> Faults:
    """These faults one after another for each text, then right answers."""
    return lambda text, attempt: faults[attempt] if attempt < len(faults) else None


# ---------------------------------------------------------------------------------------------------------------------
# The service


@dataclass(frozen=True)
class StubReply:
    """What goes back over the wire.

    Attributes:
        status: of HTTP.
        body: its bytes.
        headers: beside the usual ones.
        delay: seconds until it goes.
        sent: how much of the body does; `None` for no answer at all.
    """

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    sent: int | None = None


class Service(Protocol):
    """What answers requests behind a transport of this module."""

    def answer(self, target: str, headers: Mapping[str, str], body: bytes) -> StubReply:
        """Answer a POST to a path and query."""


class StubService:
    """Answers requests as Perspective would, but with made-up scores and faults at will; without any transport.

    Args:
        faults: which calls go wrong, and how.
        key: the one that is accepted, as the header `X-Goog-Api-Key` or the parameter `key`; `None` for any or none.
        attributes: those that it knows.
        languages: those that it knows; `None` for any.

    Attributes:
        calls: how many calls came with each text.
        requests: the decoded bodies, as they came.
    """

    def __init__(
        self,
        faults: Faults | None = None,
        *,
        key: str | None = None,
        attributes: Collection[str] = ATTRIBUTES,
        languages: Collection[str] | None = None,
    ) -> None:
        self.faults, self.key, self.attributes, self.languages = faults, key, attributes, languages
        self.calls: Counter[str] = Counter()
        self.requests: list[Any] = []
        self._lock = threading.Lock()

    def answer(self, target: str, headers: Mapping[str, str], body: bytes) -> StubReply:
        """Answer a POST.

        Args:
            target: path and query.
            headers: looked up as `X-Goog-Api-Key`.
            body: JSON.
        """
        parts = urlsplit(target)
        try:
            if parts.path != ANALYZE_PATH:
                raise WireError(f"Method not found: {parts.path}", None, 404, "NOT_FOUND")
            given = headers.get("X-Goog-Api-Key") or parse_qs(parts.query).get("key", [""])[0]
            if self.key is not None and given != self.key:
                raise key_error()
            return self._answer(body)
        except WireError as error:
            return json_reply(error.code, error.body())

    def _answer(self, body: bytes) -> StubReply:
        try:
            record = json.loads(body)
        except ValueError:
            raise WireError("Invalid JSON payload received.", "INVALID_REQUEST") from None
        request = parse_analyze_request(record, self.attributes, self.languages)
        with self._lock:
            attempt = self.calls[request.text]
            self.calls[request.text] += 1
            self.requests.append(record)
        fault = self.faults(request.text, attempt) if self.faults else None
        language = request.languages[0] if request.languages else "en"
        answer = analyze_response(request, _made_up(request), language)
        if fault is not None and fault.kind is FaultKind.MISSING_ATTRIBUTE:
            answer.get("attributeScores", {}).pop(next(iter(request.thresholds)), None)
        if fault is not None and fault.kind is FaultKind.MISSING_SCORES:
            answer.pop("attributeScores", None)
        return reply_with(fault, answer)


def reply_with(fault: Fault | None, answer: Any) -> StubReply:
    """The reply of HTTP to a call that would be answered so, had it not this fault."""
    if fault is None:
        return json_reply(200, answer)
    match fault.kind:
        case FaultKind.RATE_LIMIT:
            after = {} if fault.seconds is None else {"Retry-After": f"{fault.seconds:g}"}
            return json_reply(429, quota_error(60).body(), headers=after)
        case FaultKind.SERVER_ERROR:
            return json_reply(500, WireError("Internal error encountered.", None, 500, "INTERNAL").body())
        case FaultKind.SLOW:
            return json_reply(200, answer, delay=fault.seconds or 0.0)
        case FaultKind.DROPPED:
            return StubReply(200, b"")
        case FaultKind.TRUNCATED:
            whole = json_reply(200, answer)
            return StubReply(200, whole.body, sent=len(whole.body) // 2)
        case FaultKind.GARBAGE:
            page = b"<html>Bad gateway</html>"
            return StubReply(200, page, sent=len(page))
    return json_reply(200, answer)


def json_reply(status: int, answer: Any, **changes: Any) -> StubReply:
    """A whole reply of JSON; `changes` are further fields of `StubReply`."""
    body = json.dumps(answer, ensure_ascii=False).encode()
    return StubReply(status, body, sent=len(body), **changes)


def _made_up(request: AnalyzeRequest) -> dict[str, AttributeScore]:
    text, scores = request.text, {}
    for attribute in request.thresholds:
        spans: tuple[Span, ...] = ()
        if request.span_annotations:
            spans = tuple(
                Span(found.start(), found.end(), pseudo_score(found.group(), attribute))
                for found in re.finditer(r"[^.!?]*[.!?]*\s*", text)
                if found.group()
            )
        scores[attribute] = AttributeScore(pseudo_score(text, attribute), spans)
    return scores


# ---------------------------------------------------------------------------------------------------------------------
# Transports


class StubAdapter(HTTPAdapter):
    """A transport for `requests` that answers in process: mount it, or give it to `PerspectiveScorer`.

    It waits for nothing: an answer later than the timeout is a timeout at once, any other comes at once.
    """

    def __init__(self, service: Service) -> None:
        super().__init__()
        self.service = service

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        verify: Any = True,
        cert: Any = None,
        proxies: Any = None,
    ) -> requests.Response:
        """Answer a prepared request."""
        body: Any = request.body or b""
        headers = CaseInsensitiveDict((name, str(value)) for name, value in request.headers.items())
        reply = self.service.answer(request.path_url, headers, body.encode() if isinstance(body, str) else body)
        longest = timeout[1] if isinstance(timeout, tuple) else timeout
        if longest is not None and reply.delay > longest:
            raise requests.ReadTimeout(f"no answer for {request.url}", request=request)
        if reply.sent is None:
            raise requests.ConnectionError(f"connection to {request.url} dropped", request=request)
        raw = HTTPResponse(
            body=io.BytesIO(reply.body[: reply.sent]),
            headers={"Content-Type": "application/json", "Content-Length": str(len(reply.body)), **reply.headers},
            status=reply.status,
            preload_content=False,
            request_method="POST",
        )
        return self.build_response(request, raw)


class StubServer:
    """A server on 127.0.0.1 for the time of a `with` block.

    Example:
        >>> with StubServer(StubService()) as server:
        ...     scores = PerspectiveScorer(endpoint=server.url, rate=100).score(["A text"])
    """

    def __init__(self, service: Service, port: int = 0) -> None:
        self._stopping = threading.Event()
        self._server = _Server(("127.0.0.1", port), _handler(service, self._stopping))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        """The base of its addresses."""

    def __enter__(self) -> StubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # clients may keep connections open
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: clients that do not wait for an answer are what it is made for."""


def _handler(service: Service, stopping: threading.Event) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one packet
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            headers = CaseInsensitiveDict(self.headers.items())
            reply = service.answer(self.path, headers, self.rfile.read(length))
            if reply.delay:
                stopping.wait(reply.delay)
            if reply.sent is None or reply.sent < len(reply.body):
                self.close_connection = True
            if reply.sent is None:
                return
            self.send_response(reply.status)
            self.send_header("Content-Type", "application/json; charset=UTF-8")
            self.send_header("Content-Length", str(len(reply.body)))
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(reply.body[: reply.sent])

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    return Handler
