"""The rules that turn a policy and the risk of each next token into the rectified policy: tensors in, tensors out.

Let `π₀(a|s)` be the base policy, `Q(s,a) ∈ [−1, 0]` the dead-end value (`−Q` estimates the probability that the
finished text is toxic) and `1 + Q` the survival probability. The security condition (Cao et al., "Systematic
Rectification of Language Models via Dead-end Analysis", ICLR 2023) asks for
`π(a|s) ≤ clip(1 + Q(s,a) − ε, p_min, 1)`. Here the margin is never larger than the risk that it is a margin of: the
cap is `c(s,a) = clip(1 + Q − min(ε, −Q), p_min, 1)`. For risks of ε or more that is the condition as published; for
smaller ones it is `1 + 2Q`, never above `1 + Q`; and a confident policy without risk is left alone.

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
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from rectify.errors import InvalidArgumentError
from rectify.projection import Reshaped, normalise, normalise_, project_onto_caps
from rectify.readable import COMPARABLE, narrowed, readable_scores, readable_survival
from rectify.support import Support

# Larger tilts than this have float32 tell tokens too coarsely apart.
_EXACT = 1024.0


class Rectified(NamedTuple):
    """What a rule made of a batch of policies, and what it had to do for that.

    Attributes:
        scores: `[B, V]` logits of the rectified policy, float32 or better whatever the dtype of the policy was, so that
            caps hold in it. Rows that the rule leaves alone are returned bit for bit.
        capped: `[B]` int64, tokens held at their cap or removed (`Tilt` caps nothing).
        moved: `[B]` float, total variation distance to the base policy, from 0 to 1.
        widened: `[B]` bool, the truncated support was infeasible, and tokens outside it were let in.
        dead_end: `[B]` bool, no policy is feasible, and `π ∝ π₀·max(1 + Q, p_min)` was used.
        unread: `[B]` bool, the risk of a token was no number, and held to be the highest.
    """

    scores: Tensor
    capped: Tensor
    moved: Tensor
    widened: Tensor
    dead_end: Tensor
    unread: Tensor


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What every rule shares: an optional cap at the end, and the floor of survival.

    Attributes:
        epsilon: margin ε of the cap that follows the rule, from 0 to 1, at most the risk itself; `None` for no cap.
        p_min: smallest survival and smallest cap, in (0, 1).
    """

    epsilon: float | None = None
    p_min: float = 1e-7

    removes: ClassVar[bool] = False
    """Whether it removes tokens."""

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

    def caps(self, log_survival: Tensor) -> Tensor | None:
        """The greatest probability of each token, in the shape of `log(1 + Q)`; `None` where the rule caps nothing."""
        if self.epsilon is None:
            return None
        survival = log_survival.exp()
        return survival.sub((1 - survival).clamp_max_(self.epsilon)).clamp_(self.p_min, 1)

    def apply(
        self, log_policy: Tensor, log_survival: Tensor, unread: Tensor | None = None, held: Tensor | None = None
    ) -> Reshaped:
        """The rule and the cap that follows it.

        Args:
            log_policy, log_survival: as in `reshape`.
            unread: `[B, V]` bool, tokens of unknown risk, whose survival is given as 0: without any other token there
                is no policy. A rule that removes tokens removes these first, and so does any in a wider policy.
            held: `[B, V]` bool in a wider policy, the tokens it was widened from; see `project_onto_caps`.
        """
        known = None if unread is None else _remove(log_policy, unread)
        if known is None:
            reshaped = self.reshape(log_policy, log_survival)
        elif self.removes or held is not None:
            reshaped = _both(known, self.reshape(known.log_policy, log_survival))
        else:
            reshaped = self.reshape(log_policy, log_survival)
            reshaped = reshaped._replace(feasible=reshaped.feasible & known.feasible)
        caps = self.caps(log_survival)
        return reshaped if caps is None else _both(reshaped, project_onto_caps(reshaped.log_policy, caps, held))


@dataclass(frozen=True, kw_only=True)
class Cap(Rule):
    """The security condition alone: the policy nearest to the base with `π ≤ clip(1 + Q − min(ε, −Q), p_min, 1)`."""

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
        floor = math.log(self.p_min)
        tilted = log_survival.clamp_min(floor)
        if self.beta * -floor > _EXACT and tilted.device.type != "mps":  # which has no float64
            tilted = tilted.double()
        tilted, total = normalise_(tilted.mul_(self.beta).add_(log_policy))
        tilted = tilted.to(log_policy.dtype)
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
    removes: ClassVar[bool] = True

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
    removes: ClassVar[bool] = True

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
    return Reshaped(normalise(kept), removed, removed > 0, kept.amax(-1) > -math.inf)


