"""Connections of the server: each has so long for every step, and a new one always finds a place.

uvicorn gives up on a connection only between two requests, and counts silent ones among those that it may have. This
protocol is uvicorn's with a limit for each step: a client that sends nothing, or a byte a second, is cut off; and where
there are too many connections, those go that have kept the server waiting longest, of whoever holds most of them.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
from collections import defaultdict
from dataclasses import dataclass
from enum import Enum
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from rectify.errors import WireError
from rectify.scoring.bodies import BODY_SECONDS
from rectify.scoring.failures import kind_and_place, log_loop_failure
from rectify.scoring.server import GONE, TASK
from rectify.scoring.wire_errors import malformed_error, unavailable_error

logger = logging.getLogger(__name__)

_TICK = 0.5
_READ_BYTES = 4096  # at a time, so that a body in chunks of one byte does not keep the others waiting


@dataclass(frozen=True)
class Patience:
    """How many connections there may be, and how many seconds each has for what.

    Attributes:
        connections: more than these are not kept.
        head: from connecting, or from the first byte of a further request, to the end of the headers.
        idle: between two requests.
        body: from the headers to the end of the body; the application answers first, where it reads it.
        rest: for the rest of a body when the request has its answer already.
        answer: for the client to take the answer.
    """

    connections: int = 1024
    head: float = 10.0
    idle: float = 5.0
    body: float = BODY_SECONDS + 5
    rest: float = 5.0
    answer: float = 60.0


class _Step(Enum):
    HEAD, IDLE, BODY, REST, ANSWER, WORK, CLOSED = range(7)


def patient_protocol(patience: Patience | None = None) -> type[H11Protocol]:
    """A protocol class for uvicorn's `http`, for one server.

    Example:
        >>> uvicorn.run(app, http=patient_protocol(), limit_concurrency=None)  # doctest: +SKIP
    """
    hall = _Hall(patience or Patience())

    class Connection(_Connection):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(hall, *arguments, **settings)

    return Connection


class _Hall:
    """All the connections of a server."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._held: set[_Connection] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._seconds = {
            _Step.HEAD: patience.head,
            _Step.IDLE: patience.idle,
            _Step.BODY: patience.body,
            _Step.REST: patience.rest,
            _Step.ANSWER: patience.answer,
            _Step.CLOSED: patience.answer,  # what is in the buffer still goes out
        }

    def enter(self, connection: _Connection) -> bool:
        """Take a connection in; whether there is a place."""
        if len(self._held) >= self._patience.connections and not self._make_room():
            return False
        self._held.add(connection)
        if connection.loop.get_exception_handler() is None:  # asyncio's own logs what callbacks were given
            connection.loop.set_exception_handler(log_loop_failure)
        if self._timer is None:
            self._timer = connection.loop.call_later(_TICK, self._look)
        return True

    def leave(self, connection: _Connection) -> None:
        """Let a connection go."""
        self._held.discard(connection)

    def _make_room(self) -> bool:
        """Cut off those that have kept the server waiting longest, of whoever holds most; whether there were any."""
        waited_for = defaultdict(list)
        for connection in self._held:
            if connection.step is not _Step.WORK:
                waited_for[connection.owner].append(connection)
        ranked = []
        for connections in waited_for.values():
            connections.sort(key=lambda connection: -connection.since)
            ranked += [
                (place, -connection.since, id(connection), connection) for place, connection in enumerate(connections)
            ]
        # several at once, as new ones come in crowds
        for *_, connection in sorted(ranked, reverse=True)[: max(1, self._patience.connections // 16)]:
            connection.cut_off()
        return bool(ranked)

    def _look(self) -> None:
        self._timer = None
        for connection in list(self._held):
            connection.note()
            if connection.loop.time() - connection.since > self._seconds.get(connection.step, float("inf")):
                connection.cut_off()
        if self._held:
            self._timer = connection.loop.call_later(_TICK, self._look)


class _Connection(H11Protocol, asyncio.BufferedProtocol):
    def __init__(
        self,
        hall: _Hall,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.step, self.since, self.owner = _Step.HEAD, self.loop.time(), b""
        self._hall = hall
        self._buffer = bytearray()

    # -----------------------------------------------------------------------------------------------------------------
    # What the transport says

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self.owner = _owner(self.client)
        if not self._hall.enter(self):
            self._refuse(unavailable_error("Too many connections."))

    def connection_lost(self, exc: Exception | None) -> None:
        self._hall.leave(self)
        self._unset_keepalive_if_required()
        super().connection_lost(exc)
        if self.cycle is not None and not self.cycle.response_complete:
            scope: dict[str, Any] = self.cycle.scope  # type: ignore[assignment]
            scope[GONE] = True
            if TASK in scope:
                scope[TASK].cancel()

    def get_buffer(self, sizehint: int) -> bytearray:
        self._buffer = bytearray(_READ_BYTES)
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        data, self._buffer = bytes(self._buffer[:nbytes]), bytearray()
        self.data_received(data)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        try:
            super().data_received(data)
        except Exception as error:  # asyncio would log its message, and h11's hold what came
            self._give_up(error)
        self.note(heard=True)

    # -----------------------------------------------------------------------------------------------------------------
    # What uvicorn says

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP; an answer under way is broken off instead."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the application has nothing to answer any more
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(malformed_error())
        else:
            self.transport.close()

    def on_response_complete(self) -> None:
        """The answer is out; a next request may have come already."""
        try:
            super().on_response_complete()
        except Exception as error:  # as in `data_received`
            self._give_up(error)
        self.note()

    def shutdown(self) -> None:
        """Wait for no request that has not come whole."""
        self.note()
        if self.step is _Step.WORK:
            self.cycle.keep_alive = False
        else:
            self.transport.close()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection between two requests."""
        self.transport.close()

    # -----------------------------------------------------------------------------------------------------------------

    def note(self, heard: bool = False) -> None:
        """Note what is waited for, and since when.

        Args:
            heard: whether something has just come.
        """
        step = self._step(heard)
        if step is not self.step:
            self.step, self.since = step, self.loop.time()

    def _step(self, heard: bool) -> _Step:
        if self.transport.is_closing():
            return _Step.CLOSED
        if self.cycle is not None and not self.cycle.response_complete:
            if self.cycle.more_body:
                return _Step.BODY
            return _Step.ANSWER if self.flow.write_paused else _Step.WORK  # answers to earlier requests are not taken
        if self.transport.get_write_buffer_size():
            return _Step.ANSWER
        if self.conn.their_state is h11.SEND_BODY:
            return _Step.REST
        return _Step.HEAD if heard or self.step is _Step.HEAD else _Step.IDLE

    def cut_off(self) -> None:
        """Close the connection, whatever its state."""
        self._hall.leave(self)
        self.step = _Step.CLOSED
        self.transport.abort()

    def _refuse(self, error: WireError) -> None:
        """Answer with an error, past h11, and close."""
        body = json.dumps(error.body()).encode("ascii")
        further = "".join(f"{name}: {value}\r\n" for name, value in error.headers.items())
        reason = "Bad Request" if error.code == 400 else "Service Unavailable"
        head = f"HTTP/1.1 {error.code} {reason}\r\nContent-Type: application/json; charset=UTF-8\r\n{further}"
        self.transport.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode("ascii") + body)
        self.transport.close()

    def _give_up(self, error: Exception) -> None:
        logger.error("a connection failed: %s", kind_and_place(error))
        self.cut_off()


def _owner(client: tuple[str, int] | None) -> bytes:
    """Whose connection it is: an address, or for IPv6 the network of which anyone has them all."""
    try:
        address = ipaddress.ip_address(client[0]) if client else None
    except ValueError:
        address = None
    if address is None:
        return b""
    mapped = getattr(address, "ipv4_mapped", None)
    return mapped.packed if mapped else address.packed[:8]
