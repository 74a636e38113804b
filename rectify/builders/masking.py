"""Masking of toxic spans, further and further until what is left of a text is safe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol, cast

import numpy as np

from rectify.builders.trajectories import Score
from rectify.detectors.span_decoding import Span
from rectify.errors import InvalidArgumentError

MASK = "<MASK>"
SAFE = 0.5
"""Masked text is safe below this toxicity."""

THRESHOLDS = (None, 0.3, 0.1, 0.03, 0.01)
"""Of the detector, one after the other; `None` is its own."""


class Find(Protocol):
    """What finds spans: `SpanDetector.find`."""

    def __call__(self, texts: Sequence[str], threshold: float | None = None) -> list[list[Span]]:
        """The spans of each text, sorted and without overlaps, at a threshold or at its own."""


class Outcome(StrEnum):
    """What became of a text."""

    SAFE = "safe"
    HOPELESS = "hopeless"
    """Still toxic when nothing more was found to mask, or so much is masked that nothing is left to rephrase."""
    UNSCORED = "unscored"
    """What is left of it has no score, so that nobody can say whether it is safe."""


class Masking(NamedTuple):
    """A text after masking.

    Attributes:
        text: with `<MASK>` in place of its spans; the text itself where it has none.
        spans: what is masked.
        toxicity: of what is left, without the masks; NaN where there is no score.
        outcome: whether it is safe.
        rounds: how often it was scored.
    """

    text: str
    spans: tuple[Span, ...]
    toxicity: float
    outcome: Outcome
    rounds: int


def mask_spans(text: str, spans: Sequence[Span]) -> str:
    """A text with `<MASK>` in place of each span; masks with nothing but blanks between them become one.

    Blanks at the edges of a span stay, as does everything else.

    Args:
        text: the text.
        spans: in any order; they may overlap, and those of blanks only are passed over.

    Raises:
        InvalidArgumentError: a span is not in the text.

    Example:
        >>> mask_spans("You silly  old fool!", [Span(4, 9, 0.9), Span(11, 19, 0.8)])
        'You <MASK>!'
    """
    return _replaced(text, spans, MASK)


def masked_words(original: str, masked: str) -> list[str]:
    """What was in a text where its masks are now; where several readings are possible, the shortest from the left.

    Args:
        original: the text.
        masked: the same with `<MASK>` in place of some of it, one character or more each.

    Raises:
        InvalidArgumentError: the texts differ elsewhere.

    Example:
        >>> masked_words("You silly  old fool!", "You <MASK>!")
        ['silly  old fool']
    """
    first, *others = masked.split(MASK)
    found, place = [], len(first)
    for number, part in enumerate(others, start=1):
        end = original.find(part, place + 1) if number < len(others) else len(original) - len(part)
        if end > place:
            found.append(original[place:end])
            place = end + len(part)
    pieces = [piece for pair in zip(found, others, strict=False) for piece in pair]
    if len(found) < len(others) or "".join([first, *pieces]) != original:
        raise InvalidArgumentError(f"masked is {masked!r}: give the text {original!r} with {MASK} in it")
    return found


def mask_until_safe(
    texts: Sequence[str],
    find: Find,
    score: Score,
    *,
    limit: float = SAFE,
    thresholds: Sequence[float | None] = THRESHOLDS,
    max_share: float = 0.7,
) -> list[Masking]:
    """Mask the toxic spans of texts, and more of them until what is left scores below a limit.

    First all spans at the detector's own threshold are masked. While what is left is toxic, the likeliest span that a
    lower threshold adds is masked as well, one a round; then those of the next threshold.

    Args:
        texts: toxic texts, or any; a text that is safe and without spans stays as it is.
        find: see `Find`.
        score: judges what is left: the text with its spans taken out, which no scorer has to know `<MASK>` for.
        limit: toxicity from which on a text is not safe.
        thresholds: falling; `None` for the detector's own.
        max_share: a text is hopeless beyond this share of its characters that are not blank.

    Returns:
        One for each text; `collections.Counter(one.outcome for one in …)` counts what became of them.

    Raises:
        InvalidArgumentError: a number is out of range, or there is no threshold.
    """
    if not 0 < limit <= 1 or not 0 <= max_share <= 1:
        raise InvalidArgumentError(
            f"limit is {limit}, max_share {max_share}: give numbers from 0 to 1, and a limit > 0"
        )
    if not thresholds:
        raise InvalidArgumentError("thresholds is empty: give one or more, None for the detector's own")
    pending = [_Pending(text) for text in texts]
    for one, spans in zip(pending, find(texts, thresholds[0]), strict=True):
        one.add(spans)
    results: list[Masking | None] = [None] * len(texts)
    active = list(range(len(texts)))
    rounds = 0
    while active:
        rounds += 1
        toxicity = np.asarray(score([pending[index].left for index in active]), dtype=np.float64)
        if toxicity.shape != (len(active),):
            raise InvalidArgumentError(f"score gave shape {toxicity.shape} for {len(active)} texts: give one each")
        known = dict(zip(active, toxicity.tolist(), strict=True))
        toxic = [index for index in active if known[index] >= limit]
        _refill([pending[index] for index in toxic], find, thresholds)
        for index in active:
            one, outcome = pending[index], Outcome.SAFE
            if (not one.left.strip() and one.runs) or one.share > max_share:
                outcome = Outcome.HOPELESS
            elif math.isnan(known[index]):
                outcome = Outcome.UNSCORED
            elif known[index] >= limit:
                if one.waiting:
                    one.add([one.waiting.pop(0)])
                    continue
                outcome = Outcome.HOPELESS
            results[index] = Masking(mask_spans(one.text, one.spans), tuple(one.spans), known[index], outcome, rounds)
        active = [index for index in active if results[index] is None]
    return cast(list[Masking], results)


# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class _Pending:
    """A text that is being masked: its spans, those that wait, and the threshold that they were found at."""

    text: str
    spans: list[Span] = field(default_factory=list)
    waiting: list[Span] = field(default_factory=list)
    level: int = 0

    def add(self, spans: Sequence[Span]) -> None:
        self.spans = sorted([*self.spans, *spans])

    @property
    def runs(self) -> list[tuple[int, int]]:
        return _runs(self.text, self.spans)

    @property
    def left(self) -> str:
        """The text without its spans."""
        return _replaced(self.text, self.spans, "")

    @property
    def share(self) -> float:
        """How much of it is masked."""
        total = _visible(self.text)
        return sum(_visible(self.text[start:end]) for start, end in self.runs) / total if total else 0.0

    def unmasked(self, spans: Sequence[Span], threshold: float) -> list[Span]:
        """What of spans is not masked yet, the likeliest first; of what is left of a span, no more is known than that
        it reached the threshold."""
        found = []
        for span in spans:
            start, pieces = span.start, []
            for begin, end in self.runs:
                if start < end and begin < span.end:
                    pieces.append((start, begin))
                    start = end
            pieces.append((start, span.end))
            score = span.score if len(pieces) == 1 else threshold
            found += [Span(begin, end, score) for begin, end in pieces if self.text[begin:end].strip()]
        return sorted(found, key=lambda span: -span.score)


def _refill(pending: Sequence[_Pending], find: Find, thresholds: Sequence[float | None]) -> None:
    """Look for more spans in the texts for which none waits, at lower and lower thresholds."""
    for level, threshold in enumerate(thresholds[1:], start=1):
        some = [one for one in pending if not one.waiting and one.level == level - 1]
        if some:
            for one, spans in zip(some, find([one.text for one in some], threshold), strict=True):
                one.level, one.waiting = level, one.unmasked(spans, cast(float, threshold))


def _replaced(text: str, spans: Sequence[Span], by: str) -> str:
    pieces, done = [], 0
    for start, end in _runs(text, spans):
        pieces += [text[done:start], by]
        done = end
    return "".join([*pieces, text[done:]])


def _visible(text: str) -> int:
    return sum(not character.isspace() for character in text)


def _runs(text: str, spans: Sequence[Span]) -> list[tuple[int, int]]:
    """Where masks go: spans without the blanks at their edges, those with only blanks between them as one."""
    runs: list[tuple[int, int]] = []
    for start, end, _ in sorted(spans):
        if not 0 <= start <= end <= len(text):
            raise InvalidArgumentError(f"spans hold ({start}, {end}): give places in the text's {len(text)} characters")
        piece = text[start:end]
        if not piece.strip():
            continue
        start, end = start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())
        if runs and (start <= runs[-1][1] or not text[runs[-1][1] : start].strip()):
            runs[-1] = runs[-1][0], max(end, runs[-1][1])
        else:
            runs.append((start, end))
    return runs
