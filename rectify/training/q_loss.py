"""Targets and losses of the dead-end Q network: tensors in, tensors out.

A trajectory is a text whose token `t` is the action `a_t` taken after the prefix `s_t`; the one reward, in [−1, 0], is
given at its last token. With discount γ = 1, `−Q(s_t, a_t)` is the probability that the finished text is toxic.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

LossKind = Literal["cross_entropy", "squared_error"]


def lambda_returns(
    reward: Tensor,
    next_values: Tensor | None,
    taken: Tensor,
    *,
    gamma: float = 1.0,
    td_lambda: float = 1.0,
    q_min: float = -1.0,
    q_max: float = 0.0,
) -> Tensor:
    """λ-returns: `y_t = γ[(1 − λ) v_{t+1} + λ y_{t+1}]` before the last action, and the reward there.

    λ = 0 with `v_{t+1} = Q̄(s_{t+1}, a_{t+1})` is the one-step SARSA of the published system, λ = 1 is Monte Carlo, and
    `v_{t+1} = Σ_a π(a|s_{t+1}) Q̄(s_{t+1}, a)` makes it expected SARSA. Every target is clipped to [q_min, q_max].

    Args:
        reward: `[B]` float, of the finished trajectory.
        next_values: `[B, T]` float, the value `v_{t+1}` of the state after each action; not read at the last action,
            and may be `None` if λ is 1.
        taken: `[B, T]` bool, True at actions, False at padding; the actions of a row stand together.
        gamma: discount γ, in [0, 1].
        td_lambda: λ, in [0, 1].
        q_min, q_max: least and greatest target.

    Returns:
        `[B, T]` float targets without gradient; 0 at padding.

    Source: Sutton and Barto, "Reinforcement Learning", 2nd edition, section 12.1; λ = 0: the published `sarsa.py`.
    """
    if next_values is None:
        if td_lambda != 1:
            raise ValueError(f"next_values is None with td_lambda {td_lambda}: only Monte Carlo (1) needs no values")
        next_values = torch.zeros_like(taken, dtype=reward.dtype)
    next_values = next_values.detach().to(reward.dtype)
    following = torch.nn.functional.pad(taken[:, 1:], (0, 1))
    targets = torch.zeros_like(next_values)
    later = torch.zeros_like(reward)
    for t in reversed(range(taken.shape[1])):
        bootstrapped = gamma * ((1 - td_lambda) * next_values[:, t] + td_lambda * later)
        later = torch.where(following[:, t], bootstrapped, reward).clamp(q_min, q_max)
        targets[:, t] = later
    return targets.masked_fill(~taken, 0)


def q_loss(risk_logits: Tensor, targets: Tensor, counted: Tensor, kind: LossKind = "cross_entropy") -> Tensor:
    """The distance between `Q(s_t, a_t)` and its target, averaged over the actions that count.

    Args:
        risk_logits: `[B, T]` float32 logits of the risk `−Q(s_t, a_t)`.
        targets: `[B, T]` in [−1, 0].
        counted: `[B, T]` bool.
        kind: `"cross_entropy"` of the risk with `−target`, which does not saturate, or the published
            `"squared_error"`. Both have the target's mean as their minimum.

    Returns:
        A scalar; 0 where nothing counts.
    """
    if kind == "cross_entropy":
        loss = binary_cross_entropy_with_logits(risk_logits, -targets, reduction="none")
    else:
        loss = (risk_logits.sigmoid() + targets).square()
    return loss.masked_fill(~counted, 0).sum() / counted.sum().clamp_min(1)


def expected_values(policy_logits: Tensor, risk_logits: Tensor) -> Tensor:
    """`Σ_a π(a|s) Q(s, a)`, the value of states under a policy.

    Args:
        policy_logits: `[..., V]` logits of the policy.
        risk_logits: `[..., V]` logits of the risk `−Q`.

    Returns:
        `[...]` float32, in [−1, 0].
    """
    return -(policy_logits.float().softmax(-1) * risk_logits.float().sigmoid()).sum(-1)


@torch.no_grad()
def polyak_update(target: torch.nn.Module, online: torch.nn.Module, rate: float) -> None:
    """`target ← rate · online + (1 − rate) · target`, parameter by parameter, in place."""
    for kept, fresh in zip(target.parameters(), online.parameters(), strict=True):
        kept.lerp_(fresh.detach().to(kept.dtype), rate)
