"""Trajectories of the pocket Q network: the model's own continuations, and people's texts cut in two."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from sklearn.pipeline import Pipeline
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rectify.pocket.rewards import rewards
from rectify.pocket.texts import LabelledText

logger = logging.getLogger(__name__)

NEW_TOKENS = 20
LONGEST_PROMPT = 20
LONGEST_CONTINUATION = 30


def cut_texts(
    texts: Sequence[LabelledText], tokenizer: PreTrainedTokenizerBase, reward_model: Pipeline, seed: int
) -> list[dict]:
    """Each labelled text cut at a random place; a continuation is toxic if the text is and the reward model says so."""
    rng = np.random.default_rng(seed)
    records: list[dict[str, Any]] = []
    labels = []
    for text in texts:
        ids = tokenizer(text.text)["input_ids"][: LONGEST_PROMPT + LONGEST_CONTINUATION]
        if text.toxic is None or len(ids) < 3:
            continue
        cut = int(rng.integers(1, min(LONGEST_PROMPT, len(ids) - 1) + 1))
        prompt, continuation = tokenizer.decode(ids[:cut]), tokenizer.decode(ids[cut : cut + LONGEST_CONTINUATION])
        records.append({"prompt": prompt, "continuation": continuation})
        labels.append(text.toxic)
    scores = rewards(reward_model, [record["continuation"] for record in records])
    for record, label, score in zip(records, labels, scores, strict=True):
        record["reward"] = round(float(score) * label, 4)
    return records


@torch.no_grad()
def roll_out(
    texts: Sequence[LabelledText],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reward_model: Pipeline,
    count: int,
    seed: int,
    batch_size: int = 128,
) -> list[dict]:
    """Continuations sampled from the model itself, after the beginnings of texts."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    prompts: list[list[int]] = []
    for index in rng.choice(len(texts), size=count, replace=count > len(texts)):
        ids = tokenizer(texts[index].text)["input_ids"]
        length = int(rng.integers(2, LONGEST_PROMPT + 1))
        if len(ids) > 2:
            prompts.append(ids[: min(length, len(ids) - 1)])
    prompts.sort(key=len)
    records: list[dict[str, Any]] = []
    for start in tqdm(range(0, len(prompts), batch_size), unit="batch", disable=None):
        batch = tokenizer.pad({"input_ids": prompts[start : start + batch_size]}, return_tensors="pt")
        batch = batch.to(model.device)
        output = cast(Any, model).generate(
            **batch, do_sample=True, top_p=1.0, top_k=0, max_new_tokens=NEW_TOKENS, pad_token_id=0
        )
        new = output[:, batch["input_ids"].shape[1] :]
        for ids, continuation in zip(prompts[start : start + batch_size], new, strict=True):
            records.append(
                {
                    "prompt": tokenizer.decode(ids),
                    "continuation": tokenizer.decode(continuation, skip_special_tokens=True),
                }
            )
    for record, score in zip(records, rewards(reward_model, [r["continuation"] for r in records]), strict=True):
        record["reward"] = round(float(score), 4)
    return records


def write(records: Sequence[dict], path: Path) -> None:
    """Write JSON lines, all or nothing."""
    fresh = path.with_name(path.name + ".tmp")
    with fresh.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    fresh.replace(path)
    mean = sum(-record["reward"] for record in records) / len(records)
    logger.info("%s: %d trajectories, mean risk %.3f", path.name, len(records), mean)


def read(path: Path) -> list[dict]:
    """Read JSON lines."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
