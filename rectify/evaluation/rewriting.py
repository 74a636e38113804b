"""Rewrites of toxic sentences against human ones: safe, alike, fluent; and against merely deleting what is toxic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rectify.builders.cmd_stages import score_with
from rectify.builders.masking import MASK, SAFE, Find, Outcome, mask_until_safe
from rectify.builders.trajectories import Score
from rectify.errors import InvalidArgumentError
from rectify.evaluation.chrf import chrf
from rectify.evaluation.fluency import continuation_nll
from rectify.evaluation.language_model import begin_token
from rectify.rephrasing.filler import Filler, rephrase
from rectify.rephrasing.sentences import Sentence
from rectify.scoring.scores import Scorer
from rectify.sentence_encoder import SentenceEncoder


@dataclass(frozen=True)
class Rewrites:
    """What each system made of the sentences.

    Attributes:
        copied: the sentences as they are.
        deleted: the sentences without what was masked.
        filled: the sentences with other words there; `None` where there is no rewrite.
        masked: the sentences with masks.
        failures: of `filled`, why there is none, and how often.
    """

    copied: list[str]
    deleted: list[str]
    filled: list[str | None]
    masked: list[str]
    failures: dict[str, int]


def rewrite(sentences: Sequence[Sentence], find: Find, filler: Filler, score: Score, attempts: int = 4) -> Rewrites:
    """Mask what is toxic, until the rest is safe, and fill the masks, until the whole is safe.

    Args:
        sentences: the toxic sentences.
        find: finds toxic spans.
        filler: fills masks.
        score: says what is safe; not the judge of the result.
        attempts: see `rephrase`.
    """
    texts = [sentence.text for sentence in sentences]
    masked = mask_until_safe(texts, find, score)
    filled: list[str | None] = [None] * len(texts)
    failures: Counter[str] = Counter()
    places = []
    for place, one in enumerate(masked):
        if one.outcome is not Outcome.SAFE:
            failures[str(one.outcome)] += 1
        elif MASK in one.text:
            places.append(place)
        else:
            filled[place] = one.text  # there was nothing to rewrite
    rephrased = rephrase(
        [texts[place] for place in places], [masked[place].text for place in places], filler, score, attempts
    )
    for place, made in zip(places, rephrased, strict=True):
        filled[place] = made.text
        if made.reason is not None:
            failures[made.reason] += 1
    deleted = [" ".join(one.text.replace(MASK, "").split()) for one in masked]
    return Rewrites(texts, deleted, filled, [one.text for one in masked], dict(failures))


@dataclass(frozen=True)
class RewriteFigures:
    """How good the rewrites of a system are.

    Attributes:
        safe_share: of all sentences, those whose rewrite the judge scores below 0.5; a missing one is not safe, nor is
            one without a score.
        chrf: corpus chrF2 to the human rewrites, from 0 to 100.
        similarity: mean cosine to the human rewrites, of which the nearest counts; `None` without an encoder.
        perplexity: of a language model, a token as the unit.
        sentences: how many the last three are of: those that every system has a rewrite of.
    """

    safe_share: float
    chrf: float
    similarity: float | None
    perplexity: float
    sentences: int


def measure_rewrites(
    sentences: Sequence[Sentence],
    systems: dict[str, Sequence[str | None]],
    judge: Scorer,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoder: SentenceEncoder | None = None,
) -> dict[str, RewriteFigures]:
    """The figures of systems, all on the same sentences.

    Args:
        sentences: the toxic sentences.
        systems: by name, a rewrite of each sentence, or `None`; blank ones are none.
        judge: of toxicity.
        model, tokenizer: whose perplexity is measured.
        encoder: of sentences.

    Raises:
        InvalidArgumentError: there is no sentence of which every system has a rewrite.
    """
    score = score_with(judge)
    common = [
        place for place in range(len(sentences)) if all((texts[place] or "").strip() for texts in systems.values())
    ]
    if not common:
        raise InvalidArgumentError(
            f"systems: {len(systems)} have no rewrite of the same sentence: give other sentences"
        )
    references = [sentences[place].references for place in common]
    figures = {}
    for name, rewrites in systems.items():
        made = [text for text in rewrites if text is not None and text.strip()]
        texts = [str(rewrites[place]) for place in common]
        figures[name] = RewriteFigures(
            safe_share=int((score(made) < SAFE).sum()) / len(sentences),
            chrf=chrf(texts, references),
            similarity=_nearest(encoder, texts, references) if encoder is not None else None,
            perplexity=_perplexity(model, tokenizer, texts),
            sentences=len(common),
        )
    return figures


def _nearest(encoder: SentenceEncoder, texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The mean cosine of each text and the nearest of its references."""
    owners = [place for place, others in enumerate(references) for _ in others]
    flat = [other for others in references for other in others]
    cosines = encoder.similarity([texts[place] for place in owners], flat)
    best = np.full(len(texts), -1.0)
    np.maximum.at(best, owners, cosines)
    return float(best.mean())


def _perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> float:
    rows: Any = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return continuation_nll(model, [[begin_token(tokenizer)]] * len(rows), rows).perplexity


def table(figures: dict[str, RewriteFigures]) -> str:
    """The figures as a Markdown table."""
    lines = ["| rewrite | safe | chrF | cosine | perplexity | sentences |", "|---|---|---|---|---|---|"]
    for name, one in figures.items():
        cosine = "–" if one.similarity is None else f"{one.similarity:.4f}"
        lines.append(
            f"| {name} | {one.safe_share:.1%} | {one.chrf:.2f} | {cosine} | {one.perplexity:.1f} | {one.sentences} |"
        )
    return "\n".join(lines) + "\n"


def as_json(sentences: Sequence[Sentence], made: Rewrites, figures: dict[str, RewriteFigures]) -> dict[str, Any]:
    """Figures and texts, for a file."""
    return {
        "figures": {name: asdict(one) for name, one in figures.items()},
        "failures": made.failures,
        "texts": [
            {"toxic": sentence.text, "masked": masked, "filled": filled, "references": list(sentence.references)}
            for sentence, masked, filled in zip(sentences, made.masked, made.filled, strict=True)
        ],
    }
