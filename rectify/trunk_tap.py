"""The generating model's own hidden states, caught while it computes its logits: what makes a shared trunk free."""

from __future__ import annotations

import inspect
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.generation.candidate_generator import CandidateGenerator

from rectify.causal_body import causal_body, is_body_of
from rectify.errors import InvalidArgumentError
from rectify.prefix_memo import MASKED, PrefixMemo
from rectify.risk_model import RiskModel
from rectify.thread_lock import ThreadLocal, ThreadLock
from rectify.trunk_probe import own_cache_of
from rectify.trunk_states import Abilities, kept_within, positions_of

_WIDTH = 64  # features of a recurrent state
_KEY_WIDTH = 2  # features of a key, at each position


@dataclass
class _Reading:
    """What was read with one cache, and the last states of it.

    Attributes:
        number: readings are counted; the last one has the largest.
        thread: that ran the model.
        text: `[B, end]` ids; those of a prompt of embeddings are anything.
        embedded: how many positions these are.
        real: `[B, end]` bool, False at padding; `None` where there is none.
        sound: whether the text is known to be what the cache holds; a bool, or a tensor of one, so that no accelerator
            is waited for.
        hidden: `[B, T, H]`, of the last T positions.
        rows: what the cache held of each row afterwards; see `_rows_of`.
    """

    number: int
    thread: int
    text: Tensor
    embedded: int
    real: Tensor | None
    sound: Tensor | bool
    hidden: Tensor
    rows: Tensor | None = None

    def last_hidden(self, prefixes: Tensor, abilities: Abilities) -> Tensor | None:
        """The state after each prefix, `[B, H]`; `None` where it is not certain that these were read."""
        end = self.text.shape[1]
        asked = self.embedded + prefixes.shape[1]
        place = asked - end + self.hidden.shape[1] - 1
        if len(prefixes) != len(self.text) or not 0 <= place < self.hidden.shape[1] or self.sound is False:
            return None
        if abilities.rotation is not None and end > abilities.rotation.limit:
            return None
        seen, alike = self.text[:, self.embedded : asked], self.sound
        if self.real is not None:
            seen = seen.masked_fill(~self.real[:, self.embedded : asked], MASKED)  # whatever is written there
            # a text that ends in padding has the state of its own last token
            alike = alike & (self.real if not abilities.pads else self.real[:, asked - 1]).all()
        alike = (seen == prefixes.to(seen.device)).all() & alike
        return self.hidden[:, place] if bool(alike) else None


@dataclass(frozen=True)
class _Begun:
    """A run of the trunk that has not ended: what its cache held before."""

    before: _Reading | None
    past: int | None
    rows: Tensor | None


