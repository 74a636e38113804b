"""chrF: how alike texts are to references, by the n-grams of their characters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from rectify.errors import InvalidArgumentError

_ORDER = 6
_BETA = 2


def chrf(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus chrF2 of texts against one or more references each: n-grams of 1 to 6 characters without blanks.

    Of several references that one counts which a text is most alike. Matches and n-grams are summed over the texts.

    Args:
        texts: N of them.
        references: of each text one or more.

    Returns:
        From 0 to 100, as sacrebleu gives it by default; 0 where there is no text.

    Raises:
        InvalidArgumentError: there are not as many lists of references as texts, or one is empty.

    Source: Popović, "chrF", WMT 2015, and "chrF deconstructed", WMT 2016, for β = 2.

    Example:
        >>> from rectify.evaluation.chrf import chrf
        >>> round(chrf(["the cat sat"], [["the cat sat"]]))
        100
    """
    if len(texts) != len(references) or not all(references):
        raise InvalidArgumentError(
            f"references are of {len(references)} texts, texts {len(texts)}: give one or more for each text"
        )
    total = np.zeros((3, _ORDER))
    for text, others in zip(texts, references, strict=True):
        total += max((_counts(text, other) for other in others), key=_score)
    return _score(total)


def _counts(text: str, reference: str) -> np.ndarray:
    """`[3, 6]`: n-grams of the text, of the reference, and of both, for each length."""
    found = np.zeros((3, _ORDER))
    for n in range(1, _ORDER + 1):
        own, other = _grams(text, n), _grams(reference, n)
        if other:  # what is longer than the whole reference is not held against a text
            found[:, n - 1] = own.total(), other.total(), (own & other).total()
    return found


def _grams(text: str, n: int) -> Counter[str]:
    joined = "".join(text.split())
    return Counter(joined[start : start + n] for start in range(len(joined) - n + 1))


def _score(counts: np.ndarray) -> float:
    """The F-score of the mean precision and the mean recall over the lengths that both have n-grams of."""
    own, other, both = counts
    known = (own > 0) & (other > 0)
    if not both[known].any():
        return 0.0
    precision, recall = (both[known] / own[known]).mean(), (both[known] / other[known]).mean()
    return float(100 * (1 + _BETA**2) * precision * recall / (_BETA**2 * precision + recall))
