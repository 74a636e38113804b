"""LoRA adapters of any backbone: made, saved beside a head, and loaded again without a look-up on the Hub."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import cast

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from rectify.adapter_config import ADAPTER_FILE, WEIGHTS_FILE, check_adapter_sizes, read_adapter_config
from rectify.errors import CheckpointError, InvalidArgumentError, first_line
from rectify.quiet import quiet_loading, without_bitsandbytes
from rectify.quiet_peft import (
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from rectify.saved_weights import read_weights

__all__ = [
    "ADAPTER_FILE",
    "WEIGHTS_FILE",
    "add_adapter",
    "load_adapter",
    "load_any_adapter",
    "put_adapter",
    "read_adapter",
    "save_adapter",
]


def add_adapter(
    model: PreTrainedModel,
    name: str,
    *,
    task_type: TaskType,
    lora_r: int,
    lora_alpha: int,
    lora_dropout: float,
    target_modules: str | Sequence[str],
    modules_to_save: Sequence[str] | None = None,
) -> PeftModel:
    """Freeze a model and put a LoRA adapter into it, drawn from torch's random generator.

    Args:
        model: changed in place.
        name: what a message calls it.
        task_type: what peft is to make of it.
        lora_r, lora_alpha, lora_dropout: rank, scale and dropout of the adapter.
        target_modules: ends of the names of the modules that are adapted, or a pattern of them; `"all-linear"`, also in
            a list, for all linear ones.
        modules_to_save: modules that are trained and saved whole.

    Raises:
        InvalidArgumentError: a setting makes no adapter of this model.
    """
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    try:
        adapter = LoraConfig(
            r=lora_r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            modules_to_save=None if modules_to_save is None else list(modules_to_save),
            task_type=task_type,
        )
        with quiet_loading(), without_bitsandbytes():
            return cast(PeftModel, get_peft_model(model, adapter))
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise InvalidArgumentError(
            f"lora_r {lora_r}, lora_alpha {lora_alpha}, lora_dropout {lora_dropout}, target_modules {targets!r} make "
            f"no adapter of {name!r} ({first_line(error)}): change the one it names"
        ) from error


def save_adapter(model: PeftModel, folder: Path, base_model: str, state: Mapping[str, Tensor] | None = None) -> None:
    """Write an adapter's configuration and weights to a folder.

    Args:
        model: of which the adapter is.
        folder: made, if it is not there.
        base_model: where its backbone is found again.
        state: that of `model.state_dict()`; needed where the parameters are sharded over processes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    adapter = copy(cast(LoraConfig, model.peft_config["default"]))
    adapter.base_model_name_or_path, adapter.inference_mode = base_model, True
    if not isinstance(adapter.target_modules, str):
        adapter.target_modules = sorted(adapter.target_modules or ())  # a set has no order to be relied on
    if adapter.modules_to_save is not None:
        adapter.modules_to_save = sorted(set(adapter.modules_to_save))
    # peft's own save_pretrained adds a model card, and looks the backbone up on the Hub
    adapter.save_pretrained(str(folder))
    weights = _weights(model, state=state)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / WEIGHTS_FILE)


def load_adapter(model: PreTrainedModel, folder: Path, trainable: bool = False) -> PeftModel:
    """Put the adapter of a folder written by `save_adapter` into a model, frozen unless it is to be trained on.

    Raises:
        CheckpointError: weights and configuration disagree.
    """
    adapter, weights = read_adapter(folder)
    adapter.inference_mode = not trainable
    return put_adapter(model, adapter, weights)


def read_adapter(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Configuration and weights of a folder written by `save_adapter`.

    Raises:
        CheckpointError: either is missing or damaged.
    """
    adapter = read_adapter_config(folder)
    if not isinstance(adapter, LoraConfig):
        raise CheckpointError(f"{str(folder / ADAPTER_FILE)!r} is of {adapter.peft_type}: give a LoRA adapter")
    check_adapter_sizes(folder, adapter)
    return adapter, read_weights(folder / WEIGHTS_FILE)


def load_any_adapter(model: PreTrainedModel, folder: Path, trainable: bool = False) -> PeftModel:
    """Put the adapter that peft's own `save_pretrained` wrote, of LoRA or of another kind, into a model.

    Raises:
        CheckpointError: weights or configuration are missing or damaged, or they disagree.
    """
    adapter = read_adapter_config(folder)
    check_adapter_sizes(folder, adapter)
    weights = read_weights(folder / WEIGHTS_FILE)
    adapter.inference_mode = not trainable
    with quiet_loading(), without_bitsandbytes(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # which are refused below
        adapted = cast(PeftModel, PeftModel.from_pretrained(model, folder, is_trainable=trainable, config=adapter))
    differing = set(weights) ^ set(_weights(adapted))
    if differing:
        raise CheckpointError(f"{WEIGHTS_FILE} and {ADAPTER_FILE} disagree on {min(differing)!r}: is it complete?")
    return adapted


def put_adapter(
    model: PreTrainedModel | PeftModel, adapter: LoraConfig, weights: dict[str, Tensor], name: str = "default"
) -> PeftModel:
    """A model with an adapter that was trained, not folded in.

    Args:
        model: the backbone, or what this has made of it for another adapter.
        adapter, weights: of `read_adapter`.
        name: what peft is to call it.

    Raises:
        CheckpointError: the weights are not those of the adapter.
    """
    with quiet_loading(), without_bitsandbytes():
        if isinstance(model, PeftModel):
            model.add_adapter(name, adapter)
        else:
            model = cast(PeftModel, get_peft_model(model, adapter, name))
    # peft would leave what is missing at its random start, with no more than a warning
    differing = set(weights) ^ set(_weights(model, name))
    if differing:
        raise CheckpointError(f"{WEIGHTS_FILE} and {ADAPTER_FILE} disagree on {min(differing)}: is it complete?")
    set_peft_model_state_dict(model, weights, name)
    return model


def _weights(model: PeftModel, name: str = "default", state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    # the embeddings are the backbone's; asked to decide by itself, peft would look it up on the Hub
    given = None if state is None else dict(state)
    return get_peft_model_state_dict(model, given, adapter_name=name, save_embedding_layers=False)
