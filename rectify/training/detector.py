"""Training of a toxicity classifier: LoRA adapter and head, by cross-entropy with hard or soft labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import IntervalStrategy

from rectify.detectors.classifier import ToxicityClassifier, pad
from rectify.errors import InvalidArgumentError, RectifyError
from rectify.generation.output import sha256_of, write_json
from rectify.training.running import checkpoint_to_resume
from rectify.training.score_calibration import calibration_curve
from rectify.training.trainer import AdapterTrainer, use_fast_attention

RESULTS_FILE = "all_results.json"

Row = tuple[str, float] | tuple[str, Sequence[float]]


@dataclass
class DetectorSettings:
    """What is trained; each field is a flag of `rectify train detector`."""

    model_name_or_path: str = field(metadata={"help": "backbone: folder, Hub id, or pocket"})
    model_revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a Hub id"})
    max_length: int = field(default=256, metadata={"help": "tokens of a text that are read, from its start"})
    lora_r: int = field(default=8, metadata={"help": "rank of the adapter"})
    lora_alpha: int = field(default=16, metadata={"help": "the adapter is scaled by lora_alpha / lora_r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before the adapter"})
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "modules that are adapted, by the end of their names"}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "stop after so many evaluations without a better one, and keep the best"}
    )
    calibration: Literal["none", "curve"] = field(
        default="none", metadata={"help": "curve: bring the probabilities to the scale of the validation labels"}
    )

    def __post_init__(self) -> None:
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise InvalidArgumentError(f"early_stopping_patience is {self.early_stopping_patience}: give 1 or more")


def train_detector(
    settings: DetectorSettings,
    arguments: TrainingArguments,
    train: Sequence[Row],
    validation: Sequence[Row],
    callbacks: Sequence[TrainerCallback] = (),
    labels: Sequence[str] = ("toxic",),
) -> ToxicityClassifier:
    """Train a classifier and save it in `arguments.output_dir`; killed, the same call goes on from its checkpoint.

    Texts without a token are left out. The folder also gets `all_results.json`, and `training` of the classifier's
    configuration what it was trained on and `validation_figures`, those before calibration.

    Args:
        settings: what is trained.
        arguments: how, for `transformers.Trainer`; `train_sampling_strategy` may be `"group_by_length"`.
        train, validation: texts, and their labels from 0 (clean) to 1 (toxic): a number, or one for each of `labels`,
            NaN where it is not known.
        callbacks: of the Trainer.
        labels: what the classifier's logits stand for.

    Returns:
        The classifier, in evaluation mode, on the device that it was trained on.

    Raises:
        InvalidArgumentError: there is no text, a setting is out of range, or the folder holds another training.
        CheckpointError: nothing usable is at `model_name_or_path`.
        RectifyError: scikit-learn is not installed.
    """
    _scikit_learn()  # missing, it is to be missed now and not after the training
    rows = [
        [(text, np.atleast_1d(label).astype(float).tolist()) for text, label in part] for part in (train, validation)
    ]
    digest = sha256_of(rows)
    callbacks = [*callbacks, *_early_stopping(settings, arguments)]
    checkpoint = checkpoint_to_resume(arguments, RESULTS_FILE, **asdict(settings), texts_sha256=digest)
    set_seed(arguments.seed)
    classifier = ToxicityClassifier.from_backbone(
        settings.model_name_or_path,
        revision=settings.model_revision,
        labels=labels,
        max_length=settings.max_length,
        lora_r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.target_modules,
    )
    use_fast_attention(cast(PreTrainedModel, classifier.model.get_base_model()), arguments)
    data, held = (
        EncodedTexts(classifier, part, name) for part, name in zip(rows, ("train", "validation"), strict=True)
    )
    held.items.sort(key=lambda item: -len(item["input_ids"]))  # batches of nearly equal length
    trainer = AdapterTrainer(
        model=_Training(classifier),
        args=arguments,
        train_dataset=data,
        eval_dataset=held,
        data_collator=collate,
        compute_metrics=partial(_compute_metrics, labels),
        callbacks=list(callbacks),
    )
    results = dict(trainer.train(resume_from_checkpoint=checkpoint).metrics)
    predicted = trainer.predict(cast(Any, held), metric_key_prefix="eval")
    results |= predicted.metrics or {}
    names = [_figure(labels, label, name) for label in labels for name in FIGURES]
    figures = {name: results[f"eval_{name}"] for name in names if f"eval_{name}" in results}
    classifier.config.training = {
        **{name: value for name, value in asdict(settings).items() if name.startswith(("lora", "target"))},
        "texts": len(data),
        "texts_sha256": digest,
        "epochs": trainer.state.epoch,
        "steps": trainer.state.global_step,
        "batch_size": arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size,
        "learning_rate": arguments.learning_rate,
        "seed": arguments.seed,
        "validation": figures,
    }
    if settings.calibration == "curve":
        classifier.config.calibration = _curves(labels, predicted)
    if trainer.is_world_process_zero():
        folder = Path(str(arguments.output_dir))
        classifier.save_pretrained(folder)
        # the last file, as it says that the training is finished
        write_json(folder / RESULTS_FILE, results)
    return classifier.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Figures

FIGURES = ("n", "toxic_share", "auc", "average_precision", "accuracy", "f1", "brier", "brier_constant", "pearson")


def validation_figures(probability: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """How good probabilities are.

    Args:
        probability: `[N]` in [0, 1].
        label: `[N]` in [0, 1]; from 0.5 on, a text counts as toxic.

    Returns:
        `n`, `toxic_share`, `auc` and `average_precision` (left out where all texts count alike), `accuracy` and `f1`
        at 0.5, `brier` against the labels as they are, `brier_constant`, that of their mean, and, where labels are
        soft, their correlation `pearson`.
    """
    metrics = _scikit_learn()
    probability, label = probability.astype(np.float64), label.astype(np.float64)
    toxic, said = label >= 0.5, probability >= 0.5
    figures: dict[str, float] = {"n": len(label), "toxic_share": float(toxic.mean())}
    if toxic.any() and not toxic.all():
        figures["auc"] = float(metrics.roc_auc_score(toxic, probability))
        figures["average_precision"] = float(metrics.average_precision_score(toxic, probability))
    figures["accuracy"] = float((toxic == said).mean())
    figures["f1"] = float(metrics.f1_score(toxic, said, zero_division=0.0))
    figures["brier"] = float(np.mean((probability - label) ** 2))
    figures["brier_constant"] = float(np.var(label))
    if ((label > 0) & (label < 1)).any() and np.std(label) > 0 and np.std(probability) > 0:
        figures["pearson"] = float(np.corrcoef(probability, label)[0, 1])
    return figures


def _figure(labels: Sequence[str], label: str, name: str) -> str:
    """What a figure is called; those of several labels begin with the label."""
    return name if len(labels) == 1 else f"{label}/{name}"


def _compute_metrics(labels: Sequence[str], prediction: EvalPrediction) -> dict[str, float]:
    """`validation_figures` of each label, in the form that `transformers.Trainer` calls."""
    figures: dict[str, float] = {}
    for label, probability, truth in _known(labels, prediction):
        found = validation_figures(probability, truth)
        figures |= {_figure(labels, label, name): value for name, value in found.items()}
    return figures


def _curves(labels: Sequence[str], prediction: Any) -> dict[str, list[list[float]]]:
    """The calibration of each label that has been seen."""
    return {label: calibration_curve(probability, truth) for label, probability, truth in _known(labels, prediction)}


def _known(labels: Sequence[str], prediction: Any) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Each label, with the probabilities and labels of the texts for which it is known, if there are any."""
    probabilities = torch.as_tensor(np.asarray(prediction.predictions)).double().sigmoid().numpy()
    truth = np.asarray(prediction.label_ids)
    for place, label in enumerate(labels):
        known = ~np.isnan(truth[:, place])
        if known.any():
            yield label, probabilities[known, place], truth[known, place]


