"""Heads of the span detector: from a trunk's states of tokens to logits of what each judges, tokens or segments."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TokenHead(nn.Module):
    """One logit a token, from its own state: plain token classification."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.score = nn.Linear(hidden_size, 1)

    def forward(self, hidden: Tensor, own: Tensor) -> Tensor:
        """Logits of what is judged.

        Args:
            hidden: `[B, T, hidden_size]`.
            own: `[B, T]` bool, False at padding and special tokens.

        Returns:
            `[B, T]` float32.
        """
        return self.score(hidden.to(self.score.weight.dtype)).squeeze(-1).float()

    def token_logits(self, logits: Tensor) -> Tensor:
        """The logits of tokens, `[B, T]`, by what `forward` gave."""
        return logits

    def targets(self, labels: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` is trained to give.

        Args:
            labels: `[B, T]` bool, the toxic tokens.
            own: as for `forward`.

        Returns:
            Labels of what is judged, and which of them count: bool, in `forward`'s shape.
        """
        return labels, own


class SegmentHead(nn.Module):
    """Segment-CNN: one logit for every segment of two neighbouring tokens, from a convolution over their states.

    A segment is toxic where one of its tokens is; so a token is as toxic as the less toxic of the two segments that
    hold it, and its neighbours are not drawn in. The first and the last token also make a segment with nothing beside
    them, so that a text of one token has segments, and special tokens are in none.

    Source: Tang et al., "CMD", EMNLP 2024, whose filter has two weights shared by all features, whose softmax is taken
    twice, and which masks both tokens of a segment.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.filter = nn.Conv1d(hidden_size, hidden_size, kernel_size=2, padding=1)
        self.score = nn.Linear(hidden_size, 1)

    def forward(self, hidden: Tensor, own: Tensor) -> Tensor:
        """Logits of segments, `[B, T + 1]` float32: that at place j is of the tokens j − 1 and j; see `TokenHead`."""
        alone = hidden.masked_fill(~own[..., None], 0).to(self.score.weight.dtype)
        features = self.filter(alone.transpose(1, 2)).tanh().transpose(1, 2)
        return self.score(features).squeeze(-1).float()

    def token_logits(self, logits: Tensor) -> Tensor:
        """See `TokenHead.token_logits`."""
        return torch.minimum(logits[:, :-1], logits[:, 1:])

    def targets(self, labels: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """See `TokenHead.targets`."""
        return _either(labels & own), _either(own)


def _either(tokens: Tensor) -> Tensor:
    """Which segments hold one of these tokens: `[B, T]` to `[B, T + 1]` bool."""
    return nn.functional.pad(tokens, (1, 0)) | nn.functional.pad(tokens, (0, 1))


HEADS: dict[str, type[TokenHead] | type[SegmentHead]] = {"token": TokenHead, "segment": SegmentHead}
"""Heads by their names in a configuration."""
