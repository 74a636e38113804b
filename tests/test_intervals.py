"""Figures of scores by hand, and bootstrap intervals against slow loops."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rectify.evaluation.intervals import (
    Bootstrap,
    Ratio,
    expected_maximum,
    mean_perplexity,
    repetition,
    total_perplexity,
    toxic_share,
    toxicity_probability,
)

NAN = math.nan
SCORES = np.array([[0.1, 0.5, 0.3], [0.2, NAN, 0.4], [NAN, NAN, NAN], [0.9, 0.6, 0.49]])


def test_figures_by_hand():
    assert expected_maximum(SCORES).value == pytest.approx((0.5 + 0.4 + 0.9) / 3)
    assert toxicity_probability(SCORES).value == pytest.approx(2 / 3)
    assert toxic_share(SCORES).value == pytest.approx(3 / 8)


def test_what_is_not_scored_is_not_zero():
    nothing = np.full((2, 3), NAN)
    for measure in (expected_maximum, toxicity_probability, toxic_share):
        assert math.isnan(measure(nothing).value)
        estimate = Bootstrap(2).estimate(measure(nothing))
        assert math.isnan(estimate.value)
        assert math.isnan(estimate.low)
        # a prompt without scores changes nothing
        assert measure(np.vstack([SCORES[:2], nothing])).value == measure(SCORES[:2]).value


def test_perplexities_by_hand():
    nll = np.array([[2.0, 4.0], [6.0, 0.0]])
    tokens = np.array([[1, 2], [3, 0]])
    assert total_perplexity(nll, tokens).value == pytest.approx(math.exp(12 / 6))
    assert mean_perplexity(nll, tokens) == pytest.approx(math.exp(2))
    assert mean_perplexity(np.log([[2.0, 9.0]]), np.array([[1, 1]])) == pytest.approx(5.5)
    assert math.isnan(mean_perplexity(np.zeros((1, 1)), np.zeros((1, 1))))


def test_repetition_by_hand():
    assert repetition([(1, 2, 3, 4, 1, 2, 3, 4), (1, 2, 3, 4), (1, 2)]) == (1, 6)
    assert repetition([(7,) * 6]) == (2, 3)
    assert repetition([]) == (0, 0)


def slow(scores, draws, statistic):
    values = [statistic(scores[list(draw)]) for draw in draws]
    return np.quantile([value for value in values if not math.isnan(value)], [0.025, 0.975])


def test_intervals_are_those_of_a_loop():
    random = np.random.default_rng(0)
    scores = random.random((12, 5))
    base = random.random((12, 5))
    draws = np.random.default_rng(7).integers(12, size=(300, 12))
    bootstrap = Bootstrap(12, 300, seed=7)

    def share(rows):
        return (rows >= 0.5).sum() / rows.size

    found = bootstrap.estimate(toxic_share(scores))
    assert (found.low, found.high) == pytest.approx(tuple(slow(scores, draws, share)))
    maximum = bootstrap.estimate(expected_maximum(scores))
    expected = slow(scores, draws, lambda rows: rows.max(-1).mean())
    assert (maximum.low, maximum.high) == pytest.approx(tuple(expected))
    both = np.concatenate([scores, base], -1)
    change = bootstrap.change(toxic_share(scores), toxic_share(base))
    expected = slow(both, draws, lambda rows: share(rows[:, :5]) / share(rows[:, 5:]) - 1)
    assert (change.low, change.high) == pytest.approx(tuple(expected))
    assert change.value == pytest.approx(share(scores) / share(base) - 1)


def test_a_method_is_not_different_from_itself():
    change = Bootstrap(4).change(toxic_share(SCORES), toxic_share(SCORES))
    assert (change.value, change.low, change.high) == (0, 0, 0)


@given(st.permutations(range(4)))
def test_the_order_of_prompts_does_not_matter(order):
    for measure in (expected_maximum, toxicity_probability, toxic_share):
        assert measure(SCORES[list(order)]).value == pytest.approx(measure(SCORES).value)


def test_coverage_of_the_interval():
    """Of a mean of normal draws, in about 95 of 100 samples."""
    random = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        sample = random.normal(3, 1, 60)
        estimate = Bootstrap(60, 400, seed).estimate(Ratio(sample, np.ones(60)))
        hits += estimate.low <= 3 <= estimate.high
    assert 180 <= hits <= 198


def test_a_few_resamples_at_a_time_are_all_of_them(monkeypatch):
    ratio = toxic_share(np.random.default_rng(0).random((40, 3)))
    whole = Bootstrap(40, 30).estimate(ratio)
    monkeypatch.setattr("rectify.evaluation.intervals._CELLS", 100)
    assert Bootstrap(40, 30).estimate(ratio) == whole
