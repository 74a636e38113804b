"""Train the pocket scorer: a small encoder that imitates Perspective's scores of RealToxicityPrompts.

    python -m rectify.pocket.scorer --data DATA --teacher FOLDER --output OUTPUT

The scores of the training records teach a sentence encoder (`--teacher`: all-MiniLM-L6-v2 or the like, with LoRA); it
scores pieces of unlabelled texts, and the small encoder learns from both. Perspective's scores are used for nothing
else in the project: this model judges what the others make. `OUTPUT/scorer` is what `rectify/pocket/scorer` holds; a
killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import rectify.training  # noqa: F401  # isort: skip (before transformers' Trainer: see there)
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from rectify.detectors import ToxicityClassifier
from rectify.pocket.language_model import train_or_resume, training_arguments
from rectify.pocket.texts import pieces, read_texts
from rectify.scoring.pocket import PocketScorer, ScorerConfig
from rectify.scoring.score_tables import perspective_scores
from rectify.scoring.scores import ATTRIBUTES
from rectify.training.detector import DetectorSettings, collate, soft_label_loss, train_detector
from rectify.training.score_calibration import calibration_curve
from rectify.training.trainer import AdapterTrainer

logger = logging.getLogger(__name__)

VOCABULARY = 8192
MAX_LENGTH = 64
GOLD_WEIGHT = 4
_LONGEST_PIECE = 22  # words, as in RealToxicityPrompts
_CUTS = 2  # of each text

Table = list[tuple[str, list[float]]]


def train_teacher(backbone: str, train: Table, validation: Table, folder: Path, seed: int) -> ToxicityClassifier:
    """The sentence encoder with LoRA; loaded where it is there."""
    if not (folder / "all_results.json").exists():
        train_detector(
            DetectorSettings(backbone, max_length=MAX_LENGTH, lora_r=32, lora_alpha=64),
            training_arguments(
                folder,
                seed=seed,
                learning_rate=1e-3,
                weight_decay=0.01,
                num_train_epochs=4,
                per_device_train_batch_size=32,
                per_device_eval_batch_size=256,
                eval_strategy="epoch",
                save_strategy="epoch",
                train_sampling_strategy="group_by_length",
            ),
            train,
            validation,
            labels=ATTRIBUTES,
        )
    return ToxicityClassifier.from_pretrained(folder)


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of lower-case text: `[CLS]` text `[SEP]`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["[PAD]", "[CLS]", "[SEP]"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=MAX_LENGTH,
    )


def small_encoder() -> BertForSequenceClassification:
    """A BERT of 1.7 M parameters: 3.5 MB in bfloat16."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=384,
        hidden_act="relu",  # a tenth of the time faster than gelu
        max_position_embeddings=MAX_LENGTH,
        type_vocab_size=1,
        pad_token_id=0,
        hidden_dropout_prob=0.0,  # it imitates; its labels are not noise
        attention_probs_dropout_prob=0.0,
        problem_type="multi_label_classification",
        id2label=dict(enumerate(ATTRIBUTES)),
        label2id={name: place for place, name in enumerate(ATTRIBUTES)},
    )
    return BertForSequenceClassification(config)


