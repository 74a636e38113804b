"""The `key=value` pairs of the command line: those that follow a name, and those that give one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rectify.errors import InvalidArgumentError


def named_places(entries: Sequence[str], argument: str, form: str) -> dict[str, str]:
    """What is behind each name.

    Args:
        entries: each `name=place`.
        argument: how messages call them.
        form: that an entry should have, such as `"NAME=FOLDER"`.

    Raises:
        InvalidArgumentError: an entry is of another form, or a name is given twice.
    """
    places = dict(entry.partition("=")[::2] for entry in entries)
    if not all(name and place for name, place in places.items()) or len(places) < len(entries):
        raise InvalidArgumentError(f"{argument} is {list(entries)}: give {form}, each name once")
    return places


def read_pairs(pairs: Sequence[str], known: Mapping[str, Callable[[str], Any]], what: str) -> dict[str, Any]:
    """The values of pairs.

    Args:
        pairs: each `key=value`.
        known: the keys that there are, and the type of each one's value.
        what: how messages call the whole, such as `"method 'rectify,beta=4'"`.

    Raises:
        InvalidArgumentError: a key is unknown or given twice, or a value is not of its type.
    """
    given: dict[str, Any] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key not in known or key in given:
            wrong = "twice" if key in given else "which it has not"
            raise InvalidArgumentError(
                f"{what} gives {key!r}, {wrong}: its parameters are {', '.join(known) or 'none'}"
            )
        try:
            given[key] = known[key](value)
        except ValueError as error:
            number = "a whole number" if known[key] is int else "a number"
            raise InvalidArgumentError(f"{what}: {key} is {value!r}: give {number}") from error
    return given
