"""Libraries that only some commands need: which extra of this package brings each, and whether it is there."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from rectify.errors import MissingExtraError

EXTRAS: dict[str, dict[str, str]] = {
    "train": {"sklearn": "scikit-learn", "scipy": "scipy"},
    "plots": {"matplotlib": "matplotlib"},
    "serve": {"starlette": "starlette", "uvicorn": "uvicorn", "h11": "h11"},
    "quant": {"bitsandbytes": "bitsandbytes"},
    "detoxify": {"detoxify": "detoxify"},
    "datasets": {"datasets": "datasets"},
}
"""The modules of each extra, and the names under which pip installs them."""


def has_extra(extra: str) -> bool:
    """Whether everything that an extra brings is there; nothing is imported."""
    return not _lacking(extra)


def need_extra(extra: str, what: str = "") -> None:
    """Refuse what could not be done, before any work.

    Args:
        extra: a name in `EXTRAS`.
        what: asks for it, to begin the message with, as `"quantization is 'nf4'"`.

    Raises:
        MissingExtraError: something that it brings is not installed; it says how to install it.
    """
    for library in _lacking(extra):
        raise MissingExtraError(f"{what}, and {library}" if what else library, extra)


def _lacking(extra: str) -> list[str]:
    return [library for module, library in EXTRAS[extra].items() if not _is_there(module)]


def _is_there(module: str) -> bool:
    return sys.modules.get(module) is not None or find_spec(module) is not None
