"""One run of a causal trunk over the positions that its cache does not hold yet."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import Cache


def hidden_states(
    trunk: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, cache: Cache | None, takes_positions: bool
) -> Tensor:
    """Hidden states of the last positions.

    Args:
        trunk: a causal model without its output embedding.
        input_ids: `[B, T]` int64, the positions that `cache` does not hold yet.
        attention_mask: `[B, past + T]`, 0 at padding; `None` where nothing is padding. Positions are counted from the
            first real token, so padding on either side changes nothing.
        cache: extended in place.
        takes_positions: whether the trunk's forward has `position_ids`.

    Returns:
        `[B, T, hidden_size]` in the trunk's dtype.
    """
    arguments: dict[str, Any] = {"use_cache": False}
    if cache is not None:
        arguments = {"past_key_values": cache, "use_cache": True}
    if attention_mask is not None:
        arguments["attention_mask"] = attention_mask
        if takes_positions:
            positions = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
            arguments["position_ids"] = positions[:, -input_ids.shape[1] :]
    return trunk(input_ids=input_ids, **arguments).last_hidden_state
