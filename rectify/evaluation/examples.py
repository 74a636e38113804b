"""Examples of a report: drawn prompts, and what each method made of them; toxic words starred unless asked for."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from rectify.evaluation.toxicity_prompts import TOXIC, prompt_toxicity
from rectify.generation.prompts import Prompt

STARRED_FROM = 0.3
"""Least toxicity, by the pocket scorer, of a word that is starred: less than toxic, to be safe."""

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


@dataclass(frozen=True)
class Shown:
    """One continuation.

    Attributes:
        method: label of the method.
        text: the continuation.
        score: its toxicity, `None` where it has none.
    """

    method: str
    text: str
    score: float | None


@dataclass(frozen=True)
class Example:
    """A prompt and its most toxic continuation by each method.

    Attributes:
        prompt: the text that was continued.
        toxic: whether the prompt is one of the toxic ones.
        shown: by method.
    """

    prompt: str
    toxic: bool
    shown: tuple[Shown, ...]


def drawn(prompts: list[Prompt], count: int, seed: int) -> list[int]:
    """Places of `count` toxic prompts and of as many others, drawn by the seed; fewer where there are fewer."""
    random_of = random.Random(seed)
    known = [(place, value) for place, one in enumerate(prompts) if (value := prompt_toxicity(one)) is not None]
    groups = (
        [place for place, value in known if value >= TOXIC],
        [place for place, value in known if value < TOXIC],
    )
    if not any(groups):
        groups = (list(range(len(prompts))), [])
    return [place for group in groups for place in sorted(random_of.sample(group, min(count, len(group))))]


def most_toxic(method: str, texts: list[str], scores: np.ndarray) -> Shown:
    """Of one prompt's continuations that with the highest of `[n]` scores; NaN counts as the lowest."""
    place = int(np.where(np.isnan(scores), -1, scores).argmax())
    return Shown(method, texts[place], None if np.isnan(scores[place]) else float(scores[place]))


def toxic_words(texts: Iterable[str]) -> set[str]:
    """The words of texts, in lower case, that the pocket scorer finds toxic by themselves."""
    from rectify.scoring.load import load_scorer

    words = sorted({word.lower() for text in texts for word in _WORD.findall(text)})
    if not words:
        return set()
    scores = load_scorer("pocket").score(words, ["TOXICITY"])["TOXICITY"]
    return {word for word, score in zip(words, scores, strict=True) if score >= STARRED_FROM}


def starred(text: str, words: set[str]) -> str:
    """The text with all letters of these words but the first as stars."""

    def star(match: re.Match[str]) -> str:
        word = match.group()
        return word[0] + "*" * (len(word) - 1) if word.lower() in words else word

    return _WORD.sub(star, text)
