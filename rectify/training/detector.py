"""Training of a toxicity classifier: an adapter and a head, or all weights, on labels that are hard or soft."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import IntervalStrategy

from rectify.detectors.backbone import Quantization
from rectify.detectors.classifier import ToxicityClassifier, pad
from rectify.detectors.config import DetectorConfig, Form
from rectify.errors import InvalidArgumentError, RectifyError
from rectify.extras import need_extra
from rectify.hub import current_fingerprint
from rectify.json_files import sha256_of, write_json
from rectify.training.detector_figures import label_figures, scikit_learn
from rectify.training.running import RESULTS_FILE, checkpoint_to_resume
from rectify.training.score_calibration import calibration_curve, calibration_temperature
from rectify.training.trainer import AdapterTrainer, ModelTraining, run_record, use_fast_attention

Label = float | Sequence[float]
Text = str | tuple[str, str]
"""A text, or a question and its answer, as the classifier reads them."""
Row = tuple[Text, Label] | tuple[Text, Label, str]


@dataclass
class DetectorSettings:
    """What is trained; each field is a flag of `rectify train detector`."""

    model_name_or_path: str = field(metadata={"help": "backbone: folder, Hub id, or pocket"})
    model_revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a Hub id"})
    form: Form = field(
        default="sequence",
        metadata={"help": "prefix: predict the finished text's label at each token, on a causal backbone"},
    )
    quantization: Quantization = field(
        default="none", metadata={"help": "nf4: the backbone in 4 bits (QLoRA); needs bitsandbytes, the extra [quant]"}
    )
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
    class_weights: Literal["none", "balanced"] = field(
        default="none", metadata={"help": "balanced: toxic and clean texts count alike in the loss, however many"}
    )
    calibration: Literal["none", "curve", "temperature"] = field(
        default="none",
        metadata={
            "help": "bring the probabilities to the scale of the validation labels by a curve, or by a temperature, "
            "which keeps what is above 0.5 there"
        },
    )

    def __post_init__(self) -> None:
        if self.quantization == "nf4":
            need_extra("quant", "quantization is 'nf4'")
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise InvalidArgumentError(f"early_stopping_patience is {self.early_stopping_patience}: give 1 or more")

    def classifier_settings(self) -> dict[str, Any]:
        """The arguments of `from_backbone` but for the labels."""
        return {
            "name": self.model_name_or_path,
            "revision": self.model_revision,
            "form": self.form,
            "quantization": self.quantization,
            "max_length": self.max_length,
            "lora_r": self.lora_r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": self.target_modules,
        }


def train_detector(
    settings: DetectorSettings,
    arguments: TrainingArguments,
    train: Sequence[Row],
    validation: Sequence[Row],
    callbacks: Sequence[TrainerCallback] = (),
    labels: Sequence[str] = ("toxic",),
    kind: type[ToxicityClassifier] = ToxicityClassifier,
    finish: Callable[[Any, np.ndarray, np.ndarray], dict[str, Any]] | None = None,
) -> ToxicityClassifier:
    """Train a classifier and save it in `arguments.output_dir`; killed, the same call goes on from its checkpoint.

    Texts without a token are left out. The folder also gets `all_results.json`, with the log of the training, and
    `training` of the classifier's configuration what it was trained on, and its figures on the validation texts:
    `validation`, those of `detector_figures` before calibration, `calibrated`, after it, and both for each source.

    Args:
        settings: what is trained.
        arguments: how, for `transformers.Trainer`; `train_sampling_strategy` may be `"group_by_length"`.
        train, validation: texts, their labels from 0 (clean) to 1 (toxic), a number, or one for each of `labels`,
            NaN where it is not known, and, if it is to be told, the source of each.
        callbacks: of the Trainer.
        labels: what the classifier's logits stand for.
        kind: of classifier.
        finish: given the trained classifier, and probabilities and labels of the validation texts, `[N, L]` each; what
            it returns is added to what is recorded.

    Returns:
        The classifier, in evaluation mode, on the device that it was trained on.

    Raises:
        InvalidArgumentError: there is no text, or but one class, a setting is out of range, or the folder holds
            another training.
        CheckpointError: nothing usable is at `model_name_or_path`.
        RectifyError: scikit-learn is not installed, or no gradient reaches the adapter.
    """
    scikit_learn()  # missing, it is to be missed now and not after the training
    rows = [
        [(text, np.atleast_1d(label).astype(float).tolist(), *source) for text, label, *source in part]
        for part in (train, validation)
    ]
    digest = sha256_of(rows)
    callbacks = [*callbacks, *early_stopping(settings.early_stopping_patience, arguments), _GradientCheck()]
    fingerprint = current_fingerprint(settings.model_name_or_path, settings.model_revision)
    checkpoint = checkpoint_to_resume(
        arguments, RESULTS_FILE, **asdict(settings), texts_sha256=digest, base_fingerprint=fingerprint
    )
    set_seed(arguments.seed)
    classifier = kind.from_backbone(labels=labels, **settings.classifier_settings())
    use_fast_attention(classifier.inner, arguments)
    data, held = (
        EncodedTexts(classifier, part, name) for part, name in zip(rows, ("train", "validation"), strict=True)
    )
    data.check_classes(labels)
    held.items.sort(key=lambda item: -len(item["input_ids"]))  # batches of nearly equal length
    weights = balanced_weights(data.labels) if settings.class_weights == "balanced" else None
    trainer = AdapterTrainer(
        model=_Training(classifier, weights),
        args=arguments,
        train_dataset=data,
        eval_dataset=held,
        data_collator=collate,
        compute_metrics=partial(_compute_metrics, labels),
        callbacks=list(callbacks),
    )
    results: dict[str, Any] = trainer.train_to_end(checkpoint)
    predicted = trainer.predict(cast(Any, held), metric_key_prefix="eval")
    results |= predicted.metrics or {}
    logits = torch.as_tensor(np.asarray(predicted.predictions))
    if settings.calibration != "none":
        classifier.config.calibration = fit_calibration(settings.calibration, labels, logits, held.labels)
    figures = _figures(classifier.config, logits, held)
    for source in figures["sources"]:
        figures["sources"][source]["texts"] = data.sources.count(source)
    classifier.config.training = {
        **{name: value for name, value in asdict(settings).items() if name.startswith(("lora", "target", "class"))},
        "texts": len(data),
        "texts_sha256": digest,
        **run_record(trainer),
        **figures,
    }
    results |= {name: figures[name] for name in ("calibrated", "sources") if name in figures}
    if finish is not None:
        further = finish(classifier, classifier.config.probabilities(logits).numpy(), held.labels)
        results |= further
        classifier.config.training |= further
    results["history"] = trainer.state.log_history
    whole = whole_weights(classifier.model)
    if trainer.is_world_process_zero():
        folder = Path(str(arguments.output_dir))
        classifier.save_pretrained(folder, whole)
        # the last file, as it says that the training is finished
        write_json(folder / RESULTS_FILE, results)
    return classifier.eval()


def whole_weights(model: nn.Module) -> dict[str, Tensor] | None:
    """The weights of a model whose parameters are sharded, whole, on the CPU, and on the first process alone.

    All processes are to call it. `None` where nothing is sharded.
    """
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))


def _compute_metrics(labels: Sequence[str], prediction: EvalPrediction) -> dict[str, float]:
    """`label_figures` in the form that `transformers.Trainer` calls."""
    logits = torch.as_tensor(np.asarray(prediction.predictions))
    return label_figures(labels, logits.sigmoid().numpy(), np.asarray(prediction.label_ids))


def fit_calibration(
    kind: str, labels: Sequence[str], logits: Tensor, truth: np.ndarray
) -> dict[str, float | list[list[float]]]:
    """The `"curve"` or `"temperature"` of each label that has been seen, from `[N, L]` logits and labels."""
    found: dict[str, float | list[list[float]]] = {}
    for place, label in enumerate(labels):
        known = ~np.isnan(truth[:, place])
        if not known.any():
            continue
        column, wanted = logits[known, place].double(), truth[known, place]
        if kind == "curve":
            found[label] = calibration_curve(column.sigmoid().numpy(), wanted)
        else:
            found[label] = calibration_temperature(column.numpy(), wanted)
    return found


def _figures(config: DetectorConfig, logits: Tensor, held: EncodedTexts) -> dict[str, Any]:
    """The figures of all texts and of those of each source, with `calibrated` ones where there is a calibration."""
    values = {"validation": replace(config, calibration={}).probabilities(logits).numpy()}
    if config.calibration:
        values["calibrated"] = config.probabilities(logits).numpy()

    def of(chosen: np.ndarray) -> dict[str, Any]:
        return {name: label_figures(config.labels, some[chosen], held.labels[chosen]) for name, some in values.items()}

    sources = np.array(held.sources)
    by_source = {source: of(sources == source) for source in sorted(set(held.sources) - {""})}
    return {**of(np.ones(len(sources), dtype=bool)), "sources": by_source}


# ---------------------------------------------------------------------------------------------------------------------
# Data, loss, Trainer


class EncodedTexts(Dataset):
    """Token ids, labels and sources, in `items`; texts without a token are left out.

    Args:
        classifier: that encodes them.
        rows: texts, the labels of each, and, if it is to be told, its source.
        name: what messages call them.

    Raises:
        InvalidArgumentError: a label is out of range, or no text is left.
    """

    def __init__(self, classifier: ToxicityClassifier, rows: Sequence[tuple[Any, ...]], name: str) -> None:
        width = len(classifier.config.labels)
        for index, (_, labels, *_) in enumerate(rows):
            if len(labels) != width:
                raise InvalidArgumentError(f"{name}[{index}] has {len(labels)} labels: give {width}")
            for label in labels:
                if not (0 <= label <= 1 or (label != label and width > 1)):
                    raise InvalidArgumentError(f"{name}[{index}] has the label {label}: give a number from 0 to 1")
        encoded = classifier.encode([row[0] for row in rows])
        self.items: list[dict[str, Any]] = [
            {"input_ids": ids, "labels": labels, "source": source[0] if source else ""}
            for ids, (_, labels, *source) in zip(encoded, rows, strict=True)
            if ids
        ]
        if not self.items:
            raise InvalidArgumentError(f"{name} has {len(rows)} texts, none with a token: give at least one that has")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]

    @property
    def labels(self) -> np.ndarray:
        """`[N, L]` float64, NaN where a label is not known."""
        return np.array([item["labels"] for item in self.items], dtype=np.float64)

    @property
    def sources(self) -> list[str]:
        """Of each text, empty where it was not told."""
        return [item["source"] for item in self.items]

    def check_classes(self, names: Sequence[str]) -> None:
        """Refuse labels that teach nothing.

        Raises:
            InvalidArgumentError: all texts have the same one; where there are several labels, of each of them.
        """
        known = [(name, column[~np.isnan(column)]) for name, column in zip(names, self.labels.T, strict=True)]
        known = [(name, column) for name, column in known if len(column)]
        # a rare category may be in no text of a sample
        if known and all((column == column[0]).all() for _, column in known):
            name, column = known[0]
            raise InvalidArgumentError(
                f"all {len(column)} training texts have the label {column[0]:g} of {name!r}: give files with others "
                "too, or see whether label_column and label_values name the right ones"
            )


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """A right-padded batch: `input_ids` and `attention_mask` `[B, T]` int64, `labels` `[B, L]` float32."""
    ids, mask = pad([item["input_ids"] for item in items])
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([item["labels"] for item in items])}


def balanced_weights(labels: np.ndarray) -> Tensor:
    """`[2, L]` float32: the weights of clean and of toxic by which both count alike in the loss, and 1 on average.

    For hard labels those of scikit-learn's `compute_class_weight("balanced")`; of soft ones, each counts in part.

    Args:
        labels: `[N, L]` in [0, 1], NaN where one is not known.
    """
    known = np.count_nonzero(~np.isnan(labels), axis=0)
    toxic = np.nansum(labels, axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = known / (2 * np.stack((known - toxic, toxic)))
    return torch.tensor(np.where(np.isfinite(weights), weights, 1.0), dtype=torch.float32)


def soft_label_loss(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Cross-entropy of logits with soft labels, averaged over those that are known.

    Args:
        logits: `[B, L]` float32.
        labels: `[B, L]` in [0, 1], NaN where one is not known.
        class_weights: `[2, L]`, of clean and of toxic.
    """
    known = ~labels.isnan()
    loss = _cross_entropy(logits, labels.where(known, 0), class_weights)
    return loss.where(known, 0).sum() / known.sum().clamp_min(1)


