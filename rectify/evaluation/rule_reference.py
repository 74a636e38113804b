"""The rules once more, one row at a time in float64, to compare with.

The cap is solved by one sort of the ratios c/π₀, where the package grows the set of binding caps.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rectify.rule import Advantage, Mask, Rule, Tilt

_INF = np.inf
Array = np.ndarray


class Specified(NamedTuple):
    """What a rule makes of one state.

    Attributes:
        policy: `[V]`.
        least, most: tokens held at their cap or removed; ties may fall either way.
        moved: total variation distance to the base policy.
        widened: tokens outside the truncated support were let in.
        dead_end: no policy is feasible.
    """

    policy: Array
    least: int
    most: int
    moved: float
    widened: bool
    dead_end: bool


def log_normalised(scores: Array) -> Array:
    """Log-probabilities of `[V]` scores."""
    scores = np.asarray(scores, dtype=np.float64)
    scores = scores - scores.max()
    return np.asarray(scores - np.logaddexp.reduce(scores))


def waterfill(log_p: Array, caps: Array, held: Array | None = None) -> tuple[Array, Array] | None:
    """`min(c, t·p)` and `log t`, by one sort of the ratios c/p; `None` where the caps over the support miss 1.

    Tokens that are held stand at their caps where these sum to less than 1, and the others share the rest.
    """
    support = np.flatnonzero(log_p > -_INF)
    if caps[support].sum() < 1 - 1e-9:
        return None
    if held is not None and (held := held & (log_p > -_INF)).any() and caps[held].sum() < 1:
        rest = 1 - caps[held].sum()
        filled = waterfill(np.where(held, -_INF, log_p), caps / rest)
        if filled is None:  # they hold all but what was lost in rounding
            return np.where(held, caps, 0), np.where(held, _INF, -_INF)
        return np.where(held, caps, filled[0] * rest), np.where(held, _INF, filled[1] + np.log(rest))
    ratio = np.log(caps[support]) - log_p[support]
    order = support[np.argsort(ratio, kind="stable")]
    ratio = np.sort(ratio, kind="stable")
    log_rest = np.logaddexp.accumulate(log_p[order][::-1])[::-1]
    free = 1 - np.concatenate([[0], np.cumsum(caps[order])[:-1]])
    log_t = np.log(np.maximum(free, 1e-300)) - log_rest
    reached = np.flatnonzero(log_t <= ratio)
    best = log_t[reached[0]] if reached.size else ratio[-1]
    return np.exp(np.minimum(np.log(caps), log_p + best)), np.full_like(log_p, best)


def survivals(q: Array, p_min: float = 1e-7) -> Array:
    """`1 + Q` of dead-end values, with its floor."""
    return np.asarray(np.clip(1 + q, p_min, 1))


def caps_of(q: Array, epsilon: float, p_min: float = 1e-7) -> Array:
    """The greatest probabilities under dead-end values; the margin is never larger than the risk."""
    return np.asarray(np.clip(1 + q - np.minimum(epsilon, -q), p_min, 1))


def risky_tokens(rule: Rule, log_p: Array, q: Array) -> Array:
    """What `Mask` and `Advantage` remove from the support, `[V]` bool."""
    support = log_p > -_INF
    if isinstance(rule, Mask):
        return np.asarray(support & (1 + q < rule.threshold))
    if isinstance(rule, Advantage):
        value = (np.exp(log_p) * q).sum()
        return np.asarray(support & (q - value < -rule.tau) & (q < q[support].max()))
    return np.zeros_like(support)


def reshaped(rule: Rule, log_p: Array, q: Array) -> tuple[Array, int] | None:
    """The log policy before the cap and how many tokens went; `None` where none is left."""
    if isinstance(rule, Tilt):
        return log_normalised(log_p + rule.beta * np.log(survivals(q, rule.p_min))), 0
    risky = risky_tokens(rule, log_p, q)
    kept = np.where(risky, -_INF, log_p)
    return None if np.isneginf(kept).all() else (log_normalised(kept), int(risky.sum()))


def followed(rule: Rule, log_p: Array, q: Array, held: Array | None = None) -> tuple[Array, int, int] | None:
    """The rule and its cap: the policy and the least and the most tokens held."""
    first = reshaped(rule, log_p, q)
    if first is None:
        return None
    log_p, removed = first
    if rule.epsilon is None:
        return np.exp(log_p), removed, removed
    caps = caps_of(q, rule.epsilon, rule.p_min)
    filled = waterfill(log_p, caps, held)
    if filled is None:
        return None
    policy, log_t = filled
    with np.errstate(invalid="ignore"):  # -inf + inf, where nothing is held
        over = log_p + log_t - np.log(caps)
    return policy, removed + int((over > 1e-4).sum()), removed + int((over > -1e-4).sum())


def specified(rule: Rule, scores: Array, q: Array, unwarped: Array | None = None) -> Specified:
    """What the specification asks of one state: `[V]` scores, dead-end values and scores before truncation."""
    log_p = log_normalised(scores)
    whole = log_p if unwarped is None else log_normalised(unwarped)
    found = followed(rule, log_p, q)
    widened = found is None and (found := followed(rule, whole, q, held=log_p > -_INF)) is not None
    dead_end = found is None
    policy, least, most = found or (np.exp(log_normalised(whole + np.log(survivals(q, rule.p_min)))), 0, 0)
    return Specified(policy, least, most, np.abs(np.exp(log_p) - policy).sum() / 2, widened, dead_end)


def clear_of_thresholds(rule: Rule, log_p: Array, q: Array, margin: float) -> bool:
    """Whether rounding cannot change what `Advantage` removes."""
    if not isinstance(rule, Advantage):
        return True
    support = log_p > -_INF
    value = (np.exp(log_p) * q).sum()
    gap = np.abs(q - value + rule.tau)[support & (q < q[support].max())]
    return gap.size == 0 or bool(gap.min() > margin)
