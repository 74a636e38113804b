"""The output file: one JSON line a prompt, appended as generation goes, and resumed after any interruption."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rectify.errors import InvalidArgumentError


class GenerationFile:
    """A file of generation records that can be continued by the run that began it.

    Beside it, `FILE.settings.json` holds what determines its content; a run with other settings is refused.

    Args:
        path: the file; its folder is made.
        settings: everything that the content depends on, as JSON values.

    Raises:
        InvalidArgumentError: the file is there and was written with other settings, or by something else.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any]) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise InvalidArgumentError(f"output {str(path)!r} is a folder: give a file")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(self.path.name + ".settings.json")
        settings = json.loads(json.dumps(settings))
        if self.path.exists() and self.path.stat().st_size:
            self._check(beside, settings)
        else:
            fresh = beside.with_name(beside.name + ".tmp")
            fresh.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(fresh, beside)
        self.done = self._drop_unfinished_line()
        """How many records the file holds."""

    def _check(self, beside: Path, settings: dict[str, Any]) -> None:
        if not beside.exists():
            raise InvalidArgumentError(
                f"output {str(self.path)!r} exists and has no {beside.name}: remove it or give another file"
            )
        try:
            former = json.loads(beside.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InvalidArgumentError(f"{str(beside)!r} is broken ({error}): remove it and the output") from error
        differing = [key for key in {**former, **settings} if former.get(key) != settings.get(key)]
        if differing:
            key = differing[0]
            raise InvalidArgumentError(
                f"output {str(self.path)!r} was begun with {key} {former.get(key)!r}, not {settings.get(key)!r}: "
                "give the same settings, remove it, or give another file"
            )

    def _drop_unfinished_line(self) -> int:
        if not self.path.exists():
            return 0
        with self.path.open("r+b") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)
        return content.count(b"\n")

    def append(self, records: list[dict[str, Any]]) -> None:
        """Add records, on disk before this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
        self.done += len(records)
