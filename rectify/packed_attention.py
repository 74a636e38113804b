"""Attention of some positions of a padded batch, which run through all else of a model as one row without the padding.

transformers' packed rows (`cu_seqlens`) keep texts apart that begin in the row; these go on from a cache of prefixes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, Cache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_NAME = "rectify_packed"


@dataclass(frozen=True)
class Packing:
    """Which positions are run, and what they read.

    Attributes:
        real: `[B, T]` bool, N of them True.
        mask: `[B, 1, T, past + T]` in the model's dtype, added to the scores of attention.
        cache: of the prefixes; extended by all T positions, zero where they are not real.
    """

    real: Tensor
    mask: Tensor
    cache: Cache

    def pack(self, values: Tensor) -> Tensor:
        """`[B, T, …]` to `[1, N, …]`."""
        return values[self.real][None]

    def unpack(self, values: Tensor) -> Tensor:
        """`[1, N, …]` to `[B, T, …]`, zero where nothing is real."""
        whole = values.new_zeros(*self.real.shape, *values.shape[2:])
        whole[self.real] = values[0]
        return whole

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> tuple[Tensor, None]:
        """Attention of `[1, heads, N, D]` states over the cache and themselves: `[1, N, heads, D]`."""
        query, key, value = (self.unpack(each.transpose(1, 2)).transpose(1, 2) for each in (query, key, value))
        key, value = self.cache.update(key, value, module.layer_idx)  # type: ignore[arg-type]
        found, _ = sdpa_attention_forward(module, query, key, value, self.mask, **options)
        return self.pack(found), None


def can_pack(trunk: PreTrainedModel) -> bool:
    """Whether a model takes attention from elsewhere, and would take torch's otherwise."""
    return trunk._supports_attention_backend and trunk.config._attn_implementation == "sdpa"


@contextmanager
def packed(trunk: PreTrainedModel) -> Iterator[None]:
    """Within, a model that is given a `packing` attends by it."""
    AttentionInterface.register(_NAME, _attend)
    before = trunk.config._attn_implementation
    trunk.config._attn_implementation = _NAME
    try:
        yield
    finally:
        trunk.config._attn_implementation = before


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, *, packing: Packing, **options: Any
) -> tuple[Tensor, None]:
    return packing.attend(module, query, key, value, **options)