def _both(first: Reshaped, then: Reshaped) -> Reshaped:
    """Two stages as one."""
    return Reshaped(
        then.log_policy, first.capped + then.capped, first.changed | then.changed, first.feasible & then.feasible
    )


def rectify(
    scores: Tensor, log_survival: Tensor, rule: Rule, unwarped: Tensor | None = None, *, checked: bool = False
) -> Rectified:
    """Apply a rule to a batch of next-token scores.

    Where the rule is infeasible on the truncated support, the policy is widened by no more than needed: the tokens of
    the support stand at their caps, and what they cannot hold goes to the others, in proportion to the policy before
    truncation. Where that is infeasible too, the state is a dead end, answered by `π ∝ π₀·max(1 + Q, p_min)` over the
    policy before truncation.

    It fails closed: a token whose `log(1 + Q)` is no number, or above 0, has the highest risk (`Mask` and `Advantage`
    remove it), and where that is so of every token, the state is a dead end. Both are told by `unread`. A token that is
    banned in the scores (see `readable_scores`) has no probability in any answer.

    Args:
        scores: `[B, V]` logits or log-probabilities after the sampling warpers, of any floating dtype; computed in
            float32 or better. `-inf` removes a token.
        log_survival: `[B, V]` `log(1 + Q)`, 0 or less; of dead-end values `q` it is `q.log1p()`.
        rule: the rule.
        unwarped: `[B, V]` scores before what truncates them, but at the same temperature; `None` where nothing was
            truncated.
        checked: the scores are those of `readable_scores`.

    Raises:
        InvalidArgumentError: the shapes differ, or are not `[B, V]`, or a row of the scores leaves no token.

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
    given = torch.promote_types(torch.promote_types(scores.dtype, log_survival.dtype), torch.float32)
    scores, unwarped = _readable(scores, unwarped, checked)
    dtype = torch.promote_types(scores.dtype, given)
    scores, unwarped = scores.to(dtype), None if unwarped is None else unwarped.to(dtype)
    survival, unread = readable_survival(log_survival.to(dtype))
    result, rows = _first(scores, survival, unread, rule)
    if rows is not None:
        risks = survival[rows], None if unread is None else unread[rows]
        result = _replaced(
            result, rows, _widen(scores[rows], *risks, rule, None if unwarped is None else unwarped[rows])
        )
    return result._replace(scores=narrowed(result.scores, given), moved=result.moved.to(given))


def rectify_support(
    scores: Tensor, support: Support, log_survival: Callable[[Tensor | None, Tensor | None], Tensor], rule: Rule,
    unwarped: Tensor, *, checked: bool = False,
) -> Rectified:  # fmt: skip
    """`rectify` of truncated policies, in which the risk of the tokens that are left is all that is asked for.

    Args:
        scores: `[B, V]` after the warpers.
        support: of the scores.
        log_survival: `log(1 + Q)`. Of `(None, tokens)`, `[B, K]`, that of these tokens; of `(rows, None)`, `[R]`, that
            of the whole vocabulary in these rows, `[R, V]`, asked for where truncation left no feasible policy.
        rule, unwarped, checked: as in `rectify`.
    """
    given = torch.promote_types(scores.dtype, torch.float32)
    scores, unwarped = _readable(scores, unwarped, checked)
    left = support.of(scores) if checked else readable_scores(support.of(scores))
    survival, unread = readable_survival(log_survival(None, support.tokens).to(left.dtype).where(support.real, 0))
    result, rows = _first(left, survival, unread, rule)
    result = result._replace(scores=support.spread(result.scores, scores.shape[-1]))
    if rows is not None:
        survival, unread = readable_survival(log_survival(rows, None).to(left.dtype))
        result = _replaced(result, rows, _widen(scores[rows], survival, unread, rule, unwarped[rows]))
    return result._replace(scores=narrowed(result.scores, given), moved=result.moved.to(given))


def rectify_candidates(
    scores: Tensor, candidates: Support, log_survival: Tensor, rule: Rule, unwarped: Tensor, *, checked: bool = False
) -> Rectified:
    """`rectify` where only some tokens have a known risk: the others are removed, so that what the rule promises holds.

    A policy that is infeasible on the candidates is widened to no other token: the answer to a dead end is one of
    candidates alone.

    Args:
        scores: `[B, V]` after the warpers.
        candidates: the tokens whose risk is known, at least one in each row.
        log_survival: `[B, K]` `log(1 + Q)` of the candidates.
        rule, unwarped, checked: as in `rectify`.

    Returns:
        Of the whole vocabulary. What is moved is the distance to the policy of all tokens, so the probability of those
        that were removed is part of it.
    """
    given = torch.promote_types(scores.dtype, torch.float32)
    scores, unwarped = _readable(scores, unwarped, checked)
    left, whole = candidates.of(scores), candidates.of(unwarped)
    if not checked:
        left, whole = readable_scores(left), readable_scores(whole)
    result = rectify(left, log_survival.masked_fill(~candidates.real, 0), rule, whole, checked=True)
    base = left - scores.logsumexp(-1, keepdim=True)
    overlap = torch.minimum(base, normalise(result.scores)).exp_().sum(-1)
    whole_scores = candidates.spread(narrowed(result.scores, given), scores.shape[-1])
    return result._replace(scores=whole_scores, moved=(1 - overlap).clamp_(0, 1).to(given))


def _readable(scores: Tensor, unwarped: Tensor | None, checked: bool) -> tuple[Tensor, Any]:
    """Scores after and before the warpers, without the bans of either."""
    if checked:
        return scores, unwarped
    scores = readable_scores(scores)
    if unwarped is None:
        return scores, None
    unwarped = readable_scores(unwarped)
    if bool((banned := (unwarped == -math.inf) & (scores > -math.inf)).any()):
        scores = readable_scores(scores.masked_fill(banned, -math.inf))
    dtype = torch.promote_types(scores.dtype, unwarped.dtype)
    return scores.to(dtype), unwarped.to(dtype)


def _first(scores: Tensor, log_survival: Tensor, unread: Tensor | None, rule: Rule) -> tuple[Rectified, Tensor | None]:
    """What a rule makes of a policy as it is, and the rows for which it makes none, `[R]`; `None` without any."""
    log_policy, normaliser = normalise_(scores.clone())
    reshaped = rule.apply(log_policy, log_survival, unread)
    result = _answer(scores, log_policy, normaliser, reshaped, unread)
    if (rule.always_feasible and unread is None) or bool(reshaped.feasible.all()):
        return result, None
    return result, (~reshaped.feasible).nonzero().squeeze(-1)


def _answer(
    scores: Tensor, log_policy: Tensor, normaliser: Tensor, reshaped: Reshaped, unread: Tensor | None
) -> Rectified:
    """What a rule that was feasible made of scores, `log_policy` plus a normaliser. Overwrites the reshaped policy."""
    overlap = log_policy.clamp_max(reshaped.log_policy).exp_().sum(-1)
    # Beam search compares rows, so the normaliser of log-probabilities is kept; that of raw logits is dropped.
    shift = normaliser.masked_fill(normaliser.abs() > COMPARABLE, 0)
    rectified = reshaped.log_policy.add_(shift)
    if not reshaped.changed.all():
        rectified = torch.where(reshaped.changed[:, None], rectified, scores)
    moved = torch.where(reshaped.changed, (1 - overlap).clamp_(0, 1), 0)
    none = torch.zeros_like(reshaped.changed)
    unknown = none if unread is None else (unread & (log_policy > -math.inf)).any(-1)
    return Rectified(rectified, reshaped.capped, moved, none, none, unknown)


def _widen(
    scores: Tensor, log_survival: Tensor, unread: Tensor | None, rule: Rule, unwarped: Tensor | None
) -> Rectified:
    """Rows whose truncated policy is infeasible: the rule on the whole policy, or the answer to a dead end."""
    log_policy, normaliser = normalise_(scores.clone())
    log_whole = log_policy if unwarped is None else normalise(unwarped)
    whole = rule.apply(log_whole, log_survival, unread, held=log_policy > -math.inf)
    fallback = normalise(log_survival.clamp_min(math.log(rule.p_min)).add_(log_whole))
    chosen = whole._replace(
        log_policy=torch.where(whole.feasible[:, None], whole.log_policy, fallback),
        capped=torch.where(whole.feasible, whole.capped, 0),
        changed=torch.ones_like(whole.changed),
    )
    result = _answer(scores, log_policy, normaliser, chosen, None)
    unknown = result.unread if unread is None else (unread & (log_whole > -math.inf)).any(-1)
    return result._replace(widened=whole.feasible, dead_end=~whole.feasible, unread=unknown)


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
