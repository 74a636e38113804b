"""What decoding needs of a risk model, so that a `DeadEndQNetwork` and a table can stand in for each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, Self

import torch
from torch import Tensor, nn
from transformers import Cache

from rectify.trunk_states import Abilities
from rectify.vocabulary import Fingerprint


class RiskConfig(Protocol):
    """The vocabulary of a risk model."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens that are valued."""

    @property
    def vocabulary(self) -> Fingerprint | None:
        """Fingerprint of the tokenizer, or `None` where it is not known."""


class RiskHead(Protocol):
    """From states to values."""

    def log_survival(self, hidden: Tensor, actions: Tensor | None = None) -> Tensor:
        """`log(1 + Q)` of `[..., H]` states, float32: `[..., V]`, or that of `actions`, `[...]` or `[..., K]`."""


class StateModel(Protocol):
    """A state after each prefix."""

    @property
    def config(self) -> RiskConfig:
        """Its vocabulary."""

    @property
    def abilities(self) -> Abilities:
        """Whether states may be kept, padded and made side by side."""

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """The states after the last positions, `[B, T, H]`."""


class BranchingModel(StateModel, Protocol):
    """One that may also read several next tokens of a prefix side by side."""

    @property
    def branches(self) -> bool:
        """Whether `encode_branches` may be called; without it, each text is read by itself."""

    def encode_branches(self, tokens: Tensor, seen: Tensor, positions: Tensor, cache: Cache, real: Tensor) -> Tensor:
        """The states after `[B, K]` tokens, `[B, K, H]`; the cache is extended by them.

        Args:
            tokens: int64.
            seen: `[B, 1, K, past + K]` bool, what each token may read.
            positions: `[B, K]` int64.
            cache: of the prefixes.
            real: `[B, K]` bool, which tokens are asked for; the states of the others may be anything.
        """


class TextRisk(Protocol):
    """The risk of each token of finished texts."""

    @property
    def device(self) -> torch.device:
        """Where it is."""

    def action_values(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """`Q` of each token that was taken: `[B, T]` float32, NaN at padding and at the first real token."""


class RiskModel(StateModel, TextRisk, Protocol):
    """A state after each prefix, and a head that values every next token in it."""

    @property
    def head(self) -> RiskHead:
        """From states to values."""

    @property
    def context(self) -> int | None:
        """Longest prefix in tokens, or `None` for no limit."""

    def eval(self) -> Self:
        """Put into evaluation mode."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trained weights."""
