"""What fills the masks of texts, and the trying until the result is safe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rectify.builders.masking import MASK, SAFE
from rectify.builders.trajectories import Score
from rectify.errors import InvalidArgumentError


class Filler(Protocol):
    """Fills masked texts.

    Attributes:
        name: what its results depend on; those of equal names may be mixed.
    """

    name: str

    def fill(self, masked: Sequence[str], attempt: int, originals: Sequence[str] | None = None) -> list[str | None]:
        """Each text with words in place of every `<MASK>`; `None` where nothing usable came.

        Args:
            masked: texts with `<MASK>` in them; in batches of the filler's own making.
            attempt: another number draws other words.
            originals: the texts before they were masked, for fillers that ask what is to be replaced.
        """


@dataclass(frozen=True)
class Rephrased:
    """What came of a masked text.

    Attributes:
        text: the safe text; `None` where there is none.
        toxicity: of the last one that was tried, as far as it is known.
        similarity: of the last one to the original; `None` where it was not asked for.
        attempts: how many were tried.
        reason: why there is none: `unfilled`, `unscored`, `unsafe` or `dissimilar`, of the last attempt.
    """

    text: str | None
    toxicity: float | None
    similarity: float | None
    attempts: int
    reason: str | None


def rephrase(
    originals: Sequence[str],
    masked: Sequence[str],
    filler: Filler,
    score: Score,
    attempts: int = 4,
    limit: float = SAFE,
    similarity: Callable[[Sequence[str], Sequence[str]], np.ndarray] | None = None,
    min_similarity: float = 0.0,
) -> list[Rephrased]:
    """Fill masked texts, trying those that are not safe again with other seeds.

    Args:
        originals: the texts before they were masked.
        masked: the texts with masks.
        filler: what fills them.
        score: judges the results.
        attempts: how many fillings of a text are tried, 1 or more.
        limit: toxicity from which on a text is not safe.
        similarity: of pairs of texts, `[N]` from −1 to 1; `None` for no gate.
        min_similarity: the least similarity to the original.

    Returns:
        One for each text.

    Raises:
        InvalidArgumentError: `attempts` is below 1.
    """
    if attempts < 1:
        raise InvalidArgumentError(f"attempts is {attempts}: give 1 or more")
    found: list[Rephrased] = [Rephrased(None, None, None, 0, "unfilled")] * len(masked)
    for attempt in range(attempts):
        pending = [place for place, one in enumerate(found) if one.text is None]
        if not pending:
            break
        texts = filler.fill([masked[place] for place in pending], attempt, [originals[place] for place in pending])
        filled = [
            (place, text)
            for place, text in zip(pending, texts, strict=True)
            if text is not None and text.strip() and MASK not in text
        ]
        for place in pending:
            found[place] = Rephrased(None, None, None, attempt + 1, "unfilled")
        if not filled:
            continue
        values = score([text for _, text in filled])
        cosines = [None] * len(filled)
        if similarity is not None:
            cosines = similarity([originals[place] for place, _ in filled], [text for _, text in filled]).tolist()
        for (place, text), value, cosine in zip(filled, values.tolist(), cosines, strict=True):
            reason = None
            if np.isnan(value):
                reason = "unscored"
            elif value >= limit:
                reason = "unsafe"
            elif cosine is not None and cosine < min_similarity:
                reason = "dissimilar"
            known = None if np.isnan(value) else round(value, 6)
            found[place] = Rephrased(None if reason else text, known, cosine, attempt + 1, reason)
    return found
