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
from transformers import Cache

from rectify.growing_cache import Growing, growing_cache, has_grown, keep
from rectify.risk_model import BranchingModel, StateModel
from rectify.thread_lock import ThreadLock

MASKED = -1
"""Stands for a padding position in a prefix, whatever id is written there."""

_COMPARISONS = 1 << 24


class PrefixMemo:
    """The last hidden states of prefixes under one model.

    Args:
        q_network: whose trunk is run, or another model of states.
        use_cache: whether to remember anything; without it, and where the trunk was not seen to keep a cache, every
            call runs over whole prefixes (the slow reference).

    One call is answered at a time, whichever thread asks.

    Raises:
        InvalidArgumentError: the trunk is not causal.
    """

    def __init__(self, q_network: StateModel, use_cache: bool = True) -> None:
        self.q_network = q_network
        self.abilities = q_network.abilities
        self.use_cache = use_cache and self.abilities.caches
        self._lock = ThreadLock()
        self.clear()

    def clear(self) -> None:
        """Forget everything; needed only after the network's weights change."""
        with self._lock:
            self._ids: Growing | None = None
            self._hidden: Growing | None = None
            self._cache: Cache | None = None
            self._long = False  # whether what is kept was rotated as long texts are

    @torch.inference_mode(False)  # what is kept must be writable in later calls, whatever mode they run in
    @torch.no_grad()
    def last_hidden(self, prefixes: Tensor) -> Tensor:
        """Hidden state after each prefix.

        Args:
            prefixes: `[B, T]` int64, `MASKED` at padding positions, which may stand anywhere.

        Returns:
            `[B, hidden_size]`.
        """
        prefixes, padded = _padded_on_the_left(prefixes)
        with self._lock:
            if not self._may_keep(prefixes, padded):
                return self._whole(prefixes, padded)
            return self._kept_hidden(prefixes, padded)

    def _kept_hidden(self, prefixes: Tensor, padded: bool) -> Tensor:
        length = prefixes.shape[1]
        kept, parents = self._match(prefixes)
        if self._hidden is not None and kept == length:  # asked before: a roll-back in assisted decoding
            state = self._hidden.view()[:, length - 1]
            return state.clone() if parents is None else state[parents]
        asked, copies = prefixes, None
        if kept == 0 and len(prefixes) > 1:
            # the samples of a prompt, or its beams, begin alike: it is read once
            distinct, copies = prefixes.unique(dim=0, return_inverse=True)
            prefixes, copies = (distinct, copies) if len(distinct) < len(prefixes) else (prefixes, None)
        try:
            cache = self._keep(kept, parents)
            new = self._encode(prefixes, padded, kept, cache)
        except BaseException:
            self.clear()  # a half-extended cache must not answer
            raise
        if not has_grown(cache, length):  # the model keeps its states in another way after all
            self.use_cache = False
            return self._whole(asked, padded)
        if self._ids is None or self._hidden is None:
            self._ids, self._hidden = Growing(prefixes, 1), Growing(new, 1)
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
        prefixes, padded = _padded_on_the_left(prefixes)
        with self._lock:
            if self.use_cache and model.branches and self._may_keep(prefixes, padded, more=1):
                return self._kept_branches(model, prefixes, padded, tokens, real)
            rows, places = real.nonzero(as_tuple=True)
            ends = self._whole(torch.cat((prefixes[rows], tokens[rows, places, None]), 1), padded)
            return ends.new_zeros(*tokens.shape, ends.shape[-1]).index_put_((rows, places), ends)

    def _kept_branches(
        self, model: BranchingModel, prefixes: Tensor, padded: bool, tokens: Tensor, real: Tensor
    ) -> Tensor:
        kept, parents = self._match(prefixes)
        if not 0 < kept >= prefixes.shape[1] - 1:
            self._kept_hidden(prefixes, padded)
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
            keep(self._cache, kept + new)
            if new:
                self._ids.append(last)
                self._hidden.append(states[:, :new])
        except BaseException:
            self.clear()
            raise
        return states[:, new:]

    def _may_keep(self, prefixes: Tensor, padded: bool, more: int = 0) -> bool:
        """Whether what is kept may answer, of a text that is `more` tokens longer; else it is forgotten."""
        may = self.use_cache and (self.abilities.pads or not padded)
        rotation = self.abilities.rotation
        if may and rotation is not None:
            lengths = (prefixes != MASKED).sum(-1)
            shortest, longest = int(lengths.min()), int(lengths.max())
            may = rotation.same(shortest, longest) and rotation.same(shortest, longest + more)
            if self._long != (longest > rotation.limit):
                self.clear()
                self._long = longest > rotation.limit
        if not may:
            self.clear()
        return may

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

    def _keep(self, length: int, parents: Tensor | None) -> Cache:
        if length == 0 or self._ids is None or self._hidden is None or self._cache is None:
            self._ids = self._hidden = None
            self._cache = growing_cache()
            return self._cache
        for tensor in (self._ids, self._hidden):
            tensor.crop(length)
            if parents is not None:
                tensor.select(parents)
        keep(self._cache, length, parents)
        return self._cache

    def _whole(self, prefixes: Tensor, padded: bool) -> Tensor:
        self.clear()
        return self._encode(prefixes, padded, 0, None)[:, -1]

    def _encode(self, prefixes: Tensor, padded: bool, start: int, cache: Cache | None) -> Tensor:
        mask = (prefixes != MASKED).long() if padded else None
        ids = prefixes[:, start:].clamp(0, self.q_network.config.vocab_size - 1)
        return self.q_network.encode(ids, mask, cache)


def _padded_on_the_left(prefixes: Tensor) -> tuple[Tensor, bool]:
    """The same tokens after their padding, so that no window or recurrence runs over it; and whether there is any."""
    real = prefixes != MASKED
    if bool(real.all()):
        return prefixes, False
    if bool((real[:, :-1] & ~real[:, 1:]).any()):
        prefixes = prefixes.gather(-1, real.to(torch.uint8).argsort(dim=-1, stable=True))
    return prefixes, True
