"""The output file: one JSON line a prompt, appended as generation goes, and resumed after any interruption."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from rectify.errors import InvalidArgumentError, OutputError
from rectify.json_files import append_records, write_json
from rectify.resumable import check_records, drop_broken_end
from rectify.run_lock import RunLock

Records = list[dict[str, Any]]

Item = TypeVar("Item")


class GenerationFile:
    """A file of generation records that can be continued by the run that began it.

    Beside it, `FILE.settings.json` holds what determines its content; a run with other settings is refused. While the
    object lives, no other run can open the file, by whatever name.

    Args:
        path: the file; its folder is made.
        settings: everything that the content depends on, as JSON values.

    Raises:
        InvalidArgumentError: the file is there and was written with other settings, or by something else.
        OutputError: it cannot be written, or another run is writing it.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any]) -> None:
        self.path = Path(path)
        self._lock = RunLock(self.path)
        self.done = 0
        """How many records the file holds."""
        try:
            self._begin(json.loads(json.dumps(settings)))
        except BaseException:
            self.close()
            raise

    def _begin(self, settings: dict[str, Any]) -> None:
        beside = self.path.with_name(self.path.name + ".settings.json")
        if self.path.exists() and self.path.stat().st_size:
            self._lock.own_file()
            self._check(beside, settings)
            self.done = drop_broken_end(self.path)
        else:
            write_json(beside, settings)

    def close(self) -> None:
        """Let other runs have the file; this object is of no more use then."""
        self._lock.release()

    def _check(self, beside: Path, settings: dict[str, Any]) -> None:
        if not beside.exists():
            raise InvalidArgumentError(
                f"output {str(self.path)!r} exists and has no {beside.name}: remove it or give another file"
            )
        try:
            former = json.loads(beside.read_text(encoding="utf-8"))
            differing = [key for key in {**former, **settings} if former.get(key) != settings.get(key)]
        except (ValueError, RecursionError, AttributeError, TypeError) as error:
            raise InvalidArgumentError(f"{str(beside)!r} is broken ({error}): remove it and the output") from error
        if differing:
            key = differing[0]
            raise InvalidArgumentError(
                f"output {str(self.path)!r} was begun with {key} {former.get(key)!r}, not {settings.get(key)!r}: "
                "give the same settings, remove it, or give another file"
            )

    def check(self, items: Iterable[Item], belongs: Callable[[dict[str, Any], Item], bool]) -> None:
        """Refuse the file where what it holds are not the records of the first items; see `check_records`.

        Raises:
            InvalidArgumentError: a line, named by its number, is none of theirs.
        """
        if self.done:
            check_records(self.path, items, belongs)

    def append(self, records: Records) -> None:
        """Add records, on disk before this returns, or none of them.

        Raises:
            OutputError: they cannot be written; what the file holds stays.
        """
        if self.done and not self.path.exists():
            raise OutputError(
                f"output {str(self.path)!r} was removed while it was written: run again, from its beginning"
            )
        self._lock.own_file()
        append_records(self.path, records)
        self.done += len(records)

    def complete(
        self,
        prompts: list[Item],
        batch_size: int,
        make: Callable[[list[Item], int], Records],
        belongs: Callable[[dict[str, Any], Item], bool],
        label: str | None = None,
    ) -> None:
        """Add the records that are missing, with a progress bar.

        Args:
            prompts: all of them, or what else makes a record each; the file holds the records of the first `done`.
            batch_size: prompts at a time.
            make: from a batch and its number to a record for each of its prompts.
            belongs: whether a record that the file holds is a prompt's.
            label: what the progress bar is called.

        Raises:
            InvalidArgumentError: the file holds something else than the records of the first prompts.
            OutputError: it cannot be written; what it holds stays, and is gone on from.
        """
        try:
            self.check(prompts, belongs)
            self._lock.own_file()  # no record makes a file too
            with tqdm(total=len(prompts), initial=self.done, desc=label, unit="prompt", disable=None) as progress:
                for number, batch in batches(prompts, batch_size):
                    written = max(0, self.done - number * batch_size)
                    if written < len(batch):
                        # a batch is sampled as a whole, also when some of its records are there
                        self.append(make(batch, number)[written:])
                        progress.update(len(batch) - written)
        except BaseException:
            self.close()
            raise


def batches(prompts: list[Item], size: int) -> Iterator[tuple[int, list[Item]]]:
    """Numbered batches in the order of the prompts, or of what else is worked on in batches."""
    for start in range(0, len(prompts), size):
        yield start // size, prompts[start : start + size]
