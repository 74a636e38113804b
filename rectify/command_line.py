"""What all commands share: how they refuse, and what they exit with."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from rectify.command_outputs import held_outputs
from rectify.errors import OutputError, RectifyError, first_line
from rectify.extras import need_extra

UNFINISHED = 3
"""The exit code of a run that went through, but left something without a result that it may get another time."""
EXIT_CODES = (
    f"Exit code: 2 where something is refused or out of reach, {UNFINISHED} where a text lacks a result that it may "
    "yet get, else 0."
)

# what the system says of an output, or of its folder, that cannot be written
_UNWRITABLE = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "ENAMETOOLONG", "ENOTDIR", "EISDIR", "EIO")
    if hasattr(errno, name)
}
# how the writers of weights call the same
_UNWRITTEN = ("I/O error", "PytorchStreamWriter", "iostream error", "No space left", "unexpected pos")


class Parser(argparse.ArgumentParser):
    """An argument parser that refuses in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        leave_standard_output()  # whoever reads --help may stop reading
        super().exit(status, message)


def say(message: str) -> None:
    """A line for the person at the terminal: on standard error, so that results stay alone on standard output."""
    if sys.stderr is None:  # closed; `print` would take standard output
        return
    with suppress(OSError):  # nobody reads it: no reason to end a run
        print(message, file=sys.stderr, flush=True)


def execute(
    run: Callable[[Any], int | None],
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    extras: Sequence[str] = (),
    folders: Sequence[str] = ("output_dir",),
) -> int:
    """Parse and run a command; a refusal becomes one line on standard error, and its hint another.

    Its outputs are held from the beginning, so that a second run on one of them is refused; see `held_outputs`.

    Args:
        run: the command, given what the parser returns: a namespace, or a tuple of dataclasses.
        parser: a `Parser` or a `rectify.dataclass_parser.DataclassParser`.
        argv: the arguments; `None` for those of the process.
        extras: of this package, without which the command is refused.
        folders: the flags of outputs that are folders.

    Returns:
        The exit code: 0, or what the command returns; 2 for a refusal, an output that cannot be written among them; 130
        when interrupted.
    """
    arguments = parser.parse_args(argv)
    # after parsing, as --help is not to wait for them
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if sys.stdout is None:
        sys.stdout = _Closed()  # type: ignore[assignment]
    try:
        for extra in extras:
            need_extra(extra)
        with warnings.catch_warnings(), held_outputs(arguments, folders):
            warnings.simplefilter("ignore", FutureWarning)  # of other libraries, which the reader cannot mend
            code = run(arguments)
            sys.stdout.flush()
        return code or 0
    except KeyboardInterrupt:
        say(f"{parser.prog}: interrupted")
        return 130
    except Exception as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        leave_standard_output()
        hint = refusal.hint if isinstance(refusal, RectifyError) else ""
        say(f"{parser.prog}: error: {' '.join(str(refusal).removesuffix(hint).split())}")
        if hint:
            say(hint)
        return 2


def _refusal(error: Exception) -> Exception | None:
    """What a person is told of an error; `None` for one that nobody foresaw."""
    if isinstance(error, RectifyError):
        return error
    if isinstance(error, BrokenPipeError):
        return OutputError("standard output is read no further: let its reader take everything, or give an output")
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        # an error of an open file does not name it; the files of this package do, in errors of their own
        place = repr(error.filename) if error.filename is not None else "standard output, or another output,"
        return OutputError(f"{place} cannot be written or used ({error.strerror}): check its place and the room there")
    if isinstance(error, RecursionError):
        return RectifyError("an input is nested too deeply to be read: give one without lists in lists without end")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return RectifyError(f"memory is used up ({first_line(error)}): lower batch_size, or give less at a time")
    if any(said in str(error) for said in _UNWRITTEN) and type(error).__name__ in ("SafetensorError", "RuntimeError"):
        return OutputError(f"weights cannot be written ({first_line(error)}): make room, or give another place")
    return None


class _Closed:
    """Stands for a standard output that the caller has closed."""

    def write(self, text: str) -> int:
        raise OutputError("standard output is closed: leave it open, or give an output")

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Nothing is held back."""

    def isatty(self) -> bool:
        return False


def leave_standard_output() -> None:
    """Have the interpreter not try again, at its end, what a full disk or a reader that has gone would not take."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):  # no file of the system
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