class TrunkTap:
    """The last hidden states of prefixes under a Q network whose trunk is the generating model itself.

    Hooks on the model's trunk catch its states, those that the Q network was trained on, and which ids they belong to:
    for each cache, and so each text under way, apart. Where it is not certain that they belong to the prefixes that are
    asked for, the trunk is run over these, so that the answer is a function of the prefix.

    Args:
        q_network: a network with a shared trunk.
        model: the causal model whose trunk it is.
        use_cache: for the prefixes that the model has not just read; see `PrefixMemo`.

    Raises:
        InvalidArgumentError: the model has no output embedding, or is not causal.
    """

    def __init__(self, q_network: RiskModel, model: PreTrainedModel, use_cache: bool = True) -> None:
        self.trunk = causal_body(model)
        self._fallback = PrefixMemo(q_network, use_cache)
        self._own_cache = own_cache_of(self.trunk)
        if not isinstance(model.get_output_embeddings(), nn.Module):
            raise InvalidArgumentError(
                f"model is a {type(model).__name__}, without an output embedding: give a causal one"
            )
        self._names = [*inspect.signature(self.trunk.forward).parameters]
        self._tuned: Any = next(filter(_is_tuned, self.trunk.modules()), None)
        self._setting = self._now()
        self._runs = 0
        self._local = ThreadLocal()
        self._lock = ThreadLock()
        self.clear()
        # the model outlives the tap, and must not keep it alive; a copy of the model has a copy of its hooks
        tap = weakref.ref(self)

        def before_trunk(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if (alive := tap()) is not None and module is alive.trunk and not torch.compiler.is_compiling():
                alive._begin(args, kwargs)

        def after_trunk(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if (alive := tap()) is not None and module is alive.trunk:
                if torch.compiler.is_compiling():  # this becomes a part of the compiled model
                    alive._compiled = (args, kwargs, output)
                else:
                    alive._end(args, kwargs, output)

        for handle in (
            self.trunk.register_forward_pre_hook(before_trunk, with_kwargs=True),
            self.trunk.register_forward_hook(after_trunk, with_kwargs=True),
        ):
            weakref.finalize(self, handle.remove)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._readings: weakref.WeakKeyDictionary[Cache, _Reading] = weakref.WeakKeyDictionary()
        self._local.last = None
        self._compiled: tuple[tuple[Any, ...], dict[str, Any], Any] | None = None
        self._fallback.clear()

    def last_hidden(self, prefixes: Tensor) -> Tensor | None:
        """Hidden state after each prefix.

        Args:
            prefixes: `[B, T]` int64, `MASKED` at padding positions.

        Returns:
            `[B, hidden_size]`; `None` where a draft is made, as in assisted decoding, whose scores are another model's.

        Raises:
            InvalidArgumentError: another model's `generate` asks.
        """
        self._end_compiled()
        for place, reading in enumerate(self._of_this_thread()):
            if reading.embedded and place:  # its prompt is not known, so another text may have the same tokens
                continue
            state = reading.last_hidden(prefixes, self._fallback.abilities)
            if state is not None:
                return state
        asking = _asking()
        if isinstance(asking, CandidateGenerator):
            return None
        if asking is not None and not is_body_of(self.trunk, asking):
            raise InvalidArgumentError(
                f"the processor is bound to another {type(self.trunk).__name__} than the model that generates: make "
                "one with from_pretrained(..., model=model) for each model"
            )
        if not prefixes.shape[1]:
            raise InvalidArgumentError("input_ids are empty, and the model has not been run: run it first")
        with self._unwatched():
            if self._own_cache.steps:
                return self._fallback.last_hidden(prefixes)
            with kept_within(self.trunk):
                return self._fallback.last_hidden(prefixes)

    def _of_this_thread(self) -> list[_Reading]:
        """The latest first."""
        with self._lock:
            readings = [*self._readings.values()]
        last = getattr(self._local, "last", None)  # its cache may be gone, or there was none
        if last is not None and all(each is not last for each in readings):
            readings.append(last)
        mine = threading.get_ident()
        return sorted((each for each in readings if each.thread == mine), key=lambda each: -each.number)

    @contextmanager
    def _unwatched(self) -> Iterator[None]:
        self._local.unwatched = True
        try:
            yield
        finally:
            self._local.unwatched = False

    # -----------------------------------------------------------------------------------------------------------------
    # What the model reads

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._local.begun = None
        if getattr(self._local, "unwatched", False):
            return
        cache = self._cache_of(self._given(args, kwargs))
        with self._lock:
            before = None if cache is None else self._readings.pop(cache, None)
        if self._now() != self._setting:  # other layers, or another adapter: not the states that are meant
            return
        past = 0 if cache is None else _length(cache, before)
        rows = None if cache is None or not past else _rows_of(cache, past)
        self._local.begun = _Begun(before, past, rows)

    def _end_compiled(self) -> None:
        """Take what a compiled model has left; what its cache held before is still there, where it has kept all."""
        if self._compiled is None:
            return
        (args, kwargs, output), self._compiled = self._compiled, None
        given = self._given(args, kwargs)
        cache, fed = self._cache_of(given), given.get("input_ids")
        if cache is None or not isinstance(fed, Tensor):
            return
        end = _length(cache, None)
        with self._lock:
            before = self._readings.pop(cache, None)
        if end is not None and end >= fed.shape[1] and _keeps_all(cache, end) and self._now() == self._setting:
            past = end - fed.shape[1]
            self._local.begun = _Begun(before, past, _rows_of(cache, past) if past else None)
            self._end(args, kwargs, output)

    def _end(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._compiled = None
        begun: _Begun | None = getattr(self._local, "begun", None)
        self._local.begun = self._local.last = None
        if begun is None or begun.past is None:
            return
        given = self._given(args, kwargs)
        ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
        hidden = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
        fed = ids if isinstance(ids, Tensor) else embeddings
        if not isinstance(hidden, Tensor) or not isinstance(fed, Tensor) or hidden.shape[:2] != fed.shape[:2]:
            return
        reading = self._reading(begun, given, fed, None if fed is embeddings else ids, hidden.detach())
        if reading is None:
            return
        cache = self._cache_of(given) or getattr(output, "past_key_values", None)
        if isinstance(cache, Cache):
            reading.rows = _rows_of(cache, reading.text.shape[1])
            with self._lock:
                self._readings[cache] = reading
        self._local.last = reading

    def _reading(
        self, begun: _Begun, given: dict[str, Any], fed: Tensor, ids: Tensor | None, hidden: Tensor
    ) -> _Reading | None:
        past, count = cast(int, begun.past), fed.shape[1]
        new = fed.new_zeros(fed.shape[:2], dtype=torch.long) if ids is None else ids.detach()
        embedded, text, sound, known = 0, new, cast("Tensor | bool", True), None
        if past:
            before = begun.before
            if before is None or before.text.shape[1] < past:
                return None
            text, known = before.text[:, :past], before.real
            sound = before.sound if self._own_cache.steps else False
            embedded = before.embedded
            rows, same = _origin(before, begun.rows, past, len(new))
            sound = sound & same
            if rows is not None and not self._own_cache.reorders:
                sound = sound & (rows == torch.arange(len(rows), device=rows.device)).all()
            if sound is False:
                return None
            if rows is not None:
                text = text[rows]
                known = None if known is None else known[rows]
            text = torch.cat((text, new), 1)
        if ids is None:
            if embedded < past:  # embeddings after tokens
                return None
            embedded = past + count
        real = _real(given.get("attention_mask"), len(new), past + count)
        if real is False:
            return None
        mask = real if isinstance(real, Tensor) else None
        if past and (known is not None or mask is not None):
            ones = torch.ones_like(text[:, :past], dtype=torch.bool)
            held = ones if known is None else known[:, :past]
            sound = sound & ((ones if mask is None else mask[:, :past]) == held).all()
        if past and mask is not None and not self._own_cache.pads:
            sound = sound & mask.all()
        sound = sound & self._positions_agree(given.get("position_ids"), mask, past, count)
        self._runs += 1
        return _Reading(self._runs, threading.get_ident(), text, embedded, mask, sound, hidden)

    def _positions_agree(self, told: Any, mask: Tensor | None, past: int, count: int) -> Tensor | bool:
        """Whether the positions are those that the Q network's own runs have."""
        if not isinstance(told, Tensor):  # counted by the model, which does not know of padding
            return mask is None or "position_ids" not in self._names or mask.all()
        if not self._fallback.abilities.numbers:
            return False
        if told.ndim != 2:  # of a picture's rows and columns too
            return True
        if mask is None:
            return (told == torch.arange(past, past + count, device=told.device)).all()
        return ((told == positions_of(mask)[:, -count:]) | ~mask[:, -count:]).all()

    def _now(self) -> tuple[Any, ...]:
        """What can be switched between two runs: how many layers are run, and with which adapters."""
        layers = getattr(self.trunk.config.get_text_config(), "num_hidden_layers", None)
        if self._tuned is None:
            return (layers,)
        return layers, self._tuned.disable_adapters, tuple(self._tuned.active_adapters)

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self._names, args, strict=False)), **kwargs} if args else kwargs

    @staticmethod
    def _cache_of(given: dict[str, Any]) -> Cache | None:
        cache = given.get("past_key_values")
        cache = given.get("cache_params") if cache is None else cache
        return cache if isinstance(cache, Cache) else None


