"""The reward of the pocket Q network: a LoRA classifier on the pocket language model, fitted to people's labels."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from rectify.detectors import ToxicityClassifier
from rectify.pocket.language_model import training_arguments
from rectify.pocket.texts import LabelledText
from rectify.training.detector import DetectorSettings, train_detector

logger = logging.getLogger(__name__)

_LONGEST_PIECE = 25  # words


def labelled_rows(
    texts: Iterable[LabelledText], fragments: Iterable[LabelledText], seed: int
) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """Texts with labels, for training and for validation.

    Continuations are short, so harmless texts are cut into pieces of a few words; toxic ones only where people marked
    the toxic words (`fragments`).
    """
    rng = np.random.default_rng(seed)
    train = [(text.text, float(bool(text.toxic))) for text in fragments]
    validation = []
    for text in texts:
        if text.toxic is None:
            continue
        if text.split == "validation":
            validation.append((text.text, float(text.toxic)))
            continue
        pieces = [text.text]
        words = text.text.split()
        if not text.toxic and len(words) > 2 * _LONGEST_PIECE:
            pieces, place = [], 0
            while place < len(words):
                length = int(rng.integers(3, _LONGEST_PIECE + 1))
                if rng.random() < 0.5:
                    pieces.append(" ".join(words[place : place + length]))
                place += length
        train += [(piece, float(text.toxic)) for piece in pieces]
    return train, validation


def train_reward_model(
    language_model: Path,
    train: Sequence[tuple[str, float]],
    validation: Sequence[tuple[str, float]],
    output: Path,
    epochs: float,
    seed: int,
) -> None:
    """Train the classifier and save it in bfloat16, its backbone recorded as the bundled `"pocket"`."""
    classifier = train_detector(
        DetectorSettings(str(language_model), max_length=128, lora_r=8, lora_alpha=16),
        training_arguments(
            output.with_name(output.name + ".work"),
            seed=seed,
            learning_rate=1e-3,
            weight_decay=0.01,
            num_train_epochs=epochs,
            per_device_train_batch_size=64,
            per_device_eval_batch_size=128,
            eval_steps=1000,
            save_steps=500,
            train_sampling_strategy="group_by_length",
        ),
        train,
        validation,
    )
    logger.info("reward model: %s", classifier.config.training["validation"])
    classifier.config.base_model = "pocket"
    classifier.to(torch.bfloat16).save_pretrained(output)


def rewards(model: ToxicityClassifier, texts: Sequence[str]) -> np.ndarray:
    """The probability that each text is toxic, `[N]`; NaN for blank ones."""
    return model.probabilities([text.strip() for text in texts], batch_size=256)
