"""The cap against an independent float64 reference, at its limits and at the size of a real vocabulary."""

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from rule_reference import (
    CLOSE,
    INF,
    OVER,
    assert_as_specified,
    at_risk,
    batches,
    both_dtypes,
    cap_of,
    caps_alone,
    cast,
    dtypes,
    epsilons,
    examples,
    policy_of,
    risk_scores,
)

from rectify.evaluation.rule_reference import clear_of_thresholds, log_normalised, specified, waterfill
from rectify.rule import Advantage, Cap, Mask, Tilt, project_onto_caps

# --- the cap


@examples(120)
@given(batches(truncated=False), epsilons, dtypes)
def test_cap_sums_to_one_and_never_exceeds_a_feasible_cap(batch, epsilon, dtype):
    scores, q, _ = cast(batch, dtype)
    result = at_risk(scores, q, Cap(epsilon=epsilon))
    policy, caps = policy_of(result), cap_of(q, epsilon)
    feasible = torch.where(scores > -INF, caps, 0).sum(-1) >= 1
    assert torch.equal(result.dead_end, ~feasible)
    assert torch.allclose(result.scores.softmax(-1).sum(-1), torch.ones((), dtype=dtype))
    assert ((policy <= caps + OVER[dtype]) | ~feasible[:, None]).all()
    assert (policy[scores == -INF] == 0).all()


@examples(120)
@given(batches(truncated=False), caps_alone, dtypes)
def test_cap_equals_the_reference(batch, rule, dtype):
    assert_as_specified(rule, batch, dtype)


@examples(60)
@given(st.integers(0, 10**6), st.integers(2, 60), dtypes)
def test_projection_of_random_policies_equals_the_reference(seed, tokens, dtype):
    scores, _ = risk_scores((4, tokens), seed)
    generator = np.random.default_rng(seed)
    shares = generator.dirichlet(np.full(tokens, 0.3), size=4)
    # the sums of the caps run from barely feasible to ample
    caps = torch.from_numpy(np.clip(shares * [[1.01], [1.2], [2], [10]] + 1e-6, 1e-7, 1)).to(dtype)
    log_policy = scores.log_softmax(-1).to(dtype)
    projected = project_onto_caps(log_policy, caps)
    for row in range(4):
        filled = waterfill(log_normalised(log_policy[row].double().numpy()), caps[row].double().numpy())
        assert projected.feasible[row].item() == (filled is not None)
        if filled is not None:
            assert projected.log_policy[row].double().exp().numpy() == pytest.approx(filled[0], abs=CLOSE[dtype])
            assert projected.log_policy[row].double().exp().sum().item() == pytest.approx(1, abs=CLOSE[dtype])


def divergence(policy, log_p):
    """KL(π‖π₀) in nats."""
    held = policy > 0
    return (policy[held] * (np.log(policy[held]) - log_p[held])).sum()


@examples(60)
@given(st.integers(0, 10**6), st.integers(2, 20), epsilons)
def test_cap_is_the_nearest_feasible_policy(seed, tokens, epsilon):
    scores, q = risk_scores((1, tokens), seed)
    log_p, caps = log_normalised(scores[0]), cap_of(q, epsilon)[0].numpy()
    assume(caps.sum() >= 1)
    policy = policy_of(at_risk(scores, q, Cap(epsilon=epsilon)))[0].numpy()
    nearest = divergence(policy, log_p)
    generator = np.random.default_rng(seed)
    for spread in (0.1, 1, 5):
        other, _ = waterfill(log_normalised(generator.normal(size=tokens) * spread), caps)
        for weight in (1e-3, 0.1, 0.5, 1):
            mixed = (1 - weight) * policy + weight * other
            assert (mixed <= caps + 1e-9).all()
            assert nearest <= divergence(mixed, log_p) + 1e-9


@both_dtypes
def test_cap_meets_the_first_example_exactly(dtype):
    scores, q = torch.tensor([[0.9, 0.1]], dtype=dtype).log(), torch.tensor([[-0.7, 0.0]], dtype=dtype)
    result = at_risk(scores, q, Cap(epsilon=0.0))
    assert policy_of(result)[0].tolist() == pytest.approx([0.3, 0.7], abs=1e-6)
    assert result.capped.tolist() == [1]
    assert result.moved.item() == pytest.approx(0.6, abs=1e-6)
    assert not result.widened.any()
    assert not result.dead_end.any()


