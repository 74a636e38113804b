"""Log policies: normalising them, and the nearest policy under caps."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


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


def project_onto_caps(log_policy: Tensor, caps: Tensor, held: Tensor | None = None) -> Reshaped:
    """The policy nearest to the base in KL divergence among those under the caps: `min(c, t·π₀)`.

    `t` is found by growing the set `B` of binding caps: given `B`, `t = (1 − Σ_B c) / Σ_{not B} π₀`, which rises
    from round to round and only adds to `B`, so the iteration ends; usually within 6 rounds, without a sort. Each row
    is a problem of its own. `t·π₀` is reckoned relative to the likeliest token that is not bound, so that it keeps its
    digits however unlikely that is.

    Args:
        log_policy: `[B, V]` normalised log-probabilities, float32 or float64; `-inf` outside the support.
        caps: `[B, V]` of the same dtype, in (0, 1].
        held: `[B, V]` bool, tokens that are to stand at their caps, where these sum to less than 1: the others get no
            more than what those cannot hold.

    Returns:
        The projected log policy with its binding caps; feasible where the caps over the support sum to at least 1.

    Source: the minimiser of KL(π‖π₀) under box constraints, from its Lagrange conditions. The published code's two
    passes of cap and renormalise leave tokens up to three times above their caps.
    """
    feasible = caps.masked_fill(log_policy == -math.inf, 0).sum(-1) >= 1 - 8 * torch.finfo(caps.dtype).eps
    log_caps = caps.log()
    bound = log_policy > log_caps
    if held is not None:
        held = held & (log_policy > -math.inf)
        short = held.any(-1, keepdim=True) & (caps.masked_fill(~held, 0).sum(-1, keepdim=True) < 1)
        bound = torch.where(short, held, bound)
    changed = bound.any(-1)
    capped = torch.zeros_like(changed, dtype=torch.int64)
    # most caps of most states do not bind: only the rows where one does are worked on
    rows = changed.nonzero().squeeze(-1)
    if rows.numel() == len(changed):
        log_policy, capped = _fill(log_policy, caps, log_caps, bound)
    elif rows.numel():
        projected, count = _fill(log_policy[rows], caps[rows], log_caps[rows], bound[rows])
        log_policy = log_policy.index_copy(0, rows, projected)
        capped = capped.index_copy(0, rows, count)
    return Reshaped(log_policy, capped, changed, feasible)


def _fill(log_policy: Tensor, caps: Tensor, log_caps: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """The projection of rows with at least one binding cap, and how many bind: `[R, V]` and `[R]`."""
    tiny = torch.finfo(caps.dtype).tiny
    while True:
        free = (1 - caps.masked_fill(~bound, 0).sum(-1, keepdim=True)).clamp_min_(tiny).log_()
        highest, total = _sum_of(log_policy.masked_fill(bound, -math.inf))
        # with nothing left to raise, total is -inf
        raised = (log_policy - highest).add_(free - total.masked_fill(total == -math.inf, 0))
        grown = bound | (raised > log_caps)
        if torch.equal(grown, bound):
            return torch.where(bound, log_caps, raised), bound.sum(-1)
        bound = grown


def _sum_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """The highest entry of each row of logs (0 where all are `-inf`), and the log of the sum relative to it.

    Overwrites its argument, and so needs no other memory of its size.
    """
    highest = x.amax(-1, keepdim=True)
    highest = highest.masked_fill_(highest == -math.inf, 0)
    return highest, x.sub_(highest).exp_().sum(-1, keepdim=True).log_()


def normalise(x: Tensor) -> Tensor:
    """`[B, V]` log-probabilities; rows of `-inf` stay so."""
    return normalise_(x.clone())[0]


def normalise_(x: Tensor) -> tuple[Tensor, Tensor]:
    """`normalise` in place, and the normaliser that was taken away, `[B, 1]`.

    torch's float32 `log_softmax` sums in one go on a CPU: over 150,000 tokens its probabilities miss 1 by 2e-5.
    """
    highest = x.amax(-1, keepdim=True)
    highest = highest.masked_fill_(highest == -math.inf, 0)
    # not both at once: the highest raw logit may be too large to keep the digits of the sum
    total = x.sub_(highest).exp().sum(-1, keepdim=True).log_()
    total.masked_fill_(total == -math.inf, 0)
    return x.sub_(total), highest + total
