"""One run of a causal model over the positions that its cache does not hold yet, counted from the first real token."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from transformers import Cache


def takes_positions(model: nn.Module) -> bool:
    """Whether a model is told the positions of its tokens, as `position_ids`."""
    return "position_ids" in inspect.signature(model.forward).parameters


def positions_of(attention_mask: Tensor) -> Tensor:
    """`[B, T]` positions counted from the first real token, int64; padding before it has 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


def position_arguments(model: nn.Module, attention_mask: Tensor, count: int) -> dict[str, Tensor]:
    """The `position_ids` of the last `count` tokens under `[B, T]` 0 and 1, for a model that takes them."""
    return {"position_ids": positions_of(attention_mask)[:, -count:]} if takes_positions(model) else {}


def hidden_states(
    trunk: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, cache: Cache | None, positions: bool
) -> Tensor:
    """Hidden states of the last positions.

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
