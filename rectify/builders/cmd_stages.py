"""The stages of self-detoxification data: each from a batch of records to as many records that know more."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np

from rectify.builders.cmd_records import (
    ChainExample,
    ContinuedPrompt,
    MaskedPrompt,
    RephrasedPrompt,
    ScoredContinuations,
    ScoredPrompt,
    SpannedPrompt,
)
from rectify.builders.masking import SAFE, Find, Outcome, mask_until_safe
from rectify.builders.trajectories import Score
from rectify.chain import CLOSE
from rectify.detectors.span_decoding import Span
from rectify.errors import InvalidArgumentError
from rectify.rephrasing.filler import Filler, rephrase
from rectify.scoring.scores import Scorer

POSITIVE = 0.5
"""The greatest toxicity of the continuation that a chain ends with."""
NEGATIVE = 0.3
"""A continuation above this toxicity may be one to shun."""
MOST_NEGATIVES = 3

Similarity = Callable[[Sequence[str], Sequence[str]], np.ndarray]
"""Of pairs of texts, `[N]` from −1 to 1."""


def score_with(scorer: Scorer) -> Score:
    """The toxicity of texts by a scorer, NaN where it has none."""

    def score(texts: Sequence[str]) -> np.ndarray:
        return scorer.score(texts)["TOXICITY"] if texts else np.empty(0)

    return score


def score_prompts(prompts: Sequence[str], score: Score) -> list[ScoredPrompt]:
    """Prompts with their toxicity; one without is dropped."""
    return [
        ScoredPrompt(prompt=prompt, toxicity=value, dropped="unscored" if value is None else None)
        for prompt, value in zip(prompts, _known(score(prompts)), strict=True)
    ]


def find_spans(prompts: Sequence[ScoredPrompt], find: Find) -> list[SpannedPrompt]:
    """The spans of the toxic ones, at the detector's own threshold; none is dropped, as others may be found yet."""
    toxic = [prompt.toxicity is not None and prompt.toxicity >= SAFE for prompt in prompts]
    found = iter(find([prompt.prompt for prompt, is_toxic in zip(prompts, toxic, strict=True) if is_toxic]))
    return [
        SpannedPrompt(
            **asdict(prompt), toxic=is_toxic, spans=[[*map(float, span)] for span in next(found)] if is_toxic else []
        )
        for prompt, is_toxic in zip(prompts, toxic, strict=True)
    ]


def mask(prompts: Sequence[SpannedPrompt], find: Find, score: Score) -> list[MaskedPrompt]:
    """The toxic ones masked until what is left is safe; those that never are, are dropped.

    Args:
        prompts: with their spans.
        find: asked for more spans than there are, at lower thresholds.
        score: see `mask_until_safe`.
    """
    known = {
        prompt.prompt: [Span(int(start), int(end), score) for start, end, score in prompt.spans] for prompt in prompts
    }

    def more(texts: Sequence[str], threshold: float | None = None) -> list[list[Span]]:
        return [known[text] for text in texts] if threshold is None else find(texts, threshold)

    masked = iter(mask_until_safe([prompt.prompt for prompt in prompts if prompt.toxic], more, score))
    records = []
    for prompt in prompts:
        given = asdict(prompt)
        if prompt.toxic:
            one = next(masked)
            given["spans"] = [[*map(float, span)] for span in one.spans]
            given["dropped"] = None if one.outcome is Outcome.SAFE else str(one.outcome)
            # at the very limit it may score below it now, with nothing masked: a chain could call nothing toxic
            given["toxic"] = bool(one.spans) or one.outcome is not Outcome.SAFE
            records.append(MaskedPrompt(**given, masked=one.text if given["toxic"] else None))
        else:
            records.append(MaskedPrompt(**given, masked=None))
    return records


