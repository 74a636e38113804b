"""What a span detector is to beat: looking words up in a list, and chance."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from rectify.detectors.span_decoding import Span
from rectify.errors import InvalidArgumentError
from rectify.evaluation.span_f1 import characters
from rectify.scoring.keywords import alternatives
from rectify.text_files import AnnotatedText

_WORD = re.compile(r"\w+")


class LexiconSpans:
    """Finds the terms of a list, as whole words in whatever case.

    Args:
        terms: of one word or several.

    Raises:
        InvalidArgumentError: there is no term.
    """

    def __init__(self, terms: Iterable[str]) -> None:
        folded = sorted({" ".join(term.lower().split()) for term in terms} - {""})
        if not folded:
            raise InvalidArgumentError("lexicon holds no term: give one or more")
        pattern = alternatives(folded).replace(r"\ ", r"\s+")
        self._pattern = re.compile(rf"(?<!\w){pattern}(?!\w)", re.IGNORECASE)

    def find(self, texts: Sequence[str]) -> list[list[Span]]:
        """The terms in each text."""
        return [[Span(*found.span(), 1.0) for found in self._pattern.finditer(text)] for text in texts]


def learnt_terms(rows: Iterable[AnnotatedText], least: int = 2) -> list[str]:
    """The words that are toxic more often than not in annotated texts.

    Args:
        rows: the texts.
        least: how often a word must be there.
    """
    there, toxic = Counter[str](), Counter[str]()
    for row in rows:
        inside = characters(row.spans)
        for found in _WORD.finditer(row.text):
            word = found.group().lower()
            there[word] += 1
            toxic[word] += inside.issuperset(range(*found.span()))
    return sorted(word for word, count in toxic.items() if there[word] >= least and 2 * count > there[word])


def random_spans(texts: Sequence[str], seed: int = 0) -> list[list[Span]]:
    """Each word with a chance of one half, by seed and text alone."""
    found = []
    for text in texts:
        draw = random.Random(f"{seed} {text}")
        found.append([Span(*word.span(), 0.5) for word in _WORD.finditer(text) if draw.random() < 0.5])
    return found
