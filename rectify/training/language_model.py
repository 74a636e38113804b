"""A LoRA adapter of a causal language model, trained by cross-entropy on texts or on answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel, TrainerCallback, TrainingArguments

from rectify.adapters import add_adapter
from rectify.context import context_length
from rectify.detectors.classifier import pad
from rectify.errors import InvalidArgumentError
from rectify.quiet_peft import PeftModel, TaskType
from rectify.training.trainer import AdapterTrainer, ModelTraining, use_fast_attention

LEFT_OUT = -100
"""The label of a token that is not predicted, as `cross_entropy` calls it."""


@dataclass
class AdapterSettings:
    """A LoRA adapter of a causal language model; each field is a flag of the trainings that make one."""

    model_name_or_path: str = field(metadata={"help": "causal language model: folder, Hub id, or pocket"})
    model_revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a Hub id"})
    lora_r: int = field(default=16, metadata={"help": "rank of each adapter"})
    lora_alpha: int = field(default=32, metadata={"help": "an adapter is scaled by lora_alpha / lora_r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before the adapter"})
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "modules that are adapted, by the end of their names"}
    )


class EncodedItems(Protocol):
    """A data set with `input_ids` in each of its items, and `labels` where not all tokens are to be predicted."""

    items: list[dict[str, Any]]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def with_adapter(model: PreTrainedModel, settings: AdapterSettings) -> PeftModel:
    """A language model with a new adapter, drawn from torch's random generator.

    Raises:
        InvalidArgumentError: the settings make none.
    """
    return add_adapter(
        model,
        settings.model_name_or_path,
        task_type=TaskType.CAUSAL_LM,
        lora_r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.target_modules,
    )


def check_length(model: PreTrainedModel, max_length: int) -> None:
    """Refuse texts of fewer than two tokens, or of more than a model reads.

    Raises:
        InvalidArgumentError: `max_length` is out of range.
    """
    context = context_length(model.config)
    if max_length < 2 or (context is not None and max_length > context):
        limit = f"to {context}, the model's context" if context is not None else "on"
        raise InvalidArgumentError(f"max_length is {max_length}: give a number from 2 {limit}")


def fit(
    model: PeftModel,
    arguments: TrainingArguments,
    data: EncodedItems,
    held: EncodedItems,
    checkpoint: str | None,
    callbacks: Sequence[TrainerCallback],
) -> tuple[AdapterTrainer, dict[str, Any]]:
    """Train the adapter of a language model.

    Args:
        model: the model with its adapter.
        arguments: of the Trainer.
        data: what it learns.
        held: what it is evaluated on; sorted, so that batches are of nearly equal length.
        checkpoint: to go on from.
        callbacks: of the Trainer.

    Returns:
        The Trainer, and its figures: of the training, and those of `held`, which begin with `eval_`.
    """
    use_fast_attention(cast(PreTrainedModel, model.get_base_model()), arguments)
    held.items.sort(key=lambda item: -len(item["input_ids"]))
    trainer = AdapterTrainer(
        model=LanguageModelTraining(model),
        args=arguments,
        train_dataset=cast(Any, data),
        eval_dataset=cast(Any, held),
        data_collator=collate,
        compute_metrics=nats_a_token,
        callbacks=list(callbacks),
    )
    results = trainer.train_to_end(checkpoint)
    results |= trainer.predict(cast(Any, held), metric_key_prefix="eval").metrics or {}
    return trainer, results


class LanguageModelTraining(ModelTraining):
    """The language model and its loss, in the form that `Trainer` expects."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        nll, tokens = text_nll(logits, labels)
        return {"loss": nll.sum() / tokens.sum().clamp_min(1), "nll": nll, "tokens": tokens}


def text_nll(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of texts, in nats.

    Args:
        logits: `[B, T, V]`, those of the next token.
        labels: `[B, T]` int64 tokens, −100 at padding.

    Returns:
        `[B]` float32 sums over the tokens that follow another, and `[B]` how many these are.
    """
    wanted = labels[:, 1:]
    nll = nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), wanted.flatten(), ignore_index=LEFT_OUT, reduction="none"
    )
    return nll.view(wanted.shape).sum(-1), (wanted != LEFT_OUT).sum(-1)


def nats_a_token(prediction: EvalPrediction) -> dict[str, float]:
    """The mean over all predicted tokens, in the form that `transformers.Trainer` calls."""
    nll, tokens = (np.asarray(part, dtype=np.float64) for part in prediction.predictions[:2])
    return {"nll": float(nll.sum() / tokens.sum()), "tokens": int(tokens.sum())}


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """A right-padded batch: `input_ids`, `attention_mask` and `labels` `[B, T]` int64, −100 at padding in `labels`.

    The labels are those of the items, where they have any, and their tokens else.
    """
    ids, mask = pad([item["input_ids"] for item in items])
    labels, _ = pad([item.get("labels", item["input_ids"]) for item in items])
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask.bool(), labels, LEFT_OUT)}
