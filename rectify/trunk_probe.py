"""What a causal trunk was seen to do with a few tokens: whether its states may be kept, padded and read side by side.

Configurations do not say it, and kinds of models are many, so each trunk is tried once. One that is not causal is
refused; what another cannot do is not asked of it, and whole texts are run instead.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from rectify.context import context_length
from rectify.errors import InvalidArgumentError, first_line
from rectify.growing_cache import growing_cache, has_grown, keep
from rectify.trunk_states import (
    Abilities,
    hidden_states,
    input_device,
    own_precision,
    position_arguments,
    rotation_of,
    takes_positions,
)

_LENGTH, _SHARED, _PADDING = 12, 5, 3
_CLOSE = {torch.float64: 1e-4, torch.float32: 1e-4}  # of what a state ranges over
_CLOSE_IN_HALF = 0.1

_T = TypeVar("_T")
_lock = threading.RLock()
_known: weakref.WeakKeyDictionary[nn.Module, dict[tuple[object, str], Any]] = weakref.WeakKeyDictionary()


def abilities_of(trunk: nn.Module) -> Abilities:
    """What a trunk can do, tried the first time that it is asked for, and anew where its attention was exchanged.

    Args:
        trunk: a model without its output embedding; that of a `PeftModel` is tried.

    Raises:
        InvalidArgumentError: its states are not those of prefixes, so that nothing right can be made of them.
    """
    return tried(trunk, "abilities", lambda inner: _Probe(inner).abilities())


def own_cache_of(trunk: nn.Module) -> OwnCache:
    """What the cache holds that a model generates with; errors as of `abilities_of`."""
    return tried(trunk, "own cache", lambda inner: _Probe(inner).own_cache())


def tried(trunk: nn.Module, what: str, trial: Callable[[nn.Module], _T]) -> _T:
    """What a trial says of a trunk, which is made once for each kind of attention; the trunk is not changed by it."""
    inner: nn.Module = cast(Any, trunk).get_base_model() if hasattr(trunk, "get_base_model") else trunk
    key = getattr(inner.config, "_attn_implementation", None), what
    with _lock:
        known = _known.setdefault(inner, {})
        if key not in known:
            with undisturbed(inner):
                known[key] = trial(inner)
        return known[key]


@contextmanager
def undisturbed(trunk: nn.Module) -> Iterator[None]:
    """Within, a trunk is in evaluation mode and its own precision; afterwards all is as it was, random numbers too."""
    training = [module for module in trunk.modules() if module.training]
    trunk.eval()
    try:
        own = own_precision(input_device(trunk))
        with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]), own:
            yield
    finally:
        for module in training:
            module.training = True


def gap(found: Tensor, expected: Tensor) -> float:
    """How far `[B, T, H]` states are from others: of the worst of them the median over its features.

    Each feature is measured by what it ranges over, as a few of real models are a thousand times larger than the rest.
    """
    expected = expected.float()
    scale = expected.abs().flatten(0, -2).amax(0).clamp_min(1e-30)
    return float(((found.float() - expected).abs() / scale).median(-1).values.max())


def close_for(dtype: torch.dtype) -> float:
    """The largest `gap` of states that count as equal."""
    return _CLOSE.get(dtype, _CLOSE_IN_HALF)


def probe_texts(trunk: nn.Module, length: int, shared: int) -> Tensor:
    """Two texts of one beginning, `[2, length]` int64, of tokens without a meaning for the model."""
    config: Any = trunk.config
    own: Any = config.get_text_config()
    special = {
        each
        for one in (config, own)
        for name, value in vars(one).items()
        if name.endswith(("_id", "_ids", "_index"))
        for each in (value if isinstance(value, list | tuple) else [value])
    }
    weight = getattr(trunk.get_input_embeddings(), "weight", None)  # type: ignore[operator]
    sizes = [getattr(own, "vocab_size", None), None if weight is None else weight.shape[0]]
    size = min(each for each in sizes if isinstance(each, int))
    tokens = [token for token in range(size // 8, size) if token not in special] or [*range(size)]
    step = max(1, len(tokens) // (2 * length))
    first = [tokens[place * step % len(tokens)] for place in range(length)]
    second = first[:shared] + [tokens[(place + length) * step % len(tokens)] for place in range(shared, length)]
    return torch.tensor([first, second], device=input_device(trunk))


@dataclass(frozen=True)
class OwnCache:
    """What was seen of the cache that a model generates with.

    Attributes:
        steps: one token after the other gives the states of a run over the whole text, whatever is read in between.
        reorders: it does so after the rows were put into another order.
        pads: it does so with padding on the left.
    """

    steps: bool
    reorders: bool
    pads: bool


class _Probe:
    """Two texts of one beginning, and their states in a run of both."""

    def __init__(self, trunk: nn.Module) -> None:
        self.trunk, self.positions = trunk, takes_positions(trunk)
        self.config: Any = cast(Any, trunk).config.get_text_config()
        config = self.config
        self.rotation = rotation_of(config)
        bounds = [_LENGTH, context_length(config)]
        bounds += [self.rotation.limit] if self.rotation is not None else []
        self.length = min(bound for bound in bounds if isinstance(bound, int) and bound > 0)
        self.shared = min(_SHARED, max(1, self.length // 2))
        self.texts = probe_texts(trunk, self.length, self.shared)
        try:
            self.states = self._run(self.texts)
        except Exception as error:  # whatever a model raises that was made for something else
            raise self._refusal(f"it cannot be run over token ids alone ({first_line(error)})") from error
        if self.states.shape[:2] != self.texts.shape:
            raise self._refusal(
                f"it gives states of shape {tuple(self.states.shape)} for {tuple(self.texts.shape)} ids"
            )
        width = getattr(config, "hidden_size", self.states.shape[-1])
        if self.states.shape[-1] != width:
            raise self._refusal(f"they are {self.states.shape[-1]} wide, and its configuration says {width}")
        if not self.states.isfinite().all():
            raise self._refusal("its states are not finite numbers")
        self.close = close_for(self.states.dtype)

    def abilities(self) -> Abilities:
        beginnings = self.states[:, : self.shared]
        if not gap(beginnings[:1], beginnings[1:]) <= self.close / 5:
            raise self._refusal("it is not causal: two texts with one beginning have different states there")
        batches = self._holds(self._alone)
        if not batches and not self._holds(self._shorter):
            raise self._refusal("the states of its texts change with what follows them")
        numbers = self._holds(self._numbered)
        pads = batches and numbers and self._holds(self._padded)
        if batches and self.length > _PADDING + 3 and self._knows_places(numbers):
            if pads and self._holds(partial(self._kept, _PADDING)):
                return Abilities(caches=True, rotation=self.rotation)
            if self._holds(partial(self._kept, 0)):
                return Abilities(caches=True, pads=False, numbers=numbers, rotation=self.rotation)
        return Abilities(False, pads, batches, numbers, self.rotation)

    def _knows_places(self, numbers: bool, own: bool = False) -> bool:
        """Whether a cache tells where the next token stands, also after a padding token that is a part of the text.

        Some models count the tokens that are no padding. Those that may be told positions do not.
        """
        padding = getattr(self.config, "pad_token_id", None)
        if (self.positions and numbers) or not isinstance(padding, int) or not 0 <= padding < self.config.vocab_size:
            return True
        ids = self.texts.clone()
        ids[:, self.shared] = padding
        cache = DynamicCache(config=self.config) if own else growing_cache()
        name = self._cache_name() if own else "past_key_values"
        try:
            parts = [
                self.trunk(input_ids=part, use_cache=True, **{name: cache}).last_hidden_state
                for part in (ids[:, : self.shared], *ids[:, self.shared :].split(1, 1))
            ]
        except Exception:  # another trial says whether it keeps any
            return True
        return self._same(torch.cat(parts, 1), self._run(ids))

    def _cache_name(self) -> str:
        names = inspect.signature(self.trunk.forward).parameters
        return "past_key_values" if "past_key_values" in names else "cache_params"

    def own_cache(self) -> OwnCache:
        end = self.length - 2
        if not self._knows_places(self._holds(self._numbered), own=True):
            return OwnCache(False, False, False)
        for made in (True, False):
            if self._holds(partial(self._steps, made, end, _PADDING)):
                return OwnCache(True, True, True)
            if self._holds(partial(self._steps, made, None, 0)):
                reorders = self._holds(partial(self._steps, made, end, 0))
                return OwnCache(True, reorders, self._holds(partial(self._steps, made, None, _PADDING)))
        return OwnCache(False, False, False)

    def _steps(self, made: bool, reordered: int | None, padding: int) -> bool:
        """One token after the other with a cache that was `made` by `generate`, or is by the model.

        Another text is read in between: some models keep a part of what they have read in themselves.
        """
        name, cache = self._cache_name(), DynamicCache(config=self.config) if made else None
        ids, mask = self._shifted(padding)
        expected = torch.stack((self.states[0].roll(padding, 0), self.states[1]))
        real = mask.bool()[..., None]
        for end in range(self.shared, self.length + 1):
            begin = 0 if end == self.shared else end - 1
            if end == reordered:
                order = torch.tensor([1, 0], device=ids.device)
                cast(Any, cache).reorder_cache(order)
                ids, mask, real, expected = ids[order], mask[order], real[order], expected[order]
            arguments: dict[str, Any] = {name: cache}
            if padding:
                arguments |= {
                    "attention_mask": mask[:, :end],
                    **position_arguments(self.trunk, mask[:, :end], end - begin),
                }
            output = self.trunk(input_ids=ids[:, begin:end], use_cache=True, **arguments)
            cache = output[name] if cache is None else cache
            states = torch.where(real[:, begin:end], output.last_hidden_state, expected[:, begin:end])
            if not self._same(states, expected[:, begin:end]):
                return False
            if not begin:
                self._run(self.texts.flip(0, 1))
        return True

    def _holds(self, trial: Callable[[], bool]) -> bool:
        try:
            return trial()
        except Exception:  # a model may fail in any way at what it was not made for, and then it is not asked to
            return False

    def _same(self, found: Tensor, expected: Tensor) -> bool:
        return found.shape == expected.shape and gap(found, expected) <= self.close

    def _run(self, ids: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        return hidden_states(self.trunk, ids, mask, cache, self.positions)

    def _shorter(self) -> bool:
        return self._same(self._run(self.texts[:, :-1]), self.states[:, :-1])

    def _alone(self) -> bool:
        """A row by itself, and shorter."""
        return self._same(self._run(self.texts[1:, :-1]), self.states[1:, :-1])

    def _numbered(self) -> bool:
        """Told positions, without any padding."""
        return not self.positions or self._same(self._run(self.texts, torch.ones_like(self.texts)), self.states)

    def _padded(self) -> bool:
        ids, mask = self._shifted(_PADDING)
        states = self._run(ids, mask)
        end = self.length - _PADDING
        return self._same(states[:1, _PADDING:], self.states[:1, :end]) and self._same(states[1:], self.states[1:])

    def _kept(self, padding: int) -> bool:
        """A cache that is fed several tokens, one and several, cut back, put into another order and fed again."""
        ids, mask = self._shifted(padding)
        expected = torch.stack((self.states[0].roll(padding, 0), self.states[1]))
        cache, found = growing_cache(), []
        middle = _PADDING + (self.length - _PADDING) // 2
        for begin, end in ((0, middle), (middle, middle + 1), (middle + 1, self.length)):
            found.append(self._run(ids[:, begin:end], mask[:, :end] if padding else None, cache))
            if not has_grown(cache, end):
                return False
        states = torch.cat(found, 1)
        if not (self._same(states[:1, padding:], expected[:1, padding:]) and self._same(states[1:], expected[1:])):
            return False
        order = torch.tensor([1, 0, 1], device=ids.device)
        keep(cache, middle, order)
        again = self._run(ids[order, middle:], mask[order] if padding else None, cache)
        return has_grown(cache, self.length) and self._same(again, expected[order, middle:])

    def _shifted(self, padding: int) -> tuple[Tensor, Tensor]:
        """The texts, the first of them without its end and after some padding, in which any token may stand."""
        ids, mask = self.texts.clone(), torch.ones_like(self.texts)
        ids[0, padding:] = self.texts[0, : self.length - padding]
        ids[0, :padding], mask[0, :padding] = self.texts[0, -1], 0
        return ids, mask

    def _refusal(self, reason: str) -> InvalidArgumentError:
        return InvalidArgumentError(
            f"the trunk is a {type(self.trunk).__name__} whose states are not those of prefixes: {reason}; give a "
            "causal language model, such as GPT-2 or Llama"
        )