def _is_tuned(module: nn.Module) -> bool:
    """Whether a module is one that peft has put an adapter around."""
    return hasattr(module, "active_adapters") and isinstance(getattr(module, "disable_adapters", None), bool)


def _length(cache: Cache, before: _Reading | None) -> int | None:
    """How many positions a cache holds; `None` where that cannot be told."""
    try:
        return int(cache.get_seq_length())
    except ValueError:  # a recurrent model's does not count
        try:
            held = cache.has_previous_state()
        except ValueError:
            return None
        if not held:
            return 0
        return None if before is None else before.text.shape[1]


def _layers(cache: Cache) -> list[Any]:
    """The layers of the decoder, where others' are kept as well."""
    return getattr(getattr(cache, "self_attention_cache", cache), "layers", [])


def _keeps_all(cache: Cache, length: int) -> bool:
    keys = [getattr(layer, "keys", None) for layer in _layers(cache)]
    return bool(keys) and all(isinstance(each, Tensor) and each.ndim == 4 and each.shape[-2] >= length for each in keys)


def _rows_of(cache: Cache, length: int) -> Tensor | None:
    """Some numbers of each row of a cache that holds `length` positions, `[B, N]`, by which rows can be told apart.

    They are of the last layer that keeps anything, whose numbers depend on all that was read before them. `None` where
    they cannot be found, and of a single row.
    """
    for layer in reversed(_layers(cache)):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and keys.ndim == 4 and keys.numel():
            if len(keys) == 1:
                return None
            some = keys[:, 0, : min(length, keys.shape[-2]), :_KEY_WIDTH]
            return some.clone(memory_format=torch.contiguous_format).flatten(1)
        for name in ("recurrent_states", "conv_states"):
            states = getattr(layer, name, None)
            for state in reversed([*states.values()]) if isinstance(states, dict) else [states]:
                if isinstance(state, Tensor) and state.numel():
                    return state.flatten(1)[:, -_WIDTH:].clone()
    return None


