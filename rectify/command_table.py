"""Commands that are imported when they are called, so that none waits for another's libraries."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Command:
    """One line of a table of commands.

    Attributes:
        module: whose `main` takes the arguments, and the program's name as `prog`.
        what: it does, for the help.
    """

    module: str
    what: str

    def run(self, argv: list[str], prog: str) -> int:
        """Import the command and run it; returns its exit code."""
        return import_module(self.module).main(argv, prog=prog)
