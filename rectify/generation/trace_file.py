"""The file of a trace: one JSON document for programs, or one HTML page for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rectify.errors import InvalidArgumentError
from rectify.generation.trace import PromptTrace
from rectify.generation.trace_page import trace_page
from rectify.json_files import write_json, write_whole


def trace_path(path: str | Path) -> Path:
    """The path of a trace that can be written; its folder is made.

    Raises:
        InvalidArgumentError: it does not end in `.html` or `.json`, or cannot be a file.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".json"):
        raise InvalidArgumentError(f"trace is {str(path)!r}: give a file that ends in .html (to read) or in .json")
    if path.is_dir():
        raise InvalidArgumentError(f"trace {str(path)!r} is a folder: give a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidArgumentError(
            f"trace {str(path)!r} cannot be written ({error.strerror}): give another file"
        ) from error
    return path


def write_trace(path: Path, settings: dict[str, Any], traces: Sequence[PromptTrace]) -> None:
    """Write a trace in the form that the file's name ends in, whole or not at all.

    Args:
        path: as from `trace_path`.
        settings: what the continuations depend on, as JSON values.
        traces: of every prompt.
    """
    if path.suffix.lower() == ".json":
        write_json(path, {"settings": settings, "prompts": [asdict(trace) for trace in traces]})
    else:
        write_whole(path, trace_page(settings, traces))
