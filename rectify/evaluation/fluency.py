"""Fluency: perplexity of continuations under a base model and under its rectified policy, and distinct n-grams.

The perplexity of generated text alone can be lowered by narrowing the distribution; that of clean human text under the
rectified policy, and the share of its tokens that are cut, show what such narrowing costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rectify.errors import InvalidArgumentError
from rectify.generation.generator import read_once
from rectify.trunk_states import input_device, position_arguments

CUT = math.log(10)
"""A token is cut where its log-probability falls by more than this."""
FLOOR = math.log(1000)
"""A removed token counts as if its log-probability had fallen by this, so that perplexity stays finite."""

_CELLS = 1 << 24


class TextBatch(NamedTuple):
    """Prompts with their continuations, padded.

    Attributes:
        input_ids: `[B, T]` int64.
        attention_mask: `[B, T]` int64, 0 at padding.
        counted: `[B, T]` bool, the tokens of the continuations.
    """

    input_ids: Tensor
    attention_mask: Tensor
    counted: Tensor


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihood of continuations, each given its prompt.

    Attributes:
        nll: `[N]` float64 sums over the tokens of each continuation, in nats.
        tokens: `[N]` int64 token counts.
    """

    nll: Tensor
    tokens: Tensor

    @property
    def perplexity(self) -> float:
        """`exp(Σ nll / Σ tokens)`, a token as the unit; NaN without tokens."""
        return perplexity(float(self.nll.sum()), int(self.tokens.sum()))


@dataclass(frozen=True)
class ForcedLikelihood:
    """Negative log-likelihood of continuations under a method's policy and under its base, summed over all tokens.

    Attributes:
        nll: under the method's policy, in nats; a removed token counts as its base probability / 1000.
        base_nll: under the base policy.
        tokens: how many tokens.
        cut: tokens whose probability falls more than tenfold, the removed ones included.
        removed: tokens that the method gives probability 0.
    """

    nll: float
    base_nll: float
    tokens: int
    cut: int
    removed: int

    @property
    def perplexity(self) -> float:
        """Of the method's policy."""
        return perplexity(self.nll, self.tokens)

    @property
    def base_perplexity(self) -> float:
        """Of the base policy."""
        return perplexity(self.base_nll, self.tokens)

    @property
    def cut_share(self) -> float:
        """Share of tokens whose probability falls more than tenfold, 0 to 1."""
        return self.cut / self.tokens if self.tokens else math.nan


# ---------------------------------------------------------------------------------------------------------------------
# Likelihoods


def perplexity(nll: float, tokens: int) -> float:
    """`exp(nll / tokens)`; NaN without tokens."""
    return math.exp(nll / tokens) if tokens else math.nan


def text_batch(
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    side: Literal["left", "right"] = "right",
    device: str | torch.device = "cpu",
) -> TextBatch:
    """Token ids of prompts and their continuations as one padded batch.

    Raises:
        InvalidArgumentError: there are not equally many of both, or a prompt has no token to begin from.
    """
    if len(prompts) != len(continuations):
        raise InvalidArgumentError(
            f"prompts are {len(prompts)}, continuations {len(continuations)}: give one prompt for each continuation"
        )
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise InvalidArgumentError(f"prompts hold no token at place {number}: give at least one")
    rows = [[*prompt, *continuation] for prompt, continuation in zip(prompts, continuations, strict=True)]
    longest = max((len(row) for row in rows), default=0)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask, counted = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        first = longest - len(row) if side == "left" else 0
        ids[number, first : first + len(row)] = torch.tensor(row)
        mask[number, first : first + len(row)] = 1
        counted[number, first + len(prompt) : first + len(row)] = True
    return TextBatch(ids.to(device), mask.to(device), counted.to(device))


@torch.no_grad()
def token_log_probabilities(model: PreTrainedModel, batch: TextBatch) -> Tensor:
    """Log-probability of each token under the model as it is, without temperature or truncation.

    Returns:
        `[B, T]` float64 on the CPU; 0 where no token is counted.
    """
    return _log_probabilities(model_logits(model, batch), batch)


def _log_probabilities(logits: Tensor, batch: TextBatch) -> Tensor:
    """`token_log_probabilities` of `[B, T, V]` logits."""
    found = torch.zeros(batch.input_ids.shape, dtype=torch.float64)
    for rows, columns in counted_places(batch, logits.shape[-1]):
        scores = logits[rows, columns - 1].float().log_softmax(-1)
        found[rows.cpu(), columns.cpu()] = _of(scores, batch.input_ids[rows, columns])
    return found


