"""From texts to windows of tokens, and from scores of tokens back to spans of characters."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from rectify.detectors.classifier import check_texts

_JOINER = "\u200d"


class Span(NamedTuple):
    """A piece of a text.

    Attributes:
        start, end: Python's places in the original text, end exclusive.
        score: how probably it is toxic, in [0, 1].
    """

    start: int
    end: int
    score: float


@dataclass(frozen=True)
class Window:
    """Tokens that are read together.

    Attributes:
        text: the index of the text that they are from.
        input_ids: with the special tokens that the model expects around them.
        begin: how many of these stand before the text's own tokens.
        first: the index of the first own token in the text.
        count: how many own tokens there are.
        last: whether the text ends here.
    """

    text: int
    input_ids: list[int]
    begin: int
    first: int
    count: int
    last: bool

    @property
    def own(self) -> np.ndarray:
        """Which of `input_ids` are the text's own: `[T]` bool."""
        places = np.arange(len(self.input_ids))
        return (places >= self.begin) & (places < self.begin + self.count)


@dataclass(frozen=True)
class EncodedTexts:
    """Texts as windows.

    Attributes:
        windows: in the order of the texts; a text that fits has one, one without a token has none.
        offsets: of each text, `[n, 2]` int64: the characters of each of its n tokens, without blanks around them, and
            whole as people see them, with combining marks and joined emoji; begin and end are equal where nothing is
            left.
    """

    windows: list[Window]
    offsets: list[np.ndarray]

    def merged(self, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The score of each text's tokens, by the windows' scores; where windows overlap, that with more context.

        Args:
            rows: for each window `[count]`.

        Returns:
            For each text `[n]` float32.
        """
        scores = [np.zeros(len(offsets), np.float32) for offsets in self.offsets]
        context = [np.full(len(offsets), -1.0) for offsets in self.offsets]
        for window, row in zip(self.windows, rows, strict=True):
            before = np.arange(window.count) + (0.0 if window.first else np.inf)
            after = np.arange(window.count)[::-1] + (np.inf if window.last else 0.0)
            near = np.minimum(before, after)
            place = slice(window.first, window.first + window.count)
            better = near > context[window.text][place]
            scores[window.text][place][better] = row[better]
            context[window.text][place][better] = near[better]
        return scores


def encode_windows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int, overlap: int
) -> EncodedTexts:
    """Cut texts into overlapping windows of tokens.

    Args:
        tokenizer: a fast one.
        texts: of any length.
        max_length: tokens of a window, special ones included.
        overlap: tokens that two neighbouring windows share.

    Raises:
        InvalidArgumentError: a text is not a string, or no valid Unicode.
    """
    check_texts(texts)
    if not texts:
        return EncodedTexts([], [])
    encoded = tokenizer(
        list(texts),
        truncation=True,
        max_length=max_length,
        stride=overlap,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    step = max_length - overlap - tokenizer.num_special_tokens_to_add()
    windows: list[Window] = []
    offsets: list[list[tuple[int, int]]] = [[] for _ in texts]
    sources = encoded["overflow_to_sample_mapping"]
    for index, source in enumerate(sources):
        own = [place for place, special in enumerate(encoded["special_tokens_mask"][index]) if not special]
        if not own:
            continue
        first = windows[-1].first + step if windows and windows[-1].text == source else 0
        new = own[len(offsets[source]) - first :]
        offsets[source] += [whole_characters(texts[source], *encoded["offset_mapping"][index][place]) for place in new]
        last = index + 1 == len(sources) or sources[index + 1] != source
        windows.append(Window(source, encoded["input_ids"][index], own[0], first, len(own), last))
    return EncodedTexts(windows, [np.array(rows, np.int64).reshape(-1, 2) for rows in offsets])


def word_scores(text: str, offsets: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Give each token the mean score of its word, so that no part of a word is found without the rest.

    A word is made of tokens that touch at letters or digits; letters of scripts without upper case, many of which have
    no blanks between words, are left as the tokens are.

    Args:
        text: the text.
        offsets: `[n, 2]` int64, the characters of each token.
        scores: `[n]`.

    Returns:
        `[n]` float64.
    """
    begins = np.ones(len(scores), np.int64)
    for place in range(1, len(scores)):
        (left, end), (start, right) = offsets[place - 1].tolist(), offsets[place].tolist()
        if left < end and start < right:
            # parts of a character share it
            touch = start < end or (start == end and _in_word(text[start - 1]) and _in_word(text[start]))
            begins[place] = not touch
    words = np.cumsum(begins) - 1
    return (np.bincount(words, scores) / np.maximum(1, np.bincount(words)))[words] if len(scores) else scores


def _in_word(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] in "LMN" and category != "Lo"


def spans_of(text: str, offsets: np.ndarray, scores: np.ndarray, threshold: float) -> list[Span]:
    """The spans of a text whose tokens have at least a score.

    Tokens with nothing but blanks between them make one span, as annotators mark phrases; its score is the highest of
    theirs.

    Args:
        text: the text.
        offsets: `[n, 2]` int64, the characters of each token.
        scores: `[n]`.
        threshold: in [0, 1].

    Returns:
        Sorted, without overlaps.
    """
    spans: list[Span] = []
    for place in np.flatnonzero((scores >= threshold) & (offsets[:, 0] < offsets[:, 1])):
        start, end = offsets[place].tolist()
        score = float(scores[place])
        if spans and (start <= spans[-1].end or not text[spans[-1].end : start].strip()):
            last = spans.pop()
            start, end, score = last.start, max(end, last.end), max(score, last.score)
        spans.append(Span(start, end, score))
    return spans


def token_labels(offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens have at least half of their characters in spans: `[n, 2]` offsets to `[n]` bool."""
    if not len(offsets):
        return np.zeros(0, bool)
    inside = np.zeros(max(int(offsets.max()), *(end for _, end in spans), 0) + 1, np.int64)
    for start, end in spans:
        inside[start:end] = 1
    before = np.concatenate([[0], np.cumsum(inside)])
    covered = before[offsets[:, 1]] - before[offsets[:, 0]]
    length = offsets[:, 1] - offsets[:, 0]
    return (length > 0) & (2 * covered >= length)


def whole_characters(text: str, start: int, end: int) -> tuple[int, int]:
    """The characters of a token, or of another piece of a text, as people see them.

    Many tokens hold the blank before their word, others are a part of a character, or lack its accents.

    Args:
        text: the text.
        start, end: of the piece, end exclusive.

    Returns:
        Where it begins and ends without blanks around it, and with what belongs to its first and last character.
    """
    piece = text[start:end]
    start += len(piece) - len(piece.lstrip())
    end = start + len(piece.strip())
    if start >= end:
        return start, start
    while start > 0 and _goes_on(text, start):
        start -= 1
    while end < len(text) and _goes_on(text, end):
        end += 1
    return start, end


def _goes_on(text: str, place: int) -> bool:
    """Whether a character belongs to the one before it: a mark, a skin tone, or what a joiner joins."""
    character = text[place]
    return (
        unicodedata.category(character).startswith("M")
        or character == _JOINER
        or text[place - 1] == _JOINER
        or "\U0001f3fb" <= character <= "\U0001f3ff"
    )
