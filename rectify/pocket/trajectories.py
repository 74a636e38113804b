"""Trajectories of the pocket Q network: the model's own continuations, and people's texts, whole or cut in two."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rectify.builders.settings import TrajectorySettings
from rectify.builders.trajectories import build_trajectories
from rectify.pocket.texts import LabelledText

logger = logging.getLogger(__name__)

PROMPT_TOKENS = (5, 12, 20)
LONGEST_PROMPT = 20
LONGEST_CONTINUATION = 30
CUT_SHARE = 0.25
_COMMENTS = "jigsaw_10k_airdecoding"

Score = Callable[[Sequence[str]], np.ndarray]


def roll_out(
    texts: Sequence[LabelledText],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    score: Score,
    count: int,
    folder: Path,
    seed: int,
) -> list[Path]:
    """One continuation of 20 tokens for each of `count` beginnings of texts, in files by the length of the prompt."""
    rng = np.random.default_rng(seed)
    # prompts of the kind that the evaluation uses, and of all others
    prompts = [text.text for text in texts if text.source == "realtoxicityprompts"]
    others = [text.text for text in texts if text.source != "realtoxicityprompts"]
    files = []
    for length in PROMPT_TOKENS:
        chosen = rng.choice(
            len(others), size=min(len(others), count // len(PROMPT_TOKENS) - len(prompts)), replace=False
        )
        settings = TrajectorySettings(
            prompt_tokens=length, n=1, batch_size=256, seed=seed, keep="all", drop_clean=0.0, validation_share=0.0
        )
        place = folder / f"rollouts_{length}"
        counts = build_trajectories(
            prompts + [others[i] for i in chosen], model, tokenizer, score, settings, place, {"model": "pocket"}
        )
        logger.info("rollouts after %d tokens: %s", length, counts)
        files.append(place / "train.jsonl")
    return files


def cut_texts(
    texts: Sequence[LabelledText], tokenizer: PreTrainedTokenizerBase, score: Score, seed: int
) -> Iterator[dict[str, Any]]:
    """Labelled texts cut at a random place; a continuation is toxic if the text is and the reward model says so.

    A share of them: with more, values follow what people write where the model would go on otherwise.
    """
    rng = np.random.default_rng(seed)
    records: list[dict[str, Any]] = []
    labels = []
    known = [text for text in texts if text.toxic is not None and rng.random() < CUT_SHARE]
    encoded = tokenizer([text.text for text in known], verbose=False)["input_ids"]
    for text, whole in zip(known, encoded, strict=True):
        ids = whole[: LONGEST_PROMPT + LONGEST_CONTINUATION]
        if len(ids) < 3:
            continue
        cut = int(rng.integers(1, min(LONGEST_PROMPT, len(ids) - 1) + 1))
        prompt, continuation = tokenizer.decode(ids[:cut]), tokenizer.decode(ids[cut : cut + LONGEST_CONTINUATION])
        records.append({"prompt": prompt, "continuation": continuation})
        labels.append(bool(text.toxic))
    scores = score([record["continuation"].strip() for record in records])
    for record, label, p in zip(records, labels, scores, strict=True):
        if p == p:  # a blank continuation has no score
            yield {**record, "reward": [-round(float(p), 4) * label]}


def whole_texts(texts: Sequence[LabelledText]) -> Iterator[dict[str, Any]]:
    """The comments whose kind finished texts are measured on, with their label as reward."""
    for text in texts:
        if text.source == _COMMENTS:
            yield {"text": text.text, "reward": [-float(bool(text.toxic))]}


def write(records: Iterator[dict[str, Any]], path: Path) -> None:
    """Write JSON lines, all or nothing."""
    fresh = path.with_name(path.name + ".tmp")
    count, risk = 0, 0.0
    with fresh.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            count, risk = count + 1, risk - record["reward"][0]
    fresh.replace(path)
    logger.info("%s: %d trajectories, mean risk %.3f", path.name, count, risk / count)