def continuation_nll(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    batch_size: int = 32,
) -> Likelihood:
    """Likelihood of each continuation under the model as it is; errors as in `text_batch`.

    Args:
        model: a causal language model in evaluation mode.
        prompts, continuations: token ids; give those that were generated, not those of their text.
        batch_size: texts at a time; the logits of whole texts are held for so many.
    """
    sums = [torch.empty(0, dtype=torch.float64)]
    for batch in _batches(model, prompts, continuations, batch_size):
        sums.append(-token_log_probabilities(model, batch).sum(-1))
    return Likelihood(torch.cat(sums), torch.tensor([len(row) for row in continuations], dtype=torch.int64))


@torch.no_grad()
def prompted_nll(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
    batch_size: int = 32,
) -> Likelihood:
    """Likelihood of several continuations of each prompt, which is read once; as `continuation_nll` otherwise.

    Args:
        model: a causal language model in evaluation mode.
        prompts: token ids, `P` of them.
        continuations: token ids of each prompt's, equally many.
        batch_size: continuations at a time, at least those of one prompt.

    Returns:
        Of the `P × n` continuations, those of a prompt together.
    """
    n = len(continuations[0]) if continuations else 1
    sums = [torch.empty(0, dtype=torch.float64)]
    size = max(1, batch_size // n)
    for start in range(0, len(prompts), size):
        some = prompts[start : start + size]
        texts = [text for ones in continuations[start : start + size] for text in ones]
        whole = text_batch(some, [()] * len(some), side="left", device=input_device(model))
        cache = read_once(model, whole.input_ids, whole.attention_mask, n)
        if cache is None:
            sums.append(continuation_nll(model, [prompt for prompt in some for _ in range(n)], texts, batch_size).nll)
            continue
        last = [prompt[-1:] for prompt in some for _ in range(n)]
        batch = text_batch(last, texts, device=input_device(model))
        mask = torch.cat((whole.attention_mask[:, :-1].repeat_interleave(n, 0), batch.attention_mask), -1)
        positions = position_arguments(model, mask, batch.input_ids.shape[1])
        logits = cast(Any, model)(
            input_ids=batch.input_ids, attention_mask=mask, past_key_values=cache, **positions
        ).logits
        sums.append(-_log_probabilities(logits, batch).sum(-1))
    return Likelihood(torch.cat(sums), torch.tensor([len(text) for ones in continuations for text in ones]))


# ---------------------------------------------------------------------------------------------------------------------
# Diversity


def distinct_n(continuations: Sequence[Sequence[str]], n: int) -> float:
    """Distinct n-grams of all continuations of a prompt over their number of words, averaged over prompts.

    Words are split at whitespace, and n-grams stay within a continuation. The words are the denominator for every n, so
    that figures can be set beside published ones. Prompts whose continuations have no word are left out.

    Args:
        continuations: of each prompt.
        n: length of the n-grams, 1 or more.

    Returns:
        From 0 to 1; NaN where no prompt has a word.

    Source: Liu et al., "DExperts", ACL 2021 (their evaluation code).
    """
    if n < 1:
        raise InvalidArgumentError(f"n is {n}: give 1 or more")
    shares = []
    for texts in continuations:
        words = [text.split() for text in texts]
        if total := sum(map(len, words)):
            grams = {tuple(row[start : start + n]) for row in words for start in range(len(row) - n + 1)}
            shares.append(len(grams) / total)
    return math.fsum(shares) / len(shares) if shares else math.nan


# ---------------------------------------------------------------------------------------------------------------------


def _batches(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], size: int
) -> Iterator[TextBatch]:
    if size < 1:
        raise InvalidArgumentError(f"batch_size is {size}: give 1 or more")
    if len(prompts) != len(continuations):
        text_batch(prompts, continuations)  # refuses
    for start in range(0, len(prompts), size):
        end = start + size
        yield text_batch(prompts[start:end], continuations[start:end], device=input_device(model))


def model_logits(model: PreTrainedModel, batch: TextBatch) -> Tensor:
    """`[B, T, V]`, with positions counted from the first real token."""
    ids, mask = batch.input_ids, batch.attention_mask
    positions = position_arguments(model, mask, ids.shape[1])
    return cast(Any, model)(input_ids=ids, attention_mask=mask, use_cache=False, **positions).logits


def counted_places(batch: TextBatch, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and columns of the counted tokens, few enough at a time for `[N, width]` tables of them to be small."""
    for places in batch.counted.nonzero().split(max(1, _CELLS // width)):
        yield places[:, 0], places[:, 1]


def _of(log_probabilities: Tensor, tokens: Tensor) -> Tensor:
    """The entry of each token: `[N, V]` and `[N]` to `[N]` float64 on the CPU."""
    return log_probabilities.gather(-1, tokens[:, None])[:, 0].cpu().double()
