"""LoRA adapters of any backbone: made, saved beside a head, and loaded again without a look-up on the Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from rectify.adapter_config import ADAPTER_FILE, WEIGHTS_FILE, check_adapter_sizes, read_adapter_config
from rectify.errors import CheckpointError, InvalidArgumentError, first_line
from rectify.quiet import quiet_loading, without_bitsandbytes
from rectify.quiet_peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from rectify.saved_weights import read_weights
from rectify.trunk_states import own_precision

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


def adapt_body(body: PreTrainedModel, adapter: PeftConfig) -> PeftModel:
    """Freeze a body without a head and put a new adapter into it.

    Args:
        body: changed in place.
        adapter: of any kind that changes layers; not changed itself. Its `task_type` is left out.

    Raises:
        InvalidArgumentError: it makes no adapter of this body.
    """
    kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
    if adapter.is_prompt_learning:
        raise InvalidArgumentError(
            f"adapter is of {kind}, which is put before the text and not into the layers: give another, such as LoRA"
        )
    try:
        with quiet_loading(), without_bitsandbytes():
            model = cast(PeftModel, get_peft_model(body, _headless(adapter)))
        if not isinstance(adapter, LoraConfig):  # some need more arguments than a text
            with torch.no_grad():
                model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=body.device))
        return model
    except Exception as error:  # every kind has its own ways to fail
        raise InvalidArgumentError(
            f"adapter of {kind} cannot be put into a {type(body).__name__} ({first_line(error)}): change it, or give "
            "another, such as LoRA"
        ) from error


def _headless(adapter: PeftConfig) -> PeftConfig:
    """An adapter's configuration for a body; peft would warn of a base model's name that is not the body's own."""
    adapter = copy(adapter)
    adapter.task_type = adapter.base_model_name_or_path = None
    return adapter


def save_adapter(model: PeftModel, folder: Path, base_model: str, state: Mapping[str, Tensor] | None = None) -> None:
    """Write an adapter's configuration and weights to a folder.

    Args:
        model: of which the adapter is.
        folder: made, if it is not there.
        base_model: where its backbone is found again.
        state: that of `model.state_dict()`; needed where the parameters are sharded over processes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    adapter = copy(model.peft_config["default"])
    adapter.base_model_name_or_path, adapter.inference_mode = base_model, True
    for name, value in vars(adapter).items():
        if isinstance(value, set) or (name == "modules_to_save" and value):  # whose order is not to be relied on
            setattr(adapter, name, sorted(set(value)))
    if adapter.task_type is None:  # for whoever loads it with peft alone
        base = type(model.get_base_model())
        adapter.auto_mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
    # peft's own save_pretrained adds a model card, and looks the backbone up on the Hub
    adapter.save_pretrained(str(folder))
    weights = _weights(model, state=state)
    # copied, as layers of some kinds share theirs
    save_file({name: weight.clone().contiguous() for name, weight in weights.items()}, folder / WEIGHTS_FILE)


def load_adapter(model: PreTrainedModel, folder: Path, trainable: bool = False) -> PeftModel:
    """Put the adapter of a folder written by `save_adapter` into a model, frozen unless it is to be trained on.

    Raises:
        CheckpointError: weights and configuration disagree.
    """
    adapter, weights = read_adapter(folder)
    adapter.inference_mode = not trainable
    return put_adapter(model, adapter, weights)


def fold_in(model: PeftModel) -> None:
    """Fold an adapter into the layers, which is faster; one of a kind that cannot be folded in stays apart."""
    before = {name: weight.clone() for name, weight in _weights(model).items()}
    try:
        with own_precision(model.device):
            model.merge_adapter()
    except (AttributeError, NotImplementedError, ValueError):
        return
    if any(not torch.equal(weight, before[name]) for name, weight in _weights(model).items()):
        model.unmerge_adapter()  # it changes places with what it replaces, and would not be saved again


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
    """Put an adapter of `adapt_body`, of LoRA or of another kind, into a body; peft may have written it as well.

    Raises:
        CheckpointError: weights or configuration are missing or damaged, or they disagree.
    """
    adapter = read_adapter_config(folder)
    check_adapter_sizes(folder, adapter)
    weights = read_weights(folder / WEIGHTS_FILE)
    adapter = _headless(adapter)
    adapter.inference_mode = not trainable
    return put_adapter(model, adapter, weights)


def put_adapter(
    model: PreTrainedModel | PeftModel, adapter: PeftConfig, weights: dict[str, Tensor], name: str = "default"
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
