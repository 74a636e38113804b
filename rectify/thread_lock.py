"""A lock, and values of single threads, for what several threads may use and what may be copied all the same."""

from __future__ import annotations

import threading
from typing import Any


class ThreadLock:
    """Held by one thread at a time, which may enter again; a copy is another lock."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return ThreadLock, ()


class ThreadLocal(threading.local):
    """Attributes that each thread has of its own; a copy has none."""

    def __reduce__(self) -> tuple[Any, ...]:
        return ThreadLocal, ()
