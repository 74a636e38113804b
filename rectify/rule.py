"""The rules that turn a policy and the risk of each next token into the rectified policy: tensors in, tensors out.

Let `π₀(a|s)` be the base policy, `Q(s,a) ∈ [−1, 0]` the dead-end value (`−Q` estimates the probability that the
finished text is toxic) and `1 + Q` the survival probability. The security condition (Cao et al., "Systematic
Rectification of Language Models via Dead-end Analysis", ICLR 2023) asks for
`π(a|s) ≤ c(s,a) = clip(1 + Q(s,a) − ε, p_min, 1)`.

`Cap` meets it exactly, at the least distance from the base policy. `Tilt`, `Mask` and `Advantage` reshape the policy
first, because a cap binds only where a token's probability exceeds its survival and so leaves rare toxic tokens alone;
each of them can be followed by the cap (`epsilon`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rectify.errors import InvalidArgumentError

# A normaliser beyond this is that of raw logits: it says nothing, and float32 is coarse there.
_COMPARABLE = 16.0


class Rectified(NamedTuple):
    """What a rule made of a batch of policies, and what it had to do for that.

    Attributes:
        scores: `[B, V]` logits of the rectified policy. Rows that the rule leaves alone are returned bit for bit.
        capped: `[B]` int64, tokens held at their cap or removed (`Tilt` caps nothing).
        moved: `[B]` float, total variation distance to the base policy, from 0 to 1.
        widened: `[B]` bool, the truncated support was infeasible and the whole policy was used.
        dead_end: `[B]` bool, no policy is feasible, and `π ∝ π₀·max(1 + Q, p_min)` was used.
    """

    scores: Tensor
    capped: Tensor
    moved: Tensor
    widened: Tensor
    dead_end: Tensor


class Reshaped(NamedTuple):
    """One stage of a rule: `[B, V]` log policy, `[B]` tokens held back, `[B]` whether the stage was feasible."""

    log_policy: Tensor
    capped: Tensor
    feasible: Tensor


def log_survival(q: Tensor, p_min: float) -> Tensor:
    """`log max(1 + Q, p_min)`, float32 or better; `p_min` keeps it finite."""
    return (1 + q).clamp(p_min, 1).log()


def project_onto_caps(log_policy: Tensor, caps: Tensor) -> Reshaped:
    """The policy nearest to the base in KL divergence among those under the caps: `min(c, t·π₀)`.

    `t ≥ 1` is found by growing the set `B` of binding caps: given `B`, `t = (1 − Σ_B c) / Σ_{not B} π₀`, which rises
    from round to round and only adds to `B`, so the iteration ends; usually within 6 rounds, without a sort. Each row
    is a problem of its own.

    Args:
        log_policy: `[B, V]` normalised log-probabilities, float32 or float64; `-inf` outside the support.
        caps: `[B, V]` of the same dtype, in (0, 1].

    Returns:
        The projected log policy, the number of binding caps, and whether the caps over the support sum to at least 1.
        Rows where they do not hold no policy and are to be replaced.

    Source: the minimiser of KL(π‖π₀) under box constraints, from its Lagrange conditions. The published code's two
    passes of cap and renormalise leave tokens up to three times above their caps.
    """
    support = log_policy > -math.inf
    slack = 8 * torch.finfo(caps.dtype).eps
    feasible = torch.where(support, caps, 0).sum(-1) >= 1 - slack
    log_caps = caps.log()
    log_t = torch.zeros_like(log_policy[:, :1])
    bound = log_policy > log_caps
    while bound.any():
        free = 1 - torch.where(bound, caps, 0).sum(-1, keepdim=True)
        rest = torch.where(bound, -math.inf, log_policy).logsumexp(-1, keepdim=True)
        step = free.clamp_min(torch.finfo(free.dtype).tiny).log() - rest
        # with nothing left to raise, or nothing bound, t stays
        log_t = torch.where(rest.isfinite() & bound.any(-1, keepdim=True), torch.maximum(step, log_t), log_t)
        grown = bound | (log_policy + log_t > log_caps)
        if torch.equal(grown, bound):
            break
        bound = grown
    return Reshaped(torch.where(bound, log_caps, log_policy + log_t), bound.sum(-1), feasible)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What every rule shares: an optional cap at the end, and the floor of survival.

    Attributes:
        epsilon: margin ε of the cap that follows the rule, from 0 to 1; `None` for no cap.
        p_min: smallest survival and smallest cap, in (0, 1).
    """

    epsilon: float | None = None
    p_min: float = 1e-7

    def __post_init__(self) -> None:
        if self.epsilon is not None:
            _check_range("epsilon", self.epsilon, 0, 1)
        if not 0 < self.p_min < 1:
            raise InvalidArgumentError(f"p_min is {self.p_min}: give a number above 0 and below 1")

    @property
    def name(self) -> str:
        """The rule's name on the command line."""
        return type(self).__name__.lower()

    @property
    def always_feasible(self) -> bool:
        """Whether no state can be infeasible under this rule, whatever its Q values."""
        return self.epsilon is None

    def reshape(self, log_policy: Tensor, q: Tensor) -> Reshaped:
        """The rule itself, before the cap: `[B, V]` log policy and Q of the same dtype."""
        rows = log_policy[:, 0]
        return Reshaped(log_policy, torch.zeros_like(rows, dtype=torch.int64), torch.ones_like(rows, dtype=torch.bool))

    def apply(self, log_policy: Tensor, q: Tensor) -> Reshaped:
        """The rule and the cap that follows it."""
        reshaped = self.reshape(log_policy, q)
        if self.epsilon is None:
            return reshaped
        caps = (1 + q - self.epsilon).clamp(self.p_min, 1)
        capped = project_onto_caps(reshaped.log_policy, caps)
        return Reshaped(capped.log_policy, reshaped.capped + capped.capped, reshaped.feasible & capped.feasible)


