"""The tokens of a policy that are looked at, where they are few: as tables with a row for each policy."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Support(NamedTuple):
    """Some of the tokens of each policy.

    Attributes:
        tokens: `[B, K]` int64, K the size of the largest; shorter rows are filled up with any id.
        real: `[B, K]` bool, False where a row is filled up.
    """

    tokens: Tensor
    real: Tensor

    def of(self, scores: Tensor) -> Tensor:
        """Those of `[B, V]` scores, `[B, K]`; `-inf` where a row is filled up."""
        return scores.gather(-1, self.tokens).masked_fill_(~self.real, -math.inf)

    def spread(self, values: Tensor, width: int) -> Tensor:
        """`[B, K]` values in the places of their tokens, `[B, width]`; `-inf` elsewhere."""
        whole = values.new_full((len(values), width), -math.inf)
        rows, places = self.real.nonzero(as_tuple=True)
        whole[rows, self.tokens[rows, places]] = values[rows, places]
        return whole


def support_of(scores: Tensor, largest: int) -> Support | None:
    """The tokens that truncation left of `[B, V]` scores; `None` where a row has more than `largest`."""
    kept = scores > -math.inf
    counts = kept.sum(-1)
    size = _largest(counts)
    return _support(kept, counts, size) if 0 < size <= largest else None


def candidates_of(scores: Tensor, threshold: float | None, k: int | None = None, least: int = 1) -> Support:
    """The tokens that a policy is likely to take.

    Args:
        scores: `[B, V]` logits; tokens of `-inf` are none.
        threshold: least probability; `None` to take the `k` likeliest tokens.
        k: how many without a threshold.
        least: how many of the likeliest are candidates whatever their probability.
    """
    highest = scores.topk(min(max(least, k or 1), scores.shape[-1]), dim=-1).indices
    likely = torch.zeros_like(scores, dtype=torch.bool) if threshold is None else scores.softmax(-1) >= threshold
    kept = likely.scatter_(-1, highest, True) & (scores > -math.inf)
    counts = kept.sum(-1)
    return _support(kept, counts, max(1, _largest(counts)))


def _largest(counts: Tensor) -> int:
    return int(counts.max()) if len(counts) else 0


def _support(kept: Tensor, counts: Tensor, size: int) -> Support:
    rows, columns = kept.nonzero(as_tuple=True)
    places = torch.arange(len(rows), device=kept.device) - (counts.cumsum(0) - counts)[rows]
    tokens = columns.new_zeros(len(kept), size).index_put_((rows, places), columns)
    return Support(tokens, torch.arange(size, device=kept.device) < counts[:, None])
