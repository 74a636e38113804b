"""The configuration of a peft adapter: read as a stranger's file, before any of it reaches peft."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rectify.errors import CheckpointError, first_line
from rectify.saved_config import read_object
from rectify.saved_weights import weight_shapes

if TYPE_CHECKING:
    from rectify.quiet_peft import PeftConfig

ADAPTER_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_RUNS_OR_READS = {
    "megatron_config": "imports a module of a name",
    "tokenizer_name_or_path": "loads a tokenizer",
    "tokenizer_kwargs": "loads a tokenizer",
    "prompt_tuning_init_state_dict_path": "reads a file",
    "corda_config": "reads a file",
    "lora_ga_config": "reads a file",
    "adapters": "loads other adapters",
}
_LEAST_WIDTH = 4096
_SIZES = ("r", "num_virtual_tokens", "encoder_hidden_size", "token_dim", "num_layers", "adapter_len")


def read_adapter_config(folder: Path) -> PeftConfig:
    """The configuration of an adapter in a folder.

    Raises:
        CheckpointError: there is none, it is damaged, or it has peft import modules or read other files.
    """
    from rectify.quiet_peft import PeftConfig  # which takes its time, and most models have no adapter

    path = folder / ADAPTER_FILE
    values = read_object(path, "give a folder of an adapter with its configuration")
    for name, what in _RUNS_OR_READS.items():
        if values.get(name):
            raise _unusable(path, f"{name} is set, which {what}")
    values.pop("auto_mapping", None)  # a class to import by name, which is not needed where the model is at hand
    values.pop("runtime_config", None)
    _check_values(path, values)
    try:
        return PeftConfig.from_peft_type(**PeftConfig.check_kwargs(**values))
    except Exception as error:  # whatever a damaged file makes of another library
        raise _unusable(path, first_line(error)) from error


def check_adapter_sizes(folder: Path, adapter: PeftConfig) -> None:
    """Refuse the configuration of an adapter that is far larger than its weights, before it fills memory.

    Raises:
        CheckpointError: it is, or there are no usable weights.
    """
    shapes = weight_shapes(folder / WEIGHTS_FILE)
    widest = max(_LEAST_WIDTH, *(max(shape, default=1) for shape in shapes.values()))
    sizes = {name: getattr(adapter, name, None) for name in _SIZES}
    sizes |= {f"rank_pattern of {name}": rank for name, rank in (getattr(adapter, "rank_pattern", None) or {}).items()}
    for name, size in sizes.items():
        if size is not None and size > widest:
            raise _unusable(folder / ADAPTER_FILE, f"{name} is {size}, and none of the weights is so large")


def _check_values(path: Path, values: dict[str, Any]) -> None:
    if not isinstance(values.get("peft_type"), str):
        raise _unusable(path, f"peft_type is {values.get('peft_type')!r}, not a string")
    for name in _SIZES:
        size = values.get(name)
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or not 0 <= size < 2**31):
            raise _unusable(path, f"{name} is {size!r}, not a whole number from 0 on")
    for name, least, most in (("lora_alpha", 0.0, 1e6), ("alpha", 0.0, 1e6), ("lora_dropout", -1.0, 1.0)):
        if values.get(name) is not None and not _within(values[name], least, most):
            raise _unusable(
                path, f"{name} is {values[name]!r}, not a number above {max(least, 0):g} and below {most:g}"
            )
    for name in ("target_modules", "modules_to_save", "exclude_modules"):
        value = values.get(name)
        if not (value is None or isinstance(value, str)) and not (
            isinstance(value, list) and all(isinstance(each, str) for each in value)
        ):
            raise _unusable(path, f"{name} is {value!r}, not a list of names")
    for name, least in (("rank_pattern", 1.0), ("alpha_pattern", 0.0)):
        value = values.get(name) or {}
        if not isinstance(value, dict) or not all(_within(each, least - 1e-9, 1e6) for each in value.values()):
            raise _unusable(path, f"{name} is {value!r}, not an object of numbers above 0")


def _within(value: Any, above: float, below: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value) and above < value < below
    except OverflowError:
        return False


def _unusable(path: Path, reason: str) -> CheckpointError:
    reason = " ".join(reason.split())
    reason = reason if len(reason) <= 300 else f"{reason[:297]}..."
    return CheckpointError(f"{str(path)!r} cannot be used ({reason}): put back the file that was written")
