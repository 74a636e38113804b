"""The server: a Starlette application that speaks the Perspective API's format in front of any scorer."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rectify.errors import WireError
from rectify.scoring.access import Access
from rectify.scoring.batching import Batcher, Flow
from rectify.scoring.bodies import Intake
from rectify.scoring.discovery import VERSION, discovery_document
from rectify.scoring.failures import kind_and_place
from rectify.scoring.http_batch import InnerCall, first_key, format_batch, key_of_query, parse_batch
from rectify.scoring.page import PAGE_POLICY, page
from rectify.scoring.public_address import check_origin, check_public_url, own_url
from rectify.scoring.scores import Scorer, check_attributes
from rectify.scoring.service import MAX_BODY, Reply, Service
from rectify.scoring.wire import ANALYZE_PATH, SUGGEST_PATH
from rectify.scoring.wire_errors import internal_error, method_error, path_error, two_lengths_error, unavailable_error

__all__ = ["GONE", "MAX_BATCH_BODY", "MAX_BODY", "TASK", "make_app"]

logger = logging.getLogger(__name__)

MAX_BATCH_BODY = 2**23
TASK, GONE = "rectify.task", "rectify.gone"
"""In the scope of a request: the task that answers it, and whether nobody waits for the answer any more."""
_CALLS_AT_ONCE = 16  # of a batch, so that no batch fills the queue of the scorer
_REST_SECONDS = 5.0
_QUERY = "rectify.query"
_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


def make_app(
    scorer: Scorer,
    *,
    attributes: Sequence[str] | None = None,
    languages: Sequence[str] | None = ("en",),
    api_keys: Sequence[str] = (),
    quota_per_minute: int | None = None,
    max_batch: int = 64,
    max_delay: float = 0.002,
    time_limit: float = 60.0,
    cors: Sequence[str] = (),
    public_url: str | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Starlette:
    """The server as an ASGI application. It keeps and logs no text and no key.

    Args:
        scorer: called by one thread at a time.
        attributes: those that are answered; by default all of the scorer's.
        languages: those that are answered, the first one for requests that name none; `None` for any.
        api_keys: those that are accepted, as the parameter `key` or the header `X-Goog-Api-Key`; none to take any.
        quota_per_minute: calls of each key, or of all callers together where there are no keys; `None` for no limit.
        max_batch, max_delay: texts in a batch of the scorer's, and seconds that one waits to be filled.
        time_limit: seconds until a call, or a batch of calls, is given up.
        cors: origins of other sites whose pages may call, as `"https://app.example"`; `"*"` for any.
        public_url: where clients reach the server, for the discovery document; by default it is where they did.
        clock: seconds, never going back; for tests.

    Raises:
        InvalidArgumentError: an argument is out of range.
        UnknownAttributeError: the scorer lacks an attribute.

    Example:
        >>> import uvicorn
        >>> from rectify.scoring.connections import patient_protocol
        >>> from rectify.scoring.load import load_scorer
        >>> from rectify.scoring.server import make_app
        >>> uvicorn.run(make_app(load_scorer("pocket")), http=patient_protocol(), ws="none")  # doctest: +SKIP
    """
    asked = check_attributes(scorer, scorer.attributes if attributes is None else attributes)
    batcher = Batcher(scorer, max_batch=max_batch, max_delay=max_delay)
    access = Access(api_keys, quota_per_minute, clock)
    service = Service(batcher, access, asked, languages, time_limit)
    endpoints = _Endpoints(scorer, service, None if public_url is None else check_public_url(public_url))
    origins = [check_origin(origin) for origin in cors]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await service.close()

    app = Starlette(
        routes=[
            Route(ANALYZE_PATH, endpoints.call, methods=["POST"]),
            Route(SUGGEST_PATH, endpoints.call, methods=["POST"]),
            Route("/batch", endpoints.batch, methods=["POST"]),
            Route("/$discovery/rest", endpoints.discovery),
            Route("/healthz", endpoints.health),
            Route("/", endpoints.page),
        ],
        middleware=[
            *([Middleware(CORSMiddleware, **_cross_origin(origins))] if origins else []),
            Middleware(_QueryTaken),
            Middleware(_Guard),
        ],
        exception_handlers={HTTPException: _refuse},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


def _cross_origin(origins: Sequence[str]) -> dict[str, Any]:
    """The settings of CORS: no credentials but keys, which pages of other sites must know themselves."""
    # a site in the internet that calls a server on the person's own machine, where starlette knows of it
    private = "allow_private_network" in inspect.signature(CORSMiddleware).parameters
    return {
        **({"allow_private_network": True} if private else {}),
        "allow_origins": origins,
        "allow_methods": ["GET", "HEAD", "POST"],
        "allow_headers": ["*"],  # Google's clients for browsers send many of their own
        "expose_headers": ["Retry-After"],
    }


class _QueryTaken:
    """Takes the query, where clients put their key, out of the scope, of which servers make their access logs."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope[_QUERY], scope["query_string"] = scope["query_string"], b""
        await self.app(scope, receive, send)


