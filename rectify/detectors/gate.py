"""The gate: how much each adapter counts for a text, by a small network on a frozen sentence embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rectify.errors import InvalidArgumentError
from rectify.hub import checkpoint_folder
from rectify.json_files import check_format_version, write_json
from rectify.pretrained import refusing
from rectify.saved_config import read_config
from rectify.saved_weights import read_weights, shapes_of
from rectify.sentence_encoder import SentenceEncoder
from rectify.weights_digest import check_base

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
        check_format_version(self.format_version, FORMAT_VERSION)


class AdapterGate(nn.Module):
    """`softmax(Linear(ReLU(Linear(e))))` of a sentence embedding e: a weight for each adapter.

    Source: the gate of ExplainingHate-OptimalQLoRA, which predicts the platform of a text; 3,107 weights on
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
            config = read_config(GateConfig, folder / CONFIG_FILE, "give a folder written by save_pretrained")
            weights = read_weights(folder / WEIGHTS_FILE, shapes_of(lambda: make_network(config)))
            encoder = SentenceEncoder.from_pretrained(
                config.encoder, revision=config.encoder_revision, max_length=config.max_length
            )
            check_base(
                encoder.model, config.encoder_fingerprint, config.encoder, repr(str(name)), lambda: encoder.fingerprint
            )
            gate = cls(config, encoder)
            gate.network.load_state_dict(weights)
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
