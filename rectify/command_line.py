"""What all commands share: how they refuse, and what they exit with."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from rectify.errors import RectifyError
from rectify.extras import need_extra


class Parser(argparse.ArgumentParser):
    """An argument parser that refuses in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def say(message: str) -> None:
    """A line for the person at the terminal: on standard error, so that results stay alone on standard output."""
    print(message, file=sys.stderr, flush=True)


def execute(
    run: Callable[[Any], None], parser: argparse.ArgumentParser, argv: list[str] | None, extras: Sequence[str] = ()
) -> int:
    """Parse and run a command; a refusal becomes one line on standard error.

    Args:
        run: the command, given what the parser returns: a namespace, or a tuple of dataclasses.
        parser: a `Parser` or a `rectify.dataclass_parser.DataclassParser`.
        argv: the arguments; `None` for those of the process.
        extras: of this package, without which the command is refused.

    Returns:
        The exit code: 0, 2 for a refusal, 130 when interrupted.
    """
    arguments = parser.parse_args(argv)
    # after parsing, as --help is not to wait for them
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of other libraries, which the reader cannot mend
            for extra in extras:
                need_extra(extra)
            run(arguments)
        sys.stdout.flush()
    except RectifyError as error:
        say(f"{parser.prog}: error: {' '.join(str(error).split())}")
        return 2
    except KeyboardInterrupt:
        say(f"{parser.prog}: interrupted")
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
