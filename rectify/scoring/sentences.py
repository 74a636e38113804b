"""Sentences of a text, as places in it."""

from __future__ import annotations

import re

# what ends a sentence, with the blanks after it: marks before a blank, marks of scripts without blanks, an empty line
_END = re.compile(r"""(?:(?<![.!?…])[.!?…]++["'”’»)\]}*]*+(?=\s|\Z)|[。！？｡]++["'”’」』）】]*+|\n[^\S\n]*+\n)\s*+""")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[\"'“‘])(?:(?i:mr|mrs|ms|mx|dr|prof|rev|st|sr|jr|vs|cf|approx|e\.g|i\.e|u\.s)|[A-HJ-Z])\Z"
)
_MARKS = ".!?…。！？｡\"'”’»)]}*"


def sentence_spans(text: str, most: int | None = None) -> list[tuple[int, int]]:
    """Where the sentences of a text are.

    A sentence keeps the blanks that follow it, so that the spans cover the text without gaps; marks that stand alone
    belong to a neighbour. The rules are those of European scripts, and of the full stops of Chinese and Japanese.

    Args:
        text: any string.
        most: how many there may be at most; beyond it, neighbours are taken together.

    Returns:
        Begin and end of each sentence, in Python's places, end exclusive; none for an empty text.
    """
    spans: list[tuple[int, int]] = []
    begin = last = 0
    ends = [found.end() for found in _END.finditer(text) if _is_end(text, found)]
    for end in [*ends, len(text)]:
        bare = all(character in _MARKS or character.isspace() for character in text[last:end])
        last = end
        if not bare:
            spans.append((begin, end))
        elif spans:
            spans[-1] = spans[-1][0], end
        else:
            continue  # it waits for a sentence to belong to
        begin = end
    if begin < len(text):
        spans.append((begin, len(text)))
    if most is not None and len(spans) > most:
        step = -(-len(spans) // most)
        groups = [spans[start : start + step] for start in range(0, len(spans), step)]
        spans = [(group[0][0], group[-1][1]) for group in groups]
    return spans


def _is_end(text: str, found: re.Match[str]) -> bool:
    """Whether marks end a sentence, and not an abbreviation, or a pause within one."""
    marks = found.group().rstrip()
    if marks == ".":
        return _ABBREVIATION.search(text[max(0, found.start() - 10) : found.start()]) is None
    if set(marks) in ({"."}, {"…"}):
        return not text[found.end() : found.end() + 1].islower()
    return True