def prefix_loss(logits: Tensor, attention_mask: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """`soft_label_loss` of all prefixes, where that of `t` tokens of a text of `T` has the weight `t / (1 + … + T)`.

    Each text counts alike, and the more of it is read, the more it is to be told. Source: the weights of the cumulative
    loss of Deng and Raffel, RAD, EMNLP 2023 (arXiv 2310.09520), with the cross-entropy for their squared error.

    Args:
        logits: `[B, T, L]` float32, see `ToxicityClassifier.position_logits`.
        attention_mask: `[B, T]`, 0 at padding.
        labels, class_weights: as in `soft_label_loss`.
    """
    known = ~labels.isnan()
    shares = attention_mask * attention_mask.cumsum(-1)
    shares = shares / shares.sum(-1, keepdim=True)
    loss = _cross_entropy(logits, labels.where(known, 0)[:, None].expand_as(logits), class_weights)
    loss = (loss * shares[..., None]).sum(1)
    return loss.where(known, 0).sum() / known.sum().clamp_min(1)


def _cross_entropy(logits: Tensor, labels: Tensor, class_weights: Tensor | None) -> Tensor:
    if class_weights is None:
        return nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    clean, toxic = class_weights
    return nn.functional.binary_cross_entropy_with_logits(
        logits, labels, weight=clean, pos_weight=toxic / clean, reduction="none"
    )


class _Training(ModelTraining):
    """The classifier and its loss, in the form that `Trainer` expects."""

    class_weights: Tensor | None

    def __init__(self, classifier: ToxicityClassifier, class_weights: Tensor | None) -> None:
        super().__init__()
        self.classifier = classifier
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if self.classifier.config.form == "sequence":
            logits = self.classifier(input_ids, attention_mask)
            return {"loss": soft_label_loss(logits, labels, self.class_weights), "logits": logits}
        logits = self.classifier.position_logits(input_ids, attention_mask)
        last = attention_mask.sum(-1) - 1  # `collate` pads on the right
        loss = prefix_loss(logits, attention_mask, labels, self.class_weights)
        return {"loss": loss, "logits": logits[torch.arange(len(last), device=last.device), last]}


class _GradientCheck(TrainerCallback):
    """Refuses a training whose first step leaves the adapter as it is."""

    def __init__(self) -> None:
        self._done = False

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any
    ) -> None:
        if self._done or model is None:
            return
        self._done = True
        gradients = [weight.grad for name, weight in model.named_parameters() if "lora_" in name]
        if gradients and all(gradient is not None and not gradient.any() for gradient in gradients):
            raise RectifyError(
                "no gradient reaches the adapter: was a 4-bit backbone evaluated before? Load it anew, or give "
                "quantization none"
            )


def early_stopping(patience: int | None, arguments: TrainingArguments) -> list[TrainerCallback]:
    """The callback, if it is asked for; what the Trainer needs for it is set in its arguments.

    Raises:
        InvalidArgumentError: there is no checkpoint for each evaluation.
    """
    if patience is None:
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
    return [EarlyStoppingCallback(early_stopping_patience=patience)]
