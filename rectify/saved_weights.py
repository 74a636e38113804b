"""Weights that are saved in a folder: of safetensors alone, all there, of the right shape, and finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from rectify.errors import CheckpointError, first_line

_FLOATS = {"F64", "F32", "F16", "BF16"}
_FLOAT4 = {getattr(torch, "float4_e2m1fn_x2", None)}  # two in a byte, and none that is not finite


def read_weights(
    path: Path, shapes: Mapping[str, Sequence[int]] | None = None, *, floats: bool = True, finite: bool = True
) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Args:
        path: the file.
        shapes: of the tensors that are to be there, no fewer and no more; `None` for whatever is there.
        floats: refuse what is of another type.
        finite: refuse what is not finite.

    Raises:
        CheckpointError: there is no such file, it is no whole safetensors file, or a tensor is missing, one too many,
            of another shape, of no float type, or not finite; the message names file and tensor.
    """
    found = weight_shapes(path, floats)
    if shapes is not None:
        if missing := shapes.keys() - found.keys():
            raise _unusable(path, f"it lacks {min(missing)!r}")
        if extra := found.keys() - shapes.keys():
            raise _unusable(path, f"it holds {min(extra)!r}, which has no place")
        for name, shape in shapes.items():
            if found[name] != tuple(shape):
                raise _unusable(path, f"{name!r} is of shape {found[name]}, not {tuple(shape)}")
    try:
        weights = load_file(path)
    except Exception as error:  # whatever a damaged file makes of another library
        raise _unusable(path, first_line(error)) from error
    if finite:
        for name, weight in weights.items():
            if not all_finite(weight):
                raise _unusable(path, f"{name!r} holds NaN or infinity")
    return weights


def weight_shapes(path: Path, floats: bool = True) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a safetensors file, by its header alone.

    Raises:
        CheckpointError: see `read_weights`.
    """
    try:
        if not path.exists():
            raise CheckpointError(f"{str(path.parent)!r} holds no {path.name}: is it complete?")
        if not path.is_file():  # to read from a device or a pipe might never end
            raise _unusable(path, "it is no file")
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            types = {name: part.get_dtype() for name, part in slices.items()}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged file makes of another library
        raise _unusable(path, first_line(error)) from error
    if not shapes:
        raise _unusable(path, "it holds no weights")
    for name, dtype in types.items():
        if floats and dtype not in _FLOATS:
            raise _unusable(path, f"{name!r} is of type {dtype}, not of floats")
    return shapes


def shapes_of(make: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """The shapes of a module's weights, by name; none of its memory is taken, however large it says it is.

    Args:
        make: makes the module.

    Raises:
        CheckpointError: no module can be so large.
    """
    try:
        with torch.device("meta"):
            return {name: tuple(weight.shape) for name, weight in make().state_dict().items()}
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:
        raise CheckpointError(
            f"no module is of such a size ({first_line(error)}): put back its configuration"
        ) from error


def fill(module: nn.Module, path: Path) -> None:
    """Load a module's weights from a file that holds just them.

    Raises:
        CheckpointError: see `read_weights`.
    """
    module.load_state_dict(
        read_weights(path, {name: tuple(weight.shape) for name, weight in module.state_dict().items()})
    )


def all_finite(weight: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinities; of what is not here, or is no float, nothing is said."""
    if weight.is_meta or not weight.is_floating_point() or not weight.numel() or weight.dtype in _FLOAT4:
        return True
    if weight.element_size() == 1:  # float8, of which torch tells neither least nor greatest
        weight = weight.bfloat16()
    low, high = weight.detach().aminmax()  # in one pass, without a copy; NaN comes through
    return bool(low.isfinite() & high.isfinite())


def check_finite(module: nn.Module, what: str) -> None:
    """Refuse a model whose parameters are not all finite.

    Args:
        module: it.
        what: a message calls it.

    Raises:
        CheckpointError: one is not.
    """
    for name, parameter in module.named_parameters():
        if not all_finite(parameter):
            raise CheckpointError(
                f"{what} has weights {name!r} that hold NaN or infinity: put back those that were trained"
            )


def _unusable(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{str(path)!r} cannot be used ({reason}): put back the file that was written")