class _Guard:
    """Answers what goes wrong anywhere below: the server would log the message of the error, which may hold a text.

    An answer that goes out before the body has come is finished only when the rest has come too, or some seconds have
    passed: were the connection closed at once, the client might never see it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope[TASK] = asyncio.current_task()
        names = {name for name, _ in scope["headers"]}
        lengths = names & {b"content-length", b"transfer-encoding"}
        coming = bool(lengths)
        # a client that waits for leave to send its body, and gets an answer instead, may yet send it: as a next request
        waiting = b"expect" in names
        answered = False

        async def hear() -> Message:
            nonlocal coming, waiting
            waiting = False
            message = await receive()
            coming = message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def tell(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                if coming and waiting:
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            elif coming and not waiting and not message.get("more_body", False):
                await send({**message, "more_body": True})
                with suppress(TimeoutError):
                    async with asyncio.timeout(_REST_SECONDS):
                        while coming:
                            await hear()
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        try:
            if len(lengths) > 1:  # a proxy on the way may have taken the other, and what follows for another request
                await _response(Reply.of_error(two_lengths_error()))(scope, hear, tell)
            else:
                await self.app(scope, hear, tell)
        except asyncio.CancelledError:  # the server ends, or the client has gone
            if scope.get(GONE):
                return
            if not answered:
                coming = False
                await _response(Reply.of_error(unavailable_error()))(scope, hear, tell)
            raise
        except Exception as error:  # whatever it is
            logger.error("a request failed: %s", kind_and_place(error))
            if not answered:
                await _response(Reply.of_error(internal_error()))(scope, hear, tell)


class _Endpoints:
    def __init__(self, scorer: Scorer, service: Service, public_url: str | None) -> None:
        self.scorer, self.service, self.public_url = scorer, service, public_url
        self.intake = Intake()

    async def call(self, request: Request) -> Response:
        """One call."""
        key = _key(request)
        try:
            self.service.admit(key)
            async with self.intake.body(request, MAX_BODY) as body:
                return _response(await self.service.answer(request.scope["path"], key, body))
        except WireError as error:
            return _response(Reply.of_error(error))

    async def batch(self, request: Request) -> Response:
        """Calls in Google's batch format; each has a key of its own, and counts by itself."""
        outer, kind = _key(request), request.headers.get("Content-Type", "")
        try:
            check = None
            if outer or not self.service.access.needs_key:
                self.service.admit(outer)
            else:  # Google's client puts the key into the calls only
                check = lambda beginning: self.service.admit(first_key(kind, beginning))  # noqa: E731
            async with self.intake.body(request, MAX_BATCH_BODY, check) as body:
                calls = await self.service.read(functools.partial(parse_batch, kind), body)
                body.clear()
                answers = await self._answers(calls, outer)
        except WireError as error:
            return _response(Reply.of_error(error))
        media_type, content = format_batch(calls, answers)
        return Response(content, media_type=media_type, headers=_HEADERS)

    async def _answers(self, calls: Sequence[InnerCall], outer: str) -> list[tuple[int, bytes]]:
        """Status and JSON of each."""
        flow = Flow(asyncio.get_running_loop().time() + self.service.time_limit)
        answers = [(0, b"")] * len(calls)

        async def work(numbered: Iterator[tuple[int, InnerCall]]) -> None:
            for number, call in numbered:
                reply = await self.service.answer(call.path, call.key or outer, call.body, flow)
                answers[number] = reply.status, reply.data
                await asyncio.sleep(0)  # an answer without a score waits for nothing

        numbered = iter(enumerate(calls))  # of which each takes the next
        await asyncio.gather(*(work(numbered) for _ in range(_CALLS_AT_ONCE)))
        return answers

    async def discovery(self, request: Request) -> Response:
        """What Google's clients make themselves of."""
        if f"version={VERSION}" not in _query(request).split("&"):
            return _response(Reply.of_error(WireError("Discovery document not found.", None, 404, "NOT_FOUND")))
        url = self.public_url or own_url(request.scope, request.headers.get("Host", ""))
        return _response(Reply(discovery_document(url)))

    async def health(self, request: Request) -> Response:
        """What the server is."""
        scorer = {"name": self.scorer.name, "revision": self.scorer.revision}
        return _response(Reply({"status": "ok", "scorer": scorer, "attributes": list(self.service.attributes)}))

    async def page(self, request: Request) -> Response:
        """A page for people."""
        content = page(
            f"{self.scorer.name}, revision {self.scorer.revision}",
            self.service.attributes,
            self.service.access.needs_key,
        )
        return Response(content, media_type="text/html", headers=_HEADERS | {"Content-Security-Policy": PAGE_POLICY})


def _query(request: Request) -> str:
    return request.scope[_QUERY].decode("latin-1")


def _key(request: Request) -> str:
    return request.headers.get("X-Goog-Api-Key") or key_of_query(_query(request))


def _response(reply: Reply) -> Response:
    return Response(
        reply.data, reply.status, {**_HEADERS, **reply.headers}, media_type="application/json; charset=UTF-8"
    )


async def _refuse(request: Request, error: Exception) -> Response:
    """What is asked for is not there."""
    allowed = getattr(error, "headers", None) or {}
    if "Allow" in allowed:
        return _response(Reply.of_error(method_error(request.method, allowed["Allow"])))
    return _response(Reply.of_error(path_error(request.scope["path"])))