def test_published_two_passes_leave_the_first_example_above_its_cap():
    scores, q = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[-0.7, 0.0]])
    approximate = scores
    for _ in range(2):
        approximate = torch.minimum(approximate, (1 + q).log() + approximate.logsumexp(-1, keepdim=True))
    assert approximate.softmax(-1)[0, 0].item() == pytest.approx(0.545, abs=1e-3)
    assert policy_of(at_risk(scores, q, Cap(epsilon=0.0)))[0, 0].item() == pytest.approx(0.3, abs=1e-6)


@both_dtypes
@pytest.mark.parametrize("gap", [20.0, 90.0, 200.0, 1000.0])
def test_cap_holds_for_extreme_ratios(gap, dtype):
    scores = torch.tensor([[0.0, -gap]], dtype=dtype)
    result = at_risk(scores, torch.tensor([[-0.7, 0.0]], dtype=dtype), Cap(epsilon=0.0))
    assert policy_of(result)[0].tolist() == pytest.approx([0.3, 0.7], abs=1e-5)
    scores = torch.tensor([[0.0, -gap, -gap, -2 * gap]], dtype=dtype)
    result = at_risk(scores, torch.tensor([[-0.7, -0.9, -0.9, 0.0]], dtype=dtype), Cap(epsilon=0.0))
    assert policy_of(result)[0].tolist() == pytest.approx([0.3, 0.1, 0.1, 0.5], abs=1e-5)


@both_dtypes
def test_cap_over_a_token_that_is_very_unlikely(dtype):
    scores = torch.tensor([[math.log(0.9), math.log(0.1), -5e3]], dtype=dtype)
    result = at_risk(scores, torch.tensor([[-0.7, -0.7, 0.0]], dtype=dtype), Cap(epsilon=0.0))
    # it is in the support, and the only token with room
    assert policy_of(result)[0].tolist() == pytest.approx([0.3, 0.3, 0.4], abs=1e-5)


@examples(60)
@given(st.sets(st.integers(1, 1023), min_size=1, max_size=30), st.integers(0, 10**6), dtypes)
def test_caps_that_sum_to_exactly_one_are_the_policy(cuts, seed, dtype):
    caps = torch.tensor(np.diff([0, *sorted(cuts), 1024]) / 1024)[None]
    scores, _ = risk_scores(caps.shape, seed, dtype=dtype)
    result = at_risk(scores, (caps - 1).to(dtype), Cap(epsilon=0.0))
    assert not result.dead_end.any()
    assert torch.allclose(policy_of(result), caps, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-12)
    lowered = caps.clone()
    lowered[0, caps.argmax()] -= 1 / 1024
    assert at_risk(scores, (lowered - 1).to(dtype), Cap(epsilon=0.0)).dead_end.all()


@both_dtypes
def test_many_caps_that_sum_to_exactly_one_are_feasible(dtype):
    tokens = 2**15
    scores, _ = risk_scores((2, tokens), 3, dtype=dtype)
    result = at_risk(scores, torch.full_like(scores, 1 / tokens - 1), Cap(epsilon=0.0))
    assert not result.dead_end.any()
    # the sum of the caps rounds, and what it is off by falls on the last token
    close = 2e-7 if dtype == torch.float32 else 1e-12
    assert policy_of(result).numpy() == pytest.approx(np.full((2, tokens), 1 / tokens), abs=close)


def staircase(ratio, tokens):
    """Scores and caps for which each round of a growing set of binding caps adds one token, the next."""
    free, caps = 1.0, []
    for _ in range(tokens - 1):
        caps.append(1.5 / ratio * free)
        free -= caps[-1]
    return -math.log(ratio) * torch.arange(tokens, dtype=torch.float64)[None], torch.tensor([[*caps, 1.0]])


