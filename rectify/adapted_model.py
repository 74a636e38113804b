"""A language model under a LoRA adapter: what is recorded beside the adapter, and how both are loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rectify.adapters import load_adapter
from rectify.causal_body import causal_body
from rectify.errors import VocabularyMismatchError
from rectify.hub import current_fingerprint, load_language_model
from rectify.json_files import check_format_version, write_json
from rectify.pretrained import refusing
from rectify.saved_config import read_config
from rectify.saved_weights import check_finite
from rectify.vocabulary import Fingerprint
from rectify.weights_digest import check_base

FORMAT_VERSION = 1


@dataclass
class AdapterConfig:
    """Everything about adapters of a language model but their weights; saved as `file` beside them.

    Attributes:
        base_model: Hub id, folder or bundled name of the frozen language model.
        base_revision: revision of `base_model` on the Hub.
        vocabulary: fingerprint of its tokenizer.
        base_fingerprint: digest of its weights, see `weights_digest`; `None` to take any.
        training: free-form record of how the weights came to be.
        format_version: of the folder's files.
    """

    file: ClassVar[str]
    """Its name in a folder."""
    what: ClassVar[str]
    """What messages call the adapters, in the plural."""
    command: ClassVar[str]
    """What writes such a folder."""

    base_model: str
    vocabulary: Fingerprint
    base_revision: str | None = None
    base_fingerprint: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if isinstance(self.vocabulary, dict):
            self.vocabulary = Fingerprint(**self.vocabulary)
        check_format_version(self.format_version, FORMAT_VERSION)

    @classmethod
    def from_pretrained(cls, folder: Path) -> Self:
        """That of a folder.

        Raises:
            CheckpointError: there is none, or it cannot be used.
        """
        return read_config(cls, folder / cls.file, f"give a folder written by `{cls.command}`")

    def save_pretrained(self, folder: Path) -> None:
        """Write it to a folder."""
        write_json(folder / self.file, asdict(self))

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a tokenizer of another vocabulary.

        Raises:
            VocabularyMismatchError: it is one.
        """
        found = Fingerprint.of(tokenizer)
        if found.sha256 != self.vocabulary.sha256:
            raise VocabularyMismatchError(
                f"tokenizer {tokenizer.name_or_path!r} of {found.size} tokens is not that of the {self.what}, of "
                f"{self.base_model!r} with {self.vocabulary.size} tokens: train {self.what} from a model of this "
                "vocabulary"
            )


class OnBase(Protocol):
    """What says on which language model an adapter was trained; see `AdapterConfig`."""

    base_model: str
    base_revision: str | None
    base_fingerprint: str | None


def load_adapted(
    folder: Path, config: OnBase, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The language model under the adapter of a folder, frozen, in evaluation mode, and its tokenizer.

    Below float32, where folding an adapter into the weights would round it away, it stays apart.

    Args:
        folder: written by `rectify.adapters.save_adapter`.
        config: what it was trained on.
        dtype: of the weights.

    Raises:
        CheckpointError: nothing usable is there, or the language model has other weights than in the training.
    """
    with refusing(folder):
        base, tokenizer = load_language_model(config.base_model, dtype, revision=config.base_revision)
        place = config.base_model, config.base_revision
        check_base(
            causal_body(base), config.base_fingerprint, place[0], repr(str(folder)), lambda: current_fingerprint(*place)
        )
        model = load_adapter(base, folder)
        whole = model.get_base_model() if torch.finfo(dtype).bits < 32 else model.merge_and_unload()
        check_finite(cast(PreTrainedModel, whole), "the adapted model")
    return cast(PreTrainedModel, cast(Any, whole).requires_grad_(False).eval()), tokenizer
