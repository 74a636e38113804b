"""Training of a gate: from sentence embeddings to how much each platform's adapter counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments, set_seed

from rectify.detectors import classifier
from rectify.detectors.adapter_blend import AdapterBlend
from rectify.detectors.classifier import batches_by_length
from rectify.detectors.gate import AdapterGate, GateConfig
from rectify.detectors.gated import Blending, GatedConfig, GatedDetector, check_names
from rectify.detectors.routing import Routing
from rectify.errors import InvalidArgumentError
from rectify.hub import checkpoint_folder, files_digest
from rectify.json_files import sha256_of, write_json
from rectify.sentence_encoder import SentenceEncoder
from rectify.training.detector import early_stopping, fit_calibration
from rectify.training.detector_figures import scikit_learn, validation_figures
from rectify.training.resumable_array import ResumableArray
from rectify.training.running import RESULTS_FILE, checkpoint_to_resume
from rectify.training.trainer import AdapterTrainer, run_record
from rectify.weights_digest import weights_digest

_CHUNK = 2048  # texts that are embedded, or judged by the adapters, between two notes of how far it is

Row = tuple[str, float, str]


@dataclass
class GateSettings:
    """What is trained; each field is a flag of `rectify train gate`."""

    adapters: list[str] = field(metadata={"help": "NAME=FOLDER of each: detectors of `rectify train` on one backbone"})
    encoder: str = field(
        metadata={
            "help": "sentence encoder: folder or Hub id of an encoder or a causal model, such as "
            "sentence-transformers/all-MiniLM-L6-v2, or pocket"
        }
    )
    encoder_revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a Hub id"})
    encoder_max_length: int = field(default=256, metadata={"help": "tokens of a text that the encoder reads"})
    hidden_size: int = field(default=8, metadata={"help": "width of the network between embedding and gates"})
    objective: Literal["source", "label"] = field(
        default="source",
        metadata={
            "help": "source: tell which platform a text is of, each source being named as its adapter; label: the log "
            "loss of the adapters' logits, blended by the gates, on the texts' labels"
        },
    )
    balance_sources: bool = field(
        default=True, metadata={"help": "have each source count alike in the loss, however many texts it has"}
    )
    routing: Routing = field(
        default="blend", metadata={"help": "how the detector uses the gates: all, the best k renormalised, the best"}
    )
    k: int = field(default=2, metadata={"help": "adapters of top_k"})
    blending: Blending | None = field(
        default=None,
        metadata={
            "help": "weights: blend the adapters, in one pass; logits: blend their logits, a pass for each (default: "
            "weights with the objective source, logits with label, which is what that trains)"
        },
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "stop after so many evaluations without a better one, and keep the best"}
    )
    calibration: Literal["none", "curve", "temperature"] = field(
        default="none", metadata={"help": "bring the blend's probabilities to the scale of the validation labels"}
    )

    def __post_init__(self) -> None:
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise InvalidArgumentError(f"early_stopping_patience is {self.early_stopping_patience}: give 1 or more")
        if self.hidden_size < 1:
            raise InvalidArgumentError(f"hidden_size is {self.hidden_size}: give 1 or more")

    def places(self) -> dict[str, str]:
        """The folder of each adapter.

        Raises:
            InvalidArgumentError: an entry is of another form, or a name cannot be used.
        """
        for entry in self.adapters:
            name, _, place = entry.partition("=")
            if not (name and place):
                raise InvalidArgumentError(f"adapters holds {entry!r}: give NAME=FOLDER")
        check_names([entry.partition("=")[0] for entry in self.adapters])
        return {name: place for name, _, place in (entry.partition("=") for entry in self.adapters)}


def train_gate(
    settings: GateSettings,
    arguments: TrainingArguments,
    train: Sequence[Row],
    validation: Sequence[Row],
    callbacks: Sequence[TrainerCallback] = (),
) -> GatedDetector:
    """Train a gate and save a gated detector in `arguments.output_dir`; killed, the same call goes on where it was.

    Texts are embedded once by the frozen encoder, and judged once by each adapter where that is needed. Those without a
    token are left out. The folder also gets `all_results.json`, and `training` of the detector's configuration what it
    was trained on and `gate_figures` of the validation texts.

    Args:
        settings: what is trained.
        arguments: how, for `transformers.Trainer`.
        train, validation: texts, their labels from 0 (clean) to 1 (toxic), and their sources.
        callbacks: of the Trainer.

    Returns:
        The detector, in evaluation mode, on the device that the gate was trained on.

    Raises:
        InvalidArgumentError: there is no text, a source has no adapter or an adapter no source though the objective
            needs one, a setting is out of range, or the folder holds another training.
        CheckpointError: nothing usable is at an adapter's place or the encoder's.
        MissingExtraError: scikit-learn is not installed.
    """
    scikit_learn()  # missing, it is to be missed now and not after the training
    places = settings.places()
    names = list(places)
    gating = GatedConfig(names, settings.routing, settings.k, settings.blending or _BLENDING_OF[settings.objective])
    if settings.objective == "source":
        _check_sources(names, [source for _, _, source in train], [source for _, _, source in validation])
    digest = sha256_of([list(train), list(validation)])
    adapters = {name: files_digest(checkpoint_folder(place), suffixes=_FILES) for name, place in places.items()}
    stopping = early_stopping(settings.early_stopping_patience, arguments)
    checkpoint = checkpoint_to_resume(
        arguments, RESULTS_FILE, **asdict(settings), texts_sha256=digest, adapters_sha256=adapters
    )
    blend = AdapterBlend.from_pretrained(places, device=arguments.device)
    if len(blend.config.labels) > 1:
        raise InvalidArgumentError(f"adapters have the labels {blend.config.labels}: give some of one label")
    encoder = SentenceEncoder.from_pretrained(
        settings.encoder,
        revision=settings.encoder_revision,
        max_length=settings.encoder_max_length,
        device=arguments.device,
    )
    read_by = {"encoder": encoder.fingerprint, "encoder_max_length": settings.encoder_max_length}
    features = _Features(blend, encoder, arguments, {"texts": digest, "adapters": adapters, **read_by})
    # validation first: its logits are wanted in any case
    held, data = (features.rows(part, name) for part, name in ((validation, "validation"), (train, "train")))
    rows = [*held, *data]
    by_label = settings.objective == "label"
    embeddings = features.embeddings([row[0] for row in rows])
    logits = features.logits([row[0] for row in (rows if by_label else held)])
    weight_of = source_weights([row[2] for row in data], settings.balance_sources)
    columns = {
        "embeddings": embeddings,
        "weights": np.array([weight_of.get(row[2], 1.0) for row in rows], dtype=np.float32),
        "labels": np.array([row[1] if by_label else names.index(row[2]) for row in rows]),
    }
    if by_label:
        columns |= {"labels": columns["labels"].astype(np.float32), "adapter_logits": logits}
    cut = len(held)
    held_set, data_set = (
        Columns(**{name: column[part] for name, column in columns.items()}) for part in (slice(cut), slice(cut, None))
    )
    set_seed(arguments.seed)
    config = GateConfig(
        settings.encoder,
        names,
        encoder.hidden_size,
        settings.hidden_size,
        settings.encoder_max_length,
        settings.encoder_revision,
        weights_digest(encoder.model) or encoder.fingerprint,
    )
    gate = AdapterGate(config, encoder).to(arguments.device)
    trainer = AdapterTrainer(
        model=_Training(gate.network),
        args=arguments,
        train_dataset=data_set,
        eval_dataset=held_set,
        data_collator=collate,
        callbacks=[*callbacks, *stopping],
    )
    results = trainer.train_to_end(checkpoint)
    gate.requires_grad_(False).eval()
    detector, figures = _calibrated(
        GatedDetector(gating, gate, blend),
        settings.calibration,
        held,
        embeddings[:cut],
        logits[:cut],
        arguments.per_device_eval_batch_size,
    )
    record = {
        "objective": settings.objective,
        "texts": len(data),
        "texts_sha256": digest,
        **run_record(trainer),
        "validation": figures,
    }
    gate.config.training = gating.training = detector.config.training = record
    if trainer.is_world_process_zero():
        folder = Path(str(arguments.output_dir))
        detector.save_pretrained(folder)
        # the last file, as it says that the training is finished
        write_json(folder / RESULTS_FILE, results | {"validation": figures, "history": trainer.state.log_history})
        features.remove()
    return detector


def _calibrated(
    detector: GatedDetector,
    calibration: str,
    rows: Sequence[Row],
    embeddings: np.ndarray,
    logits: np.ndarray,
    batch_size: int,
) -> tuple[GatedDetector, dict[str, Any]]:
    """A detector whose probabilities are calibrated on rows, unless that is `"none"`, and its `gate_figures` there.

    Embeddings `[N, H]` and the adapters' own logits `[N, K]` are those of the rows.
    """
    gating, gate, blend = detector.gating, detector.gate, detector.blend
    texts, labels, sources = zip(*rows, strict=True)
    truth = np.array(labels)
    blended = torch.from_numpy(detector.label_logits(texts, batch_size))
    probabilities = {"blend": blended.double().sigmoid().numpy()[:, 0]}
    if calibration != "none":
        gating.calibration = fit_calibration(calibration, blend.config.labels, blended, truth[:, None])
        detector = GatedDetector(gating, gate, blend)
        probabilities["calibrated"] = detector.config.probabilities(blended).numpy()[:, 0].astype(float)
    own = torch.from_numpy(np.array(logits)).double().sigmoid().numpy()
    probabilities |= dict(zip(gating.adapters, own.T, strict=True))
    with torch.no_grad():
        gates = gate(torch.from_numpy(np.array(embeddings)).to(blend.device)).cpu().numpy()
    return detector, gate_figures(gating.adapters, gates, probabilities, truth, sources)


_BLENDING_OF: dict[str, Blending] = {"source": "weights", "label": "logits"}
_FILES = {Path(name).suffix for name in (classifier.ADAPTER_FILE, classifier.WEIGHTS_FILE)}


def _check_sources(names: Sequence[str], train: Sequence[str], validation: Sequence[str]) -> None:
    unknown = sorted({*train, *validation} - set(names))
    lacking = [name for name in names if name not in train]
    if unknown or lacking:
        said = f"the source {unknown[0]!r} has no adapter" if unknown else f"the adapter {lacking[0]!r} has no texts"
        raise InvalidArgumentError(
            f"objective is 'source', and {said}: name the sources as the adapters, {', '.join(names)}, or give "
            "objective label"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def gate_figures(
    names: Sequence[str],
    gates: np.ndarray,
    probabilities: dict[str, np.ndarray],
    labels: np.ndarray,
    sources: Sequence[str],
) -> dict[str, Any]:
    """How good a gate is.

    Args:
        names: of the adapters.
        gates: `[N, K]`, before the routing.
        probabilities: `[N]` of the blend and of each adapter alone, by name.
        labels: `[N]` in [0, 1]; from 0.5 on, a text counts as toxic.
        sources: of the texts.

    Returns:
        `n`; `source_accuracy`, how often the largest gate is that of the adapter with the source's name, of the texts
        that have one; of each of `probabilities`, `log_loss`, in nats against the labels as they are, and `f1_macro`;
        and `sources` with the same of each, and `gates`, the mean gate of each adapter there.
    """
    of = np.array(sources)
    best = np.array(names)[gates.argmax(-1)]

    def chosen(rows: np.ndarray) -> dict[str, Any]:
        found: dict[str, Any] = {"n": int(rows.sum())}
        named = rows & np.isin(of, list(names))
        if named.any():
            found["source_accuracy"] = float((best == of)[named].mean())
        found["log_loss"] = {
            name: float(_log_loss(values[rows], labels[rows])) for name, values in probabilities.items()
        }
        scores = {
            name: validation_figures(values[rows], labels[rows]).get("f1_macro")
            for name, values in probabilities.items()
        }
        return found | {"f1_macro": scores} if None not in scores.values() else found

    by_source = {}
    for source in sorted(set(sources)):
        rows = of == source
        means = dict(zip(names, gates[rows].mean(0, dtype=np.float64).tolist(), strict=True))
        by_source[source] = chosen(rows) | {"gates": means}
    return chosen(np.ones(len(of), dtype=bool)) | {"sources": by_source}


def _log_loss(probability: np.ndarray, label: np.ndarray) -> float:
    inside = probability.clip(1e-7, 1 - 1e-7)
    return -np.mean(label * np.log(inside) + (1 - label) * np.log1p(-inside))


# ---------------------------------------------------------------------------------------------------------------------
# Data


class _Features:
    """What the frozen models make of the texts, computed once into files that a killed training goes on with."""

    def __init__(
        self, blend: AdapterBlend, encoder: SentenceEncoder, arguments: TrainingArguments, key: dict[str, Any]
    ) -> None:
        self._blend, self._encoder, self._key = blend, encoder, key
        self._batch_size, self._progress = arguments.per_device_eval_batch_size, not arguments.disable_tqdm
        self._folder = Path(str(arguments.output_dir))
        self._arrays: list[ResumableArray] = []

    def rows(self, rows: Sequence[Row], name: str) -> list[Row]:
        """Those with a token."""
        for index, (_, label, _) in enumerate(rows):
            if not 0 <= label <= 1:
                raise InvalidArgumentError(f"{name}[{index}] has the label {label}: give a number from 0 to 1")
        encoded = self._blend.encode([row[0] for row in rows])
        kept = [row for row, ids in zip(rows, encoded, strict=True) if ids]
        if not kept:
            raise InvalidArgumentError(f"{name} has {len(rows)} texts, none with a token: give at least one that has")
        return kept

    def embeddings(self, texts: Sequence[str]) -> np.ndarray:
        """`[N, H]` float32."""
        return self._computed(
            "embeddings",
            texts,
            self._encoder.hidden_size,
            lambda some: self._encoder.embed(some, self._batch_size, self._progress),
        )

    def logits(self, texts: Sequence[str]) -> np.ndarray:
        """The adapters' own, `[N, K]` float32."""
        return self._computed("adapter_logits", texts, len(self._blend.names), self._own_logits)

    @torch.inference_mode()
    def _own_logits(self, texts: Sequence[str]) -> np.ndarray:
        result = np.empty((len(texts), len(self._blend.names)), dtype=np.float32)
        for places, ids, mask in batches_by_length(self._blend.encode(texts), self._batch_size, self._progress):
            ids, mask = ids.to(self._blend.device), mask.to(self._blend.device)
            for place in range(result.shape[1]):
                result[places, place] = self._blend.adapter_logits(ids, mask, place)[:, 0].cpu().numpy()
        return result

    def _computed(
        self, name: str, texts: Sequence[str], width: int, compute: Callable[[Sequence[str]], np.ndarray]
    ) -> np.ndarray:
        array = ResumableArray(
            self._folder / f"{name}.work", (len(texts), width), np.float32, chunk=_CHUNK, **self._key
        )
        self._arrays.append(array)
        for start in range(array.done * _CHUNK, len(texts), _CHUNK):
            array.values[start : start + _CHUNK] = compute(texts[start : start + _CHUNK])
            array.save(start // _CHUNK + 1)
        return array.values

    def remove(self) -> None:
        """Delete the files."""
        for array in self._arrays:
            array.remove()


class Columns(Dataset):
    """Rows of arrays of one length, each a dictionary of its columns."""

    def __init__(self, **columns: np.ndarray) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: column[index] for name, column in self.columns.items()}


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch: each column `[B, ...]`."""
    return {name: torch.from_numpy(np.stack([item[name] for item in items])) for name in items[0]}


def source_weights(sources: Sequence[str], balanced: bool) -> dict[str, float]:
    """The weight of a text of each source in the loss, 1 on average; balanced, all texts of a source weigh alike."""
    counts = Counter(sources)
    return {source: len(sources) / (len(counts) * count) if balanced else 1.0 for source, count in counts.items()}


class _Training(nn.Module):
    """The network and its loss, in the form that `Trainer` expects."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, embeddings: Tensor, labels: Tensor, weights: Tensor, adapter_logits: Tensor | None = None
    ) -> dict[str, Tensor]:
        """With the adapters' logits, `[B, K]`, labels are those of the texts; without, places of their sources."""
        gates = self.network(embeddings)
        if adapter_logits is None:
            loss = F.cross_entropy(gates, labels, reduction="none")
        else:
            blended = (gates.softmax(-1) * adapter_logits).sum(-1)
            loss = F.binary_cross_entropy_with_logits(blended, labels, reduction="none")
        return {"loss": (loss * weights).mean(), "gates": gates}
