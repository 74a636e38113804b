"""The states of a causal model's texts, in the form that it was seen to be able to give them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache


@dataclass(frozen=True)
class Abilities:
    """What holds of a causal trunk; `rectify.trunk_probe` finds it out.

    Attributes:
        caches: it keeps keys and values that grow by what it is fed, and can be cut back and rearranged; with them it
            gives the states of a run over the whole text.
        pads: padding on the left, told by a mask and positions, changes nothing, with a cache or without.
        batches: rows side by side have the states that each has alone.
        numbers: positions counted from 0, where it is told them, are those that it counts itself.
        rotation: how its positions depend on the length of the text.
    """

    caches: bool = False
    pads: bool = True
    batches: bool = True
    numbers: bool = True
    rotation: Rotation | None = None


@dataclass(frozen=True)
class Rotation:
    """Rotary positions that are made anew for long texts, so that the states of a short one are not its beginning's.

    Attributes:
        limit: the longest text in tokens that is rotated as the shortest.
        steady: all longer ones are rotated alike; otherwise each length has a rotation of its own.
    """

    limit: int
    steady: bool

    def same(self, shortest: int, longest: int) -> bool:
        """Whether texts of these lengths, and all between, are rotated alike."""
        return longest <= self.limit or (self.steady and shortest > self.limit)


def rotation_of(config: Any) -> Rotation | None:
    """How the positions of a model depend on the length of the text, by its configuration; `None` where they do not."""
    found = []
    context = getattr(config, "max_position_embeddings", None)
    for parameters in _rotary_parameters(config):
        kind = str(parameters.get("rope_type") or parameters.get("type"))
        before = parameters.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        if kind in ("longrope", "su"):
            found.append(Rotation(int(before or context or 0), True))
        elif "dynamic" in kind:
            # transformers does not go back to the first rotation for a text of exactly this length
            found.append(Rotation(int(context or before or 0) - 1, False))
    if getattr(config, "use_dynamic_ntk", False):
        found.append(Rotation(int(getattr(config, "seq_length", None) or context or 0) - 1, False))
    if not found:
        return None
    return Rotation(min(each.limit for each in found), len(set(found)) == 1 and found[0].steady)


def _rotary_parameters(config: Any) -> Iterator[dict[str, Any]]:
    waiting = [getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield one
            waiting += one.values()  # in some models each type of layer has its own


# ---------------------------------------------------------------------------------------------------------------------
# Positions and places


def takes_positions(model: nn.Module) -> bool:
    """Whether a model is told the positions of its tokens, as `position_ids`."""
    return "position_ids" in inspect.signature(model.forward).parameters


def positions_of(attention_mask: Tensor) -> Tensor:
    """`[B, T]` positions counted from the first real token, int64; padding before it has 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


