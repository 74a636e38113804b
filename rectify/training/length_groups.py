"""The order in which texts are trained on: batches of nearly equal length, so that little is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

_POOL = 50  # batches


class LengthGroups(Sampler[int]):
    """Indices in random batches of nearly equal length, by seed and epoch alone.

    The sampler of transformers for `group_by_length` draws from torch's global generator, so that a training that was
    resumed would see other batches than an uninterrupted one; and its batches come longest first.

    Args:
        lengths: tokens of each text.
        batch_size: texts a batch; as in the data loader, the last batch may be smaller.
        seed: of all draws.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(len(self.lengths))
        whole = len(order) // self.batch_size * self.batch_size
        batches: list[np.ndarray] = []
        # sorted within pools rather than as a whole, so that batches differ from epoch to epoch
        for start in range(0, whole, _POOL * self.batch_size):
            pool = order[start : min(start + _POOL * self.batch_size, whole)]
            pool = pool[np.argsort(self.lengths[pool], kind="stable")]
            batches += np.split(pool, len(pool) // self.batch_size)
        shuffled = [batches[index] for index in generator.permutation(len(batches))]
        return iter(np.concatenate([*shuffled, order[whole:]]).tolist())
