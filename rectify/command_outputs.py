"""What a command writes: refused where it cannot be, or is something else as well, before any work begins."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rectify.errors import OutputError
from rectify.run_lock import RunLock

_FILES = ("output", "csv", "trace", "plot")
_FOLDERS = ("output_dir",)
# texts for people and for models, and what TrainingArguments derive from the folder
_NO_PATHS = {"text", "prompt", "run_name", "logging_dir", "resume_from_checkpoint", "hub_model_id"}
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


@contextmanager
def held_outputs(arguments: Any, folders: Sequence[str] = _FOLDERS) -> Iterator[None]:
    """Hold the outputs of a command, so that no other run writes them, and refuse those that cannot be written.

    Of several processes of one run, as `accelerate launch` starts them, the first holds the outputs for all.

    Args:
        arguments: a namespace, or a tuple of dataclasses; those of `output`, `csv`, `trace` and `plot` are files.
        folders: those that are folders.

    Raises:
        OutputError: one cannot be written, is written by another run, or is given as something else as well.
    """
    values: dict[str, Any] = {}
    for part in arguments if isinstance(arguments, tuple) else (arguments,):
        values |= vars(part)
    names = [name for name in dict.fromkeys((*folders, *_FILES)) if isinstance(values.get(name) or None, str | Path)]
    _refuse_other_uses(values, names, folders)
    with ExitStack() as stack:
        if next((os.environ[name] for name in _RANKS if name in os.environ), "0") == "0":
            for name in names:
                stack.enter_context(RunLock(values[name], folder=name in folders))
        yield


def _refuse_other_uses(values: Mapping[str, Any], outputs: Sequence[str], folders: Sequence[str]) -> None:
    for name, shown in ((name, str(values[name])) for name in outputs):
        for other, value in values.items():
            if other in _NO_PATHS or other == name:
                continue
            for place in value if isinstance(value, list | tuple) else [value]:
                if isinstance(place, str | Path) and _is_same(
                    shown, place, name in folders, other in {*outputs, "cache"}
                ):
                    raise OutputError(f"{name} {shown!r} is {_called(other)} as well: give another one")


def _called(name: str) -> str:
    return {"files": "an input", "texts": "an input", "cache": "the cache"}.get(name, f"given as {name}")


def _is_same(one: str, other: str | Path, folder: bool, written: bool) -> bool:
    """Whether an output and another path are one place; `written`: whether that will be made too."""
    try:
        if os.path.exists(one) and os.path.exists(other):
            if not os.path.samefile(one, other) or (folder and not os.path.isdir(one)):
                return False
            from rectify.hub import POCKET  # names of what is bundled, which are no paths

            return str(other) not in POCKET
        return written and Path(one).resolve() == Path(other).resolve()
    except (OSError, RuntimeError, ValueError):  # no path at all
        return False