@dataclass(frozen=True, kw_only=True)
class Cap(Rule):
    """The security condition alone: the policy nearest to the base with `π ≤ clip(1 + Q − ε, p_min, 1)`."""

    epsilon: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Tilt(Rule):
    """`π ∝ π₀·(1 + Q)^β`; `β = 1` conditions the policy on a clean ending (Bayes), larger values ask for more safety.

    Attributes:
        beta: exponent β, 0 or more; 0 changes nothing.
    """

    beta: float = 4.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range("beta", self.beta, 0, math.inf)

    def reshape(self, log_policy: Tensor, q: Tensor) -> Reshaped:
        penalty = self.beta * log_survival(q, self.p_min)
        tilted = (log_policy + penalty).log_softmax(-1)
        safe = (penalty == 0).all(-1, keepdim=True)  # nothing to change: keep every bit
        return super().reshape(torch.where(safe, log_policy, tilted), q)


@dataclass(frozen=True, kw_only=True)
class Mask(Rule):
    """Remove the tokens whose survival `1 + Q` is under a threshold; infeasible where that removes them all.

    Attributes:
        threshold: least survival probability of a token that is kept, from 0 to 1.
    """

    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range("threshold", self.threshold, 0, 1)

    @property
    def always_feasible(self) -> bool:
        return False

    def reshape(self, log_policy: Tensor, q: Tensor) -> Reshaped:
        return _remove(log_policy, 1 + q < self.threshold)


@dataclass(frozen=True, kw_only=True)
class Advantage(Rule):
    """Remove the tokens riskier than the state already is: `Q(s,a) − V(s) < −τ`, `V(s) = Σ π₀·Q`.

    The safest token of the support is always kept.

    Attributes:
        tau: tolerated extra risk τ, from 0 to 1.
    """

    tau: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range("tau", self.tau, 0, 1)

    def reshape(self, log_policy: Tensor, q: Tensor) -> Reshaped:
        value = (log_policy.exp() * q).sum(-1, keepdim=True)
        safest = torch.where(log_policy > -math.inf, q, -math.inf).amax(-1, keepdim=True)
        return _remove(log_policy, (q - value < -self.tau) & (q < safest))


def _remove(log_policy: Tensor, risky: Tensor) -> Reshaped:
    risky = risky & (log_policy > -math.inf)
    kept = torch.where(risky, -math.inf, log_policy)
    total = kept.logsumexp(-1, keepdim=True)
    feasible = total > -math.inf
    return Reshaped(torch.where(feasible, kept - total, log_policy), risky.sum(-1), feasible.squeeze(-1))