def _origin(before: _Reading, rows: Tensor | None, past: int, count: int) -> tuple[Tensor | None, Tensor | bool]:
    """Which row of a reading each row of its cache is now (`None`: its own), and whether that is certain."""
    if len(before.text) == 1:  # which can only have been repeated
        return (None if count == 1 else before.text.new_zeros(count)), True
    held, end = before.rows, before.text.shape[1]
    if held is not None and rows is not None and past < end and held.shape[1] == end * _KEY_WIDTH:
        held = held[:, : past * _KEY_WIDTH]  # the cache was cut back
    if held is None or rows is None or held.shape[1] != rows.shape[1]:
        return None, False
    if len(rows) != count:
        return None, False
    if rows.device.type == "cpu" and torch.equal(held, rows):
        return None, True
    same = torch.stack([(row == held).all(-1) for row in rows])
    return same.to(torch.uint8).argmax(-1).to(before.text.device), same.any(-1).all()


def _real(mask: Any, rows: int, length: int) -> Tensor | bool:
    """Where the text is by an attention mask of any form, `[B, T]` bool; True for everywhere, False where unclear."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None) if len(mask) == 1 else False)
    if mask is None:
        return True
    if not isinstance(mask, Tensor) or mask.shape[-1] < length:
        return False
    if mask.ndim == 4:
        last = mask[:, 0, -1]
        mask = last if last.dtype == torch.bool else last == 0
    elif mask.ndim != 2:
        return False
    return mask[:, :length].bool().expand(rows, -1)


def _asking() -> PreTrainedModel | CandidateGenerator | None:
    """Whose scores are being processed: those of the innermost `generate` under way, or of a draft for a model's."""
    model, frame = None, sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in ("generate", "get_candidates"):
            owner = frame.f_locals.get("self")
            if isinstance(owner, CandidateGenerator):
                return owner
            if model is None and isinstance(owner, PreTrainedModel):
                model = owner
        frame = cast(Any, frame.f_back)
    return model
