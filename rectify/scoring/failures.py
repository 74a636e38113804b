"""Failures in the log: their kind and their place, never their message, which may hold a text."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)


def kind_and_place(error: BaseException) -> str:
    """Return what a log may tell of an error: its type, and the line of code that raised it."""
    place = " ".join("".join(traceback.format_tb(error.__traceback__)[-1:]).split())
    return f"{type(error).__name__}, {place or 'in no known place'}"


def log_loop_failure(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log a failure in a callback or task; an event loop's exception handler.

    asyncio's own writes the message of the error, and the arguments of the callback.
    """
    error = context.get("exception")
    # asyncio's messages name the callback; those of `call_exception_handler` are fixed up to the first colon
    what = str(context.get("message", "failure")).partition(":")[0].partition("<")[0].strip()
    logger.error("event loop: %s%s", what, "" if error is None else f": {kind_and_place(error)}")


class TextFreeFormatter(logging.Formatter):
    """Formats records without the messages of the errors that they carry."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line."""
        error = record.exc_info[1] if record.exc_info else None
        told = "" if error is None else f": {kind_and_place(error)}"
        return f"{record.levelname} {record.name}: {record.getMessage().rstrip()}{told}"


@contextmanager
def text_free_log(level: int = logging.WARNING) -> Iterator[None]:
    """Write the log to standard error without the messages of errors, for the time of a `with` block."""
    handler = logging.StreamHandler()
    handler.setLevel(level)
    handler.setFormatter(TextFreeFormatter())
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
