"""An array in a file that is filled in steps, and goes on after an interruption where it was."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from rectify.json_files import write_json
from rectify.run_lock import cannot_write


class ResumableArray:
    """A memory-mapped array, and beside it `FILE.json` with how many steps are done.

    Args:
        file: where it is kept; its folder is made.
        shape, dtype: of the array.
        key: of what it depends on, JSON values; a file of another key is made anew.

    Attributes:
        values: the array.
        done: steps that a former run, or this one, has finished.
    """

    def __init__(self, file: Path, shape: tuple[int, ...], dtype: DTypeLike, **key: Any) -> None:
        self._file, self._beside = file, file.with_suffix(".json")
        self._key = json.loads(json.dumps({"shape": shape, **key}))
        self._bytes = math.prod(shape) * np.dtype(dtype).itemsize
        self.done = self._steps_done()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if not self.done:
                self._beside.unlink(missing_ok=True)  # it may tell of the file that is written over here
                self._reserve()
            self.values = np.memmap(file, dtype=dtype, mode="r+", shape=shape)
        except OSError as error:
            raise cannot_write(file, error) from error

    def _reserve(self) -> None:
        """Make the file with room for all of it: a disk that fills up later would end the process without a word."""
        with self._file.open("wb") as file:
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, self._bytes)
                else:
                    file.truncate(self._bytes)
            except OSError:
                self._file.unlink(missing_ok=True)
                raise

    def _steps_done(self) -> int:
        try:
            found = json.loads(self._beside.read_text(encoding="utf-8"))
            whole = found.items() >= self._key.items() and self._file.stat().st_size == self._bytes
            return int(found["done"]) if whole else 0
        except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
            return 0

    def save(self, done: int) -> None:
        """Bring what was written to disk, and note that so many steps are done."""
        self.values.flush()
        write_json(self._beside, self._key | {"done": done})
        self.done = done

    def remove(self) -> None:
        """Delete the files."""
        for path in (self._file, self._beside):
            path.unlink(missing_ok=True)
