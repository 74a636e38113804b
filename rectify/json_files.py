"""JSON: values read strictly, records a line, and files written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rectify.errors import InvalidArgumentError
from rectify.run_lock import UNFINISHED_ENDING, cannot_write

_DEEPEST = 100
"""Levels of lists and objects: more than any record has, and few enough for what copies and writes them."""


def parse_json(text: str, start: int = 0) -> Any:
    """Return the JSON value that a text holds, alone or from a place on.

    Python's own reader keeps the last of two fields of one name, and ends with a `RecursionError` where lists are
    nested deeply: both are refused here. Like it, this one takes NaN and Infinity for numbers.

    Args:
        text: the value, with blanks around it.
        start: where the value begins.

    Raises:
        ValueError: it is no JSON value, or one of these two; the message is one short line.
    """
    value, end = parse_json_at(text, start)
    if end != len(text) and (rest := text[end:].strip(_BLANK)):
        raise ValueError(f"more text after the value: {rest[:20]!r}")
    return value


def parse_json_at(text: str, start: int = 0) -> tuple[Any, int]:
    """Return the first JSON value from a place on, and where it ends; see `parse_json`."""
    begin = start
    while begin < len(text) and text[begin] in _BLANK:
        begin += 1
    try:
        value, end = _DECODER.scan_once(text, begin)
    except StopIteration as error:
        place, found = error.value - start, text[error.value : error.value + 20]
        raise ValueError(f"{found!r} is no value, at character {place + 1}" if found else "it ends early") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg}, at character {error.pos - start + 1}") from error
    except RecursionError as error:
        raise ValueError(f"nested deeper than {_DEEPEST} levels") from error
    if text.count("[", begin, end) + text.count("{", begin, end) > _DEEPEST and _is_deep(value):
        raise ValueError(f"nested deeper than {_DEEPEST} levels")
    return value, end


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            inner
            for each in level
            if isinstance(each, list | dict)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
    return any(isinstance(each, list | dict) for each in level)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice[:60]!r} stands twice in one object")
    return found


_BLANK = " \t\n\r"
_DECODER: Any = json.JSONDecoder(object_pairs_hook=_object)


def read_json(path: Path) -> Any:
    """Return what a JSON file holds that a run has written.

    Raises:
        InvalidArgumentError: it is broken.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidArgumentError(f"{str(path)!r} is broken ({error}): remove it and run again") from error


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file that a run has written.

    Raises:
        InvalidArgumentError: it is broken, or holds something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise InvalidArgumentError(f"{str(path)!r} is broken (it is no object): remove it and run again")
    return value


def append_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Append JSON lines to a file, all or none of them; on disk before this returns.

    Raises:
        OutputError: the system refuses; the file is as it was.
    """
    lines = memoryview("".join(map(json_line, records)).encode())
    try:
        with path.open("ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                while lines:
                    lines = lines[file.write(lines) :]
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    file.truncate(size)
                raise
    except OSError as error:
        raise cannot_write(path, error) from error


def write_records(*files: tuple[Path, Iterable[dict[str, Any]]]) -> None:
    """Write files of JSON lines, all of them whole or none.

    Raises:
        OutputError: the system refuses; the files are as they were.
    """
    _replace([(path, map(json_line, records)) for path, records in files])


def json_line(record: Any) -> str:
    """A record as a line of JSON, `null` for NaN and infinities; in ASCII where it holds what is no valid Unicode."""
    try:
        line = json.dumps(record, ensure_ascii=False, allow_nan=False)
    except ValueError:
        record = without_undefined(record)
        line = json.dumps(record, ensure_ascii=False)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        line = json.dumps(record)
    return line + "\n"


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write a JSON value as a file, whole or not at all.

    Args:
        path: the file.
        value: what it holds.
        indent: for people; `None` for one line.
    """
    # what is no valid Unicode is written in ASCII
    write_whole(path, json.dumps(value, indent=indent, ensure_ascii=indent is None) + "\n")


def write_figures(path: Path, value: Any) -> None:
    """Write a JSON value as `write_json` does, with `null` for numbers that are undefined, as JSON knows no NaN."""
    write_json(path, without_undefined(value))


def without_undefined(value: Any) -> Any:
    """A JSON value with `None` for numbers that are not finite; tuples become lists."""
    if isinstance(value, dict):
        return {name: without_undefined(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_undefined(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_whole(path: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        OutputError: the system refuses; the file is as it was.
    """
    _replace([(path, [text])])


def _replace(files: Sequence[tuple[Path, Iterable[str]]]) -> None:
    fresh: list[Path] = []
    path = None
    try:
        for path, parts in files:
            fresh.append(path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED_ENDING}"))  # others may write it
            with fresh[-1].open("w", encoding="utf-8", newline="") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())  # else a power cut may leave an empty file under the new name
        for (path, _), each in zip(files, fresh, strict=True):
            os.replace(each, path)
    except OSError as error:
        raise cannot_write(path or "", error) from error
    finally:
        for each in fresh:
            with suppress(OSError):
                each.unlink(missing_ok=True)


def sha256_of(value: Any) -> str:
    """SHA-256 of a JSON value, hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_format_version(version: int, known: int) -> None:
    """Refuse files that a later version of this package has written.

    Raises:
        InvalidArgumentError: their version is above the one that is known.
    """
    if version > known:
        raise InvalidArgumentError(f"format_version is {version}, above {known}: update rectify to read it")
