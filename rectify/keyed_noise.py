"""Sampling whose noise is a function of what is sampled, not of what was sampled before.

The Gumbel-max trick: `argmax_a log π(a) + G(a)` is distributed as π where the `G(a)` are independent standard Gumbel
variables. Here each `G` is a hash of (seed, prompt, sample, step, token). A continuation then does not depend on the
order of the prompts, on who else is in the batch, or on restarts; and two methods that are given the same key meet the
same noise, so that they differ only where their policies do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import LogitsProcessor

from rectify.errors import InvalidArgumentError

_MANTISSA = 53
_FEW = 4


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


# SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): the odd integer nearest to 2^64 / φ, and two multipliers
_GAMMA = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def row_keys(seed: int, prompts: Sequence[str], samples: Iterable[int]) -> Tensor:
    """The key of each sample of each prompt: `[prompts × samples]` int64, the samples of a prompt together.

    Args:
        seed: any integer.
        prompts: what names each prompt; equal names have equal noise.
        samples: the numbers of the continuations that each has.
    """
    samples = list(samples)
    digests = (
        hashlib.sha256(f"{seed}:{sample}:{prompt}".encode("utf-8", "surrogatepass")).digest()
        for prompt in prompts
        for sample in samples
    )
    return torch.tensor([int.from_bytes(digest[:8], "big", signed=True) for digest in digests], dtype=torch.int64)


def gumbel(keys: Tensor, step: int, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise: float64, in the shape that `keys` and `tokens` broadcast to.

    Args:
        keys: int64, of the rows.
        step: how many tokens were sampled before, 0 or more.
        tokens: int64 ids.
    """
    of_step = _mixed(keys + _signed((step + 1) * _GAMMA % (1 << 64)))
    bits = _mixed(of_step + (tokens + 1) * _GAMMA)
    uniform = (_shifted(bits, 64 - _MANTISSA).double() + 0.5) * 2.0**-_MANTISSA
    return uniform.log_().neg_().log_().neg_()


def _mixed(bits: Tensor) -> Tensor:
    """SplitMix64's finaliser; overwrites its argument. int64 products wrap as unsigned ones do."""
    bits ^= _shifted(bits, 30)
    bits *= _FIRST
    bits ^= _shifted(bits, 27)
    bits *= _SECOND
    bits ^= _shifted(bits, 31)
    return bits


def _shifted(bits: Tensor, places: int) -> Tensor:
    """A logical shift to the right, of signed integers."""
    return (bits >> places).bitwise_and_((1 << (64 - places)) - 1)


class KeyedSampling(LogitsProcessor):
    """Turns greedy search into sampling with keyed noise: the last processor of `generate(..., do_sample=False)`.

    Args:
        keys: `[B]` int64, one a row, as from `row_keys`.
        prompt_length: tokens of the prompts, padding included.

    Raises:
        InvalidArgumentError: (of a call) there are not as many keys as rows.
    """

    supports_continuous_batching = False

    def __init__(self, keys: Tensor, prompt_length: int) -> None:
        self.keys, self.prompt_length = keys, prompt_length

    @torch.no_grad()
    def __call__(self, input_ids: LongTensor, scores: FloatTensor) -> FloatTensor:
        """`[B, V]` scores, normalised or not, to perturbed ones, float64, whose highest entry is the sample."""
        if len(self.keys) != len(scores):
            raise InvalidArgumentError(f"keys are {len(self.keys)}, rows {len(scores)}: give a key for each row")
        step = input_ids.shape[1] - self.prompt_length
        keys = self.keys.to(scores.device)
        possible = scores > -torch.inf
        if possible.sum() > scores.numel() // _FEW:
            whole = torch.arange(scores.shape[1], device=scores.device)
            return gumbel(keys[:, None], step, whole).add_(scores)  # type: ignore[return-value]
        # after top-p a small part of the vocabulary is left
        rows, tokens = possible.nonzero(as_tuple=True)
        perturbed = torch.full_like(scores, -torch.inf, dtype=torch.float64)
        perturbed[rows, tokens] = gumbel(keys[rows], step, tokens).add_(scores[rows, tokens])
        return perturbed  # type: ignore[return-value]
