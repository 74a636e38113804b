"""Losses, class weights and temperature, against slow references in float64 and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.utils.class_weight import compute_class_weight

from rectify.training.detector import balanced_weights, prefix_loss, soft_label_loss
from rectify.training.score_calibration import calibration_temperature

UNKNOWN = float("nan")
LENGTHS = [5, 1, 3]
LABELS = [[1.0, 0.3], [0.0, UNKNOWN], [0.25, 1.0]]
WEIGHTS = [[0.5, 2.0], [3.0, 1.0]]  # of clean, of toxic


def entropy(logit, label, weights):
    survival = -math.log1p(math.exp(-logit))
    return -weights[1] * label * survival - weights[0] * (1 - label) * (survival - logit)


def slow_loss(logits, positions, weights):
    """The mean over the known labels of the weighted cross-entropies of the positions of a text."""
    losses = []
    for row, labels in enumerate(LABELS):
        for place, label in enumerate(labels):
            if not math.isnan(label):
                pair = [weights[0][place], weights[1][place]]
                parts = [
                    share * entropy(float(logits[row, position, place]), label, pair)
                    for position, share in positions(LENGTHS[row])
                ]
                losses.append(sum(parts))
    return sum(losses) / len(losses)


def by_position(length):
    return [(position, (position + 1) / sum(range(1, length + 1))) for position in range(length)]


@pytest.fixture
def logits():
    return 2 * torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["unweighted", "weighted"])
def test_the_prefix_loss_weighs_each_position_by_its_number(logits, weights):
    mask = (torch.arange(5) < torch.tensor(LENGTHS)[:, None]).long()
    given = None if weights is None else torch.tensor(weights)
    expected = slow_loss(logits.double(), by_position, weights or [[1.0, 1.0], [1.0, 1.0]])
    left = torch.stack([row.roll(5 - length, 0) for row, length in zip(logits, LENGTHS, strict=True)])
    for some, where in ((logits, mask), (left, mask.flip(1))):
        assert prefix_loss(some, where, torch.tensor(LABELS), given).item() == pytest.approx(expected, rel=1e-5)
    junk = logits + 1e3 * (mask == 0)[..., None]
    assert prefix_loss(junk, mask, torch.tensor(LABELS), given).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["unweighted", "weighted"])
def test_the_loss_of_a_text(logits, weights):
    given = None if weights is None else torch.tensor(weights)
    expected = slow_loss(logits.double(), lambda _: [(0, 1.0)], weights or [[1.0, 1.0], [1.0, 1.0]])
    assert soft_label_loss(logits[:, 0], torch.tensor(LABELS), given).item() == pytest.approx(expected, rel=1e-5)


def test_no_known_label_is_no_loss(logits):
    labels, mask = torch.full((3, 2), UNKNOWN), torch.ones(3, 5, dtype=torch.int64)
    for given in (None, torch.tensor(WEIGHTS)):
        logits = logits.requires_grad_()
        loss = soft_label_loss(logits[:, 0], labels, given) + prefix_loss(logits, mask, labels, given)
        loss.backward()
        assert loss == 0
        assert (logits.grad == 0).all()


def test_balanced_weights():
    hard = np.array([1.0, 0, 0, 0, 1, 0, 0])
    assert balanced_weights(hard[:, None])[:, 0].tolist() == pytest.approx(
        compute_class_weight("balanced", classes=np.array([0, 1]), y=hard)
    )
    soft = np.array([[0.5, 1.0], [0.25, UNKNOWN], [0.0, 1.0]])
    clean, toxic = balanced_weights(soft).double().numpy()
    # both classes count alike, and a text 1 on average
    assert clean[0] * (3 - 0.75) == pytest.approx(toxic[0] * 0.75)
    assert clean[0] * (3 - 0.75) + toxic[0] * 0.75 == pytest.approx(3)
    assert (clean[1], toxic[1]) == (1.0, 0.5)  # nothing is clean by the second


@pytest.mark.parametrize("true", [0.5, 1.0, 4.0])
def test_the_temperature_is_that_of_a_regression_without_intercept(true):
    random = np.random.default_rng(0)
    logit = random.normal(0.5, 2, 4000)
    label = (random.random(4000) < 1 / (1 + np.exp(-logit / true))).astype(float)
    found = calibration_temperature(logit, label)
    slope = LogisticRegression(C=1e9, fit_intercept=False).fit(logit[:, None], label).coef_[0, 0]
    assert found == pytest.approx(1 / slope, rel=1e-3)
    assert found == pytest.approx(true, rel=0.15)
    soft = 1 / (1 + np.exp(-logit / true))
    assert calibration_temperature(logit, soft) == pytest.approx(true, rel=1e-3)


def test_labels_that_say_nothing_of_the_scale():
    assert calibration_temperature(np.array([1.0, 2]), np.array([1.0, 1])) == 1
    assert calibration_temperature(np.array([1.0, 2]), np.array([0.0, 0])) == 1
    assert 0.1 <= calibration_temperature(np.array([-1.0, 2]), np.array([0.0, 1])) < 0.11  # without bound
