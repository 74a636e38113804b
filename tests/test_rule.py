"""The rules against an independent float64 reference, their limits, their statistics and their errors.

The reference solves the cap by one sort of the ratios c/π₀, where the package grows the set of binding caps. Drawn
scores and risks lie on a grid and the thresholds between its points, so that float32 and float64 decide alike.
"""

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rectify.errors import InvalidArgumentError, RectifyError
from rectify.rule import Advantage, Cap, Mask, Rectified, Tilt, make_rule, project_onto_caps, rectify

INF = math.inf
DTYPES = [torch.float32, torch.float64]
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-9}
OVER = {torch.float32: 1e-5, torch.float64: 1e-6}

both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


def examples(count):
    """Settings of a property; a margin filter may drop many draws."""
    suppressed = [HealthCheck.filter_too_much, HealthCheck.too_slow]
    return settings(max_examples=count, derandomize=True, deadline=None, suppress_health_check=suppressed)


# --- the reference, one row at a time in float64


def log_normalised(scores):
    scores = np.asarray(scores, dtype=np.float64)
    return scores - np.logaddexp.reduce(scores)


def waterfill(log_p, caps):
    """`min(c, t·p)` and `log t`, by one sort of the ratios c/p; `None` where the caps over the support miss 1."""
    support = np.flatnonzero(log_p > -INF)
    if caps[support].sum() < 1 - 1e-9:
        return None
    ratio = np.log(caps[support]) - log_p[support]
    order = support[np.argsort(ratio, kind="stable")]
    ratio = np.sort(ratio, kind="stable")
    log_rest = np.logaddexp.accumulate(log_p[order][::-1])[::-1]
    free = 1 - np.concatenate([[0], np.cumsum(caps[order])[:-1]])
    log_t = np.log(np.maximum(free, 1e-300)) - log_rest
    reached = np.flatnonzero(log_t <= ratio)
    best = log_t[reached[0]] if reached.size else ratio[-1]
    return np.exp(np.minimum(np.log(caps), log_p + best)), best


def survivals(q, p_min=1e-7):
    return np.clip(1 + q, p_min, 1)


def risky_tokens(rule, log_p, q):
    """What `Mask` and `Advantage` remove from the support."""
    support = log_p > -INF
    if isinstance(rule, Mask):
        return support & (1 + q < rule.threshold)
    if isinstance(rule, Advantage):
        value = (np.exp(log_p) * q).sum()
        return support & (q - value < -rule.tau) & (q < q[support].max())
    return np.zeros_like(support)


def reshaped(rule, log_p, q):
    """The log policy before the cap and how many tokens went; `None` where none is left."""
    if isinstance(rule, Tilt):
        return log_normalised(log_p + rule.beta * np.log(survivals(q, rule.p_min))), 0
    risky = risky_tokens(rule, log_p, q)
    kept = np.where(risky, -INF, log_p)
    return None if np.isneginf(kept).all() else (log_normalised(kept), risky.sum())


def followed(rule, log_p, q):
    """The rule and its cap: the policy and the least and the most tokens held (ties may fall either way)."""
    first = reshaped(rule, log_p, q)
    if first is None or rule.epsilon is None:
        return first and (np.exp(first[0]), first[1], first[1])
    log_p, removed = first
    caps = np.clip(1 + q - rule.epsilon, rule.p_min, 1)
    filled = waterfill(log_p, caps)
    if filled is None:
        return None
    policy, log_t = filled
    over = log_p + log_t - np.log(caps)
    return policy, removed + (over > 1e-4).sum(), removed + (over > -1e-4).sum()


def specified(rule, scores, q, unwarped=None):
    """Policy, least and most tokens held, moved, widened, dead end: what the specification asks of one row."""
    log_p = log_normalised(scores)
    whole = log_p if unwarped is None else log_normalised(unwarped)
    found = followed(rule, log_p, q)
    widened = found is None and (found := followed(rule, whole, q)) is not None
    dead_end = found is None
    if dead_end:
        found = np.exp(log_normalised(whole + np.log(survivals(q, rule.p_min)))), 0, 0
    policy, least, most = found
    return policy, least, most, np.abs(np.exp(log_p) - policy).sum() / 2, widened, dead_end


def clear_of_thresholds(rule, log_p, q, margin):
    """Whether rounding cannot change what `Advantage` removes."""
    if not isinstance(rule, Advantage):
        return True
    support = log_p > -INF
    value = (np.exp(log_p) * q).sum()
    gap = np.abs(q - value + rule.tau)[support & (q < q[support].max())]
    return gap.size == 0 or gap.min() > margin


