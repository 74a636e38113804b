"""The contrastive loss of self-detoxification: what a model writes should mean what its safe continuation means."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rectify.errors import InvalidArgumentError


def contrastive_loss(
    written: Tensor, candidates: Tensor, known: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`−log( e^{cos(h, c₀)/τ} / Σ_k e^{cos(h, c_k)/τ} )`: one softmax, over the candidates that there are.

    Args:
        written: `[B, H]` states h of what the model wrote.
        candidates: `[B, K, H]` states c of the continuation to seek, c₀, and of those to shun.
        known: `[B, K]` bool, which of them there are.
        temperature: τ, above 0.

    Returns:
        `[B]` losses, float32 or better, 0 and without a gradient where the term is not active; and `[B]` bool, where it
        is: where there is something to seek and something to shun.

    Raises:
        InvalidArgumentError: `temperature` is not above 0.

    Source: CMD, EMNLP 2024 (arXiv 2308.08295), with τ = 1.
    """
    if not temperature > 0:
        raise InvalidArgumentError(f"temperature is {temperature}: give a number above 0")
    dtype = torch.promote_types(written.dtype, torch.float32)
    active = known[:, 0] & known[:, 1:].any(-1)
    cosines = nn.functional.cosine_similarity(written[:, None].to(dtype), candidates.to(dtype), dim=-1)
    # rows that are not active have a finite loss, so that no NaN comes back through the gradient of `where`
    scores = (cosines / temperature).masked_fill(~(known | ~active[:, None]), -torch.inf)
    losses = scores.logsumexp(-1) - scores[:, 0]
    return torch.where(active, losses, 0.0), active
