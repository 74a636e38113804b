"""A memo of a causal trunk's states, keyed by prefix: what makes a stateless processor incremental.

`PrefixMemo.last_hidden` is a function of the ids alone. Between calls the memo keeps the ids it has seen, their keys
and values, and their hidden states; a call reuses what agrees with its own prefixes and computes the rest. Rows are
matched to the remembered row with the longest common prefix, so beams may be permuted or duplicated, lengths may go
back (assisted decoding), and another prompt may follow: the answer never depends on the history, only the cost does.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from rectify.risk_model import BranchingModel, StateModel

MASKED = -1
"""Stands for a padding position in a prefix, whatever id is written there."""

_COMPARISONS = 1 << 24


class _Growing:
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
        return self._buffer.narrow(self.dim, 0, self.length)

    def append(self, new: Tensor) -> Tensor:
        end = self.length + new.shape[self.dim]
        if end > self._buffer.shape[self.dim]:
            self._start(torch.cat((self.view(), new), self.dim))
        else:
            self._buffer.narrow(self.dim, self.length, new.shape[self.dim]).copy_(new)
            self.length = end
        return self.view()

    def crop(self, length: int) -> None:
        self.length = length

    def select(self, rows: Tensor) -> None:
        self._start(self.view()[rows])


class _GrowingLayer(DynamicLayer):
    """A layer of keys and values that is appended to in place."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self._keys, self._values = _Growing(key_states, -2), _Growing(value_states, -2)
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