# --- drawing


def policy_of(result):
    return result.scores.double().softmax(-1)


def at_risk(scores, q, rule, unwarped=None):
    """`rectify` for dead-end values."""
    return rectify(scores, q.log1p(), rule, unwarped)


def cap_of(q, epsilon, p_min=1e-7):
    return (1 + q.double() - epsilon).clamp(p_min, 1)


def risk_scores(shape, seed, spread=3.0, dtype=torch.float64):
    """Random scores and risks."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(shape, generator=generator, dtype=torch.float64) * spread
    q = -torch.rand(shape, generator=generator, dtype=torch.float64)
    return scores.to(dtype), q.to(dtype)


score_cells = st.one_of(st.integers(-48, 48).map(lambda step: step / 8), st.just(-INF))
survival_cells = st.one_of(st.sampled_from([0, 64]), st.integers(0, 64)).map(lambda step: step / 64)
epsilons = st.sampled_from([0.0, 1 / 64, 0.125, 0.5, 1.0])
maybe_epsilons = st.one_of(st.none(), epsilons)
tilts = st.builds(Tilt, beta=st.sampled_from([0.0, 0.5, 1.0, 4.5, 20.0]), epsilon=maybe_epsilons)
masks = st.builds(Mask, threshold=st.sampled_from([0.0, 33 / 128, 65 / 128, 1.0]), epsilon=maybe_epsilons)
advantages = st.builds(Advantage, tau=st.sampled_from([0.0, 0.125, 0.5, 1.0]), epsilon=maybe_epsilons)
caps_alone = st.builds(Cap, epsilon=epsilons)
rules = st.one_of(caps_alone, tilts, masks, advantages)
dtypes = st.sampled_from(DTYPES)
ALL_RULES = [Cap(epsilon=0.0)] + [rule(epsilon=epsilon) for rule in (Tilt, Mask, Advantage) for epsilon in (None, 0.0)]
every_rule = pytest.mark.parametrize("rule", ALL_RULES, ids=lambda rule: f"{rule.name}-{rule.epsilon}")


@st.composite
def batches(draw, max_rows=3, max_tokens=9, truncated=True):
    """Scores, Q and unwarped scores (or `None`); every row of either has a token left."""
    rows, tokens = draw(st.integers(1, max_rows)), draw(st.integers(1, max_tokens))
    cells = st.tuples(score_cells, survival_cells, st.booleans() if truncated else st.just(True))
    drawn = draw(st.lists(cells, min_size=rows * tokens, max_size=rows * tokens))
    table = torch.tensor(drawn, dtype=torch.float64).reshape(rows, tokens, 3)
    whole, q, kept = table[..., 0], table[..., 1] - 1, table[..., 2] > 0
    whole[(whole == -INF).all(-1), 0] = 0.0
    best = whole.argmax(-1, keepdim=True)
    kept = kept.scatter(-1, best, kept.gather(-1, best) | ~(kept & (whole > -INF)).any(-1, keepdim=True))
    scores = torch.where(kept, whole, -INF)
    return scores, q, whole if truncated and draw(st.booleans()) else None


def cast(batch, dtype):
    return [part if part is None else part.to(dtype) for part in batch]


def assert_as_specified(rule, batch, dtype):
    scores, q, unwarped = cast(batch, dtype)
    result = at_risk(scores, q, rule, unwarped)
    assert result.scores.dtype == dtype
    assert not result.scores.isnan().any()
    policy = policy_of(result).numpy()
    for row in range(len(scores)):
        inputs = [part[row].double().numpy() for part in (scores, q, unwarped) if part is not None]
        expected, least, most, moved, widened, dead_end = specified(rule, *inputs)
        assert policy[row] == pytest.approx(expected, abs=CLOSE[dtype])
        assert (policy[row][expected == 0] == 0).all()
        assert result.dead_end[row].item() == dead_end
        assert result.widened[row].item() == widened
        assert least <= result.capped[row].item() <= most
        assert result.moved[row].item() == pytest.approx(moved, abs=CLOSE[dtype])


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
@pytest.mark.parametrize("ban", [-1e4, -1e9, None])
def test_cap_over_a_token_that_a_finite_number_bans(ban, dtype):
    ban = torch.finfo(dtype).min if ban is None else ban
    scores = torch.tensor([[math.log(0.9), math.log(0.1), ban]], dtype=dtype)
    result = at_risk(scores, torch.tensor([[-0.7, -0.7, 0.0]], dtype=dtype), Cap(epsilon=0.0))
    # a finite score is in the support, and the only token with room
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


# --- truncated support and dead ends


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
