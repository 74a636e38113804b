"""Files of JSON lines that a run appends to: what of one is whole after a crash, and whose it is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from rectify.command_line import say
from rectify.errors import InvalidArgumentError
from rectify.json_files import json_line
from rectify.run_lock import cannot_write

Item = TypeVar("Item")
Record = dict[str, Any]


def drop_broken_end(path: Path) -> int:
    """Cut off what a crash may leave at the end of a file (half a line, NUL bytes), and say so.

    Returns:
        How many records the file then holds, a line each.

    Raises:
        InvalidArgumentError: another line is no record; it is named by its number, and the file is left as it is.
        OutputError: the file cannot be read or cut.
    """
    count = kept = 0
    broken: list[tuple[int, bytes]] = []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if _is_record(line):
                    if broken:  # it stands between records
                        raise _not_ours(path, broken[0][0])
                    count, kept = count + 1, kept + len(line)
                else:
                    broken.append((number, line[:1] + line[-1:] + (b"\0" if b"\0" in line else b"")))
        for number, line in broken:
            half = number == broken[-1][0] and (line[:1] == b"{" or b"\n" not in line)
            if b"\0" not in line and not half:
                raise _not_ours(path, number)
        if broken:
            size = path.stat().st_size
            os.truncate(path, kept)
            say(f"output: {path}: the last {size - kept} bytes were no whole record, as a crash leaves them; made anew")
    except OSError as error:
        raise cannot_write(path, error) from error
    return count


def records_of(path: Path) -> Iterator[Record]:
    """The records of a file that `drop_broken_end` has seen."""
    with path.open("rb") as lines:
        yield from map(json.loads, lines)


def check_records(path: Path, items: Iterable[Item], belongs: Callable[[Record, Item], bool]) -> None:
    """Refuse a file whose records are not those of the first items, one each.

    Args:
        path: it.
        items: all of them; of an iterator, no more are taken than there are records.
        belongs: whether a record is an item's.

    Raises:
        InvalidArgumentError: one is not, and is named by its number, or there are more records than items.
    """
    rest, nothing = iter(items), object()
    for number, record in enumerate(records_of(path), start=1):
        item: Any = next(rest, nothing)
        try:
            ours = item is not nothing and belongs(record, item)
        except (LookupError, TypeError, ValueError, AttributeError):  # it has not even the form
            ours = False
        if not ours:
            raise _not_ours(path, number)


def same_json(one: Any, other: Any) -> bool:
    """Whether two JSON values are written alike, with their fields in one order."""
    return json_line(one) == json_line(other)


def _is_record(line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _not_ours(path: Path, number: int) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"output {str(path)!r}, line {number}: not what this run wrote there: restore the file, remove it, or give "
        "another one"
    )
