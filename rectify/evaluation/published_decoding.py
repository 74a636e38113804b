"""The decoding of the published rectification, written from its description: what this package's cost is compared with.

Source: Cao, Fatemi, Cheung and Shabanian, "Systematic Rectification of Language Models via Dead-end Analysis"
(ICLR 2023), and the repository `mcao516/rectification-lm`, whose algorithm this is and none of whose code.
"""

from __future__ import annotations

from copy import deepcopy
from typing import cast

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, PreTrainedModel


class PublishedQNetwork(nn.Module):
    """A causal trunk and two heads `Linear(d, 2d) → ReLU → Linear(2d, V)` of unbounded values, online and target.

    The target head is a copy of the online one that only training needs; it is evaluated in decoding as well.

    Args:
        trunk: a causal model without a language-model head.
    """

    def __init__(self, trunk: PreTrainedModel) -> None:
        super().__init__()
        vocab_size, width = cast(nn.Embedding, trunk.get_input_embeddings()).weight.shape
        self.trunk = trunk
        self.head = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, vocab_size))
        self.target_head = deepcopy(self.head)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Values of every token after every prefix, of both heads: `[B, T]` ids to `[B, T, V]` each."""
        # neither positions nor a cache are given; only what the model itself would store for one is spared
        hidden = self.trunk(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return self.head(hidden), self.target_head(hidden)


class PublishedProcessor(LogitsProcessor):
    """The published rule, `p(a|s) ≤ clip(1 + Q(s,a) − ε, p_min, p_max)` in passes of cap and renormalise.

    At every step the whole prefix is encoded, and both heads value every token at every position, of which the last is
    read. Two passes leave tokens above their caps; the rule is followed as published. The sampling warpers are left to
    `generate`, which applies them afterwards.

    Args:
        q_network: in evaluation mode, of the model's vocabulary.
        epsilon: margin ε of the cap.
        p_min, p_max: smallest and largest cap.
        pad_token_id: whatever has this id is taken for padding.
        passes: how often the scores are capped.
    """

    supports_continuous_batching = False

    def __init__(
        self,
        q_network: PublishedQNetwork,
        *,
        epsilon: float = 0.1,
        p_min: float = 1e-7,
        p_max: float = 1.0,
        pad_token_id: int = 50256,
        passes: int = 2,
    ) -> None:
        self.q_network = q_network
        self.epsilon, self.p_min, self.p_max = epsilon, p_min, p_max
        self.pad_token_id, self.passes = pad_token_id, passes

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`[B, T]` prefixes and `[B, V]` scores to `[B, V]` scores."""
        values, _ = self.q_network(input_ids, (input_ids != self.pad_token_id).long())
        log_caps = (1 + values[:, -1, :] - self.epsilon).clamp(self.p_min, self.p_max).log()
        for _ in range(self.passes):
            scores = torch.minimum(scores, log_caps + scores.logsumexp(-1, keepdim=True))
        return scores
