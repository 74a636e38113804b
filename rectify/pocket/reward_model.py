"""The reward of the pocket Q network: a LoRA classifier on the pocket language model, fitted to people's labels."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.special import expit
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from rectify.detectors import ToxicityClassifier
from rectify.pocket.language_model import training_arguments
from rectify.pocket.texts import LabelledText, pieces
from rectify.training.detector import DetectorSettings, train_detector

logger = logging.getLogger(__name__)

_LONGEST_PIECE = 25  # words
_PIECES = 120_000
_WORD = r"(?u)\b[a-z']+\b"

# hate is marked by group and stance, which single words do not tell
_NO_WORDS = ("hatexplain_mbib", "stormfront", "dynahate")
# no harmless texts come with these, so that their topics would pass for toxic
_ONE_SIDED = ("jigsaw_toxic_only", "toxic_spans")


class WordToxicity:
    """An additive model of toxicity: it spreads the label of a comment over its words.

    People label whole comments, rewards are needed for twenty tokens. The sum over the words of a piece says which
    part of the comment the label was for.

    Args:
        texts: comments with labels.
    """

    def __init__(self, texts: Sequence[LabelledText]) -> None:
        self._words = CountVectorizer(min_df=5, binary=True, token_pattern=_WORD)
        counts = self._words.fit_transform(text.text for text in texts)
        self._model = LogisticRegression(C=0.3, max_iter=300).fit(counts, [bool(text.toxic) for text in texts])

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """The toxicity of each piece, `[N]` in [0, 1]; twice the log-odds, for a sum over few words is timid."""
        return expit(2 * self._model.decision_function(self._words.transform(texts)))


def labelled_rows(
    texts: Sequence[LabelledText], fragments: Sequence[LabelledText], seed: int
) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """Texts with labels from 0 to 1, for training and for validation.

    Continuations are short, so besides whole texts with their labels, and pieces where people marked the toxic words
    (`fragments`), there are pieces of a few words labelled by `WordToxicity`.
    """
    train = [text for text in texts if text.split == "train"]
    known = [text for text in train if text.toxic is not None]
    words = WordToxicity([text for text in known if text.source not in _NO_WORDS] + list(fragments))
    chosen = pieces((text.text for text in train), _LONGEST_PIECE, _PIECES, seed)
    rows = [(text.text, float(bool(text.toxic))) for text in known if text.source not in _ONE_SIDED]
    rows += [(text.text, float(bool(text.toxic))) for text in fragments]
    rows += zip(chosen, words(chosen).tolist(), strict=True)
    validation = [
        (text.text, float(text.toxic)) for text in texts if text.split == "validation" and text.toxic is not None
    ]
    return rows, validation


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
