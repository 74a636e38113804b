"""The chain by which a model detoxifies itself: a verdict on a text, the text masked and rephrased, a continuation.

In one line, each part after a marker, as published (Tang et al., CMD, EMNLP 2024, arXiv 2308.08295):

    # Text: … # Let's detoxify step by step. # The context is toxic. # Detect the toxic segment within the context: …
    # Detoxify the toxic segments: … # Generation: … #
    # Text: … # Let's detoxify step by step. # The context is non-toxic. # Generation: … #

The model is given the text and "Let's detoxify step by step." (the *frame*), and writes the rest. Frame, *reasoning*
(as far as the last marker), continuation and the mark that closes it are tokenised apart, in training as in generation,
so that a model meets the boundaries that it was trained on; the continuation keeps its own leading space, so that it
can be cut out exactly.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum

from rectify.builders.masking import MASK

GENERATION = "# Generation:"
"""What the reasoning ends with."""
CLOSE = " #"
"""What ends a continuation."""

_FRAME = "# Text: {} # Let's detoxify step by step."
_SAFE = " # The context is non-toxic. " + GENERATION
_TOXIC = (
    " # The context is toxic. # Detect the toxic segment within the context: {} # Detoxify the toxic segments: {} "
    + GENERATION
)
_READ_SAFE, _READ_TOXIC = (
    re.compile(re.escape(template).replace(re.escape("{}"), "(.+?)"), re.DOTALL)
    for template in (_SAFE.lstrip(), _TOXIC.lstrip())
)


class Malformed(StrEnum):
    """What is wrong with a chain that a model wrote."""

    TOO_LONG = "the text leaves no room for a chain"
    UNFINISHED = "the chain does not come to a generation"
    NO_STEPS = "the chain's steps are not those of the template"
    NO_MASK = "the chain calls the context toxic and masks nothing of it"
    NOT_REPHRASED = "the chain's rephrased text is empty, or masked still"


@dataclass(frozen=True)
class Steps:
    """What a chain says of a text before its continuation.

    Attributes:
        masked: the text with `<MASK>` for what is toxic; `None` for a text that is not.
        rephrased: the text with other words there; `None` for a text that is not toxic.
    """

    masked: str | None = None
    rephrased: str | None = None

    def __post_init__(self) -> None:
        if (self.masked is None) != (self.rephrased is None):
            raise ValueError("a chain has either both a masked and a rephrased text, or none of them")

    @property
    def reasoning(self) -> str:
        """The chain from the end of the frame to the last marker."""
        return _SAFE if self.masked is None else _TOXIC.format(self.masked, self.rephrased)

    def safe_text(self, text: str) -> str:
        """What is continued: the rephrased text, or the text itself."""
        return text if self.rephrased is None else self.rephrased


def frame(text: str) -> str:
    """What a model is given of a text, to write the chain after it."""
    return _FRAME.format(text)


def read_steps(reasoning: str) -> Steps | Malformed:
    """The steps that a model wrote after a frame, as far as the last marker, or what is wrong with them.

    Example:
        >>> from rectify.chain import Steps, read_steps
        >>> read_steps(Steps("Such a <MASK>", "Such a person").reasoning)
        Steps(masked='Such a <MASK>', rephrased='Such a person')
    """
    written = reasoning.strip()
    if not written.endswith(GENERATION):
        return Malformed.UNFINISHED
    if _READ_SAFE.fullmatch(written):
        return Steps()
    found = _READ_TOXIC.fullmatch(written)
    if found is None:
        return Malformed.NO_STEPS
    masked, rephrased = found.groups()
    if MASK not in masked:
        return Malformed.NO_MASK
    if not rephrased.strip() or MASK in rephrased:
        return Malformed.NOT_REPHRASED
    return Steps(masked, rephrased)


def closed_length(ids: Sequence[int], close_ids: Sequence[int], ends: Collection[int]) -> int:
    """How many tokens of a continuation come before the marker that closes it, or before an end token; all without one.

    Args:
        ids: what was written.
        close_ids: the tokens of `CLOSE`; none where it closes nothing.
        ends: the end tokens.
    """
    close, count = list(close_ids), len(close_ids)
    for place, token in enumerate(ids):
        if token in ends or (count and list(ids[place : place + count]) == close):
            return place
    return len(ids)
