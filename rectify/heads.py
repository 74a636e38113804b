"""Vocabulary heads: from a trunk's hidden state to the dead-end value of every next token, `Q(s, a) ∈ [−1, 0]`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LowRankHead(nn.Module):
    """`−Q(s,a) = σ(P z · E[a] + b[a] + v(z))` with `z` a normalised hidden state after a small residual MLP.

    `E` is `[V, rank]` and starts from the trunk's token embeddings; `P` and `v` start at zero, so that every value
    starts at `−base_rate`, or at a risk of its token's own. GPT-2's vocabulary at rank 64 costs 3.3 M parameters; the
    published head has 78 M.

    Args:
        hidden_size: width of the trunk.
        vocab_size: number of tokens V.
        rank: width of the token factors.
        mlp_size: width of the residual MLP; 0 leaves it out.
        base_rate: toxicity probability at the start, in (0, 1).
    """

    def __init__(self, hidden_size: int, vocab_size: int, rank: int, mlp_size: int, base_rate: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.mlp = (
            nn.Sequential(nn.Linear(hidden_size, mlp_size), nn.GELU(), nn.Linear(mlp_size, hidden_size))
            if mlp_size
            else None
        )
        self.project = nn.Linear(hidden_size, rank, bias=False)
        self.value = nn.Linear(hidden_size, 1)
        self.tokens = nn.Linear(rank, vocab_size)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.value.weight)
        nn.init.constant_(self.value.bias, math.log(base_rate / (1 - base_rate)))
        nn.init.zeros_(self.tokens.bias)

    @torch.no_grad()
    def start_from_embeddings(self, embeddings: Tensor) -> None:
        """Set the token factors to the `[V, hidden_size]` embeddings in their first principal axes, at unit scale."""
        weight = embeddings.detach().to(torch.float32)
        centred = weight - weight.mean(0)
        axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(-1)[:, : self.tokens.in_features]
        factors = centred @ axes
        self.tokens.weight.zero_()
        self.tokens.weight[:, : factors.shape[-1]] = factors / factors.square().mean().sqrt().clamp_min(1e-12)

    @torch.no_grad()
    def start_from_token_risks(self, risks: Tensor) -> None:
        """Set the token biases so that the values start at the `[V]` context-free risks, each in (0, 1).

        A rare token is met in too few steps for its bias to get far from 0.
        """
        self.tokens.bias.copy_(risks.double().logit() - self.value.bias.double())

    @torch.no_grad()
    def rescale(self, scale: float, shift: float) -> None:
        """Turn every risk logit `x` into `scale · x + shift`."""
        for weight in (self.project.weight, self.value.weight, self.value.bias, self.tokens.bias):
            weight.mul_(scale)
        self.value.bias.add_(shift)

    def _state(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        z = self.norm(hidden.to(self.norm.weight.dtype))
        if self.mlp is not None:
            z = z + self.mlp(z)
        return self.project(z), self.value(z)

    def risk_logits(self, hidden: Tensor, actions: Tensor | None = None) -> Tensor:
        """Logits of the risk `−Q`, float32: `[..., V]`, or those of `actions`, `[...]` or several, `[..., K]`."""
        state, value = self._state(hidden)
        if actions is None:
            if state.ndim != 2 or state.dtype != self.tokens.weight.dtype:  # as under autocast
                return self.tokens(state).add_(value).float()
            # value and bias in one pass over the vocabulary, and the product added in place
            return (value + self.tokens.bias).addmm_(state, self.tokens.weight.T).float()
        chosen = _of_tokens(self.tokens, state, actions)
        return (chosen + (value if actions.ndim == hidden.ndim else value.squeeze(-1))).float()

    def log_survival(self, hidden: Tensor, actions: Tensor | None = None) -> Tensor:
        """`log(1 + Q)`, float32 and exact to the last digits where `Q` is near −1: shapes as in `risk_logits`."""
        return F.softplus(self.risk_logits(hidden, actions)).neg_()

    def forward(self, hidden: Tensor, actions: Tensor | None = None) -> Tensor:
        """`Q` of `[..., hidden_size]` states, float32: shapes as in `risk_logits`."""
        return -self.risk_logits(hidden, actions).sigmoid()


def _of_tokens(layer: nn.Linear, state: Tensor, tokens: Tensor) -> Tensor:
    """Some outputs of a layer: of `[..., width]` inputs and `[...]` or `[..., K]` tokens, in the latter's shape."""
    weight, several = F.embedding(tokens, layer.weight), tokens.ndim == state.ndim
    chosen = (weight @ state[..., None]).squeeze(-1) if several else (weight * state).sum(-1)
    return chosen + layer.bias[tokens]


class PublishedHead(nn.Module):
    """The head of the published system, `Linear(d, 2d) → ReLU → Linear(2d, V)`, its output clipped to [−1, 0].

    Source: `mcao516/rectification-lm`; there the range is imposed on the training target only.
    """

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden_size, 2 * hidden_size)
        self.tokens = nn.Linear(2 * hidden_size, vocab_size)

    def forward(self, hidden: Tensor, actions: Tensor | None = None) -> Tensor:
        """`Q` of `[..., hidden_size]` states, float32: `[..., V]`, or that of `actions`, `[...]` or `[..., K]`."""
        state = self.inner(hidden.to(self.inner.weight.dtype)).relu()
        q = self.tokens(state) if actions is None else _of_tokens(self.tokens, state, actions)
        return q.float().clamp(-1, 0)

    def log_survival(self, hidden: Tensor, actions: Tensor | None = None) -> Tensor:
        """`log(1 + Q)`, float32: shapes as in `forward`."""
        return self(hidden, actions).log1p()
