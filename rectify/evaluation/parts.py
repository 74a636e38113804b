"""Results in parts, a file each: written whole or not at all, never again, by any number of processes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rectify.errors import InvalidArgumentError
from rectify.json_files import read_json, read_object, write_json

KEY_FILE = "key.json"


class Parts:
    """A folder with the result of each part of a stage.

    What a process finds there it does not make again, so a killed run goes on where it was. Beside the parts,
    `KEY_FILE` holds what their content depends on; a run to which that does not apply is refused.

    Args:
        folder: is made.
        key: everything that the content depends on, as JSON values.

    Raises:
        InvalidArgumentError: the folder holds parts that depend on something else.
    """

    def __init__(self, folder: str | Path, key: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        place = self.folder / KEY_FILE
        key = json.loads(json.dumps(key))
        if not place.exists():
            write_json(place, key)
            return
        former = read_object(place)
        for name in {**former, **key}:
            if former.get(name) != key.get(name):
                raise InvalidArgumentError(
                    f"output {str(self.folder)!r} was begun with {name} {former.get(name)!r}, not {key.get(name)!r}: "
                    "give the same settings, remove it, or give another output_dir"
                )

    def path(self, number: int) -> Path:
        """Where a part is."""
        return self.folder / f"{number:05d}.json"

    def missing(self, numbers: Iterable[int]) -> list[int]:
        """Those of the parts that are not there yet."""
        return [number for number in numbers if not self._is_whole(number)]

    def _is_whole(self, number: int) -> bool:
        """Whether a part is there, and no crash has left it empty, cut, or full of NUL bytes."""
        try:
            with self.path(number).open("rb") as file:
                first = file.read(1)
                file.seek(-1, os.SEEK_END)
                return first not in (b"", b"\0") and file.read() == b"\n"
        except OSError:
            return False

    def complete(
        self, numbers: Iterable[int], make: Callable[[int], Any], done: Callable[[], Any] = lambda: None
    ) -> None:
        """Make those that are not there; `done` is called after each part, made now or before."""
        for number in numbers:
            if not self._is_whole(number):
                write_json(self.path(number), make(number), indent=None)
            done()

    def read(self, numbers: Iterable[int]) -> Iterator[Any]:
        """The parts, in the order of their numbers.

        Raises:
            InvalidArgumentError: one is missing, or broken.
        """
        for number in numbers:
            if not self.path(number).exists():
                raise InvalidArgumentError(
                    f"output {str(self.folder)!r} lacks part {number}: run the stage that makes it first"
                )
            yield read_json(self.path(number))


def shard(numbers: Iterable[int], process: int, processes: int) -> list[int]:
    """The parts that one of several processes makes."""
    return [number for number in numbers if number % processes == process]
