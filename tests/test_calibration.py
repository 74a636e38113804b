"""Calibration against loops written here, and scikit-learn's own figures."""

import math

import numpy as np
import pytest

from rectify.errors import InvalidArgumentError
from rectify.evaluation.calibration import calibration, expected_calibration_error, reliability


def draws(seed=0, count=500):
    random = np.random.default_rng(seed)
    probability = random.random(count)
    return probability, (random.random(count) < probability**2).astype(int)


def slow_bins(probability, label, bins):
    members = [[] for _ in range(bins)]
    for p, y in zip(probability, label, strict=True):
        place = next((i for i in range(bins) if i / bins <= p < (i + 1) / bins), bins - 1)
        members[place].append((p, y))
    return members


@pytest.mark.parametrize("bins", [1, 7, 10])
def test_bins_and_error_are_those_of_a_loop(bins):
    probability, label = draws()
    probability[:3] = 0, 1, 0.5
    members = slow_bins(probability, label, bins)
    predicted, observed, count = reliability(probability, label, bins)
    assert count.tolist() == [len(member) for member in members]
    expected = 0.0
    for place, member in enumerate(members):
        p, y = np.mean(member, axis=0)
        assert (predicted[place], observed[place]) == pytest.approx((p, y))
        expected += len(member) / len(label) * abs(p - y)
    assert expected_calibration_error(probability, label, bins) == pytest.approx(expected)


def test_an_empty_bin_counts_for_nothing():
    predicted, observed, count = reliability(np.array([0.05, 0.95]), np.array([0, 1]))
    assert count.sum() == 2
    assert np.isnan(predicted[1:9]).all()
    assert np.isnan(observed[1:9]).all()
    assert expected_calibration_error(np.array([0.05, 0.95]), np.array([0, 1])) == pytest.approx(0.05)


def test_edges_belong_to_the_bin_above():
    assert reliability(np.arange(11) / 10, np.zeros(11))[2].tolist() == [1] * 9 + [2]


def test_summary():
    probability, label = draws()
    found = calibration(probability, label)
    assert found.count == 500
    assert found.brier == pytest.approx(((probability - label) ** 2).mean())
    assert found.brier_constant == pytest.approx(((label.mean() - label) ** 2).mean())
    ranks = [(p > q) + (p == q) / 2 for p in probability[label == 1] for q in probability[label == 0]]
    assert found.auc == pytest.approx(np.mean(ranks))
    alike = calibration(np.array([0.2, 0.4]), np.array([0, 0]))
    assert math.isnan(alike.auc)
    assert (alike.brier, alike.brier_constant) == pytest.approx((0.1, 0.0))


@pytest.mark.parametrize(
    ("probability", "label", "message"),
    [
        ([], [], "probability has shape"),
        ([0.5], [0, 1], "probability has shape"),
        ([1.5], [0], "probability holds 1.5"),
        ([math.nan], [0], "probability holds nan"),
        ([0.5], [1.5], "label holds 1.5"),
    ],
)
def test_unusable_predictions_are_refused(probability, label, message):
    with pytest.raises(InvalidArgumentError, match=message):
        expected_calibration_error(np.array(probability), np.array(label))
    with pytest.raises(InvalidArgumentError, match=r"label holds 0.5: give 0 and 1"):
        calibration(np.array([0.5, 0.5]), np.array([0.5, 1]))
    with pytest.raises(InvalidArgumentError, match="bins is 0"):
        reliability(np.array([0.5]), np.array([1]), 0)
