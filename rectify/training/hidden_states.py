"""The states of a frozen trunk, computed once and kept on disk, so that training its head does not run it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from rectify.q_network import DeadEndQNetwork
from rectify.training.resumable_array import ResumableArray
from rectify.training.trajectory_data import TrajectoryDataset, collate
from rectify.trunk_states import input_device

_SAVE_EVERY = 50  # batches


class CachedStates(Dataset):
    """Trajectories with the last hidden states of each, in bfloat16 in a file of `tokens × hidden_size × 2` bytes.

    Making it again after an interruption goes on where it was.

    Args:
        network: whose trunk is run; it must not change.
        trajectories: the texts.
        file: where the states are kept.
        key: of network and trajectories; a file of another key is made anew.
        batch_size: texts at a time, of nearly equal length.
        progress: show a progress bar.
    """

    def __init__(
        self,
        network: DeadEndQNetwork,
        trajectories: TrajectoryDataset,
        file: Path,
        key: str,
        batch_size: int = 64,
        progress: bool = True,
    ) -> None:
        self.items = trajectories.items
        lengths = [len(item["input_ids"]) for item in self.items]
        self._ends = np.cumsum(lengths)
        shape = (int(self._ends[-1]), network.config.hidden_size)
        self._array = ResumableArray(file, shape, np.int16, key=key, batch_size=batch_size)
        self._states = self._array.values
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        for number in tqdm(range(self._array.done, len(batches)), "hidden states", unit="batch", disable=not progress):
            self._fill(network, batches[number])
            if number + 1 == len(batches) or (number + 1) % _SAVE_EVERY == 0:
                self._array.save(number + 1)

    @torch.no_grad()
    def _fill(self, network: DeadEndQNetwork, places: list[int]) -> None:
        device = input_device(network.trunk)
        batch = collate([self.items[place] for place in places])
        hidden = network.encode(batch["input_ids"].to(device), batch["attention_mask"].to(device))
        rows = hidden.to(torch.bfloat16).cpu().view(torch.int16).numpy()
        for row, place in zip(rows, places, strict=True):
            begin, end = self._span(place)
            self._states[begin:end] = row[: end - begin]

    def _span(self, place: int) -> tuple[int, int]:
        end = int(self._ends[place])
        return end - len(self.items[place]["input_ids"]), end

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        begin, end = self._span(index)
        states: Tensor = torch.from_numpy(np.array(self._states[begin:end])).view(torch.bfloat16)
        return {**self.items[index], "hidden": states}

    def remove(self) -> None:
        """Delete the file."""
        self._array.remove()
