"""A cache of keys and values that is appended to in place, cut back, and put into another order."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class Growing:
    """A tensor that grows along one dimension inside a larger buffer, so that appending does not copy what is there."""

    def __init__(self, first: Tensor, dim: int) -> None:
        self.dim = dim
        self._start(first)

    def _start(self, first: Tensor) -> None:
        self.length = first.shape[self.dim]
        shape = list(first.shape)
        shape[self.dim] = max(self.length * 3 // 2, 64)
        self._buffer = first.new_empty(shape)
        self.view().copy_(first)

    def view(self) -> Tensor:
        """All of it."""
        return self._buffer.narrow(self.dim, 0, self.length)

    def append(self, new: Tensor) -> Tensor:
        """All of it, with what is new at its end."""
        end = self.length + new.shape[self.dim]
        if end > self._buffer.shape[self.dim]:
            self._start(torch.cat((self.view(), new), self.dim))
        else:
            self._buffer.narrow(self.dim, self.length, new.shape[self.dim]).copy_(new)
            self.length = end
        return self.view()

    def crop(self, length: int) -> None:
        """Drop all from `length` on."""
        self.length = length

    def select(self, rows: Tensor) -> None:
        """Take the given rows."""
        self._start(self.view()[rows])


class _GrowingLayer(DynamicLayer):
    """A layer of keys and values that is appended to in place."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self._keys, self._values = Growing(key_states, -2), Growing(value_states, -2)
        else:
            self._keys.append(key_states)
            self._values.append(value_states)
        return self._expose()

    def _expose(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = self._keys.view(), self._values.view()
        return self.keys, self.values

    def keep(self, length: int, rows: Tensor | None) -> None:
        """Drop all positions from `length` on, and take the given rows."""
        for tensor in (self._keys, self._values):
            tensor.crop(length)
            if rows is not None:
                tensor.select(rows)
        self._expose()


def growing_cache() -> Cache:
    """An empty one, of as many layers as a model asks for."""
    return Cache(layer_class_to_replicate=_GrowingLayer)


def has_grown(cache: Cache, length: int) -> bool:
    """Whether each layer holds that many positions: some models keep their states elsewhere, or nothing."""
    return bool(cache.layers) and all(
        isinstance(layer, _GrowingLayer) and layer.keys is not None and layer.keys.shape[-2] == length
        for layer in cache.layers
    )


def keep(cache: Cache, length: int, rows: Tensor | None = None) -> None:
    """Drop all positions from `length` on, and take the given rows (`None`: all)."""
    for layer in cache.layers:
        assert isinstance(layer, _GrowingLayer)
        layer.keep(length, rows)
