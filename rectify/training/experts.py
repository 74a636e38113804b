"""Training of DExperts' pair: one LoRA adapter by the non-toxic texts, one by the toxic ones, each a language model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from rectify.adapters import save_adapter
from rectify.causal_body import causal_body
from rectify.errors import InvalidArgumentError
from rectify.hub import current_fingerprint, load_language_model
from rectify.json_files import sha256_of, write_json
from rectify.methods.expert_pair import ANTI_EXPERT, CONFIG_FILE, EXPERT, ExpertsConfig
from rectify.training.language_model import AdapterSettings, check_length, fit, with_adapter
from rectify.training.running import RESULTS_FILE, check_same, checkpoint_to_resume, folder_of_several
from rectify.training.trainer import run_record
from rectify.vocabulary import Fingerprint
from rectify.weights_digest import weights_digest

TOXIC = 0.5
"""Texts labelled this or more train the anti-expert, all others the expert."""

Row = tuple[str, float]


@dataclass
class ExpertSettings(AdapterSettings):
    """What is trained; each field is a flag of `rectify train experts`."""

    max_length: int = field(default=128, metadata={"help": "tokens of a text that are read, from its start"})


def train_experts(
    settings: ExpertSettings,
    arguments: TrainingArguments,
    train: Sequence[Row],
    validation: Sequence[Row],
    callbacks: Sequence[TrainerCallback] = (),
) -> ExpertsConfig:
    """Train expert and anti-expert into `arguments.output_dir`; killed, the same call goes on from its checkpoint.

    Each gets a folder of its own, `expert` and `anti_expert`; one that is finished is not trained again. Texts with
    fewer than two tokens, the end token among them, are left out. `experts_config.json` is written last.

    Args:
        settings: what is trained.
        arguments: how, for `transformers.Trainer`; `train_sampling_strategy` may be `"group_by_length"`.
        train, validation: texts, and their labels from 0 (clean) to 1 (toxic).
        callbacks: of both Trainers.

    Returns:
        What was saved; its `training` has the figures of `expert` and `anti_expert`, in nats a token of the validation
        texts of the same kind: `nll` after training, `base_nll` of the model as it was.

    Raises:
        InvalidArgumentError: there are no texts of a kind, a setting is out of range, or the folder holds another
            training.
        CheckpointError: nothing usable is at `model_name_or_path`.
    """
    folder = folder_of_several(arguments, CONFIG_FILE)
    base, tokenizer = _load(settings)
    parts: dict[str, dict[str, EncodedTexts]] = {EXPERT: {}, ANTI_EXPERT: {}}
    for kind, rows in (("train", train), ("validation", validation)):
        for side, word in ((EXPERT, "non-toxic"), (ANTI_EXPERT, "toxic")):
            texts = [text for text, label in rows if (label >= TOXIC) == (side == ANTI_EXPERT)]
            # all of it before a training: what is missing is to be missed now
            parts[side][kind] = EncodedTexts(tokenizer, texts, settings.max_length, f"{kind} has no {word} text")
    name, revision = settings.model_name_or_path, settings.model_revision
    fingerprint = current_fingerprint(name, revision)
    config = ExpertsConfig(name, Fingerprint.of(tokenizer), revision, weights_digest(causal_body(base)))
    for side, data in parts.items():
        config.training[side] = _train_one(
            settings, fingerprint, arguments, side, data["train"], data["validation"], callbacks
        )
    if arguments.should_save:
        config.save_pretrained(folder)
    return config


def _train_one(
    settings: ExpertSettings,
    fingerprint: str | None,
    arguments: TrainingArguments,
    side: str,
    data: EncodedTexts,
    held: EncodedTexts,
    callbacks: Sequence[TrainerCallback],
) -> dict[str, Any]:
    """The record of one of the two, after it was trained or where it was before."""
    folder = Path(str(arguments.output_dir)) / side
    arguments = copy(arguments)
    arguments.output_dir = str(folder)
    digest = sha256_of([data.items, held.items])
    given = {**asdict(settings), "base_fingerprint": fingerprint, "texts_sha256": digest}
    if (folder / RESULTS_FILE).exists():
        check_same(folder, arguments.to_dict() | given)
        return json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))["record"]
    checkpoint = checkpoint_to_resume(arguments, RESULTS_FILE, **given)
    set_seed(arguments.seed)
    base, _ = _load(settings)
    model = with_adapter(base, settings)
    trainer, results = fit(model, arguments, data, held, checkpoint, callbacks)
    with model.disable_adapter():
        before = trainer.predict(cast(Any, held), metric_key_prefix="base").metrics or {}
    record = {
        "texts": len(data),
        "validation_texts": len(held),
        "texts_sha256": digest,
        **run_record(trainer),
        "nll": results["eval_nll"],
        "base_nll": before["base_nll"],
    }
    if trainer.is_world_process_zero():
        save_adapter(model, folder, settings.model_name_or_path)
        # the last file, as it says that this one is finished
        write_json(folder / RESULTS_FILE, results | {"record": record})
    return record


# ---------------------------------------------------------------------------------------------------------------------
# Model


def _load(settings: ExpertSettings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = load_language_model(settings.model_name_or_path, revision=settings.model_revision)
    check_length(model, settings.max_length)
    return model, tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Data


class EncodedTexts(Dataset):
    """Token ids as a prompt has them, then the end token, cut to a length; texts of fewer than two are left out.

    Raises:
        InvalidArgumentError: no text is left; the message begins with `lacking`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int, lacking: str) -> None:
        rows: list[list[int]] = []
        if texts:
            rows = cast(list[list[int]], tokenizer(list(texts), truncation=True, max_length=length)["input_ids"])
        end = cast(int | None, tokenizer.eos_token_id)
        ended = [[*row, end][:length] if row and end is not None and row[-1] != end else row for row in rows]
        self.items: list[dict[str, Any]] = [{"input_ids": row} for row in ended if len(row) > 1]
        if not self.items:
            raise InvalidArgumentError(f"{lacking} of two tokens or more: give files that have texts of both kinds")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]
