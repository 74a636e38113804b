"""From gates to the weights with which adapters are blended: all of them, the best few, or the best one."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor
from torch.nn import functional as F

from rectify.errors import InvalidArgumentError

Routing = Literal["blend", "top_k", "top_1"]


def top_k(gates: Tensor, k: int) -> Tensor:
    """The `k` largest gates of each row, made to sum to 1, and 0 for the others; of equal gates, the first ones count.

    The published top-2 and top-3 routings give 1/k to each that is kept instead, whatever its gate.

    Args:
        gates: `[B, K]` in [0, 1], at least one of a row above 0.
        k: from 1 to K.

    Returns:
        `[B, K]`, of the same dtype.

    Raises:
        InvalidArgumentError: `k` is out of range.
    """
    if not 1 <= k <= gates.shape[-1]:
        raise InvalidArgumentError(f"k is {k}: give a number from 1 to {gates.shape[-1]}, that of the adapters")
    kept = gates.argsort(dim=-1, descending=True, stable=True)[:, :k]
    values = gates.gather(-1, kept)
    return gates.new_zeros(gates.shape).scatter(-1, kept, values / values.sum(-1, keepdim=True))


def top_1(gates: Tensor) -> Tensor:
    """1 for the largest gate of each row, the first of equal ones, and 0 for the others: `[B, K]` to `[B, K]`."""
    best = (gates == gates.amax(-1, keepdim=True)).int().argmax(-1)
    return F.one_hot(best, gates.shape[-1]).to(gates.dtype)


def route(gates: Tensor, routing: Routing, k: int) -> Tensor:
    """The weights of the adapters under a routing; see `top_k` and `top_1`, and `"blend"` for the gates as they are.

    Args:
        gates: `[B, K]` in [0, 1].
        routing: which.
        k: of `"top_k"`.

    Returns:
        `[B, K]`.

    Raises:
        InvalidArgumentError: there is no such routing, or `k` is out of range.
    """
    if routing not in get_args(Routing):
        raise InvalidArgumentError(f"routing is {routing!r}: give one of {', '.join(get_args(Routing))}")
    return gates if routing == "blend" else top_1(gates) if routing == "top_1" else top_k(gates, k)
