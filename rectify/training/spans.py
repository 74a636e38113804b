"""Training of a span detector: trunk or LoRA adapter, and head, by cross-entropy of tokens or segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import EvalPrediction, TrainerCallback, TrainingArguments, set_seed

from rectify.detectors.classifier import pad
from rectify.detectors.span_decoding import EncodedTexts, spans_of, token_labels, word_scores
from rectify.detectors.spans import SpanDetector, pad_flags
from rectify.errors import InvalidArgumentError
from rectify.evaluation.span_f1 import character_f1
from rectify.hub import current_fingerprint
from rectify.json_files import sha256_of, write_json
from rectify.text_files import AnnotatedText
from rectify.training.running import RESULTS_FILE, checkpoint_to_resume
from rectify.training.trainer import AdapterTrainer, ModelTraining, run_record, use_fast_attention

THRESHOLDS = tuple(step / 20 for step in range(1, 20))


@dataclass
class SpanSettings:
    """What is trained; each field is a flag of `rectify train spans`."""

    model_name_or_path: str = field(metadata={"help": "backbone: folder, Hub id, or pocket"})
    model_revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a Hub id"})
    head: Literal["token", "segment"] = field(
        default="token", metadata={"help": "token: plain token classification; segment: Segment-CNN"}
    )
    max_length: int = field(default=256, metadata={"help": "tokens of a window; longer texts have several"})
    overlap: int = field(default=64, metadata={"help": "tokens that neighbouring windows of a text share"})
    lora_r: int = field(default=0, metadata={"help": "rank of a LoRA adapter; 0 trains and saves the whole backbone"})
    lora_alpha: int = field(default=16, metadata={"help": "the adapter is scaled by lora_alpha / lora_r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before the adapter"})
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "modules that are adapted, by the end of their names"}
    )

    def __post_init__(self) -> None:
        if self.lora_r < 0:
            raise InvalidArgumentError(f"lora_r is {self.lora_r}: give a rank, or 0 to train the whole backbone")


def train_spans(
    settings: SpanSettings,
    arguments: TrainingArguments,
    train: Sequence[AnnotatedText],
    validation: Sequence[AnnotatedText],
    callbacks: Sequence[TrainerCallback] = (),
) -> SpanDetector:
    """Train a span detector and save it in `arguments.output_dir`; killed, the same call goes on from its checkpoint.

    The threshold is the one of `THRESHOLDS` with the highest character F1 on the validation texts. The folder also gets
    `all_results.json`, and `training` of the detector's configuration what it was trained on and that F1.

    Args:
        settings: what is trained.
        arguments: how, for `transformers.Trainer`; `train_sampling_strategy` may be `"group_by_length"`, and
            `metric_for_best_model` `"character_f1"`.
        train, validation: texts with their spans.
        callbacks: of the Trainer.

    Returns:
        The detector, in evaluation mode, on the device that it was trained on.

    Raises:
        InvalidArgumentError: no text has a token, a setting is out of range, or the folder holds another training.
        CheckpointError: nothing usable is at `model_name_or_path`.
    """
    digest = sha256_of([train, validation])
    fingerprint = current_fingerprint(settings.model_name_or_path, settings.model_revision)
    checkpoint = checkpoint_to_resume(
        arguments, RESULTS_FILE, **asdict(settings), texts_sha256=digest, base_fingerprint=fingerprint
    )
    set_seed(arguments.seed)
    detector = SpanDetector.from_backbone(
        settings.model_name_or_path,
        revision=settings.model_revision,
        head=settings.head,
        max_length=settings.max_length,
        overlap=settings.overlap,
        lora_r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.target_modules,
    )
    use_fast_attention(detector.backbone, arguments)
    data, held = (
        LabelledWindows(detector, rows, name) for rows, name in ((train, "train"), (validation, "validation"))
    )
    trainer = AdapterTrainer(
        model=_Training(detector),
        args=arguments,
        train_dataset=data,
        eval_dataset=held.by_length(),
        data_collator=collate,
        compute_metrics=held.figures,
        callbacks=list(callbacks),
    )
    results = trainer.train_to_end(checkpoint)
    results |= trainer.evaluate()
    detector.config.threshold = results["eval_threshold"]
    detector.config.training = {
        **{name: value for name, value in asdict(settings).items() if name.startswith(("lora", "target"))},
        "texts": len(train),
        "texts_sha256": digest,
        **run_record(trainer),
        "validation": {"n": len(validation), "character_f1": results["eval_character_f1"]},
    }
    if trainer.is_world_process_zero():
        folder = Path(str(arguments.output_dir))
        detector.save_pretrained(folder)
        # the last file, as it says that the training is finished
        write_json(folder / RESULTS_FILE, results)
    return detector.eval()


def tuned_threshold(
    rows: Sequence[AnnotatedText], encoded: EncodedTexts, scores: Sequence[np.ndarray]
) -> tuple[float, float]:
    """The threshold of `THRESHOLDS` with the highest mean character F1, and that F1; of equal ones the lowest.

    Args:
        rows: texts with their spans.
        encoded: their tokens.
        scores: of each text `[n]`, how probably each token is toxic.
    """
    annotated = [row.spans for row in rows]
    parts = zip(rows, encoded.offsets, scores, strict=True)
    words = [(row.text, offsets, word_scores(row.text, offsets, score)) for row, offsets, score in parts]
    found = []
    for threshold in THRESHOLDS:
        predicted = [spans_of(text, offsets, score, threshold) for text, offsets, score in words]
        found.append(float(character_f1(predicted, annotated).mean()))
    best = int(np.argmax(found))
    return THRESHOLDS[best], found[best]


# ---------------------------------------------------------------------------------------------------------------------
# Data, loss, Trainer


class LabelledWindows(Dataset):
    """The windows of texts with the labels of their tokens.

    Raises:
        InvalidArgumentError: no text has a token.
    """

    def __init__(self, detector: SpanDetector, rows: Sequence[AnnotatedText], name: str) -> None:
        self.rows = rows
        self.encoded = detector.encode([row.text for row in rows])
        parts = zip(self.encoded.offsets, rows, strict=True)
        toxic = [token_labels(offsets, row.spans) for offsets, row in parts]
        self.items: list[dict[str, Any]] = []
        for window in self.encoded.windows:
            own = window.own
            labels = np.zeros_like(own)
            labels[own] = toxic[window.text][window.first : window.first + window.count]
            self.items.append({"input_ids": window.input_ids, "own": own, "labels": labels})
        if not self.items:
            raise InvalidArgumentError(f"{name} has {len(rows)} texts, none with a token: give at least one that has")
        self._order = list(range(len(self.items)))

    def by_length(self) -> LabelledWindows:
        """The same with its longest windows first, for batches of nearly equal length."""
        self._order.sort(key=lambda index: -len(self.items[index]["input_ids"]))
        return self

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[self._order[index]]

    def figures(self, prediction: EvalPrediction) -> dict[str, float]:
        """The highest character F1 and its threshold, in the form that `transformers.Trainer` calls."""
        logits = np.asarray(prediction.predictions, dtype=np.float64)
        rows = [np.empty(0)] * len(self.items)
        for row, index in zip(logits, self._order, strict=True):
            window = self.encoded.windows[index]
            rows[index] = row[window.begin : window.begin + window.count]
        scores = [1 / (1 + np.exp(-row)) for row in self.encoded.merged(rows)]
        threshold, f1 = tuned_threshold(self.rows, self.encoded, scores)
        return {"character_f1": f1, "threshold": threshold}


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """A right-padded batch: `input_ids` and `attention_mask` `[B, T]` int64, `own` and `labels` `[B, T]` bool."""
    ids, mask = pad([item["input_ids"] for item in items])
    own, labels = (pad_flags([item[name] for item in items]) for name in ("own", "labels"))
    return {"input_ids": ids, "attention_mask": mask, "own": own, "labels": labels}


class _Training(ModelTraining):
    """The detector and its loss, in the form that `Trainer` expects."""

    def __init__(self, detector: SpanDetector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, input_ids: Tensor, attention_mask: Tensor, own: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.detector(input_ids, attention_mask, own)
        targets, counted = self.detector.head.targets(labels, own)
        loss = nn.functional.binary_cross_entropy_with_logits(logits[counted], targets[counted].to(logits.dtype))
        return {"loss": loss, "logits": self.detector.head.token_logits(logits)}