def position_arguments(model: nn.Module, attention_mask: Tensor, count: int) -> dict[str, Tensor]:
    """The `position_ids` of the last `count` tokens under `[B, T]` 0 and 1, for a model that takes them."""
    return {"position_ids": positions_of(attention_mask)[:, -count:]} if takes_positions(model) else {}


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its token ids: by its input embedding, whose weights may be elsewhere while it rests."""
    embedding = _embedding(model)
    for module in (embedding, model, *model.modules()):
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", [hook]):
            device = getattr(each, "execution_device", None)
            if device is not None:
                return torch.device(device)
    weights = embedding if embedding is not None else model
    return next(weights.parameters(), torch.empty(0)).device


def own_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Within, weights on a device compute in their own precision, also where `torch.autocast` is on."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


@contextmanager
def weights_of(module: nn.Module) -> Iterator[Tensor]:
    """The weights of an embedding, which are fetched meanwhile if they are elsewhere while it rests."""
    weight = cast(Tensor, module.weight)
    if not weight.is_meta:
        yield weight
        return
    from accelerate.utils import align_module_device  # whoever has put them elsewhere has it

    with align_module_device(module):
        yield cast(Tensor, module.weight)


def _embedding(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


# ---------------------------------------------------------------------------------------------------------------------
# States


def hidden_states(
    trunk: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, cache: Cache | None, positions: bool
) -> Tensor:
    """Hidden states of the last positions, in one run.

    Args:
        trunk: a causal model without its output embedding.
        input_ids: `[B, T]` int64, the positions that `cache` does not hold yet.
        attention_mask: `[B, past + T]`, 0 at padding; `None` where nothing is padding. Positions are counted from the
            first real token, so padding on either side changes nothing.
        cache: extended in place.
        positions: whether the trunk takes them; asked once, as to look costs a part of a step.

    Returns:
        `[B, T, hidden_size]` in the trunk's dtype.
    """
    arguments: dict[str, Any] = {"use_cache": False}
    if cache is not None:
        arguments = {"past_key_values": cache, "use_cache": True}
    if attention_mask is not None:
        arguments["attention_mask"] = attention_mask
        if positions:
            arguments["position_ids"] = positions_of(attention_mask)[:, -input_ids.shape[1] :]
    return trunk(input_ids=input_ids, **arguments).last_hidden_state


def text_states(
    trunk: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, abilities: Abilities, positions: bool
) -> Tensor:
    """The state after each token of whole texts, which is that of the text as far as this token, read alone.

    Args:
        trunk, positions: as in `hidden_states`.
        input_ids: `[B, T]` int64.
        attention_mask: `[B, T]`, 0 at padding, which may stand anywhere; `None` where nothing is padding.
        abilities: of the trunk.

    Returns:
        `[B, T, hidden_size]`; at padding, anything.
    """
    rotation, (rows, length) = abilities.rotation, input_ids.shape
    if abilities.batches and (rotation is None or length <= rotation.limit):
        if attention_mask is None or abilities.pads:
            return hidden_states(trunk, input_ids, attention_mask, None, positions)
        # what is causal does not see what follows, so padding on the right need not be told
        order = attention_mask.argsort(dim=-1, descending=True, stable=True)
        states = hidden_states(trunk, input_ids.gather(-1, order), None, None, positions)
        return states.gather(1, order.argsort(dim=-1)[..., None].expand_as(states))
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    lengths = real.sum(-1)
    found: Tensor | None = None
    for count in lengths.unique().tolist():
        alike = (lengths == count).nonzero()[:, 0]
        for places in [alike] if abilities.batches else alike.split(1):
            if not count:
                continue
            states = _unpadded(trunk, input_ids[places][real[places]].view(-1, count), rotation, positions)
            found = states.new_zeros(rows, length, states.shape[-1]) if found is None else found
            row, column = real[places].nonzero(as_tuple=True)
            found = found.index_put((places[row], column), states.flatten(0, 1))
    return hidden_states(trunk, input_ids, None, None, positions) if found is None else found


def _unpadded(trunk: nn.Module, ids: Tensor, rotation: Rotation | None, positions: bool) -> Tensor:
    """`text_states` of texts of one length, all of which are read as far as there is a rotation for."""
    length = ids.shape[1]
    if rotation is None or length <= rotation.limit:
        return hidden_states(trunk, ids, None, None, positions)
    ends = [*([rotation.limit] if rotation.limit > 0 else []), length]
    if not rotation.steady:
        ends[-1:] = range(max(rotation.limit, 0) + 1, length + 1)
    parts, done = [], 0
    with kept_within(trunk):
        for end in ends:
            if not rotation.steady:  # that of a longer text would stay
                with torch.no_grad():
                    hidden_states(trunk, ids[:1, :1], None, None, positions)
            parts.append(hidden_states(trunk, ids[:, :end], None, None, positions)[:, done:])
            done = end
    return torch.cat(parts, 1)


@contextmanager
def kept_within(model: nn.Module) -> Iterator[None]:
    """Afterwards a model holds again what it keeps in itself of what it has read: its rotation, and recurrent states.

    Another text may be half read.
    """
    kept: list[tuple[nn.Module, dict[str, Any], dict[str, Tensor]]] = []
    for module in model.modules():
        plain = {
            name: each.clone() if isinstance(each, Tensor) else each
            for name, each in vars(module).items()
            if each is None or isinstance(each, Tensor) or name.endswith("max_seq_len_cached")
        }
        rotation = {
            name: each.clone()
            for name, each in module._buffers.items()
            if name.endswith("inv_freq") and each is not None
        }
        kept.append((module, plain, rotation))
    try:
        yield
    finally:
        for module, plain, rotation in kept:
            vars(module).update(plain)
            module._buffers.update(rotation)