class _Rows(Dataset):
    def __init__(self, tokenizer: PreTrainedTokenizerFast, table: Table) -> None:
        encoded = cast(Any, tokenizer([text for text, _ in table], truncation=True, max_length=MAX_LENGTH))["input_ids"]
        self.items = [{"input_ids": ids, "labels": row} for ids, (_, row) in zip(encoded, table, strict=True)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


class _ScoreTrainer(AdapterTrainer):
    """The Trainer of a plain sequence classifier with the detectors' loss."""

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = soft_label_loss(outputs.logits.float(), labels)
        return (loss, outputs) if return_outputs else loss


def train_student(
    tokenizer: PreTrainedTokenizerFast, train: Table, validation: Table, work: Path, epochs: float, seed: int
) -> PreTrainedModel:
    """The small encoder."""
    set_seed(seed)
    model = small_encoder()
    arguments = training_arguments(
        work,
        seed=seed,
        learning_rate=2e-3,
        weight_decay=0.01,
        num_train_epochs=epochs,
        per_device_train_batch_size=128,
        per_device_eval_batch_size=512,
        eval_strategy="epoch",
        save_strategy="epoch",
        train_sampling_strategy="group_by_length",
        label_names=["labels"],
        remove_unused_columns=False,
    )
    if arguments.use_cpu:
        model.set_attn_implementation("eager")
    data = {"train_dataset": _Rows(tokenizer, train), "eval_dataset": _Rows(tokenizer, validation)}
    train_or_resume(_ScoreTrainer(model=model, args=arguments, data_collator=collate, **cast(Any, data)))
    model.set_attn_implementation("sdpa")
    return model.eval()


def calibrate(scorer: PocketScorer, table: Table) -> None:
    """Bring each attribute to Perspective's scale."""
    raw = scorer.raw_scores([text for text, _ in table])
    truth = np.array([row for _, row in table])
    for place, attribute in enumerate(scorer.attributes):
        known = ~np.isnan(truth[:, place])
        scorer.config.calibration[attribute] = calibration_curve(raw[known, place], truth[known, place])


def main() -> None:
    """Run the stages that are not done."""
    parser = argparse.ArgumentParser(description="Train the pocket scorer.")
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder per data set")
    parser.add_argument("--teacher", required=True, help="sentence encoder: folder or Hub id")
    parser.add_argument("--output", type=Path, required=True, help="folder for the scorer and the checkpoints")
    parser.add_argument("--pieces", type=int, default=400_000, help="unlabelled pieces (default: %(default)s)")
    parser.add_argument("--epochs", type=float, default=6.0, help="of the small encoder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    prompts = arguments.data / "realtoxicityprompts" / "prompts.jsonl"
    train, validation = perspective_scores(prompts, "train"), perspective_scores(prompts, "validation")
    teacher = train_teacher(arguments.teacher, train, validation, output / "scorer_teacher", arguments.seed)
    texts = [text for text in read_texts(arguments.data) if text.split == "train"]
    # the kind of text that it is made for, cut in more ways
    own = [text for text in texts if text.source == "realtoxicityprompts"]
    unlabelled = [
        piece
        for cut in range(_CUTS)
        for piece in pieces(
            (text.text for text in texts + own * 4), _LONGEST_PIECE, arguments.pieces // _CUTS, arguments.seed + cut
        )
    ]
    labels = output / "scorer_labels.npy"
    if not labels.exists():
        # in bfloat16, which a CPU multiplies several times faster; the labels are soft anyway
        with torch.autocast("cpu", torch.bfloat16):
            np.save(labels, teacher.label_probabilities(unlabelled, batch_size=256))
    soft = [(text, row) for text, row in zip(unlabelled, np.load(labels).tolist(), strict=True) if row[0] == row[0]]
    logger.info("pocket scorer: %d scored texts, %d pieces", len(train), len(soft))
    tokenizer = train_tokenizer([text for text, _ in train] + unlabelled)
    table = soft + train * GOLD_WEIGHT
    model = train_student(tokenizer, table, validation, output / "scorer.work", arguments.epochs, arguments.seed)
    scorer = PocketScorer(ScorerConfig(list(ATTRIBUTES), max_length=MAX_LENGTH), model, tokenizer)
    calibrate(scorer, validation)
    found = scorer.score([text for text, _ in validation], ATTRIBUTES).values
    truth = np.array([row for _, row in validation])
    correlation = {
        name: round(float(np.corrcoef(found[known, place], truth[known, place])[0, 1]), 4)
        for place, name in enumerate(ATTRIBUTES)
        for known in [~np.isnan(truth[:, place])]
    }
    scorer.config.training = {
        "texts": len(train),
        "pieces": len(soft),
        "epochs": arguments.epochs,
        "seed": arguments.seed,
        "teacher": Path(arguments.teacher).name,
        "validation_pearson": correlation,
    }
    logger.info("pocket scorer: validation %s", correlation)
    scorer.save_pretrained(output / "scorer")


if __name__ == "__main__":
    main()
