"""The folder of an expert and an anti-expert: two adapters of one frozen language model, and what they were made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rectify.adapted_model import AdapterConfig, load_adapted
from rectify.hub import checkpoint_folder

CONFIG_FILE = "experts_config.json"
EXPERT, ANTI_EXPERT = "expert", "anti_expert"


@dataclass
class ExpertsConfig(AdapterConfig):
    """Everything about a pair but its weights; saved as `experts_config.json` beside the two folders.

    `training` has a record of each of the two.
    """

    file: ClassVar[str] = CONFIG_FILE
    what: ClassVar[str] = "experts"
    command: ClassVar[str] = "rectify train experts"


def load_experts(
    name: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Expert and anti-expert, each a language model of its own in evaluation mode.

    Args:
        name: a folder written by `rectify train experts`, or a Hub id.
        tokenizer: of the model that they are to change.
        dtype: of the weights; see `load_adapted`.
        device: where to put them.

    Raises:
        CheckpointError: nothing usable is there.
        VocabularyMismatchError: the tokenizer has another vocabulary.
    """
    folder = checkpoint_folder(name)
    config = ExpertsConfig.from_pretrained(folder)
    config.check(tokenizer)
    expert, anti_expert = (load_adapted(folder / side, config, dtype)[0] for side in (EXPERT, ANTI_EXPERT))
    return expert.to(device), anti_expert.to(device)  # type: ignore[arg-type]
