"""What rectification costs: the peak memory of every arm, each in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import sys
import threading
from collections.abc import Sequence
from typing import Any

import psutil
import torch
from torch import nn

from rectify.evaluation.overhead import Bench, Shape


class _PeakMemory:
    """The highest resident memory of this process while it is entered, above what it was before, in MiB."""

    def __enter__(self) -> _PeakMemory:
        self._process = psutil.Process()
        gc.collect()
        if sys.platform == "linux":  # what was freed while the networks were built must not hide what is taken now
            ctypes.CDLL(None).malloc_trim(0)
        self._before = self._highest = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._highest = max(self._highest, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.mib = (self._highest - self._before) / 2**20


def weights_mib(network: nn.Module) -> float:
    """The weights of a network in MiB; not those of a shared trunk, which are the model's."""
    return sum(parameter.numel() * parameter.element_size() for parameter in network.parameters()) / 2**20


def arm_memory(shape: Shape, arm: str, batch: int, new_tokens: int) -> dict[str, Any]:
    """MiB that one call of `generate` adds at its peak to the loaded networks, and MiB of the arm's own weights."""
    bench = Bench(shape)
    bench.seconds(arm, 1, 2)  # what is made once, at first use
    if shape.device == "cpu":
        with _PeakMemory() as peak:
            bench.seconds(arm, batch, new_tokens)
        mib = peak.mib
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        bench.seconds(arm, batch, new_tokens)
        mib = (torch.cuda.max_memory_allocated() - before) / 2**20
    weights = 0.0 if arm == "base" else weights_mib(bench.network(arm))
    return {"arm": arm, "batch": batch, "new_tokens": new_tokens, "peak_mib": mib, "weights_mib": weights}


def peak_memory(shape: Shape, arms: Sequence[str], batch: int, new_tokens: int) -> list[dict[str, Any]]:
    """`arm_memory` of each arm, in a process of its own, and what its peak has above the base arm's: `extra_mib`."""
    rows = []
    for arm in arms:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(arm_memory, (shape, arm, batch, new_tokens)))
    base = next((row["peak_mib"] for row in rows if row["arm"] == "base"), math.nan)
    return [row | {"extra_mib": row["peak_mib"] - base} for row in rows]
