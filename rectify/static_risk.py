"""The context-free baseline: one risk a token, whatever comes before it.

What a Q network adds is what it does better than this table, which costs nothing to train or run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Cache

from rectify.errors import CheckpointError, InvalidArgumentError
from rectify.hub import checkpoint_folder
from rectify.padding import follows
from rectify.pretrained import refusing
from rectify.saved_config import read_config
from rectify.saved_weights import read_weights
from rectify.trunk_states import Abilities
from rectify.vocabulary import Fingerprint

logger = logging.getLogger(__name__)

CONFIG_FILE, TABLE_FILE = "static_risk.json", "static_risk.safetensors"


@dataclass
class StaticRiskConfig:
    """Everything about a table but its values; saved as `static_risk.json`.

    Attributes:
        vocab_size: number of tokens V.
        base_rate: mean risk over all tokens that were counted, 0 to 1; that of a token never seen.
        prior: how many occurrences at the base rate every token starts with.
        vocabulary: fingerprint of the tokenizer, or `None` where it is not known.
        training: free-form record of how the table came to be.
    """

    vocab_size: int
    base_rate: float
    prior: float
    vocabulary: Fingerprint | None = None
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.vocabulary, dict):
            self.vocabulary = Fingerprint(**self.vocabulary)
        if self.vocab_size < 1:
            raise InvalidArgumentError(f"vocab_size is {self.vocab_size}: give 1 or more")
        if not 0 <= self.base_rate <= 1:
            raise InvalidArgumentError(f"base_rate is {self.base_rate}: give a probability from 0 to 1")
        if not 0 < self.prior < float("inf"):
            raise InvalidArgumentError(f"prior is {self.prior}: give a number above 0")


class _TableHead(nn.Module):
    """A head that gives the same values in every state."""

    table: Tensor

    def __init__(self, risk: np.ndarray) -> None:
        super().__init__()
        # of log(1 − risk) float32 loses no digits near either end, and every device has it
        with np.errstate(divide="ignore"):
            self.register_buffer("table", torch.from_numpy(np.log1p(-risk)).float())

    def log_survival(self, hidden: Tensor, actions: Tensor | None = None) -> Tensor:
        """`log(1 + Q)`, float32: `[..., V]` of `[..., 0]` states, or `[...]` for `actions` `[...]`."""
        return self.table.expand(*hidden.shape[:-1], -1) if actions is None else self.table[actions]

    def forward(self, hidden: Tensor, actions: Tensor | None = None) -> Tensor:
        """`Q`: shapes as in `log_survival`."""
        return self.log_survival(hidden, actions).expm1()


class StaticTokenRisk(nn.Module):
    """A table of V risks, in the form of a Q network: `RectificationProcessor(StaticTokenRisk.fit(…), Tilt())`.

    Args:
        risk: `[V]` float64 in [0, 1].
        config: what is recorded beside it.

    Raises:
        InvalidArgumentError: the risks are out of range, or not `vocab_size` many.
    """

    abilities = Abilities()
    """There are no states to keep, so none are reused."""
    context = None
    """A table has no longest prefix."""

    def __init__(self, risk: np.ndarray, config: StaticRiskConfig) -> None:
        super().__init__()
        risk = np.asarray(risk, dtype=np.float64)
        if risk.shape != (config.vocab_size,):
            raise InvalidArgumentError(f"risk has shape {risk.shape}: give one for each of {config.vocab_size} tokens")
        if not ((risk >= 0) & (risk <= 1)).all():
            raise InvalidArgumentError(f"risk reaches from {risk.min()} to {risk.max()}: give numbers from 0 to 1")
        self.config = config
        self.head = _TableHead(risk)

    # -----------------------------------------------------------------------------------------------------------------
    # Making, saving, loading

    @classmethod
    def fit(
        cls,
        ids: Sequence[Sequence[int]],
        starts: Sequence[int],
        rewards: Sequence[float],
        vocab_size: int,
        vocabulary: Fingerprint | None = None,
        prior: float = 20.0,
    ) -> StaticTokenRisk:
        """The risk of each token, averaged over the trajectories it was taken in.

        `risk(a) = (Σ −reward + prior·base_rate) / (n + prior)`, in float64, over the `n` occurrences of `a` at or after
        the `start` of a trajectory; every occurrence counts, as every position counts in training a Q network.

        Args:
            ids: token ids of each trajectory, prompt included.
            starts: place of the first token that was chosen, in each.
            rewards: of each, from −1 (toxic) to 0.
            vocab_size: number of tokens V.
            vocabulary: fingerprint of the tokenizer, so that a model of another one is refused.
            prior: above 0.

        Raises:
            InvalidArgumentError: the lists differ in length, something is out of range, or no token is counted.
        """
        if not len(ids) == len(starts) == len(rewards):
            raise InvalidArgumentError(
                f"ids hold {len(ids)} trajectories, starts {len(starts)}, rewards {len(rewards)}: give equally many"
            )
        if not 0 < prior < float("inf"):
            raise InvalidArgumentError(f"prior is {prior}: give a number above 0")
        toxicity = -np.asarray(rewards, dtype=np.float64)
        if not ((toxicity >= 0) & (toxicity <= 1)).all():
            outside = toxicity[~((toxicity >= 0) & (toxicity <= 1))][0]
            raise InvalidArgumentError(f"rewards hold {-outside}: give numbers from -1 to 0")
        if len(starts) and min(starts) < 0:
            raise InvalidArgumentError(f"starts hold {min(starts)}: give places in the trajectories, from 0")
        taken = [np.asarray(row[start:], dtype=np.int64) for row, start in zip(ids, starts, strict=True)]
        tokens = np.concatenate([*taken, np.empty(0, dtype=np.int64)])
        if not tokens.size:
            raise InvalidArgumentError(f"ids hold {len(ids)} trajectories and no token after their starts: give more")
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            outside = tokens.min() if tokens.min() < 0 else tokens.max()
            raise InvalidArgumentError(f"ids hold {outside}, vocab_size is {vocab_size}: give the ids' vocabulary size")
        weights = np.repeat(toxicity, [len(row) for row in taken])
        base_rate = float(weights.mean())
        total, count = np.bincount(tokens, weights, vocab_size), np.bincount(tokens, minlength=vocab_size)
        # rounding may leave a mean of ones a digit above 1
        risk = np.clip((total + prior * base_rate) / (count + prior), 0, 1)
        training = {"trajectories": len(ids), "tokens": len(tokens), "distinct_tokens": int((count > 0).sum())}
        return cls(risk, StaticRiskConfig(vocab_size, base_rate, prior, vocabulary, training))

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, revision: str | None = None, device: str | torch.device | None = None
    ) -> StaticTokenRisk:
        """Load a table from a folder or a Hub id; one line of the log says so where its vocabulary is not known.

        Raises:
            CheckpointError: nothing usable is there.
        """
        folder = checkpoint_folder(name, revision)
        with refusing(name):
            config = read_config(StaticRiskConfig, folder / CONFIG_FILE, "give a folder written by save_pretrained")
            weights = read_weights(folder / TABLE_FILE, {"table": (config.vocab_size,)}, finite=False)
            if not (weights["table"] <= 0).all():  # −∞ is a risk of 1; NaN is below nothing
                raise CheckpointError(f"{TABLE_FILE} holds what is no logarithm of a probability: is it complete?")
            table = cls(np.zeros(config.vocab_size), config)
            table.head.load_state_dict(weights)
        if config.vocabulary is None:
            logger.warning(
                "table %r: it records no vocabulary, so a model of another one of %d tokens is not refused: fit it "
                "anew with vocabulary=",
                str(name),
                config.vocab_size,
            )
        return table.to(device).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write configuration and table to a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).write_text(json.dumps(asdict(self.config), indent=2, ensure_ascii=False) + "\n")
        save_file(self.head.state_dict(), folder / TABLE_FILE)

    # -----------------------------------------------------------------------------------------------------------------
    # Values

    @property
    def device(self) -> torch.device:
        """Where the table is."""
        return self.head.table.device

    @property
    def risk(self) -> Tensor:
        """`[V]` float32 risks `−Q`, from 0 to 1."""
        return -self.head.table.expm1()

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """States without content: `[B, T, 0]` for `[B, T]` ids."""
        return self.head.table.new_empty(*input_ids.shape, 0)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """`Q[b, t, a]`, the value of token `a` after any prefix: `[B, T, V]` float32."""
        return self.head(self.encode(input_ids))

    def action_values(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """`Q` of each token that was taken: `[B, T]` float32; NaN at padding and, as in a Q network, at a text's start.

        Args:
            input_ids: `[B, T]` int64.
            attention_mask: `[B, T]`, 0 at padding.
        """
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        return self.head(self.encode(input_ids), input_ids.where(real, 0)).masked_fill(~follows(real), torch.nan)
