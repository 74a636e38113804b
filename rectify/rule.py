"""The rules that turn a policy and the risk of each next token into the rectified policy: tensors in, tensors out.

Let `π₀(a|s)` be the base policy, `Q(s,a) ∈ [−1, 0]` the dead-end value (`−Q` estimates the probability that the
finished text is toxic) and `1 + Q` the survival probability. The security condition (Cao et al., "Systematic
Rectification of Language Models via Dead-end Analysis", ICLR 2023) asks for
`π(a|s) ≤ c(s,a) = clip(1 + Q(s,a) − ε, p_min, 1)`.

`Cap` meets it exactly, at the least distance from the base policy. `Tilt`, `Mask` and `Advantage` reshape the policy
first, because a cap binds only where a token's probability exceeds its survival and so leaves rare toxic tokens alone;
each of them can be followed by the cap (`epsilon`).

The values come in as `log(1 + Q)`: in float32 `1 + Q` has no digits left where `Q` is near −1, and a tilt would magnify
that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rectify.errors import InvalidArgumentError
from rectify.support import Support

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
    """One stage of a rule.

    Attributes:
        log_policy: `[B, V]` normalised.
        capped: `[B]` int64, tokens held at their cap or removed.
        changed: `[B]` bool, whether the stage changed anything.
        feasible: `[B]` bool; a row where it is False holds no policy and is to be replaced.
    """

    log_policy: Tensor
    capped: Tensor
    changed: Tensor
    feasible: Tensor


def project_onto_caps(log_policy: Tensor, caps: Tensor) -> Reshaped:
    """The policy nearest to the base in KL divergence among those under the caps: `min(c, t·π₀)`.

    `t ≥ 1` is found by growing the set `B` of binding caps: given `B`, `t = (1 − Σ_B c) / Σ_{not B} π₀`, which rises
    from round to round and only adds to `B`, so the iteration ends; usually within 6 rounds, without a sort. Each row
    is a problem of its own.

    Args:
        log_policy: `[B, V]` normalised log-probabilities, float32 or float64; `-inf` outside the support.
        caps: `[B, V]` of the same dtype, in (0, 1].

    Returns:
        The projected log policy with its binding caps; feasible where the caps over the support sum to at least 1.

    Source: the minimiser of KL(π‖π₀) under box constraints, from its Lagrange conditions. The published code's two
    passes of cap and renormalise leave tokens up to three times above their caps.
    """
    feasible = caps.masked_fill(log_policy == -math.inf, 0).sum(-1) >= 1 - 8 * torch.finfo(caps.dtype).eps
    # a cap binds once log t exceeds this room; infinite outside the support
    room = caps.log().sub_(log_policy)
    changed = room.amin(-1) < 0
    capped = torch.zeros_like(changed, dtype=torch.int64)
    # most caps of most states do not bind: only the rows where one does are worked on
    rows = changed.nonzero().squeeze(-1)
    if rows.numel() == len(changed):
        log_policy, capped = _fill(log_policy, caps, room)
    elif rows.numel():
        projected, bound = _fill(log_policy[rows], caps[rows], room[rows])
        log_policy = log_policy.index_copy(0, rows, projected)
        capped = capped.index_copy(0, rows, bound)
    return Reshaped(log_policy, capped, changed, feasible)


def _fill(log_policy: Tensor, caps: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """The projection of rows with at least one binding cap, and how many bind: `[R, V]` and `[R]`."""
    tiny = torch.finfo(caps.dtype).tiny
    log_t = torch.zeros_like(log_policy[:, :1])
    bound = room < 0
    while True:
        free = (1 - caps.masked_fill(~bound, 0).sum(-1, keepdim=True)).clamp_min_(tiny).log_()
        highest, total = _sum_of(log_policy.masked_fill(bound, -math.inf))
        step = free - total - highest
        # with nothing left to raise, t stays
        log_t = torch.where(step.isfinite(), torch.maximum(step, log_t), log_t)
        grown = bound | (room < log_t)
        if torch.equal(grown, bound):
            break
        bound = grown
    # not `log_policy + log_t`, which would lose digits where t is large; with nothing left to raise, total is -inf
    raised = (log_policy - highest).add_(free - total.masked_fill(total == -math.inf, 0))
    return torch.where(bound, caps.log(), raised), bound.sum(-1)


def _sum_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """The highest entry of each row of logs (0 where all are `-inf`), and the log of the sum relative to it.

    Overwrites its argument, and so needs no other memory of its size.
    """
    highest = x.amax(-1, keepdim=True)
    highest = highest.masked_fill_(highest == -math.inf, 0)
    return highest, x.sub_(highest).exp_().sum(-1, keepdim=True).log_()


def _normalise(x: Tensor) -> Tensor:
    """`[B, V]` log-probabilities; rows of `-inf` stay so."""
    return _normalise_(x.clone())[0]


def _normalise_(x: Tensor) -> tuple[Tensor, Tensor]:
    """`_normalise` in place, and the normaliser that was taken away, `[B, 1]`.

    torch's float32 `log_softmax` sums in one go on a CPU: over 150,000 tokens its probabilities miss 1 by 2e-5.
    """
    highest = x.amax(-1, keepdim=True)
    highest = highest.masked_fill_(highest == -math.inf, 0)
    # not both at once: the highest raw logit may be too large to keep the digits of the sum
    total = x.sub_(highest).exp().sum(-1, keepdim=True).log_()
    total.masked_fill_(total == -math.inf, 0)
    return x.sub_(total), highest + total


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

    def reshape(self, log_policy: Tensor, log_survival: Tensor) -> Reshaped:
        """The rule itself, before the cap: `[B, V]` log policy and `log(1 + Q)` of the same dtype."""
        none = torch.zeros_like(log_policy[:, 0], dtype=torch.int64)
        return Reshaped(log_policy, none, none != 0, none == 0)

    def apply(self, log_policy: Tensor, log_survival: Tensor) -> Reshaped:
        """The rule and the cap that follows it."""
        reshaped = self.reshape(log_policy, log_survival)
        if self.epsilon is None:
            return reshaped
        caps = log_survival.exp().sub_(self.epsilon).clamp_(self.p_min, 1)
        capped = project_onto_caps(reshaped.log_policy, caps)
        return Reshaped(
            capped.log_policy,
            reshaped.capped + capped.capped,
            reshaped.changed | capped.changed,
            reshaped.feasible & capped.feasible,
        )


@dataclass(frozen=True, kw_only=True)
class Cap(Rule):
    """The security condition alone: the policy nearest to the base with `π ≤ clip(1 + Q − ε, p_min, 1)`."""

    epsilon: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Tilt(Rule):
    """`π ∝ π₀·(1 + Q)^β`; `β = 1` conditions the policy on a clean ending (Bayes), larger values ask for more safety.

    Attributes:
        beta: exponent β, from 0 to 10,000; 0 changes nothing.
    """

    beta: float = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range("beta", self.beta, 0, 10_000)

    def reshape(self, log_policy: Tensor, log_survival: Tensor) -> Reshaped:
        tilted = log_survival.clamp_min(math.log(self.p_min)).mul_(self.beta).add_(log_policy)
        tilted, total = _normalise_(tilted)
        changed = total[:, 0] < -1e-6
        if not changed.all():  # nearly nothing is taken away: is it nothing?
            rows = (~changed).nonzero().squeeze(-1)
            risky = (log_survival[rows] < 0) & (log_policy[rows] > -math.inf)
            changed = changed.index_copy(0, rows, risky.any(-1) & (self.beta > 0))
        return super().reshape(tilted, log_survival)._replace(changed=changed)


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

    def reshape(self, log_policy: Tensor, log_survival: Tensor) -> Reshaped:
        return _remove(log_policy, log_survival.exp() < self.threshold)


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

    def reshape(self, log_policy: Tensor, log_survival: Tensor) -> Reshaped:
        q = log_survival.expm1()
        value = (log_policy.exp() * q).sum(-1, keepdim=True)
        safest = torch.where(log_policy > -math.inf, q, -math.inf).amax(-1, keepdim=True)
        return _remove(log_policy, (q - value < -self.tau) & (q < safest))


def _remove(log_policy: Tensor, risky: Tensor) -> Reshaped:
    risky = risky & (log_policy > -math.inf)
    kept = log_policy.masked_fill(risky, -math.inf)
    removed = risky.sum(-1)
    return Reshaped(_normalise(kept), removed, removed > 0, kept.amax(-1) > -math.inf)


def rectify(scores: Tensor, log_survival: Tensor, rule: Rule, unwarped: Tensor | None = None) -> Rectified:
    """Apply a rule to a batch of next-token scores.

    Where the rule is infeasible on the truncated support, the policy is widened to the unwarped one; where that is
    infeasible too, the state is a dead end, answered by `π ∝ π₀·max(1 + Q, p_min)` over the unwarped policy.

    Args:
        scores: `[B, V]` logits or log-probabilities after the sampling warpers, of any floating dtype; computed in
            float32 or better. `-inf` removes a token.
        log_survival: `[B, V]` `log(1 + Q)`, 0 or less; of dead-end values `q` it is `q.log1p()`.
        rule: the rule.
        unwarped: `[B, V]` scores before the warpers; `None` where nothing was truncated.

    Raises:
        InvalidArgumentError: the shapes differ, or are not `[B, V]`.

    Example:
        >>> import torch
        >>> from rectify.rule import Cap, rectify
        >>> scores, q = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[-0.7, 0.0]])
        >>> rectify(scores, q.log1p(), Cap(epsilon=0.0)).scores.softmax(-1)
        tensor([[0.3000, 0.7000]])
    """
    if scores.ndim != 2:
        raise InvalidArgumentError(f"scores have shape {tuple(scores.shape)}: give rows of tokens, [B, V]")
    for name, other in (("log_survival", log_survival), ("unwarped", unwarped)):
        if other is not None and other.shape != scores.shape:
            raise InvalidArgumentError(
                f"{name} has shape {tuple(other.shape)}, scores have {tuple(scores.shape)}: give equal shapes"
            )
    dtype = torch.promote_types(torch.promote_types(scores.dtype, log_survival.dtype), torch.float32)
    scores, log_survival = scores.to(dtype), log_survival.to(dtype)
    log_policy, normaliser = _normalise_(scores.clone())
    reshaped = rule.apply(log_policy, log_survival)
    result = _answer(scores, log_policy, normaliser, reshaped)
    rows = _infeasible(rule, reshaped)
    if rows is None:
        return result
    whole = None if unwarped is None else unwarped[rows].to(dtype)
    return _replaced(result, rows, _widen(scores[rows], log_survival[rows], rule, whole))


def rectify_support(
    scores: Tensor, support: Support, log_survival: Callable[[Tensor | None, Tensor | None], Tensor], rule: Rule,
    unwarped: Tensor,
) -> Rectified:  # fmt: skip
    """`rectify` of truncated policies, in which the risk of the tokens that are left is all that is asked for.

    Args:
        scores: `[B, V]` after the warpers, float32 or better.
        support: of the scores.
        log_survival: `log(1 + Q)`. Of `(None, tokens)`, `[B, K]`, that of these tokens; of `(rows, None)`, `[R]`, that
            of the whole vocabulary in these rows, `[R, V]`, asked for where truncation left no feasible policy.
        rule, unwarped: as in `rectify`.
    """
    left = support.of(scores)
    log_policy, normaliser = _normalise_(left.clone())
    survival = log_survival(None, support.tokens).to(left.dtype)
    reshaped = rule.apply(log_policy, survival.masked_fill(~support.real, 0))
    result = _answer(left, log_policy, normaliser, reshaped)
    result = result._replace(scores=support.spread(result.scores, scores.shape[-1]))
    infeasible = _infeasible(rule, reshaped)
    if infeasible is None:
        return result
    survival = log_survival(infeasible, None).to(left.dtype)
    return _replaced(result, infeasible, _widen(scores[infeasible], survival, rule, unwarped[infeasible]))


def rectify_candidates(
    scores: Tensor, candidates: Support, log_survival: Tensor, rule: Rule, unwarped: Tensor
) -> Rectified:
    """`rectify` where only some tokens have a known risk: the others are removed, so that what the rule promises holds.

    A policy that is infeasible on the candidates is widened no further than to their probabilities before the warpers;
    where that is infeasible too, the answer to a dead end is one of candidates alone.

    Args:
        scores: `[B, V]` after the warpers, float32 or better.
        candidates: the tokens whose risk is known, at least one in each row.
        log_survival: `[B, K]` `log(1 + Q)` of the candidates.
        rule: the rule.
        unwarped: `[B, V]` scores before the warpers.

    Returns:
        Of the whole vocabulary. What is moved is the distance to the policy of all tokens, so the probability of those
        that were removed is part of it.
    """
    left, whole = candidates.of(scores), candidates.of(unwarped)
    result = rectify(left, log_survival.masked_fill(~candidates.real, 0), rule, whole)
    base = left - scores.logsumexp(-1, keepdim=True)
    overlap = torch.minimum(base, _normalise(result.scores)).exp_().sum(-1)
    return result._replace(scores=candidates.spread(result.scores, scores.shape[-1]), moved=(1 - overlap).clamp_(0, 1))


def _answer(scores: Tensor, log_policy: Tensor, normaliser: Tensor, reshaped: Reshaped) -> Rectified:
    """What a rule that was feasible made of scores, `log_policy` plus a normaliser. Overwrites the reshaped policy."""
    overlap = log_policy.clamp_max(reshaped.log_policy).exp_().sum(-1)
    # Beam search compares rows, so the normaliser of log-probabilities is kept; that of raw logits is dropped.
    shift = normaliser.masked_fill(normaliser.abs() > _COMPARABLE, 0)
    rectified = reshaped.log_policy.add_(shift)
    if not reshaped.changed.all():
        rectified = torch.where(reshaped.changed[:, None], rectified, scores)
    moved = torch.where(reshaped.changed, (1 - overlap).clamp_(0, 1), 0)
    none = torch.zeros_like(reshaped.changed)
    return Rectified(rectified, reshaped.capped, moved, none, none)


def _infeasible(rule: Rule, reshaped: Reshaped) -> Tensor | None:
    """The rows that hold no policy, `[R]`; `None` where there are none."""
    if rule.always_feasible or bool(reshaped.feasible.all()):
        return None
    return (~reshaped.feasible).nonzero().squeeze(-1)


def _widen(scores: Tensor, log_survival: Tensor, rule: Rule, unwarped: Tensor | None) -> Rectified:
    """Rows whose truncated policy is infeasible: the rule on the whole policy, or the answer to a dead end."""
    log_policy, normaliser = _normalise_(scores.clone())
    log_whole = log_policy if unwarped is None else _normalise(unwarped)
    whole = rule.apply(log_whole, log_survival)
    fallback = _normalise(log_survival.clamp_min(math.log(rule.p_min)).add_(log_whole))
    chosen = whole._replace(
        log_policy=torch.where(whole.feasible[:, None], whole.log_policy, fallback),
        capped=torch.where(whole.feasible, whole.capped, 0),
        changed=torch.ones_like(whole.changed),
    )
    return _answer(scores, log_policy, normaliser, chosen)._replace(widened=whole.feasible, dead_end=~whole.feasible)


def _replaced(result: Rectified, rows: Tensor, by: Rectified) -> Rectified:
    pairs = zip(result, by, strict=True)
    return Rectified(*(whole.index_copy(0, rows, part.to(whole.dtype)) for whole, part in pairs))


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InvalidArgumentError(f"{name} is {value}: give a number from {low} to {high}")


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
