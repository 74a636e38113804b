"""Which part of the data a record belongs to, by a hash of its key: the same on every machine and in every order."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from rectify.errors import InvalidArgumentError

Split = Literal["train", "validation", "test"]

Row = TypeVar("Row")

_GROUPS, _LARGE_GROUP = 200, 25


def split_of(key: str) -> Split:
    """The fixed split of a record by the SHA-256 of its key: one tenth is test, one tenth validation."""
    remainder = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10
    return {1: "test", 2: "validation"}.get(remainder, "train")  # type: ignore[return-value]


def record_key(record: Mapping[str, Any]) -> str:
    """The key of a RealToxicityPrompts record, by which it is split."""
    return "{filename}:{begin}:{end}".format_map(record)


def alike(text: str) -> str:
    """The text without regard to spaces and capitals: what is alike is not to be learnt and asked for."""
    return " ".join(text.split()).casefold()


def together(keys: Sequence[str]) -> dict[str, str]:
    """For each key the one by whose hash it is split: the least of those that are `alike`."""
    least: dict[str, str] = {}
    for key in keys:
        least[alike(key)] = min(key, least.get(alike(key), key))
    return {key: least[alike(key)] for key in keys}


def first_words(texts: Sequence[str]) -> list[str]:
    """The beginning of each text, by which texts that go on from one prompt are kept together where none is told.

    As many words as make enough groups, and no more, as a prompt may be short. Groups of unequal size count by their
    effective number, `N² / Σ n²`: 200 are enough, or one for each 25 texts where there are few.
    """
    words = [alike(text).split() for text in texts]
    enough = min(_GROUPS, len(texts) / _LARGE_GROUP)
    length = 1
    for length in range(1, max(map(len, words), default=0) + 1):
        sizes = Counter(tuple(each[:length]) for each in words).values()
        if len(texts) ** 2 >= enough * sum(size**2 for size in sizes) and len(sizes) > 1:
            break
    return [" ".join(each[:length]) for each in words]


def split_by_hash(rows: Sequence[Row], share: float, key: Callable[[Row], str]) -> tuple[list[Row], list[Row]]:
    """Training and validation rows, by the SHA-256 of each row's key, so that equal keys stay together, and those that
    differ in spaces and capitals alone.

    Of rows of two keys or more none of the parts is empty.

    Args:
        rows: what is split.
        share: of validation, above 0 and below 1.
        key: of a row: its text, or what else must not be on both sides, as its prompt.

    Raises:
        InvalidArgumentError: the share is out of range.
    """
    if not 0 < share < 1:
        raise InvalidArgumentError(f"validation_share is {share}: give a share above 0 and below 1")
    keys = [key(row) for row in rows]
    places = {each: _place(least) for each, least in together(keys).items()}
    held = {each for each, place in places.items() if place < share * 2**64}
    if len(set(places.values())) > 1 and len(held) in (0, len(places)):
        end = max(places.values()) if held else min(places.values())
        held ^= {each for each, place in places.items() if place == end}
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row, each in zip(rows, keys, strict=True):
        parts[each in held].append(row)
    return parts


def _place(key: str) -> int:
    """A number below 2⁶⁴."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big")
