"""Configurations that are saved beside weights: read as strangers' files, each field of its declared type."""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from rectify.errors import CheckpointError, RectifyError, first_line
from rectify.json_files import check_format_version, parse_json

_MOST_BYTES = 1 << 28
_MOST = 2**31 - 1
_Config = TypeVar("_Config")


class _UnusableError(Exception):
    """Why a value cannot be used."""


def read_config(kind: type[_Config], path: Path, remedy: str) -> _Config:
    """A configuration from its JSON file.

    Args:
        kind: the dataclass that was saved; its own checks of ranges are made.
        path: the file.
        remedy: what messages end with, such as `"give a folder of `rectify train gate`"`.

    Raises:
        CheckpointError: there is no such file, or it is no object with the fields of the dataclass, each of the type
            that is declared for it; the message names file and field.
    """
    with _refusing(path, remedy):
        return _made(kind, _parsed(_text_of(path, remedy)), "")


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        path: the file.
        remedy: see `read_config`.

    Raises:
        CheckpointError: there is none; the message names the file.
    """
    with _refusing(path, remedy):
        return _parsed(_text_of(path, remedy))


def read_records(kind: type[_Config], path: Path, remedy: str) -> list[_Config]:
    """The records of a file of JSON lines, in their order; blank lines do not count.

    Args:
        kind: the dataclass of each.
        path: the file.
        remedy: see `read_config`.

    Raises:
        CheckpointError: there is no such file, or a line holds no such record; the message names the file.
    """
    with _refusing(path, remedy):
        return [_made(kind, _parsed(line), "") for line in _text_of(path, remedy).split("\n") if line.strip()]


@contextmanager
def _refusing(path: Path, remedy: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except (_UnusableError, RectifyError, OSError, ValueError, MemoryError) as error:
        raise _unusable(path, error, remedy) from error


def _unusable(path: Path, reason: Exception, remedy: str) -> CheckpointError:
    return CheckpointError(f"{str(path)!r} cannot be used ({first_line(reason)}): {remedy}")


def _text_of(path: Path, remedy: str) -> str:
    if not path.exists():
        raise CheckpointError(f"{str(path.parent)!r} holds no {path.name}: {remedy}")
    if not path.is_file():  # to read from a device or a pipe might never end
        raise _UnusableError("it is no file")
    if path.stat().st_size > _MOST_BYTES:
        raise _UnusableError(f"it is larger than {_MOST_BYTES >> 20} MiB")
    return path.read_bytes().decode("utf-8-sig")


def _parsed(text: str) -> dict[str, Any]:
    value = parse_json(text)
    if not isinstance(value, dict):
        raise _UnusableError(f"it holds {_shown(value)}, not an object")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Values by declared types


def _made(kind: type[_Config], values: Mapping[str, Any], place: str) -> _Config:
    """A dataclass of an object's values."""
    hints = typing.get_type_hints(kind)
    known = {field.name: field for field in fields(cast(Any, kind)) if field.init}
    # the version first: a later one explains what is not known of the rest
    for name in sorted(values, key=lambda name: name != "format_version"):
        if name not in known:
            raise _UnusableError(
                f"{place}{_shown(name)} is no field of {kind.__name__}; is it of another kind, or of a newer rectify?"
            )
        if name == "format_version":
            check_format_version(_value(hints[name], values[name], name), _known_version(kind))
    for name, field in known.items():
        if name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise _UnusableError(f"{place}{name} is missing")
    return kind(**{name: _value(hints[name], value, f"{place}{name}") for name, value in values.items()})


def _known_version(kind: type) -> int:
    return next(
        (cast(int, field.default) for field in fields(cast(Any, kind)) if field.name == "format_version"), _MOST
    )


def _value(hint: Any, value: Any, place: str) -> Any:
    """A value of a declared type, made of what JSON has for it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _of_union(arguments, value, place)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            raise _UnusableError(f"{place} is {_shown(value)}, not one of {', '.join(map(str, arguments))}")
        return value
    if is_dataclass(hint):
        if not isinstance(value, dict):
            raise _UnusableError(f"{place} is {_shown(value)}, not an object")
        return _made(cast(type, hint), value, f"{place}.")
    if origin in (list, tuple):
        return _sequence(origin, arguments, value, place)
    if origin is dict:
        if not isinstance(value, dict):
            raise _UnusableError(f"{place} is {_shown(value)}, not an object")
        return {
            _value(arguments[0], name, f"{place}[{_shown(name)}]"): _value(
                arguments[1], each, f"{place}[{_shown(name)}]"
            )
            for name, each in value.items()
        }
    if hint is float:
        return _number(value, place)
    if hint is int:
        return _whole(value, place)
    if hint is str:
        return _text(value, place)
    if type(value) is not hint:
        names = {bool: "true or false", types.NoneType: "null"}
        raise _UnusableError(f"{place} is {_shown(value)}, not {names.get(hint, hint)}")
    return value


def _of_union(kinds: tuple[Any, ...], value: Any, place: str) -> Any:
    reasons = []
    for kind in kinds:
        if value is None and kind is types.NoneType:
            return None
        if kind is types.NoneType:
            continue
        try:
            return _value(kind, value, place)
        except _UnusableError as error:
            reasons.append(error)
    # of several, what is said of the like of the value
    like = [reason for kind, reason in zip(kinds, reasons, strict=False) if isinstance(value, _json_type(kind))]
    raise (like or reasons)[0]


def _json_type(kind: Any) -> type | tuple[type, ...]:
    origin = typing.get_origin(kind)
    if origin in (list, tuple):
        return list
    if origin is dict or is_dataclass(kind):
        return dict
    return (int, float) if kind in (int, float) else str


def _sequence(origin: Any, kinds: tuple[Any, ...], value: Any, place: str) -> Any:
    if not isinstance(value, list):
        raise _UnusableError(f"{place} is {_shown(value)}, not a list")
    if origin is tuple and kinds[-1] is not Ellipsis:
        if len(value) != len(kinds):
            raise _UnusableError(f"{place} has {len(value)} parts, not {len(kinds)}")
    else:
        kinds = (kinds[0],) * len(value)
    return origin(
        _value(kind, each, f"{place}[{number}]") for number, (kind, each) in enumerate(zip(kinds, value, strict=True))
    )


def _number(value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _UnusableError(f"{place} is {_shown(value)}, not a number")
    if isinstance(value, int):
        if abs(value) > _MOST:  # some are beyond what numpy takes, or float
            raise _UnusableError(f"{place} is {_shown(value)}, out of every range")
    elif not math.isfinite(value):
        raise _UnusableError(f"{place} is {_shown(value)}, not a finite number")
    return value  # a whole number stays one, as digests of configurations are of what was written


def _whole(value: Any, place: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _UnusableError(f"{place} is {_shown(value)}, not a whole number")
    if abs(value) > _MOST:
        raise _UnusableError(f"{place} is {_shown(value)}, out of every range")
    return value


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise _UnusableError(f"{place} is {_shown(value)}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _UnusableError(f"{place} is {_shown(value)}, which is no valid Unicode") from error
    if "\0" in value:
        raise _UnusableError(f"{place} is {_shown(value)}, which holds a NUL character")
    return value


def _shown(value: Any) -> str:
    """A value as a message shows it: short, and on one line."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    try:
        shown = json.dumps(value)
    except ValueError:  # a whole number of thousands of digits
        return "a number of very many digits"
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
