"""The reward of the pocket Q network: a linear model of words and characters, fitted to people's labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline

from rectify.pocket.texts import LabelledText

_GENERAL = ("nltk_corpora", "wikitext2_valid_test")
_FRAGMENT_WORDS = 15


def fit_reward_model(texts: Sequence[LabelledText], seed: int) -> Pipeline:
    """Fit P(toxic | text) to the labelled training texts.

    General prose is cut into pieces of a few words, so that a short harmless continuation is scored as one.
    """
    rng = np.random.default_rng(seed)
    words: list[str] = []
    labels: list[bool] = []
    for text in texts:
        if text.toxic is None or text.split != "train":
            continue
        pieces = [text.text]
        if text.source in _GENERAL:
            parts = text.text.split()
            pieces = [" ".join(parts[i : i + _FRAGMENT_WORDS]) for i in range(0, len(parts), _FRAGMENT_WORDS)]
            pieces = [piece for piece in pieces if rng.random() < 0.5]
        words += pieces
        labels += [text.toxic] * len(pieces)
    features = FeatureUnion(
        [
            ("words", TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True, dtype=np.float32)),
            ("characters", TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), min_df=10, dtype=np.float32)),
        ]
    )
    return make_pipeline(features, LogisticRegression(C=4.0, solver="liblinear", random_state=seed)).fit(words, labels)


def rewards(model: Pipeline, texts: Sequence[str]) -> np.ndarray:
    """`−P(toxic)` of each text, in [−1, 0]."""
    return -model.predict_proba(texts)[:, 1]


def validation_auc(model: Pipeline, texts: Sequence[LabelledText]) -> float:
    """Area under the ROC curve on the labelled validation texts."""
    held = [text for text in texts if text.toxic is not None and text.split == "validation"]
    return roc_auc_score([text.toxic for text in held], -rewards(model, [text.text for text in held]))
