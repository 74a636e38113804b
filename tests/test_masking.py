"""Masking: what becomes of spans and of what is between them, and how far it goes until a text is safe."""

import re
from collections import Counter

import numpy as np
import pytest

from rectify.builders.masking import MASK, Outcome, mask_spans, mask_until_safe
from rectify.detectors.spans import Span
from rectify.errors import InvalidArgumentError


def spans(*pairs):
    return [Span(start, end, 0.9) for start, end in pairs]


def test_spans_become_masks_and_the_rest_stays():
    text = "You  SILLY\told fool!\u00a0 ok 🤦🏽 "
    for pairs, expected in {
        (): text,
        ((5, 10),): f"You  {MASK}\told fool!\u00a0 ok 🤦🏽 ",
        ((5, 10), (11, 14)): f"You  {MASK} fool!\u00a0 ok 🤦🏽 ",
        ((15, 19), (5, 10)): f"You  {MASK}\told {MASK}!\u00a0 ok 🤦🏽 ",
        ((4, 12), (8, 14), (14, 20)): f"You  {MASK}\u00a0 ok 🤦🏽 ",
        ((4, 11),): f"You  {MASK}\told fool!\u00a0 ok 🤦🏽 ",  # blanks at the edges of a span stay
        ((25, 27), (3, 5), (7, 7)): f"You  SILLY\told fool!\u00a0 ok {MASK} ",
        ((0, len(text)),): f"{MASK} ",
    }.items():
        assert mask_spans(text, spans(*pairs)) == expected
    assert mask_spans(f"a {MASK} b", spans((0, 1))) == f"{MASK} {MASK} b"  # a mask that was there is text
    assert mask_spans("", []) == ""


def test_spans_outside_the_text_are_refused():
    for pair in ((-1, 2), (2, 5), (3, 2)):
        with pytest.raises(InvalidArgumentError, match=r"spans hold .*4 characters"):
            mask_spans("text", spans(pair))


SCORES = {"idiot": 0.9, "moron": 0.8, "stupid": 0.25, "damn": 0.2, "and": 0.05, "unknown": 0.02}
TOXICITY = {"idiot": 0.9, "moron": 0.9, "stupid": 0.6, "damn": 0.3, "nasty": 0.9}


def find(texts, threshold=None):
    """Single words by a table; its own threshold is 0.5."""
    least = 0.5 if threshold is None else threshold
    return [
        [Span(*word.span(), SCORES[word.group()]) for word in re.finditer(r"\w+", text) if keep(word.group(), least)]
        for text in texts
    ]


def keep(word, least):
    return SCORES.get(word, 0) >= least


def score(texts):
    assert not any(MASK in text for text in texts)
    return np.array(
        [np.nan if "unknown" in text else max([TOXICITY.get(w, 0) for w in text.split()] + [0]) for text in texts]
    )


def test_masking_goes_on_until_the_text_is_safe():
    texts = [
        "have a nice day",
        "what an idiot and moron he is",
        "a stupid damn idiot came here again",
        "so nasty and damn bad was it",
        "you idiot",
        "moron !",
        "unknown words and more",
    ]
    found = mask_until_safe(texts, find, score)
    assert [one.text for one in found] == [
        texts[0],
        f"what an {MASK} and {MASK} he is",
        f"a {MASK} damn {MASK} came here again",  # "damn" is less likely, and not needed
        f"so nasty {MASK} bad was it",
        f"you {MASK}",
        f"{MASK} !",
        texts[-1],
    ]
    outcomes = ["safe", "safe", "safe", "hopeless", "safe", "hopeless", "unscored"]
    assert [one.outcome for one in found] == outcomes
    assert Counter(one.outcome for one in found)[Outcome.HOPELESS] == 2
    assert [one.rounds for one in found] == [1, 1, 2, 3, 1, 1, 1]
    assert found[3].toxicity == 0.9
    assert np.isnan(found[-1].toxicity)
    for text, one in zip(texts, found, strict=True):
        assert mask_spans(text, one.spans) == one.text
        assert mask_until_safe([text], find, score)[0][:2] == one[:2]


def test_longer_spans_at_lower_thresholds_add_what_is_not_masked():
    def wider(texts, threshold=None):
        return [[Span(4, 9, 0.9)] if threshold is None else [Span(0, 13, 0.9), Span(14, 18, 0.35)] for _ in texts]

    def until(words):
        return lambda texts: np.array([float(any(word in text for word in words)) for text in texts])

    [found] = mask_until_safe(["ab, idiot, c; damn d"], wider, until(["damn"]), max_share=1)
    assert found.text == f"ab, {MASK}, c; {MASK} d"
    assert found.spans == (Span(4, 9, 0.9), Span(14, 18, 0.35))
    [found] = mask_until_safe(["ab, idiot, c; damn d"], wider, until(["damn", "ab"]), max_share=1)
    # nothing more is known of them than that they reached the threshold
    assert found.spans == (Span(0, 4, 0.3), Span(4, 9, 0.9), Span(14, 18, 0.35))


def test_nothing_and_bad_arguments():
    assert mask_until_safe([], find, lambda texts: np.zeros(0)) == []
    assert mask_until_safe(["", " "], find, lambda texts: np.full(2, np.nan))[1].outcome == "unscored"
    for bad in ({"limit": 0}, {"limit": 1.1}, {"max_share": 2}, {"thresholds": ()}):
        with pytest.raises(InvalidArgumentError, match=next(iter(bad))):
            mask_until_safe(["idiot"], find, score, **bad)
    with pytest.raises(InvalidArgumentError, match="score gave shape"):
        mask_until_safe(["idiot"], find, lambda texts: np.zeros(3))