def _scikit_learn() -> Any:
    try:
        from sklearn import metrics
    except ImportError as error:
        raise RectifyError("scikit-learn is not installed: pip install 'rectify[train]'") from error
    return metrics


# ---------------------------------------------------------------------------------------------------------------------
# Data, loss, Trainer


class EncodedTexts(Dataset):
    """Token ids and labels; texts without a token are left out.

    Raises:
        InvalidArgumentError: a label is out of range, or no text is left.
    """

    def __init__(self, classifier: ToxicityClassifier, rows: Sequence[tuple[str, list[float]]], name: str) -> None:
        width = len(classifier.config.labels)
        for index, (_, labels) in enumerate(rows):
            if len(labels) != width:
                raise InvalidArgumentError(f"{name}[{index}] has {len(labels)} labels: give {width}")
            for label in labels:
                if not (0 <= label <= 1 or (label != label and width > 1)):
                    raise InvalidArgumentError(f"{name}[{index}] has the label {label}: give a number from 0 to 1")
        encoded = classifier.encode([text for text, _ in rows])
        self.items: list[dict[str, Any]] = [
            {"input_ids": ids, "labels": labels} for ids, (_, labels) in zip(encoded, rows, strict=True) if ids
        ]
        if not self.items:
            raise InvalidArgumentError(f"{name} has {len(rows)} texts, none with a token: give at least one that has")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """A right-padded batch: `input_ids` and `attention_mask` `[B, T]` int64, `labels` `[B, L]` float32."""
    ids, mask = pad([item["input_ids"] for item in items])
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([item["labels"] for item in items])}


def soft_label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of `[B, L]` float32 logits with labels in [0, 1], averaged over those that are known (not NaN)."""
    known = ~labels.isnan()
    loss = nn.functional.binary_cross_entropy_with_logits(logits, labels.where(known, 0), reduction="none")
    return loss.where(known, 0).sum() / known.sum().clamp_min(1)


class _Training(nn.Module):
    """The classifier and its loss, in the form that `Trainer` expects."""

    def __init__(self, classifier: ToxicityClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.classifier(input_ids, attention_mask)
        return {"loss": soft_label_loss(logits, labels), "logits": logits}


def _early_stopping(settings: DetectorSettings, arguments: TrainingArguments) -> list[TrainerCallback]:
    """The callback, if it is asked for, and what the Trainer needs for it."""
    if settings.early_stopping_patience is None:
        return []
    evaluates, saves = (IntervalStrategy(at).value for at in (arguments.eval_strategy, arguments.save_strategy))
    if evaluates != saves or evaluates == "no":
        raise InvalidArgumentError(
            f"early_stopping_patience needs a checkpoint at each evaluation, but eval_strategy is {evaluates!r} and "
            f"save_strategy {saves!r}: set both alike"
        )
    arguments.load_best_model_at_end = True
    arguments.metric_for_best_model = arguments.metric_for_best_model or "loss"
    if arguments.greater_is_better is None:
        arguments.greater_is_better = not arguments.metric_for_best_model.endswith(("loss", "brier"))
    arguments.restore_callback_states_from_checkpoint = True  # its count of evaluations, that is
    return [EarlyStoppingCallback(early_stopping_patience=settings.early_stopping_patience)]