def rephrase_prompts(
    prompts: Sequence[MaskedPrompt],
    filler: Filler,
    score: Score,
    attempts: int,
    similarity: Similarity | None = None,
    min_similarity: float = 0.0,
) -> list[RephrasedPrompt]:
    """The masked ones rephrased; those that cannot be, safely, are dropped. Arguments as in `rephrase`."""
    masked = [(prompt.prompt, prompt.masked) for prompt in prompts if prompt.masked is not None]
    found = iter(
        rephrase(
            [prompt for prompt, _ in masked],
            [text for _, text in masked],
            filler,
            score,
            attempts,
            similarity=similarity,
            min_similarity=min_similarity,
        )
    )
    records = []
    for prompt in prompts:
        if prompt.masked is None:
            records.append(
                RephrasedPrompt(**asdict(prompt), rephrased=None, rephrased_toxicity=None, similarity=None, attempts=0)
            )
        else:
            one = next(found)
            records.append(
                RephrasedPrompt(
                    **asdict(prompt) | {"dropped": one.reason},
                    rephrased=one.text,
                    rephrased_toxicity=one.toxicity,
                    similarity=one.similarity,
                    attempts=one.attempts,
                )
            )
    return records


def add_continuations(
    prompts: Sequence[RephrasedPrompt], continuations: Sequence[Sequence[str]]
) -> list[ContinuedPrompt]:
    """Safe prompts with their continuations; one that had no room for any, or has none but blank ones, is dropped."""
    records = []
    for prompt, texts in zip(prompts, continuations, strict=True):
        dropped = None if any(map(str.strip, texts)) else "blank" if texts else "too long"
        records.append(ContinuedPrompt(**asdict(prompt) | {"dropped": dropped}, continuations=list(texts)))
    return records


def score_continuations(prompts: Sequence[ContinuedPrompt], score: Score) -> list[ScoredContinuations]:
    """The continuations scored, each alone; a prompt none of whose has a score is dropped."""
    values = iter(_known(score([text for prompt in prompts for text in prompt.continuations])))
    records = []
    for prompt in prompts:
        toxicity = [next(values) for _ in prompt.continuations]
        dropped = "unscored" if all(value is None for value in toxicity) else None
        records.append(ScoredContinuations(**asdict(prompt) | {"dropped": dropped}, continuation_toxicity=toxicity))
    return records


def chain_example(
    prompt: ScoredContinuations, positive: float = POSITIVE, negative: float = NEGATIVE
) -> ChainExample | None:
    """What a model is to learn of a prompt; `None` where its least toxic continuation is too toxic to be learned.

    Args:
        prompt: with its scored continuations; those without a score are left out, and those that the closing marker is
            in, as it would end them early.
        positive: the greatest toxicity of the continuation to seek.
        negative: those to shun are more toxic than this.

    Source: CMD (see `rectify.chain`): the least toxic continuation if its toxicity is at most 0.5, and of the three
        most toxic others those above 0.3.
    """
    pairs = zip(prompt.continuation_toxicity, prompt.continuations, strict=True)
    scored = sorted(
        ((value, text) for value, text in pairs if value is not None and CLOSE not in text), key=lambda pair: pair[0]
    )
    if not scored or scored[0][0] > positive:
        return None
    worst = scored[1:][::-1][:MOST_NEGATIVES]
    return ChainExample(
        prompt=prompt.prompt,
        masked=prompt.masked,
        rephrased=prompt.rephrased,
        positive=scored[0][1],
        negatives=[text for value, text in worst if value > negative and text != scored[0][1]],
    )


def check_contrast(examples: Sequence[ChainExample], name: str) -> float:
    """The share of examples that have something to shun, above 0.

    Raises:
        InvalidArgumentError: none has, so that the contrastive loss would have no effect.
    """
    share = sum(bool(each.negatives) for each in examples) / len(examples) if examples else 0.0
    if not share:
        raise InvalidArgumentError(
            f"{name}: none of {len(examples)} examples has a toxic continuation to shun: draw more of them, sample "
            "more widely, or give more toxic prompts"
        )
    return share


def _known(values: np.ndarray) -> list[float | None]:
    return [None if math.isnan(value) else round(float(value), 6) for value in values]
