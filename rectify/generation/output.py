"""The output file: one JSON line a prompt, appended as generation goes, and resumed after any interruption."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from rectify.errors import InvalidArgumentError
from rectify.generation.generator import batches
from rectify.json_files import write_json, write_records

Records = list[dict[str, Any]]

Item = TypeVar("Item")


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
            write_json(beside, settings)
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

    def append(self, records: Records) -> None:
        """Add records, on disk before this returns."""
        write_records(self.path, records, "a")
        self.done += len(records)

    def complete(
        self,
        prompts: list[Item],
        batch_size: int,
        make: Callable[[list[Item], int], Records],
        label: str | None = None,
    ) -> None:
        """Add the records that are missing, with a progress bar.

        Args:
            prompts: all of them, or what else makes a record each; the file holds the records of the first `done`.
            batch_size: prompts at a time.
            make: from a batch and its number to a record for each of its prompts.
            label: what the progress bar is called.
        """
        self.path.touch()  # no record makes a file too
        with tqdm(total=len(prompts), initial=self.done, desc=label, unit="prompt", disable=None) as progress:
            for number, batch in batches(prompts, batch_size):
                written = max(0, self.done - number * batch_size)
                if written < len(batch):
                    # a batch is sampled as a whole, also when some of its records are there
                    self.append(make(batch, number)[written:])
                    progress.update(len(batch) - written)
