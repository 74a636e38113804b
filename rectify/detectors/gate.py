"""The gate: how much each adapter counts for a text, by a small network on a frozen sentence embedding."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rectify.adapters import quiet_loading
from rectify.detectors.backbone import fingerprint_of
from rectify.detectors.classifier import batches_by_length, refusing
from rectify.errors import CheckpointError, InvalidArgumentError, RectifyError, first_line
from rectify.hub import checkpoint_folder, model_place
from rectify.json_files import write_json

CONFIG_FILE, WEIGHTS_FILE = "gate_config.json", "gate.safetensors"
FORMAT_VERSION = 1


@dataclass
class GateConfig:
    """Everything about a gate but its weights; saved as `gate_config.json` beside them.

    Attributes:
        encoder: Hub id, folder or bundled name of the sentence encoder.
        names: of the adapters that are weighted.
        input_size: width of the encoder.
        hidden_size: width of the network; the published gate has 384 → 8 → 3.
        max_length: tokens of a text that are read, from its start.
        encoder_revision: revision of `encoder` on the Hub.
        encoder_fingerprint: what the encoder is known again by, see `backbone.Backbone`; `None` to take any.
        training: free-form record of how the weights came to be.
        format_version: of the folder's files.
    """

    encoder: str
    names: list[str]
    input_size: int
    hidden_size: int = 8
    max_length: int = 256
    encoder_revision: str | None = None
    encoder_fingerprint: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for name in ("input_size", "hidden_size", "max_length"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"{name} is {getattr(self, name)}: give 1 or more")
        if not self.names or len(set(self.names)) < len(self.names):
            raise InvalidArgumentError(f"names is {self.names!r}: give one or more, each once")
        if self.format_version > FORMAT_VERSION:
            raise InvalidArgumentError(
                f"format_version is {self.format_version}, above {FORMAT_VERSION}: update rectify to read it"
            )


class SentenceEncoder(nn.Module):
    """A frozen model whose last hidden states, averaged over a text's tokens and scaled to length 1, stand for it.

    As in sentence-transformers, the special tokens count. Make one with `from_pretrained`.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int, fingerprint: str | None
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.max_length, self.fingerprint = model, tokenizer, max_length, fingerprint
        model.config.get_text_config().use_cache = False
        tokenizer.truncation_side = "right"
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or max_length
        if not tokenizer.num_special_tokens_to_add() < max_length <= positions:
            raise InvalidArgumentError(
                f"max_length is {max_length}: give a number above {tokenizer.num_special_tokens_to_add()}, at most "
                f"{positions}, what the encoder reads"
            )

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        revision: str | None = None,
        max_length: int = 256,
        device: str | torch.device | None = None,
    ) -> SentenceEncoder:
        """Load an encoder, or the trunk of a causal model, in float32 and evaluation mode.

        Args:
            name: folder, bundled name or Hub id.
            revision: of a Hub id.
            max_length: tokens of a text that are read.
            device: where to put it.

        Raises:
            CheckpointError: nothing usable is there.
            InvalidArgumentError: it is an encoder-decoder, or reads fewer tokens.
        """
        place = model_place(name, revision)
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, revision=revision or "main")
            with quiet_loading():
                model = AutoModel.from_pretrained(place, revision=revision or "main", dtype=torch.float32)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"encoder {name!r} is neither a usable folder nor a model that the Hub gives ({first_line(error)}): "
                "give a model of text with its tokenizer"
            ) from error
        if model.config.is_encoder_decoder:
            raise InvalidArgumentError(f"encoder {name!r} is an encoder-decoder: give an encoder or a causal model")
        encoder = cls(model, tokenizer, max_length, fingerprint_of(place, model.config))
        return encoder.requires_grad_(False).to(device=device).eval()

    @property
    def hidden_size(self) -> int:
        """The width of the embeddings."""
        return cast(int, self.model.config.get_text_config().hidden_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The embeddings of texts, `[B, H]` float32 of length 1, from `[B, T]` ids and mask, padded on the right."""
        ids = input_ids.masked_fill(attention_mask == 0, self.tokenizer.pad_token_id or 0)
        hidden = self.model(input_ids=ids, attention_mask=attention_mask).last_hidden_state.float()
        total = (hidden * attention_mask[..., None]).sum(1)
        return nn.functional.normalize(total, dim=-1)  # the sum and the mean point the same way

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], batch_size: int = 64, progress: bool = False) -> np.ndarray:
        """The embeddings of texts.

        Args:
            texts: of any length; the first `max_length` tokens count.
            batch_size: texts at a time, of nearly equal length.
            progress: show a progress bar.

        Returns:
            `[N, H]` float32, each of length 1, or 0 where a text yields no token at all.
        """
        result = np.zeros((len(texts), self.hidden_size), dtype=np.float32)
        if not texts:
            return result
        encoded = cast(
            list[list[int]], self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
        )
        device = self.model.device
        for places, ids, mask in batches_by_length(encoded, batch_size, progress):
            result[places] = self(ids.to(device), mask.to(device)).cpu().numpy()
        return result


class AdapterGate(nn.Module):
    """`softmax(Linear(ReLU(Linear(e))))` of a sentence embedding e: a weight for each adapter.

    Source: the gate of ExplainingHate-OptimalQLoRA, which foretells the platform of a text; 3,107 weights on
    `all-MiniLM-L6-v2`.

    Example:
        >>> gate = AdapterGate.from_pretrained("my-detector/gate")
        >>> gate.gates(["Have a nice day", "You are an idiot"])  # [2, K], rows sum to 1
    """

    def __init__(self, config: GateConfig, encoder: SentenceEncoder) -> None:
        super().__init__()
        if encoder.hidden_size != config.input_size:
            raise InvalidArgumentError(
                f"encoder {config.encoder!r} has a width of {encoder.hidden_size}, not {config.input_size}: give the "
                "one that the gate was trained on"
            )
        self.config, self.encoder = config, encoder
        self.network = make_network(config)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, device: str | torch.device | None = None) -> AdapterGate:
        """Load a gate and its encoder, frozen and in evaluation mode.

        Args:
            name: a folder written by `save_pretrained`, or a Hub id.
            device: where to put it.

        Raises:
            CheckpointError: nothing usable is there, or the encoder has other weights than in training.
        """
        folder = checkpoint_folder(name)
        with refusing(name):
            for file in (CONFIG_FILE, WEIGHTS_FILE):
                if not (folder / file).exists():
                    raise CheckpointError(f"it holds no {file}: give a folder written by save_pretrained")
            config = GateConfig(**json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))
            encoder = SentenceEncoder.from_pretrained(
                config.encoder, revision=config.encoder_revision, max_length=config.max_length
            )
            if config.encoder_fingerprint not in (None, encoder.fingerprint):
                raise RectifyError(
                    f"it was trained on weights {config.encoder_fingerprint} of {config.encoder!r}, and those there "
                    f"now are {encoder.fingerprint}: put the former back, or train anew"
                )
            gate = cls(config, encoder)
            gate.network.load_state_dict(load_file(folder / WEIGHTS_FILE))
        return gate.requires_grad_(False).to(device=device).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write configuration and network to a folder; the encoder stays where it is."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.network.state_dict(), folder / WEIGHTS_FILE)
        write_json(folder / CONFIG_FILE, asdict(self.config))

    def forward(self, embeddings: Tensor) -> Tensor:
        """The gates of `[B, input_size]` embeddings: `[B, K]` float32, rows sum to 1."""
        return self.network(embeddings).float().softmax(-1)

    @torch.inference_mode()
    def gates(self, texts: Sequence[str], batch_size: int = 64, progress: bool = False) -> np.ndarray:
        """The gates of texts, `[N, K]` float32, rows sum to 1; see `SentenceEncoder.embed`."""
        embeddings = torch.from_numpy(self.encoder.embed(texts, batch_size, progress))
        return self(embeddings.to(self.encoder.model.device)).cpu().numpy()


def make_network(config: GateConfig) -> nn.Sequential:
    """A new network, drawn from torch's random generator: from embeddings to the logits of the gates."""
    return nn.Sequential(
        nn.Linear(config.input_size, config.hidden_size), nn.ReLU(), nn.Linear(config.hidden_size, len(config.names))
    )
