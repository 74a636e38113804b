"""The loss of the dead-end Q network: tensors in, tensors out."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits


def monte_carlo_loss(risk_logits: Tensor, reward: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy between the risk `−Q(s_t, a_t)` of each taken token and the outcome of its trajectory.

    With γ = 1 and a reward at the end only, the Monte Carlo return of every token is that reward; it has no bias, and
    credit reaches the first token at once.

    Args:
        risk_logits: `[B, T]` float32 logits of `−Q(s_t, a_t)`.
        reward: `[B]` in [−1, 0], the negative probability that the finished text is toxic.
        mask: `[B, T]` bool, True at the tokens that count.

    Returns:
        The mean over the tokens that count, a scalar.
    """
    target = (-reward)[:, None].expand_as(risk_logits)
    loss = binary_cross_entropy_with_logits(risk_logits, target, reduction="none")
    return (loss * mask).sum() / mask.sum().clamp_min(1)
