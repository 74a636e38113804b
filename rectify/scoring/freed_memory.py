"""Freed memory goes back to the system: glibc keeps what a few long texts took, some hundred MB, for ever."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_MMAP_THRESHOLD, _ARENA_MAX = -3, -8  # of glibc's malloc.h
_ARENAS = 2  # each thread would have one of its own, and keep the most that it ever held
_LARGE = 2**22  # bytes; a batch of short texts takes less


@contextmanager
def memory_given_back(seconds: float = 10.0) -> Iterator[None]:
    """Give freed memory back every so many seconds, for the time of a `with` block; nothing where there is no glibc."""
    trim = _trim()
    if trim is None:
        yield
        return
    _set_large_apart()
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(seconds):
            trim(0)

    threading.Thread(target=work, name="freed memory", daemon=True).start()
    try:
        yield
    finally:
        stop.set()


def _set_large_apart() -> None:
    """Let large blocks come from the system and go back to it one by one, from where they cannot split what remains.

    And let threads share what the small ones come from.
    """
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_MMAP_THRESHOLD, _LARGE)
    mallopt(_ARENA_MAX, _ARENAS)


def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # Windows takes no None
        return None
