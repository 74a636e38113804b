"""Connections on which the head of an answer comes in time, or not at all."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool


class TimedAdapter(HTTPAdapter):
    """A transport for `requests` whose timeout is that of the whole head of an answer, a proxy's too.

    Otherwise it is that of each part, and a server that sends one byte at a time is waited for without end.
    """

    def init_poolmanager(self, *args: Any, **settings: Any) -> None:
        """Make the pools of direct connections."""
        super().init_poolmanager(*args, **settings)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, proxy: str, **settings: Any) -> Any:
        """Return the pools of connections through a proxy."""
        manager = super().proxy_manager_for(proxy, **settings)
        if not proxy.lower().startswith("socks"):  # whose connections are of their own kind
            manager.pool_classes_by_scheme = _POOLS
        return manager


@contextmanager
def _in_time(connection: HTTPConnection) -> Iterator[None]:
    """Cut the connection off when its timeout is over."""
    late = threading.Event()

    def cut_off() -> None:
        if (found := connection.sock) is not None:
            late.set()
            with suppress(OSError):
                socket.socket.shutdown(found, socket.SHUT_RDWR)  # not TLS's own, which the reading thread would meet

    seconds = connection.timeout
    if not isinstance(seconds, int | float):
        yield
        return
    timer = threading.Timer(seconds, cut_off)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception as error:
        if late.is_set():
            raise TimeoutError("the head of the answer did not come in time") from error
        raise
    finally:
        timer.cancel()


class _Timed(HTTPConnection):
    def connect(self) -> None:
        with _in_time(self):
            super().connect()

    def getresponse(self) -> Any:
        with _in_time(self):
            return super().getresponse()


class _TimedSecure(_Timed, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Timed


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _TimedSecure


_POOLS = {"http": _Pool, "https": _SecurePool}
