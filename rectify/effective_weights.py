"""The weights that a model computes with, by name: adapters folded in, offloaded and quantised ones brought here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from rectify.quiet_peft import BaseTunerLayer, ModulesToSaveWrapper
from rectify.trunk_states import own_precision

_QUANTIZED = {"Params4bit", "Int8Params"}  # by name, as bitsandbytes is imported for quantised models alone
_LEFT_OUT = {"pooler"}  # no part of a token's state, and drawn at random where a checkpoint lacks it
_WRAPPED = {"_orig_mod", "_checkpoint_wrapped_module"}


class Weight(NamedTuple):
    """One of a model's weights.

    Attributes:
        name: the same with an adapter around it and without.
        values: a float tensor; `None` where they are not here, or of a kind that is not known.
        shape: that of the weight before it was quantised.
        module: whose it is.
        exact: not restored from fewer bits.
        apart: a part of an adapter that is active and not folded in.
        folded: with an adapter folded in, so that half precision rounded it more than once.
    """

    name: str
    values: Tensor | None
    shape: tuple[int, ...]
    module: nn.Module
    exact: bool = True
    apart: bool = False
    folded: bool = False


def effective_weights(module: nn.Module, prefix: str = "") -> Iterator[Weight]:
    """Parameters and lasting float buffers of a model, as its forward pass uses them, one after another.

    A layer with an adapter counts with it folded in, or, where that cannot be done or would be rounded away, beside
    its parts. What is offloaded is brought here while it is asked for.

    Args:
        module: the body of a model.
        prefix: of the names.
    """
    inner = _without_adapter(module)
    if inner is not module:
        folded = isinstance(module, BaseTunerLayer) and bool(_present(module)) and not module.disable_adapters
        yield from (each._replace(folded=folded) for each in effective_weights(inner, prefix))
        return
    if isinstance(module, BaseTunerLayer):
        yield from effective_weights(module.get_base_layer(), prefix)
        for name, child in module.named_children():
            if name != "base_layer":
                yield from (each._replace(apart=True) for each in effective_weights(child, f"{prefix}{name}."))
        return
    with _here(module):
        lasting = [
            (name, each) for name, each in module._buffers.items() if name not in module._non_persistent_buffers_set
        ]
        for name, tensor in [*module._parameters.items(), *lasting]:
            if tensor is not None and (
                isinstance(tensor, nn.Parameter) or (tensor.is_floating_point() and tensor.ndim)
            ):
                yield _weight(module, f"{prefix}{name}", tensor)
    for name, child in module.named_children():
        if name not in _LEFT_OUT:
            yield from effective_weights(child, prefix if name in _WRAPPED else f"{prefix}{name}.")


def has_adapter(module: nn.Module) -> bool:
    """Whether layers of a model are wrapped by peft."""
    return any(isinstance(part, BaseTunerLayer | ModulesToSaveWrapper) for part in module.modules())


def _weight(module: nn.Module, name: str, tensor: Tensor) -> Weight:
    kind, shape = type(tensor).__name__, tuple(tensor.shape)
    if kind in _QUANTIZED:
        state = getattr(tensor, "quant_state", None)
        shape = shape if state is None else tuple(state.shape)
        return Weight(name, _dequantized(module, cast(Any, tensor)), shape, module, exact=False)
    # sharded, on no device, or of a quantised kind
    known = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and not hasattr(tensor, "ds_id")
    plain = known and tensor.is_floating_point() and tensor.element_size() > 1
    return Weight(name, tensor.detach() if plain else None, tuple(getattr(tensor, "ds_shape", shape)), module)


def _dequantized(module: nn.Module, tensor: Any) -> Tensor | None:
    if tensor.is_meta:
        return None
    if type(tensor).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return None if tensor.quant_state is None else cast(Tensor, dequantize_4bit(tensor.data, tensor.quant_state))
    scale = tensor.SCB if tensor.SCB is not None else getattr(getattr(module, "state", None), "SCB", None)
    return None if scale is None else cast(Tensor, tensor.data.float() * scale.view(-1, 1) / 127)


def _without_adapter(module: nn.Module) -> nn.Module:
    """The plain layer that computes what a layer with an adapter does; the layer itself where there is none."""
    if isinstance(module, ModulesToSaveWrapper):
        active = [name for name in module.active_adapters if name in module.modules_to_save]
        own = active and not module.disable_adapters
        return cast(nn.Module, module.modules_to_save[active[0]] if own else module.original_module)
    if not isinstance(module, BaseTunerLayer):
        return module
    if module.disable_adapters or module.merged or not _present(module):
        return module.get_base_layer()
    if any(type(each).__name__ in _QUANTIZED for each in module.get_base_layer().parameters()):
        return module
    try:
        merged: Any = deepcopy(module)
        with own_precision(next(merged.parameters()).device):
            merged.merge()
    except Exception:  # every kind that cannot be folded in has its own
        return module
    return cast(nn.Module, merged.get_base_layer())


def _present(layer: BaseTunerLayer) -> set[str]:
    """The adapters of a layer that are active."""
    return set(layer.active_adapters) & set(layer._get_available_adapters())


def _here(module: nn.Module) -> AbstractContextManager[Any]:
    if getattr(getattr(module, "_hf_hook", None), "offload", False):
        from accelerate.utils import align_module_device

        return cast(AbstractContextManager[Any], align_module_device(module))
    return nullcontext()
