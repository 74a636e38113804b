"""The parser of commands whose flags are the fields of dataclasses."""

from __future__ import annotations

from typing import Any, NoReturn

from transformers import HfArgumentParser

from rectify.errors import first_line


class DataclassParser(HfArgumentParser):
    """A parser whose flags are the fields of dataclasses, `transformers.TrainingArguments` among them."""

    def error(self, message: str) -> NoReturn:
        """Refuse in one line."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The dataclasses as a tuple, checked by their own `__post_init__`."""
        try:
            return self.parse_args_into_dataclasses(args, look_for_args_file=False)
        except (ValueError, ImportError) as error:
            self.error(first_line(error))