@pytest.mark.parametrize(
    ("ratio", "tokens", "dtype", "close"),
    [
        (3, 80, torch.float32, 1e-5),
        (10, 43, torch.float32, 1e-5),
        (10, 43, torch.float64, 1e-9),
        (10, 300, torch.float32, 1e-5),
        (10, 300, torch.float64, 1e-9),
        (1000, 1000, torch.float64, 1e-9),
        (1000, 1000, torch.float32, 1e-5),
    ],
)
def test_staircases_of_caps_end_soon_and_right(ratio, tokens, dtype, close):
    scores, caps = staircase(ratio, tokens)
    scores, q = scores.to(dtype), (caps.to(torch.float64) - 1).to(dtype)
    started = time.perf_counter()
    result = at_risk(scores.repeat(4, 1), q.repeat(4, 1), Cap(epsilon=0.0))
    # milliseconds in fact; the bound only has to tell a slow rule from a busy machine
    assert time.perf_counter() - started < 5
    exact_caps = np.clip(1 + q[0].double().numpy(), 1e-7, 1)
    expected, _ = waterfill(log_normalised(scores[0].double().numpy()), exact_caps)
    assert policy_of(result).numpy() == pytest.approx(np.tile(expected, (4, 1)), abs=close)
    assert (policy_of(result).numpy() <= exact_caps + 1e-6).all()
    assert not result.dead_end.any()


@pytest.mark.parametrize("offset", [300.0, -300.0, 1000.0])
@pytest.mark.parametrize("rule", [Cap(epsilon=0.1), Tilt(), Mask(), Advantage(), Tilt(epsilon=0.1)], ids=str)
def test_raw_logits_far_from_zero(rule, offset):
    scores, q = risk_scores((16, 200), 5, dtype=torch.float32)
    scores = scores + offset
    result = at_risk(scores, q, rule)
    for row in range(16):
        inputs = scores[row].double().numpy(), q[row].double().numpy()
        assert clear_of_thresholds(rule, log_normalised(inputs[0]), inputs[1], 1e-6)
        expected, _, _, moved, _, _ = specified(rule, *inputs)
        assert policy_of(result)[row].numpy() == pytest.approx(expected, abs=1e-5)
        assert result.moved[row].item() == pytest.approx(moved, abs=1e-5)


@pytest.mark.parametrize("offset", [0.0, 300.0, 1000.0])
def test_raw_logits_barely_above_their_cap_are_capped(offset):
    scores, _ = risk_scores((300, 8), 9, dtype=torch.float32)
    scores = scores + offset
    policy = scores.double().softmax(-1)
    top = policy.argmax(-1, keepdim=True)
    # the cap of the likeliest token lies 2e-5 under its probability, every other cap is 1
    q = torch.zeros_like(scores).scatter(-1, top, (policy.gather(-1, top) * (1 - 2e-5) - 1).float())
    result = at_risk(scores, q, Cap(epsilon=0.0))
    assert (policy_of(result) - cap_of(q, 0.0)).max().item() <= 1e-5


@both_dtypes
def test_cap_at_the_size_of_a_real_vocabulary(dtype):
    shape = (16, 50257)
    scores, q = risk_scores(shape, 11, spread=2.5, dtype=dtype)
    scores[:, ::7] = -INF
    # a quarter of the rows have little room: the caps of their support sum to 1.02
    survival = 1 + q[:4].double()
    room = torch.where(scores[:4] > -INF, survival, 0).sum(-1, keepdim=True)
    q[:4] = (survival * 1.02 / room - 1).to(dtype)
    # and a quarter have one token that holds nearly everything
    scores[4:8, 1] = scores[4:8].logsumexp(-1) + 6
    started = time.perf_counter()
    result = at_risk(scores, q, Cap(epsilon=0.0))
    assert time.perf_counter() - started < 10
    policy, caps = policy_of(result).numpy(), cap_of(q, 0.0).numpy()
    assert not result.dead_end.any()
    assert (result.capped > 0)[:8].all()
    assert (policy <= caps + 1e-6).all()
    assert policy.sum(-1) == pytest.approx(np.ones(16), abs=1e-9)
    for row in range(16):
        expected, _ = waterfill(log_normalised(scores[row].double().numpy()), caps[row])
        assert np.abs(policy[row] - expected).max() < 1e-5
        moved = np.abs(np.exp(log_normalised(scores[row].double().numpy())) - expected).sum() / 2
        assert result.moved[row].item() == pytest.approx(moved, abs=CLOSE[dtype])
