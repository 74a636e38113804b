"""The server: a Starlette application that speaks the Perspective API's format in front of any scorer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from urllib.parse import parse_qs

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from rectify.errors import WireError
from rectify.scoring.access import Access
from rectify.scoring.batching import Batcher
from rectify.scoring.discovery import VERSION, discovery_document
from rectify.scoring.http_batch import format_batch, parse_batch
from rectify.scoring.page import PAGE_POLICY, page
from rectify.scoring.scores import Scorer, check_attributes
from rectify.scoring.service import Reply, Service
from rectify.scoring.wire import ANALYZE_PATH, SUGGEST_PATH
from rectify.scoring.wire_errors import method_error, path_error, size_error

MAX_BODY = 2**20
MAX_BATCH_BODY = 2**23
_BODY_SECONDS = 30.0
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
        time_limit: seconds until a call is given up.
        clock: seconds, never going back; for tests.

    Raises:
        InvalidArgumentError: an argument is out of range.
        UnknownAttributeError: the scorer lacks an attribute.

    Example:
        >>> import uvicorn
        >>> from rectify.scoring.load import load_scorer
        >>> from rectify.scoring.server import make_app
        >>> uvicorn.run(make_app(load_scorer("pocket")), port=8000)  # doctest: +SKIP
    """
    asked = check_attributes(scorer, scorer.attributes if attributes is None else attributes)
    batcher = Batcher(scorer, max_batch=max_batch, max_delay=max_delay)
    access = Access(api_keys, quota_per_minute, clock)
    endpoints = _Endpoints(scorer, Service(batcher, access, asked, languages, time_limit))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await batcher.close()

    app = Starlette(
        routes=[
            Route(ANALYZE_PATH, endpoints.call, methods=["POST"]),
            Route(SUGGEST_PATH, endpoints.call, methods=["POST"]),
            Route("/batch", endpoints.batch, methods=["POST"]),
            Route("/$discovery/rest", endpoints.discovery),
            Route("/healthz", endpoints.health),
            Route("/", endpoints.page),
        ],
        middleware=[Middleware(_QueryTaken)],
        exception_handlers={HTTPException: _refuse},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


class _QueryTaken:
    """Takes the query, where clients put their key, out of the scope, of which servers make their access logs."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope[_QUERY], scope["query_string"] = scope["query_string"], b""
        await self.app(scope, receive, send)


class _Endpoints:
    def __init__(self, scorer: Scorer, service: Service) -> None:
        self.scorer, self.service = scorer, service

    async def call(self, request: Request) -> Response:
        """One call."""
        try:
            body = await _read(request, MAX_BODY)
        except WireError as error:
            return _response(Reply.of_error(error))
        return _response(await self.service.answer(request.scope["path"], _key(request), body))

    async def batch(self, request: Request) -> Response:
        """Calls in Google's batch format; each has a key of its own, and counts by itself."""
        outer = _key(request)
        try:
            calls = parse_batch(request.headers.get("Content-Type", ""), await _read(request, MAX_BATCH_BODY))
        except WireError as error:
            return _response(Reply.of_error(error))
        replies = await asyncio.gather(
            *(self.service.answer(call.path, call.key or outer, call.body) for call in calls)
        )
        kind, content = format_batch(calls, [(reply.status, reply.data) for reply in replies])
        return Response(content, media_type=kind, headers=_HEADERS)

    async def discovery(self, request: Request) -> Response:
        """What Google's clients make themselves of."""
        if _query(request, "version") != VERSION:
            return _response(Reply.of_error(WireError("Discovery document not found.", None, 404, "NOT_FOUND")))
        return _response(Reply(discovery_document(str(request.base_url))))

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


async def _read(request: Request, limit: int) -> bytes:
    """The body.

    Raises:
        WireError: it is too long, too slow, or broken off.
    """
    if int(request.headers.get("Content-Length") or 0) > limit:  # a number: the server has seen to that
        raise size_error(limit)
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise size_error(limit)
    except (TimeoutError, ClientDisconnect):
        raise WireError("The request did not come whole.", None, 408, "DEADLINE_EXCEEDED") from None
    return bytes(body)


def _query(request: Request, name: str) -> str:
    return parse_qs(request.scope[_QUERY].decode("latin-1")).get(name, [""])[0]


def _key(request: Request) -> str:
    return request.headers.get("X-Goog-Api-Key") or _query(request, "key")


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
