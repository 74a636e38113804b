"""Which part of the data a record belongs to, by a hash of its key: the same on every machine and in every order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from rectify.errors import InvalidArgumentError

Split = Literal["train", "validation", "test"]

Row = TypeVar("Row")


def split_of(key: str) -> Split:
    """The fixed split of a record by the SHA-256 of its key: one tenth is test, one tenth validation."""
    remainder = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10
    return {1: "test", 2: "validation"}.get(remainder, "train")  # type: ignore[return-value]


def record_key(record: Mapping[str, Any]) -> str:
    """The key of a RealToxicityPrompts record, by which it is split."""
    return "{filename}:{begin}:{end}".format_map(record)


def split_by_hash(rows: Sequence[Row], share: float, key: Callable[[Row], str]) -> tuple[list[Row], list[Row]]:
    """Training and validation rows, by the SHA-256 of each row's key, so that equal keys stay together.

    Raises:
        InvalidArgumentError: `share`, that of validation, is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise InvalidArgumentError(f"validation_share is {share}: give a share above 0 and below 1")
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        digest = hashlib.sha256(key(row).encode()).digest()
        parts[int.from_bytes(digest[:8], "big") < share * 2**64].append(row)
    return parts
