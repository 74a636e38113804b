"""The folder of an expert and an anti-expert: two adapters of one frozen language model, and what they were made of."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rectify.adapters import load_adapter
from rectify.errors import CheckpointError, InvalidArgumentError, RectifyError, VocabularyMismatchError, first_line
from rectify.generation.output import write_json
from rectify.hub import checkpoint_folder, model_place
from rectify.vocabulary import Fingerprint

CONFIG_FILE = "experts_config.json"
EXPERT, ANTI_EXPERT = "expert", "anti_expert"
FORMAT_VERSION = 1


@dataclass
class ExpertsConfig:
    """Everything about a pair but its weights; saved as `experts_config.json` beside the two folders.

    Attributes:
        base_model: Hub id, folder or bundled name of the frozen language model.
        base_revision: revision of `base_model` on the Hub.
        vocabulary: fingerprint of its tokenizer.
        training: free-form record of how the weights came to be, of each of the two.
        format_version: of the folder's files.
    """

    base_model: str
    vocabulary: Fingerprint
    base_revision: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if isinstance(self.vocabulary, dict):
            self.vocabulary = Fingerprint(**self.vocabulary)
        if self.format_version > FORMAT_VERSION:
            raise InvalidArgumentError(
                f"format_version is {self.format_version}, above {FORMAT_VERSION}: update rectify to read it"
            )

    @classmethod
    def from_pretrained(cls, folder: Path) -> ExpertsConfig:
        """That of a folder.

        Raises:
            CheckpointError: there is none, or it cannot be used.
        """
        path = folder / CONFIG_FILE
        if not path.exists():
            raise CheckpointError(
                f"{str(folder)!r} holds no {CONFIG_FILE}: give a folder written by `rectify train experts`"
            )
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"{str(path)!r} cannot be used ({first_line(error)}): is the training complete?"
            ) from error

    def save_pretrained(self, folder: Path) -> None:
        """Write it to a folder."""
        write_json(folder / CONFIG_FILE, asdict(self))

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a tokenizer of another vocabulary.

        Raises:
            VocabularyMismatchError: it is one.
        """
        found = Fingerprint.of(tokenizer)
        if found.sha256 != self.vocabulary.sha256:
            raise VocabularyMismatchError(
                f"tokenizer {tokenizer.name_or_path!r} of {found.size} tokens is not that of the experts, adapters of "
                f"{self.base_model!r} with {self.vocabulary.size} tokens: train experts from a model of this vocabulary"
            )


def load_experts(
    name: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Expert and anti-expert, each a language model of its own in evaluation mode.

    Below float32, where folding an adapter into the weights would round it away, it stays apart.

    Args:
        name: a folder written by `rectify train experts`, or a Hub id.
        tokenizer: of the model that they are to change.
        dtype: of the weights.
        device: where to put them.

    Raises:
        CheckpointError: nothing usable is there.
        VocabularyMismatchError: the tokenizer has another vocabulary.
    """
    folder = checkpoint_folder(name)
    config = ExpertsConfig.from_pretrained(folder)
    config.check(tokenizer)
    expert, anti_expert = (
        _load_expert(folder / side, config, dtype).requires_grad_(False).eval() for side in (EXPERT, ANTI_EXPERT)
    )
    return expert.to(device), anti_expert.to(device)  # type: ignore[arg-type]


def _load_expert(folder: Path, config: ExpertsConfig, dtype: torch.dtype) -> PreTrainedModel:
    try:
        base, _ = load_base(config.base_model, config.base_revision, dtype)
        model = load_adapter(base, folder)
    except (RectifyError, OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{str(folder)!r} could not be loaded ({reason}): is the training complete?") from error
    if torch.finfo(dtype).bits < 32:
        return cast(PreTrainedModel, model.get_base_model())
    return cast(PreTrainedModel, model.merge_and_unload())


def load_base(
    name: str, revision: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The language model that is adapted, and its tokenizer.

    Args:
        name: folder, `"pocket"` or Hub id.
        revision: of a Hub id.
        dtype: of the weights.

    Raises:
        CheckpointError: nothing usable is there.
    """
    place = model_place(name, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, revision=revision or "main")
        model = AutoModelForCausalLM.from_pretrained(place, revision=revision or "main", dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"model {name!r} is neither a usable folder nor a model that the Hub gives ({first_line(error)}): "
            "give a causal language model with its tokenizer"
        ) from error
    return model, tokenizer
