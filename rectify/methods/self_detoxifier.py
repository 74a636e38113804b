"""The folder of a model that detoxifies itself: an adapter of a language model that writes chains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rectify.adapted_model import AdapterConfig, load_adapted
from rectify.hub import checkpoint_folder


@dataclass
class DetoxifierConfig(AdapterConfig):
    """Everything about the adapter but its weights; saved as `cmd_config.json` beside them."""

    file: ClassVar[str] = "cmd_config.json"
    what: ClassVar[str] = "chain adapters"
    command: ClassVar[str] = "rectify train cmd"


def load_detoxifier(
    name: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """The language model that writes chains, in evaluation mode.

    Args:
        name: a folder written by `rectify train cmd`, or a Hub id.
        tokenizer: of the model that it stands beside.
        dtype: of the weights; see `load_adapted`.
        device: where to put it.

    Raises:
        CheckpointError: nothing usable is there.
        VocabularyMismatchError: the tokenizer has another vocabulary.
    """
    folder = checkpoint_folder(name)
    config = DetoxifierConfig.from_pretrained(folder)
    config.check(tokenizer)
    model, _ = load_adapted(folder, config, dtype)
    return model.to(device)  # type: ignore[arg-type]
