"""Attributes of a package that are imported when they are asked for (PEP 562), so that importing it costs nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_attributes(package: str, places: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
        package: its `__name__`.
        places: the modules where its attributes are made, by the names of the attributes.

    Example:
        >>> __getattr__, __dir__ = lazy_attributes(__name__, {"Tilt": "rectify.rule"})
    """

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(places[name]), name)
        setattr(sys.modules[package], name, value)  # the next time it is found at once
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *places})
