"""The folder of an expert and an anti-expert: two adapters of one frozen language model, and what they were made of."""

from __future__ import annotations

import json
from copy import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rectify.errors import CheckpointError, InvalidArgumentError, RectifyError, VocabularyMismatchError, first_line
from rectify.hub import checkpoint_folder, model_place
from rectify.json_files import write_json
from rectify.vocabulary import Fingerprint

CONFIG_FILE = "experts_config.json"
EXPERT, ANTI_EXPERT = "expert", "anti_expert"
ADAPTER_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
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
        load_adapted(folder / side, config.base_model, config.base_revision, dtype)[0].requires_grad_(False).eval()
        for side in (EXPERT, ANTI_EXPERT)
    )
    return expert.to(device), anti_expert.to(device)  # type: ignore[arg-type]


def load_adapted(
    folder: Path, base_model: str, base_revision: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A language model with the adapter of a folder, and its tokenizer; below float32 the adapter stays apart.

    Args:
        folder: written by `save_adapter`.
        base_model, base_revision, dtype: see `load_base`.

    Raises:
        CheckpointError: nothing usable is there.
    """
    try:
        model, tokenizer = continue_adapter(folder, base_model, base_revision, dtype)
    except (RectifyError, OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{str(folder)!r} could not be loaded ({reason}): is the training complete?") from error
    adapted = model.get_base_model() if torch.finfo(dtype).bits < 32 else model.merge_and_unload()
    return cast(PreTrainedModel, adapted), tokenizer


def continue_adapter(
    folder: Path, base_model: str, base_revision: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """A language model with the adapter of a folder, which is trained on, and its tokenizer; see `load_adapted`."""
    adapter = LoraConfig.from_pretrained(str(folder))
    weights = load_file(folder / WEIGHTS_FILE)
    adapter.base_model_name_or_path, adapter.inference_mode = None, False  # peft would warn of a bundled name
    base, tokenizer = load_base(base_model, base_revision, dtype)
    model = cast(PeftModel, get_peft_model(base, adapter))
    # peft would leave what is missing at its random start, with no more than a warning
    differing = set(weights) ^ set(adapter_weights(model))
    if differing:
        raise CheckpointError(f"{WEIGHTS_FILE} and {ADAPTER_FILE} disagree on {min(differing)}")
    set_peft_model_state_dict(model, weights)
    return model, tokenizer


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


def save_adapter(model: PeftModel, folder: Path, base_model: str) -> None:
    """Write a LoRA adapter to a folder; the language model that it adapts stays where it is."""
    folder.mkdir(parents=True, exist_ok=True)
    adapter = copy(cast(LoraConfig, model.peft_config["default"]))
    adapter.base_model_name_or_path, adapter.inference_mode = base_model, True
    if not isinstance(adapter.target_modules, str):
        adapter.target_modules = sorted(adapter.target_modules or ())  # a set has no order to be relied on
    # peft's own save_pretrained adds a model card, and looks the model up on the Hub
    adapter.save_pretrained(str(folder))
    save_file({name: weight.contiguous() for name, weight in adapter_weights(model).items()}, folder / WEIGHTS_FILE)


def adapter_weights(model: PeftModel) -> dict[str, Tensor]:
    """The weights of the adapter alone, by their names in a file."""
    # the embeddings are the model's; asked to decide by itself, peft would look it up on the Hub
    return get_peft_model_state_dict(model, save_embedding_layers=False)