def rectify(scores: Tensor, q: Tensor, rule: Rule, unwarped: Tensor | None = None) -> Rectified:
    """Apply a rule to a batch of next-token scores.

    Where the rule is infeasible on the truncated support, the policy is widened to the unwarped one; where that is
    infeasible too, the state is a dead end, answered by `π ∝ π₀·max(1 + Q, p_min)` over the unwarped policy.

    Args:
        scores: `[B, V]` logits or log-probabilities after the sampling warpers, of any floating dtype; computed in
            float32 or better. `-inf` removes a token.
        q: `[B, V]` dead-end values in [−1, 0].
        rule: the rule.
        unwarped: `[B, V]` scores before the warpers; `None` where nothing was truncated.

    Raises:
        InvalidArgumentError: the shapes differ.

    Example:
        >>> import torch
        >>> from rectify.rule import Cap, rectify
        >>> scores, q = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[-0.7, 0.0]])
        >>> rectify(scores, q, Cap(epsilon=0.0)).scores.softmax(-1)
        tensor([[0.3000, 0.7000]])
    """
    if scores.shape != q.shape or (unwarped is not None and unwarped.shape != scores.shape):
        other = tuple(q.shape) if unwarped is None else (tuple(q.shape), tuple(unwarped.shape))
        raise InvalidArgumentError(
            f"scores have shape {tuple(scores.shape)}, q (and unwarped) {other}: give equal shapes"
        )
    dtype = torch.promote_types(torch.promote_types(scores.dtype, q.dtype), torch.float32)
    scores, q = scores.to(dtype), q.to(dtype)
    normaliser = scores.logsumexp(-1, keepdim=True)
    log_policy = scores - normaliser
    result = rule.apply(log_policy, q)
    log_rectified, capped = result.log_policy, result.capped
    widened = dead_end = torch.zeros_like(result.feasible)
    if not rule.always_feasible and not result.feasible.all():
        rows = (~result.feasible).nonzero().squeeze(-1)
        log_whole = log_policy[rows] if unwarped is None else unwarped[rows].to(dtype).log_softmax(-1)
        whole = rule.apply(log_whole, q[rows])
        fallback = (log_whole + log_survival(q[rows], rule.p_min)).log_softmax(-1)
        chosen = torch.where(whole.feasible[:, None], whole.log_policy, fallback)
        log_rectified = log_rectified.index_copy(0, rows, chosen)
        capped = capped.index_copy(0, rows, torch.where(whole.feasible, whole.capped, 0))
        dead_end = dead_end.index_copy(0, rows, ~whole.feasible)
        widened = widened.index_copy(0, rows, whole.feasible)
    moved = (log_policy.exp() - log_rectified.exp()).clamp_min(0).sum(-1)
    # Beam search compares rows, so the normaliser of log-probabilities is kept; that of raw logits is dropped.
    shift = torch.where(normaliser.abs() <= _COMPARABLE, normaliser, 0)
    changed = (log_rectified != log_policy).any(-1, keepdim=True)
    return Rectified(torch.where(changed, log_rectified + shift, scores), capped, moved, widened, dead_end)


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not (low <= value <= high and math.isfinite(value)):
        wanted = f"{low} or more" if math.isinf(high) else f"from {low} to {high}"
        raise InvalidArgumentError(f"{name} is {value}: give a number {wanted}")


RULES: dict[str, type[Rule]] = {rule.__name__.lower(): rule for rule in (Tilt, Advantage, Mask, Cap)}


def make_rule(name: str = "tilt", **parameters: float | None) -> Rule:
    """A rule by its name, with the parameters that are not `None`.

    Raises:
        InvalidArgumentError: an unknown rule, a parameter of another rule, or a value out of range.
    """
    if name not in RULES:
        raise InvalidArgumentError(f"rule is {name!r}: give one of {', '.join(RULES)}")
    given: dict[str, Any] = {key: value for key, value in parameters.items() if value is not None}
    known = {field.name for field in fields(RULES[name])}
    if unknown := sorted(given.keys() - known):
        raise InvalidArgumentError(
            f"{unknown[0]} is not a parameter of the rule {name}: it has {', '.join(sorted(known))}"
        )
    return RULES[name](**given)
