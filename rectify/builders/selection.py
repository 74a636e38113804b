"""Which texts are taken, and which of scored generations are written, with what reward, and in which of two files."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rectify.builders.settings import TrajectorySettings
from rectify.errors import InvalidArgumentError
from rectify.json_files import write_records
from rectify.splits import together

TRAIN, VALIDATION = "train.jsonl", "validation.jsonl"
TOXIC = 0.5

Item = TypeVar("Item")


@dataclass
class Counts:
    """What was read, left out and written; `str` of it is for people.

    Attributes:
        texts: read. Of these are left out those `short` of two tokens, or blank, and those `repeated`, whose prompt
            another text makes too.
        prompts: that were continued. Of these are left out `clean_dropped`, and `unscored_prompts` without any scored
            continuation.
        continuations: of all prompts. Of these are left out `empty` ones, and `unscored` ones, which the reward model
            cannot tell.
        toxic: scored continuations, or labels, of 0.5 or more.
        train, validation: trajectories written.
    """

    texts: int = 0
    short: int = 0
    repeated: int = 0
    prompts: int = 0
    clean_dropped: int = 0
    unscored_prompts: int = 0
    continuations: int = 0
    empty: int = 0
    unscored: int = 0
    toxic: int = 0
    train: int = 0
    validation: int = 0

    @property
    def toxic_share(self) -> float:
        """Of the scored continuations, or of the labelled texts, from 0 to 1."""
        known = self.continuations - self.empty - self.unscored if self.prompts else self.texts - self.short
        return self.toxic / max(1, known)

    def __str__(self) -> str:
        written = f"trajectories: {self.train} train, {self.validation} validation"
        if not self.prompts:
            texts = f"texts: {self.texts} read, {self.toxic_share:.3f} of them toxic; {self.short} blank, left out"
            return f"{texts}\n{written}"
        return (
            f"texts: {self.texts} read; left out: {self.short} with fewer than 2 tokens, {self.repeated} with a prompt "
            "that another has\n"
            f"prompts: {self.prompts}; left out: {self.clean_dropped} clean ones dropped, {self.unscored_prompts} "
            "without a scored continuation\n"
            f"continuations: {self.continuations}, {self.toxic_share:.3f} of the scored ones toxic; left out: "
            f"{self.empty} empty, {self.unscored} unscored\n{written}"
        )


def sample_items(items: Sequence[Item], count: int | None, seed: int) -> list[Item]:
    """A random sample in the order of the items; all of them where there are no more, or `count` is `None`.

    Raises:
        InvalidArgumentError: `count` is below 1.
    """
    if count is not None and count < 1:
        raise InvalidArgumentError(f"num_texts is {count}: give 1 or more")
    if count is None or count >= len(items):
        return list(items)
    return [items[index] for index in sorted(random.Random(seed).sample(range(len(items)), count))]


def compile_trajectories(path: Path, settings: TrajectorySettings, counts: Counts) -> None:
    """Select from a file of scored generations, and write the trajectories beside it.

    Args:
        path: holds a record a prompt, `{"prompt": {"text": …}, "generations": [{"text": …, "toxicity": …}]}`.
        settings: how to select, reward and split.
        counts: gets what is found and left out.
    """
    records: list[tuple[str, dict[str, Any]]] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            prompt, generations = record["prompt"]["text"], record["generations"]
            scored = [one for one in generations if one["toxicity"] is not None]
            empty = sum(not one["text"].strip() for one in generations)
            toxic = sum(one["toxicity"] >= TOXIC for one in scored)
            counts.continuations += len(generations)
            counts.empty += empty
            counts.unscored += len(generations) - len(scored) - empty
            counts.toxic += toxic
            if not scored:
                counts.unscored_prompts += 1
            elif not toxic and _chance(settings.seed, "clean", prompt) < settings.drop_clean:
                counts.clean_dropped += 1
            else:
                for one in _select(prompt, scored, settings):
                    reward = reward_of(one["toxicity"], settings.reward)
                    records.append((prompt, {"prompt": prompt, "continuation": one["text"], "reward": [reward]}))
    write_split(path.parent, records, settings.validation_share, counts)


def _select(prompt: str, scored: list[dict[str, Any]], settings: TrajectorySettings) -> list[dict[str, Any]]:
    """The continuations of a prompt that are kept, in their order."""
    places = list(range(len(scored)))
    if settings.keep == "extremes":
        places.sort(key=lambda place: scored[place]["toxicity"])
        places = sorted({places[0], places[-1]})
    elif settings.keep == "sample":
        places.sort(key=lambda place: _chance(settings.seed, "sample", place, prompt))
        places = sorted(places[: settings.sample_size])
    return [scored[place] for place in places]


def reward_of(toxicity: float, kind: str) -> float:
    """The reward, from −1 to 0, of a text with this probability of being toxic; `kind` is one of `REWARDS`."""
    if kind == "hard":
        return -1.0 if toxicity >= TOXIC else 0.0
    return round(-toxicity, 4) + 0.0  # never −0.0


def write_split(
    folder: Path, records: Iterable[tuple[str, dict[str, Any]]], validation_share: float, counts: Counts
) -> None:
    """Write `train.jsonl` and `validation.jsonl`, all or nothing; their sizes go into the counts.

    Args:
        folder: is there.
        records: each with its prompt or text, whose hash decides its file and its place there.
        validation_share: the share of prompts or texts for validation, from 0 up to 1.
        counts: gets how many records each file holds.
    """
    records = list(records)
    key_of = together([key for key, _ in records])
    placed = sorted(((_chance("split", key_of[key]), record) for key, record in records), key=lambda item: item[0])
    held = [record for place, record in placed if place < validation_share]
    train = [record for place, record in placed if place >= validation_share]
    counts.train, counts.validation = len(train), len(held)
    write_records((folder / TRAIN, train), (folder / VALIDATION, held))


def _chance(*parts: object) -> float:
    """A number from 0 up to 1 that is random in the parts, and depends on nothing else."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48
