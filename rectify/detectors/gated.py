"""The gated detector: adapters of several platforms, weighted for each text by a gate."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from rectify.detectors import classifier
from rectify.detectors.adapter_blend import AdapterBlend
from rectify.detectors.classifier import ToxicityClassifier, batches_by_length
from rectify.detectors.config import check_calibration
from rectify.detectors.gate import AdapterGate
from rectify.detectors.routing import Routing, route
from rectify.errors import InvalidArgumentError
from rectify.hub import checkpoint_folder
from rectify.json_files import check_format_version, write_json
from rectify.pretrained import refusing
from rectify.saved_config import read_config

CONFIG_FILE, GATE_FOLDER, ADAPTERS_FOLDER = "gated_config.json", "gate", "adapters"
FORMAT_VERSION = 1

Blending = Literal["weights", "logits"]

_NAME = re.compile(r"\w[\w.-]*")


@dataclass
class GatedConfig:
    """How a gated detector uses its parts; saved as `gated_config.json` beside them.

    Attributes:
        adapters: their names, which are those of their folders, in the order of the gates.
        routing: `"blend"`, `"top_k"` or `"top_1"`, see `routing.route`.
        k: of `"top_k"`.
        blending: `"weights"` or `"logits"`, see `AdapterBlend.forward` and `blended_logits`.
        calibration: of the blended logits, as in `DetectorConfig`.
        training: free-form record of how gate and calibration came to be.
        format_version: of the folder's files.
    """

    adapters: list[str]
    routing: Routing = "blend"
    k: int = 2
    blending: Blending = "weights"
    calibration: dict[str, float | list[list[float]]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        check_names(self.adapters)
        check_calibration(self.calibration)
        for name, known in (("routing", get_args(Routing)), ("blending", get_args(Blending))):
            if getattr(self, name) not in known:
                raise InvalidArgumentError(f"{name} is {getattr(self, name)!r}: give one of {', '.join(known)}")
        if self.k < 1 or (self.routing == "top_k" and self.k > len(self.adapters)):
            raise InvalidArgumentError(f"k is {self.k}: give a number from 1 to {len(self.adapters)}, that of adapters")
        check_format_version(self.format_version, FORMAT_VERSION)


def check_names(names: Sequence[str]) -> None:
    """Refuse names of adapters that cannot be names of folders.

    Raises:
        InvalidArgumentError: one cannot, is given twice, or there is none.
    """
    if not names or len(set(names)) < len(names):
        raise InvalidArgumentError(f"adapters has the names {list(names)!r}: give one or more, each once")
    for name in names:
        if not _NAME.fullmatch(name):
            raise InvalidArgumentError(f"adapters has the name {name!r}: use letters, digits, and . _ - within")


class GatedDetector:
    """Adapters over one backbone, and the gate that weights them: in place of a `ToxicityClassifier`.

    Args:
        gating: how the parts are used.
        gate: its names are those of the adapters.
        blend: the adapters.

    Attributes:
        config: what stands in for the configuration of a single classifier: the adapters' own, with the calibration of
            the blend.

    Raises:
        InvalidArgumentError: gate, blend and configuration have other adapters.

    Example:
        >>> from rectify.detectors.gated import GatedDetector
        >>> detector = GatedDetector.from_pretrained("my-detector")
        >>> detector.probabilities(["Have a nice day", "You are an idiot", ""])  # the last is NaN
        >>> detector.gates(["Have a nice day"])  # [1, K]
    """

    def __init__(self, gating: GatedConfig, gate: AdapterGate, blend: AdapterBlend) -> None:
        if not gating.adapters == gate.config.names == blend.names:
            raise InvalidArgumentError(
                f"the gate weights {gate.config.names}, the adapters are {blend.names}, and the configuration names "
                f"{gating.adapters}: give the same in one order"
            )
        self.gating, self.gate, self.blend = gating, gate, blend
        self.config = replace(blend.config, calibration=gating.calibration, training=gating.training)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> GatedDetector:
        """Load a detector, frozen and in evaluation mode.

        Args:
            name: a folder written by `save_pretrained`, or a Hub id.
            device: where to put it.
            dtype: of the blend's weights; the gate's are float32.

        Raises:
            CheckpointError: nothing usable is there.
        """
        folder = checkpoint_folder(name)
        with refusing(name):
            gating = read_config(GatedConfig, folder / CONFIG_FILE, "give a folder of `rectify train gate`")
            places = {adapter: folder / ADAPTERS_FOLDER / adapter for adapter in gating.adapters}
            gate = AdapterGate.from_pretrained(folder / GATE_FOLDER, device=device)
            return cls(gating, gate, AdapterBlend.from_pretrained(places, device=device, dtype=dtype))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write gate, adapters and configuration to a folder; backbone and sentence encoder stay where they are."""
        folder = Path(folder)
        self.gate.save_pretrained(folder / GATE_FOLDER)
        for name, source in self.blend.folders.items():
            place = folder / ADAPTERS_FOLDER / name
            place.mkdir(parents=True, exist_ok=True)
            for file in (classifier.ADAPTER_FILE, classifier.WEIGHTS_FILE, classifier.CONFIG_FILE):
                if (source / file).resolve() != (place / file).resolve():
                    shutil.copyfile(source / file, place / file)
        write_json(folder / CONFIG_FILE, asdict(self.gating))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.blend.device

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text for the backbone; see `ToxicityClassifier.encode`."""
        return self.blend.encode(texts)

    def gates(self, texts: Sequence[str], batch_size: int = 64, progress: bool = False) -> np.ndarray:
        """How much each adapter counts for each text, after the routing: `[N, K]` float32, rows sum to 1."""
        gates = torch.from_numpy(self.gate.gates(texts, batch_size, progress))
        return route(gates, self.gating.routing, self.gating.k).numpy()

    @torch.inference_mode()
    def label_logits(self, texts: Sequence[str], batch_size: int = 64, progress: bool = False) -> np.ndarray:
        """The blended logits of texts, `[N, L]` float32 before calibration; arguments as for `label_probabilities`."""
        encoded = self.encode(texts)
        result = np.full((len(encoded), len(self.config.labels)), np.nan, dtype=np.float32)
        readable = [place for place, ids in enumerate(encoded) if ids]
        gates = torch.zeros(len(encoded), len(self.blend.names))
        gates[readable] = torch.from_numpy(self.gates([texts[place] for place in readable], batch_size, progress))
        blended = self.blend if self.gating.blending == "weights" else self.blend.blended_logits
        for places, ids, mask in batches_by_length(encoded, batch_size, progress):
            rows = (part.to(self.device) for part in (ids, mask, gates[places]))
            result[places] = blended(*rows).cpu().numpy()
        return result

    def label_probabilities(self, texts: Sequence[str], batch_size: int = 64, progress: bool = False) -> np.ndarray:
        """How probably each text has each label.

        Args:
            texts: of any length; the first `max_length` tokens count.
            batch_size: texts at a time, of nearly equal length.
            progress: show progress bars.

        Returns:
            `[N, L]` float32 in [0, 1], in the order of the texts; NaN where a text yields no token.

        Raises:
            InvalidArgumentError: `batch_size` is below 1, or a text is not a string, or no valid Unicode.
        """
        logits = torch.from_numpy(self.label_logits(texts, batch_size, progress))
        return self.config.probabilities(logits).numpy()

    def probabilities(self, texts: Sequence[str], batch_size: int = 64, progress: bool = False) -> np.ndarray:
        """How probably each text has the first label: `[N]` float32; see `label_probabilities`."""
        return self.label_probabilities(texts, batch_size, progress)[:, 0]


def load_detector(
    name: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype = torch.float32
) -> ToxicityClassifier | GatedDetector:
    """The detector of a folder, a single classifier or a gated one; arguments and errors as of `from_pretrained`."""
    gated = (checkpoint_folder(name) / CONFIG_FILE).exists()
    kind: type[ToxicityClassifier | GatedDetector] = GatedDetector if gated else ToxicityClassifier
    return kind.from_pretrained(name, device=device, dtype=dtype)
