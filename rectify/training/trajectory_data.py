"""Trajectories for the dead-end Q network: from JSON lines to padded batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from rectify.errors import TrajectoryError, shown
from rectify.json_files import parse_json
from rectify.text_files import check_unicode
from rectify.text_lines import TextFile


@dataclass(frozen=True)
class Trajectory:
    """A finished text and what it earned.

    Attributes:
        prompt: what stood before the model's first action; empty where nothing tells prompt from continuation.
        continuation: the rest.
        reward: in [−1, 0]; −1 is a toxic ending.
    """

    prompt: str
    continuation: str
    reward: float


def read_trajectories(paths: Iterable[str | Path]) -> list[Trajectory]:
    """Read JSON lines: `{"text", "reward"}` (as the published system writes them) or `{"prompt", "continuation",
    "reward"}`; the reward is a number in [−1, 0] or a list of that one number.

    Raises:
        TrajectoryError: a file is missing or empty, or a line cannot be used; the message names file and line.
    """
    trajectories: list[Trajectory] = []
    for path in map(Path, paths):
        file, before = TextFile(path, "trajectories"), len(trajectories)
        for number, line in file.texts():
            trajectories.append(_parse(line, file.place(number)))
        if len(trajectories) == before:
            raise file.refusal("holds no line: give a file of JSON lines")
    return trajectories


def _parse(line: str, place: str) -> Trajectory:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise TrajectoryError(f"{place} is not JSON ({error}): give a JSON object a line") from error
    if not isinstance(record, dict):
        raise TrajectoryError(f"{place} is {type(record).__name__}: give objects with a text and a reward")
    if isinstance(record.get("text"), str):
        prompt, continuation = "", record["text"]
    elif isinstance(record.get("prompt"), str) and isinstance(record.get("continuation"), str):
        prompt, continuation = record["prompt"], record["continuation"]
    else:
        raise TrajectoryError(
            f'{place} has the fields {", ".join(record)}: give "text", or "prompt" and "continuation", as strings'
        )
    check_unicode(prompt + continuation, place)
    reward = record.get("reward")
    if isinstance(reward, list) and len(reward) == 1:
        reward = reward[0]
    if isinstance(reward, bool) or not isinstance(reward, (int, float)) or not -1 <= reward <= 0:
        raise TrajectoryError(
            f"{place} has the reward {shown(reward)}: give a number in [-1, 0], -1 for toxic, or a list of one"
        )
    return Trajectory(prompt, continuation, float(reward))


class TrajectoryDataset(Dataset):
    """Trajectories as token ids.

    Prompt and continuation are tokenised apart, as they are when a model generates. What is longer than `block_size`
    loses tokens at the prompt's beginning first, then at the continuation's end.

    Args:
        trajectories: the texts.
        tokenizer: of the Q network's vocabulary.
        block_size: greatest length in tokens.
        append_eos: end each text that was not cut with the end token, as an action whose risk is that of ending there.
        ignore_prompt: whether the prompt's tokens are left out of the loss.

    Attributes:
        truncated: how many texts were cut.
        too_short: how many were left out, having no token with a prefix.
    """

    def __init__(
        self,
        trajectories: Sequence[Trajectory],
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        *,
        append_eos: bool = True,
        ignore_prompt: bool = True,
    ) -> None:
        # special tokens at the beginning, as in `generate`
        firsts = _encode(tokenizer, [trajectory.prompt or trajectory.continuation for trajectory in trajectories], True)
        rests = _encode(tokenizer, [trajectory.continuation for trajectory in trajectories], False)
        end = [tokenizer.eos_token_id] if append_eos and tokenizer.eos_token_id is not None else []
        self.truncated = self.too_short = 0
        self.items: list[dict[str, Any]] = []
        for trajectory, first, rest in zip(trajectories, firsts, rests, strict=True):
            prompt, continuation = (first, rest) if trajectory.prompt else ([], first)
            ids = continuation + end
            room = block_size - len(ids)
            self.truncated += room < len(prompt)
            if room < 1 and prompt:  # one token of the prompt stays, so that the first action has a prefix
                room = 1
            kept = prompt[-room:] if room > 0 else []
            ids = (kept + ids)[:block_size]
            # the first token of a text has no prefix, and no value
            start = max(1, len(kept) if ignore_prompt else 1)
            if not continuation or len(ids) <= start:
                self.too_short += 1
                continue
            self.items.append({"input_ids": ids, "start": start, "reward": trajectory.reward})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]

    @property
    def columns(self) -> tuple[list[list[int]], list[int], list[float]]:
        """Token ids, place of the first action, and reward of each trajectory."""
        ids, starts, rewards = ([item[name] for item in self.items] for name in ("input_ids", "start", "reward"))
        return ids, starts, rewards

    @property
    def base_rate(self) -> float:
        """Mean risk of the texts, kept away from 0 and 1."""
        mean = math.fsum(-item["reward"] for item in self.items) / max(1, len(self.items))
        return min(max(mean, 1e-3), 1 - 1e-3)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"] if texts else []


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """A right-padded batch.

    Returns:
        `input_ids` and `attention_mask` `[B, T]` int64, `counted` `[B, T]` bool (True at the tokens that are in the
        loss), `labels` `[B]` float32 (the rewards), and `hidden` `[B, T, H]` where the items have states.
    """
    shape = len(items), max(len(item["input_ids"]) for item in items)
    ids = torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.long)
    counted = torch.zeros(shape, dtype=torch.bool)
    for row, item in enumerate(items):
        end = len(item["input_ids"])
        ids[row, :end] = torch.tensor(item["input_ids"])
        mask[row, :end] = 1
        counted[row, item["start"] : end] = True
    reward = torch.tensor([item["reward"] for item in items], dtype=torch.float32)
    batch = {"input_ids": ids, "attention_mask": mask, "counted": counted, "labels": reward}
    if "hidden" in items[0]:
        batch["hidden"] = pad_sequence([item["hidden"] for item in items], batch_first=True)
    return batch
