"""Other libraries, kept from saying and importing what nobody asked for.

peft imports bitsandbytes wherever that is installed, at its own import and again whenever an adapter is made. That
takes a second, prints lines about kernels, and would fetch code from the Hub where the package `kernels` is installed
too. It is needed only where layers are quantised by it, and then `transformers` has imported it before, to load the
quantised model. So as long as nothing has, peft is told that it is not there.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from transformers.utils import logging as transformers_logging

_HIDDEN = "bitsandbytes"
_LOCK = threading.RLock()


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """Let nothing import bitsandbytes, unless it is imported already: then layers may be of its classes.

    `None` in `sys.modules` is Python's own way to say that a module is not to be had: `import` fails, and `find_spec`
    finds nothing. What peft and transformers remember of their looking for it is forgotten at the end, so that a
    quantised model can be loaded afterwards.
    """
    modules = cast(dict[str, Any], sys.modules)
    with _LOCK:
        if _HIDDEN in modules:
            yield
            return
        modules[_HIDDEN] = None
        _forget()
        try:
            yield
        finally:
            del modules[_HIDDEN]
            _forget()


def _forget() -> None:
    for module, probes in (
        ("peft.import_utils", ("is_bnb_available", "is_bnb_4bit_available")),
        ("transformers.utils.import_utils", ("is_bitsandbytes_available",)),
    ):
        for probe in probes:
            clear = getattr(getattr(sys.modules.get(module), probe, None), "cache_clear", None)
            if clear is not None:
                clear()


@contextmanager
def bars_on_terminals() -> Iterator[None]:
    """Let transformers draw its bars of progress only where standard error is a terminal."""
    if sys.stderr.isatty() or not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        with warnings.catch_warnings():  # where the environment forbids bars, to allow them again is warned of
            warnings.simplefilter("ignore")
            transformers_logging.enable_progress_bar()


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without what other libraries say of new heads and of GPT-2's layers; see also `bars_on_terminals`."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), bars_on_terminals():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            warnings.filterwarnings("ignore", message="The PEFT config's `base_model_name_or_path`")  # a bundled name
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
