"""What the tests of the rules share: drawn policies and risks, and how a rule is compared with the reference.

Drawn scores and risks lie on a grid and the thresholds between its points, so that float32 and float64 decide alike.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from rectify.evaluation.rule_reference import caps_of, specified
from rectify.rule import Advantage, Cap, Mask, Tilt, rectify

INF = math.inf
DTYPES = [torch.float32, torch.float64]
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-9}
OVER = {torch.float32: 1e-5, torch.float64: 1e-6}

both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


def examples(count):
    """Settings of a property; a margin filter may drop many draws."""
    suppressed = [HealthCheck.filter_too_much, HealthCheck.too_slow]
    return settings(max_examples=count, derandomize=True, deadline=None, suppress_health_check=suppressed)


# --- drawing


def policy_of(result):
    return result.scores.double().softmax(-1)


def at_risk(scores, q, rule, unwarped=None):
    """`rectify` for dead-end values."""
    return rectify(scores, q.log1p(), rule, unwarped)


def cap_of(q, epsilon, p_min=1e-7):
    return torch.from_numpy(caps_of(q.double().numpy(), epsilon, p_min))


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
