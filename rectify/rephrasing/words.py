"""The words of texts, as they are compared between sentences and their rewrites."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import groupby

_JOINED = "_*@$#'’"  # in words beside letters, digits and what is combined with them


def split_words(text: str) -> list[str]:
    """Words and marks of a text, in lower case; what hides letters in words belongs to them."""
    return [text[start:end].lower() for start, end in word_places(text)]


def word_places(text: str) -> list[tuple[int, int]]:
    """Where the words and marks of a text are: start and end."""
    places = []
    for inside, group in groupby(enumerate(text), lambda item: _in_word(item[1])):
        run = list(group)
        if inside:
            places.append((run[0][0], run[-1][0] + 1))
        else:
            places += [(place, place + 1) for place, character in run if not character.isspace()]
    return places


def without_marks(words: Sequence[str], front: bool = True) -> list[str]:
    """Words without the marks after them, and without those before them."""
    kept = [place for place, word in enumerate(words) if _in_word(word[0])]
    return list(words[kept[0] if front else 0 : kept[-1] + 1]) if kept else []


def plain(words: Sequence[str]) -> str:
    """Words as one text, without the marks around them; nothing where there is no letter or digit."""
    text = " ".join(without_marks(words))
    return text if any(character.isalnum() for character in text) else ""


def _in_word(character: str) -> bool:
    return character.isalnum() or character in _JOINED or unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf")
