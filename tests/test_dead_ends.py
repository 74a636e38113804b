"""Truncated supports that are widened, dead ends, and inputs at the edge."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from rule_reference import (
    INF,
    assert_as_specified,
    at_risk,
    batches,
    both_dtypes,
    dtypes,
    every_rule,
    examples,
    policy_of,
    risk_scores,
    rules,
)

from rectify.evaluation.rule_reference import clear_of_thresholds, log_normalised
from rectify.rule import Cap, Mask, Rectified, rectify


@examples(200)
@given(batches(), rules, dtypes)
def test_truncated_supports_as_specified(batch, rule, dtype):
    margin = 1e-5 if dtype == torch.float32 else 1e-12
    for part in (batch[0], batch[2]):
        for scores, q in zip(part.numpy(), batch[1].numpy(), strict=True) if part is not None else ():
            assume(clear_of_thresholds(rule, log_normalised(scores), q, margin))
    assert_as_specified(rule, batch, dtype)


def truncated_example(dtype, last_survival):
    """Three of five tokens survive the warpers, with caps that sum to 0.75; the fourth is banned."""
    unwarped = torch.tensor([[0.4, 0.3, 0.2, 0.05, 0.05]], dtype=dtype).log()
    unwarped[0, 3] = -INF
    scores = unwarped.clone()
    scores[0, 3:] = -INF
    return scores, torch.tensor([[0.25, 0.25, 0.25, 1.0, last_survival]], dtype=dtype) - 1, unwarped


@both_dtypes
def test_infeasible_truncation_is_widened(dtype):
    scores, q, unwarped = truncated_example(dtype, 0.5)
    result = at_risk(scores, q, Cap(epsilon=0.0), unwarped)
    assert result.widened.tolist() == [True]
    assert result.dead_end.tolist() == [False]
    # all of it, 0.25 for each of three, against a base of 4/9, 3/9 and 2/9 after the truncation
    assert policy_of(result)[0].tolist() == pytest.approx([0.25, 0.25, 0.25, 0.0, 0.25], abs=1e-6)
    assert result.moved.item() == pytest.approx(4 / 9 + 3 / 9 - 0.5, abs=1e-6)
    assert result.capped.tolist() == [3]


@both_dtypes
@pytest.mark.parametrize("p_min", [1e-7, 0.01])
def test_infeasible_whole_is_a_dead_end(p_min, dtype):
    scores, q, unwarped = truncated_example(dtype, 0.0)
    q[0, 2] = -1.0
    result = at_risk(scores, q, Cap(epsilon=0.0, p_min=p_min), unwarped)
    assert result.widened.tolist() == [False]
    assert result.dead_end.tolist() == [True]
    assert result.capped.tolist() == [0]
    weighted = np.array([0.4 * 0.25, 0.3 * 0.25, 0.2 * p_min, 0, 0.05 * p_min])
    assert policy_of(result)[0].numpy() == pytest.approx(weighted / weighted.sum(), abs=1e-6)


@both_dtypes
def test_without_unwarped_scores_the_dead_end_is_that_of_the_policy(dtype):
    scores, q, _ = truncated_example(dtype, 1.0)
    result = at_risk(scores, q, Cap(epsilon=0.0))
    assert result.widened.tolist() == [False]
    assert result.dead_end.tolist() == [True]
    assert policy_of(result)[0].tolist() == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0, 0], abs=1e-6)


@both_dtypes
@pytest.mark.parametrize("epsilon", [None, 0.0])
def test_mask_that_removes_the_whole_support(epsilon, dtype):
    scores, q, unwarped = truncated_example(dtype, 1.0)
    rule = Mask(threshold=0.5, epsilon=epsilon)
    result = at_risk(scores, q, rule, unwarped)
    assert (result.widened.tolist(), result.dead_end.tolist()) == ([True], [False])
    assert policy_of(result)[0].tolist() == [0, 0, 0, 0, 1]
    assert result.capped.tolist() == [3]
    assert result.moved.item() == pytest.approx(1, abs=1e-6)
    q[0, 4] = -0.75
    result = at_risk(scores, q, rule, unwarped)
    assert (result.widened.tolist(), result.dead_end.tolist()) == ([False], [True])
    assert torch.allclose(policy_of(result), unwarped.double().softmax(-1), atol=1e-6)


@every_rule
@pytest.mark.parametrize("survival", [0.0, 1e-12, 0.01])
@both_dtypes
def test_hopeless_states_give_a_policy(rule, survival, dtype):
    unwarped, _ = risk_scores((4, 12), 15, dtype=dtype)
    unwarped[:, ::3] = -INF
    scores = unwarped.clone()
    scores[:2, 4:] = -INF
    result = at_risk(scores, torch.full_like(scores, survival - 1), rule, unwarped)
    assert not result.widened.any()
    assert result.dead_end.tolist() == [not rule.always_feasible] * 4
    assert torch.isfinite(result.moved).all()
    support = scores if rule.always_feasible else unwarped
    assert torch.allclose(policy_of(result), support.double().softmax(-1), atol=1e-5)


@every_rule
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("risk_dtype", [None, torch.float32])
def test_half_precision_is_computed_in_float32(rule, half, risk_dtype):
    unwarped, q = risk_scores((6, 40), 16)
    q[::2] = -1.0
    q[4] = 0.0
    unwarped, log_survival = unwarped.to(half), q.log1p().to(risk_dtype or half)
    unwarped[:, ::5] = -INF
    scores = torch.where(unwarped > 0, unwarped, -INF)
    result = rectify(scores, log_survival, rule, unwarped)
    assert result.scores.dtype == torch.float32
    expected = rectify(scores.float(), log_survival.float(), rule, unwarped.float())
    assert all(torch.equal(got, wanted) for got, wanted in zip(result, expected, strict=True))
    assert not result.scores.isnan().any()
    assert (result.scores[unwarped == -INF] == -INF).all()
    assert torch.equal(result.scores[4], scores[4].float())


def test_the_wider_dtype_wins():
    scores, q = risk_scores((2, 9), 17)
    assert at_risk(scores.float(), q, Cap()).scores.dtype == torch.float64
    assert at_risk(scores, q.float(), Cap()).scores.dtype == torch.float64


@every_rule
@both_dtypes
def test_the_inputs_stay_as_they_were(rule, dtype):
    unwarped, q = risk_scores((6, 20), 20, dtype=dtype)
    q[1], q[2] = -1.0, 0.0
    scores = unwarped.clone()
    scores[:, 3:] = -INF
    inputs = (scores, q.log1p(), unwarped)
    before = [part.clone() for part in inputs]
    result = rectify(inputs[0], inputs[1], rule, unwarped)
    result.scores.zero_()
    assert all(torch.equal(part, old) for part, old in zip(inputs, before, strict=True))


@every_rule
def test_an_empty_batch_stays_empty(rule):
    result = at_risk(torch.zeros(0, 5), torch.zeros(0, 5), rule)
    assert result.scores.shape == (0, 5)
    assert [len(part) for part in result] == [0] * len(Rectified._fields)