class PrefixMemo:
    """The last hidden states of prefixes under one model.

    Args:
        q_network: whose trunk is run, or another model of states.
        use_cache: whether to remember anything; without it, and with a recurrent trunk, every call runs over whole
            prefixes (the slow reference).
    """

    def __init__(self, q_network: StateModel, use_cache: bool = True) -> None:
        self.q_network = q_network
        self.use_cache = use_cache and not q_network.recurrent
        self.clear()

    def clear(self) -> None:
        """Forget everything; needed only after the network's weights change."""
        self._ids: _Growing | None = None
        self._hidden: _Growing | None = None
        self._cache: Cache | None = None

    @torch.inference_mode(False)  # what is kept must be writable in later calls, whatever mode they run in
    @torch.no_grad()
    def last_hidden(self, prefixes: Tensor) -> Tensor:
        """Hidden state after each prefix.

        Args:
            prefixes: `[B, T]` int64, `MASKED` at padding positions.

        Returns:
            `[B, hidden_size]`.
        """
        if not self.use_cache:
            self.clear()
            return self._encode(prefixes, 0)[:, -1]
        length = prefixes.shape[1]
        kept, parents = self._match(prefixes)
        if self._hidden is not None and kept == length:  # asked before: a roll-back in assisted decoding
            state = self._hidden.view()[:, length - 1]
            return state if parents is None else state[parents]
        copies = None
        if kept == 0 and len(prefixes) > 1:
            # the samples of a prompt, or its beams, begin alike: it is read once
            distinct, copies = prefixes.unique(dim=0, return_inverse=True)
            prefixes, copies = (distinct, copies) if len(distinct) < len(prefixes) else (prefixes, None)
        try:
            self._keep(kept, parents)
            new = self._encode(prefixes, kept)
        except BaseException:
            self.clear()  # a half-extended cache must not answer
            raise
        if self._ids is None or self._hidden is None:
            self._ids, self._hidden = _Growing(prefixes, 1), _Growing(new, 1)
        else:
            self._ids.append(prefixes[:, kept:])
            self._hidden.append(new)
        return new[:, -1] if copies is None else new[:, -1][copies]

    @torch.inference_mode(False)
    @torch.no_grad()
    def branch_states(self, prefixes: Tensor, tokens: Tensor, real: Tensor | None = None) -> Tensor:
        """The state after each of several next tokens of each prefix.

        All of them are read in one run, with the last token of each prefix where that is new. The tokens of a row read
        its prefix and themselves, not each other; what was kept of the prefixes is read where it is, and nothing of the
        tokens is kept. Models that cannot do so, and memos without a cache, read whole texts.

        Args:
            prefixes: as in `last_hidden`.
            tokens: `[B, K]` int64.
            real: `[B, K]` bool, which tokens are asked for; `None` for all. The others cost little or nothing.

        Returns:
            `[B, K, hidden_size]`; where a token was not asked for, anything.
        """
        model = cast(BranchingModel, self.q_network)
        real = torch.ones_like(tokens, dtype=torch.bool) if real is None else real
        if not self.use_cache or not model.branches:
            self.clear()
            rows, places = real.nonzero(as_tuple=True)
            ends = self._encode(torch.cat((prefixes[rows], tokens[rows, places, None]), 1), 0)[:, -1]
            return ends.new_zeros(*tokens.shape, ends.shape[-1]).index_put_((rows, places), ends)
        kept, parents = self._match(prefixes)
        if not 0 < kept >= prefixes.shape[1] - 1:
            self.last_hidden(prefixes)
            kept, parents = self._match(prefixes)
        assert self._cache is not None
        assert self._ids is not None
        assert self._hidden is not None
        try:
            if parents is not None or self._ids.length > kept:
                self._keep(kept, parents)
            text = prefixes != MASKED
            last = prefixes[:, kept:]
            new, total = last.shape[1], last.shape[1] + tokens.shape[1]
            apart = torch.eye(total, dtype=torch.bool, device=text.device).repeat(len(text), 1, 1)
            apart[:, new:, :new] = text[:, None, kept:]
            states = model.encode_branches(
                torch.cat((last, tokens), 1).clamp(0, self.q_network.config.vocab_size - 1),
                torch.cat((text[:, None, :kept].expand(-1, total, -1), apart), -1)[:, None],
                (text.cumsum(-1)[:, -1:] - (torch.arange(total, device=text.device) < new).long()).clamp_min(0),
                self._cache,
                torch.cat((torch.ones_like(last, dtype=torch.bool), real), 1),
            )
            for layer in self._cache.layers:
                assert isinstance(layer, _GrowingLayer)
                layer.keep(kept + new, None)
            if new:
                self._ids.append(last)
                self._hidden.append(states[:, :new])
        except BaseException:
            self.clear()
            raise
        return states[:, new:]

    def _match(self, prefixes: Tensor) -> tuple[int, Tensor | None]:
        """How many leading positions can be reused by all rows, and from which rows (`None`: each from its own)."""
        if self._ids is None or self._ids.view().device != prefixes.device:
            return 0, None
        seen = self._ids.view()
        shared = min(seen.shape[1], prefixes.shape[1])
        seen, wanted = seen[:, :shared], prefixes[:, :shared]
        if seen.shape[0] == wanted.shape[0] and torch.equal(seen, wanted):
            return shared, None
        common, parents = [], []
        for rows in wanted.split(max(1, _COMPARISONS // max(1, seen.numel()))):
            differs = rows[:, None] != seen[None]
            first = differs.to(torch.uint8).argmax(-1)
            best = torch.where(differs.any(-1), first, shared).max(-1)
            common.append(best.values)
            parents.append(best.indices)
        return int(torch.cat(common).min()), torch.cat(parents)

    def _keep(self, length: int, parents: Tensor | None) -> None:
        if length == 0 or self._ids is None or self._hidden is None or self._cache is None:
            self.clear()
            self._cache = Cache(layer_class_to_replicate=_GrowingLayer)
            return
        for tensor in (self._ids, self._hidden):
            tensor.crop(length)
            if parents is not None:
                tensor.select(parents)
        for layer in self._cache.layers:
            assert isinstance(layer, _GrowingLayer)
            layer.keep(length, parents)

    def _encode(self, prefixes: Tensor, start: int) -> Tensor:
        real = prefixes != MASKED
        mask = None if bool(real.all()) else real.long()
        ids = prefixes[:, start:].clamp(0, self.q_network.config.vocab_size - 1)
        return self.q_network.encode(ids, mask, self._cache)
