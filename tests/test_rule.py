"""The rules as specified, what they leave alone, statistics and errors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from rule_reference import (
    CLOSE,
    INF,
    OVER,
    advantages,
    assert_as_specified,
    at_risk,
    batches,
    both_dtypes,
    cap_of,
    cast,
    dtypes,
    every_rule,
    examples,
    masks,
    policy_of,
    risk_scores,
    rules,
    tilts,
)

from rectify.errors import InvalidArgumentError, RectifyError
from rectify.evaluation.rule_reference import clear_of_thresholds, log_normalised, waterfill
from rectify.rule import Advantage, Cap, Mask, Tilt, make_rule, rectify

# --- what a rule leaves alone


@every_rule
@both_dtypes
@pytest.mark.parametrize("offset", [0.0, 40.0, 700.0])
def test_no_risk_changes_no_bit(rule, dtype, offset):
    scores, _ = risk_scores((8, 50), 1, dtype=dtype)
    scores = scores + offset
    scores[::2, ::3] = -INF
    scores[7, 1:] = -INF
    unwarped = scores.nan_to_num(neginf=offset)
    for whole in (None, unwarped):
        result = at_risk(scores, torch.zeros_like(scores), rule, whole)
        assert torch.equal(result.scores, scores)
        assert result.moved.tolist() == [0.0] * 8
        assert result.capped.tolist() == [0] * 8
        assert not result.widened.any()
        assert not result.dead_end.any()


@every_rule
@examples(25)
@given(batches(truncated=False), dtypes)
def test_no_risk_changes_no_bit_of_drawn_scores(rule, batch, dtype):
    scores, q, _ = cast(batch, dtype)
    assert torch.equal(at_risk(scores, torch.zeros_like(q), rule).scores, scores)


@every_rule
@both_dtypes
def test_only_the_rows_with_risk_change(rule, dtype):
    scores, q = risk_scores((9, 30), 2, dtype=dtype)
    # half of the policy on one risky token, which every rule holds back
    q, safe = q * 0.3, torch.arange(9) % 3 == 0
    q[:, 0] = -0.95
    scores[:, 0] = scores[:, 1:].logsumexp(-1)
    q[safe] = 0.0
    result = at_risk(scores, q, rule)
    assert torch.equal((result.scores == scores).all(-1), safe)


@every_rule
@both_dtypes
def test_risk_of_tokens_outside_the_support_changes_no_bit(rule, dtype):
    scores, q = risk_scores((8, 30), 4, dtype=dtype)
    banned = torch.rand(scores.shape, generator=torch.Generator().manual_seed(4)) < 0.4
    scores, q = torch.where(banned, -INF, scores), torch.where(banned, q, 0)
    assert torch.equal(at_risk(scores, q, rule).scores, scores)


@both_dtypes
@pytest.mark.parametrize("rule", [Mask(threshold=0.25), Advantage(tau=0.75), Advantage(tau=0.0)], ids=str)
def test_removing_nothing_changes_no_bit(rule, dtype):
    scores, q = risk_scores((8, 30), 6, dtype=dtype)
    q = torch.full_like(q, -0.5) if rule == Advantage(tau=0.0) else q * 0.7
    result = at_risk(scores, q, rule)
    assert result.capped.tolist() == [0] * 8
    assert torch.equal(result.scores, scores)


@both_dtypes
def test_tilt_of_nothing_changes_no_bit(dtype):
    scores, q = risk_scores((8, 30), 7, dtype=dtype)
    scores[:, ::4] = -INF
    assert torch.equal(at_risk(scores, q, Tilt(beta=0.0)).scores, scores)


# --- rows


@examples(80)
@given(batches(max_rows=6), rules, dtypes)
def test_rows_are_independent(batch, rule, dtype):
    scores, q, unwarped = cast(batch, dtype)
    result = at_risk(scores, q, rule, unwarped)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12
    for row in range(len(scores)):
        whole = None if unwarped is None else unwarped[row : row + 1]
        alone = at_risk(scores[row : row + 1], q[row : row + 1], rule, whole)
        assert torch.allclose(result.scores[row], alone.scores[0], rtol=tolerance, atol=tolerance)
        assert result.moved[row].item() == pytest.approx(alone.moved.item(), abs=tolerance)
        for name in ("capped", "widened", "dead_end"):
            assert getattr(result, name)[row].item() == getattr(alone, name).item()


@every_rule
@both_dtypes
def test_a_dead_end_leaves_its_neighbours_alone(rule, dtype):
    scores, q = risk_scores((5, 200), 8, dtype=dtype)
    q[[1, 3]] = -1.0
    result = at_risk(scores, q, rule)
    living = at_risk(scores[::2], q[::2], rule)
    assert torch.allclose(result.scores[::2], living.scores, rtol=1e-6, atol=1e-6)
    assert torch.equal(result.capped[::2], living.capped)
    assert not result.dead_end[::2].any()
    assert result.dead_end[1::2].tolist() == [not rule.always_feasible] * 2


# --- the other rules


@examples(80)
@given(batches(truncated=False), tilts, dtypes)
def test_tilt_as_specified(batch, rule, dtype):
    assert_as_specified(rule, batch, dtype)


@pytest.mark.parametrize("beta", [0.5, 1.0, 4.5, 30.0])
@both_dtypes
def test_tilt_multiplies_by_a_power_of_the_survival(beta, dtype):
    scores, q = risk_scores((6, 80), 12, dtype=dtype)
    scores[:, :9] = -INF
    policy = policy_of(at_risk(scores, q, Tilt(beta=beta))).numpy()
    weighted = np.exp(scores.double().numpy()) * (1 + q.double().numpy()) ** beta
    assert policy == pytest.approx(weighted / weighted.sum(-1, keepdims=True), abs=CLOSE[dtype])


def test_tilt_with_exponent_one_is_bayes():
    # P(token | clean) = P(token) P(clean | token) / P(clean)
    prior, clean = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.5, 1.0]])
    policy = policy_of(at_risk(prior.log(), clean - 1, Tilt(beta=1.0)))
    assert policy[0].tolist() == pytest.approx([0.1 / 0.45, 0.15 / 0.45, 0.2 / 0.45], abs=1e-6)


@both_dtypes
def test_tilt_is_exact_for_survivals_near_zero(dtype):
    # in float32 the matching Q are all -1 or next to it, and the exponent would magnify that
    scores, _ = risk_scores((6, 80), 21, dtype=dtype)
    log_survival = (-9 - 4 * torch.rand(6, 80, generator=torch.Generator().manual_seed(21))).to(dtype)
    policy = policy_of(rectify(scores, log_survival, Tilt(beta=4.5))).numpy()
    for row in range(6):
        expected = np.exp(log_normalised(scores[row].double().numpy() + 4.5 * log_survival[row].double().numpy()))
        assert policy[row] == pytest.approx(expected, abs=CLOSE[dtype])


def test_tilt_floors_the_survival():
    scores, q = torch.zeros(1, 2), torch.tensor([[-1.0, 0.0]])
    policy = policy_of(at_risk(scores, q, Tilt(beta=1.0, p_min=0.25)))
    assert policy[0].tolist() == pytest.approx([0.2, 0.8], abs=1e-6)
    assert policy_of(at_risk(scores, q, Tilt(beta=1e4)))[0].tolist() == [0.0, 1.0]


@examples(80)
@given(batches(truncated=False), masks, dtypes)
def test_mask_as_specified(batch, rule, dtype):
    assert_as_specified(rule, batch, dtype)


@both_dtypes
def test_mask_removes_exactly_the_survivals_under_its_threshold(dtype):
    survival = torch.tensor([[0.0, 0.25, 0.5 - 2**-18, 0.5 + 2**-18, 0.75, 1.0]], dtype=dtype)
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0, -2.0]], dtype=dtype)
    result = at_risk(scores, survival - 1, Mask(threshold=0.5))
    assert (policy_of(result) > 0).tolist() == [[False] * 3 + [True] * 3]
    assert result.capped.tolist() == [3]
    assert torch.allclose(policy_of(result)[0, 3:], scores[0, 3:].double().softmax(-1), atol=1e-6)


@examples(100)
@given(batches(truncated=False), advantages, dtypes)
def test_advantage_as_specified(batch, rule, dtype):
    margin = 1e-5 if dtype == torch.float32 else 1e-12
    for scores, q in zip(*(part.numpy() for part in batch[:2]), strict=True):
        assume(clear_of_thresholds(rule, log_normalised(scores), q, margin))
    assert_as_specified(rule, batch, dtype)


@both_dtypes
def test_advantage_removes_exactly_what_is_riskier_than_the_state(dtype):
    # V = -0.5; the third token lies just within the tolerance and stays
    scores, q = torch.zeros(1, 4, dtype=dtype), torch.tensor([[-1.0, -0.375, -0.62499, -0.00001]], dtype=dtype)
    result = at_risk(scores, q, Advantage(tau=0.125))
    assert (policy_of(result) > 0).tolist() == [[False, True, True, True]]
    assert result.capped.tolist() == [1]
    strict = at_risk(scores, q, Advantage(tau=0.0))
    assert (policy_of(strict) > 0).tolist() == [[False, True, False, True]]


@examples(80)
@given(batches(truncated=False), st.sampled_from([0.0, 0.125]), dtypes)
def test_advantage_keeps_the_safest_token_of_the_support(batch, tau, dtype):
    scores, q, _ = cast(batch, dtype)
    policy = at_risk(scores, q, Advantage(tau=tau)).scores
    supported = torch.where(scores > -INF, q, -INF)
    safest = supported == supported.amax(-1, keepdim=True)
    assert (policy[safest] > -INF).all()
    assert (policy[scores == -INF] == -INF).all()


@both_dtypes
@pytest.mark.parametrize("risk", [0.0, -0.3, -1.0])
def test_advantage_removes_nothing_where_the_risks_are_equal(risk, dtype):
    scores, _ = risk_scores((20, 40), 13, dtype=dtype)
    result = at_risk(scores, torch.full_like(scores, risk), Advantage(tau=0.0))
    assert result.capped.tolist() == [0] * 20
    assert torch.allclose(policy_of(result), scores.double().softmax(-1), atol=1e-6)


@both_dtypes
@pytest.mark.parametrize("rule", [Tilt, Mask, Advantage])
def test_the_cap_that_follows_projects_the_reshaped_policy(rule, dtype):
    scores, q = risk_scores((6, 40), 14, spread=4.0, dtype=dtype)
    plain, capped = at_risk(scores, q, rule()), at_risk(scores, q, rule(epsilon=0.125))
    caps = cap_of(q, 0.125)
    assert not capped.dead_end.any()
    assert (policy_of(capped) <= caps + OVER[dtype]).all()
    assert (policy_of(plain) > caps + 0.01).any()
    for row in range(6):
        expected, _ = waterfill(log_normalised(plain.scores[row].double().numpy()), caps[row].numpy())
        assert policy_of(capped)[row].numpy() == pytest.approx(expected, abs=CLOSE[dtype])


# --- statistics


@examples(100)
@given(batches(), rules, dtypes)
def test_statistics_describe_the_returned_scores(batch, rule, dtype):
    scores, q, unwarped = cast(batch, dtype)
    result = at_risk(scores, q, rule, unwarped)
    distance = (scores.double().softmax(-1) - policy_of(result)).abs().sum(-1) / 2
    assert torch.allclose(result.moved.double(), distance, rtol=0, atol=CLOSE[dtype])
    assert (result.capped >= 0).all()
    assert (result.capped <= 2 * scores.shape[-1]).all()
    assert result.capped.dtype == torch.int64
    assert not (result.widened & result.dead_end).any()
    if isinstance(rule, Tilt) and rule.epsilon is None:
        assert not result.capped.any()


@both_dtypes
def test_moved_stays_between_zero_and_one(dtype):
    whole, risk = risk_scores((500, 40), 18, dtype=dtype)
    q = torch.where(risk < -0.5, -0.875, 0.0).to(dtype)
    # everything that was kept is removed, so all of the policy moves
    scores = torch.where(q < 0, whole, -INF)
    result = at_risk(scores, q, Mask(), whole)
    assert result.widened.all()
    assert result.moved.min().item() >= 1 - 1e-5
    assert result.moved.max().item() <= 1


# --- beam search


@examples(80)
@given(batches(), rules, dtypes)
def test_log_probabilities_stay_normalised(batch, rule, dtype):
    scores, q, unwarped = cast(batch, dtype)
    result = at_risk(scores.log_softmax(-1), q, rule, unwarped)
    assert torch.allclose(result.scores.logsumexp(-1), torch.zeros((), dtype=dtype), atol=CLOSE[dtype])


@every_rule
@pytest.mark.parametrize("temperature", [0.5, 0.8, 1.5])
@both_dtypes
def test_tempered_log_probabilities_keep_their_normaliser(rule, temperature, dtype):
    scores, q = risk_scores((12, 60), 19, dtype=dtype)
    q[8:] *= 0.01
    unwarped = scores.log_softmax(-1)
    scores = unwarped / temperature
    scores[::2, 20:] = -INF
    q[0] = -1.0
    result = at_risk(scores, q, rule, unwarped)
    normaliser = scores.logsumexp(-1)
    assert (normaliser.abs() > 0.01).any()
    assert torch.allclose(result.scores.logsumexp(-1), normaliser, rtol=0, atol=CLOSE[dtype])


# --- names and errors

OWN = {"cap": "epsilon", "tilt": "beta", "mask": "threshold", "advantage": "tau"}


def test_rules_by_name():
    assert make_rule() == Tilt()
    assert make_rule("cap", epsilon=0.3, beta=None) == Cap(epsilon=0.3)
    assert make_rule("tilt", beta=2.0, epsilon=None) == Tilt(beta=2.0)
    assert make_rule("mask", threshold=0.25, epsilon=0.0) == Mask(threshold=0.25, epsilon=0.0)
    assert make_rule("advantage", tau=0.05, p_min=1e-5) == Advantage(tau=0.05, p_min=1e-5)
    assert [make_rule(name).name for name in ("tilt", "advantage", "mask", "cap")] == [
        "tilt",
        "advantage",
        "mask",
        "cap",
    ]
    assert make_rule("tilt").epsilon is None


@pytest.mark.parametrize("name", ["clip", "Tilt", ""])
def test_unknown_rules_are_refused(name):
    with pytest.raises(InvalidArgumentError, match="rule is") as caught:
        make_rule(name)
    assert repr(name) in str(caught.value)
    assert all(known in str(caught.value) for known in ("tilt", "advantage", "mask", "cap"))


@pytest.mark.parametrize(
    ("name", "parameter"), [("tilt", "threshold"), ("cap", "beta"), ("mask", "tau"), ("advantage", "gamma")]
)
def test_parameters_of_another_rule_are_refused(name, parameter):
    with pytest.raises(InvalidArgumentError, match=f"{parameter} .*{name}"):
        make_rule(name, **{parameter: 0.5})


@pytest.mark.parametrize(
    ("name", "parameter", "value"),
    [(name, "epsilon", value) for name in ("cap", "tilt", "mask", "advantage") for value in (-0.1, 1.1, math.nan)]
    + [("tilt", "beta", value) for value in (-1, INF, math.nan)]
    + [("mask", "threshold", value) for value in (2, -0.5, math.nan)]
    + [("advantage", "tau", value) for value in (-1, 1.5, math.nan)]
    + [(name, "p_min", value) for name in ("cap", "tilt") for value in (0, 1, -1e-7, math.nan)],
)
def test_values_out_of_range_are_refused(name, parameter, value):
    with pytest.raises(InvalidArgumentError, match=f"{parameter} is ") as caught:
        make_rule(name, **{parameter: value})
    assert str(value) in str(caught.value)
    assert isinstance(caught.value, RectifyError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("name", "parameter", "value"),
    [(name, parameter, value) for value in (0, 1) for name, parameter in OWN.items()] + [("tilt", "beta", 100.0)],
)
def test_values_at_the_ends_of_the_range_are_taken(name, parameter, value):
    assert getattr(make_rule(name, **{parameter: value}), parameter) == value


@pytest.mark.parametrize(
    ("scores", "q", "unwarped"),
    [((2, 5), (2, 4), None), ((2, 5), (1, 5), None), ((2, 5), (2, 5), (2, 6)), ((2, 5), (2, 5), (1, 5))],
)
def test_different_shapes_are_refused(scores, q, unwarped):
    with pytest.raises(InvalidArgumentError, match="shape") as caught:
        at_risk(torch.zeros(scores), torch.zeros(q), Cap(), unwarped and torch.zeros(unwarped))
    assert str(scores) in str(caught.value)
    assert str(q) in str(caught.value)
    assert str(unwarped or scores) in str(caught.value)
