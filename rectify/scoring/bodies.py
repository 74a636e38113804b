"""Bodies of requests: each comes in so long, has so many bytes, and all the large ones together have so many."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect, Request

from rectify.scoring.wire_errors import broken_error, encoding_error, size_error, unavailable_error

BODY_SECONDS = 30.0
_SMALL = 2**17
_ROOM = 2**26


class Intake:
    """Reads bodies.

    Args:
        seconds: for a body to come.
        room: bytes of all the bodies together that are above 128 KiB; smaller ones are always read.
    """

    def __init__(self, seconds: float = BODY_SECONDS, room: int = _ROOM) -> None:
        self._seconds, self._room = seconds, room

    @asynccontextmanager
    async def body(
        self, request: Request, limit: int, check: Callable[[bytearray], None] | None = None
    ) -> AsyncIterator[bytearray]:
        """Read the body, and keep its room for the time of the `async with` block.

        Args:
            request: of which nothing has been read.
            limit: bytes of the body.
            check: called once with the first 128 KiB of a larger body, to refuse the rest.

        Raises:
            WireError: the body is too long, too slow, broken off, or compressed; or there is no room.
        """
        encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("identity", ""):
            raise encoding_error(encoding)
        if int(request.headers.get("Content-Length") or 0) > limit:  # a number: the server has seen to that
            raise size_error(limit)
        body, taken = bytearray(), 0
        try:
            async with asyncio.timeout(self._seconds):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise size_error(limit)
                    if len(body) > _SMALL:
                        if check is not None:
                            check(body)
                            check = None
                        more = len(body) - taken
                        if more > self._room:
                            raise unavailable_error("Too much is being sent at present.")
                        self._room -= more
                        taken += more
            yield body
        except (TimeoutError, ClientDisconnect):
            raise broken_error() from None
        finally:
            self._room += taken
