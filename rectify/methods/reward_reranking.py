"""Reward-augmented decoding: the likeliest tokens, ranked anew by the reward of the text that each would make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rectify.detector_value import DetectorValue
from rectify.detectors import ToxicityClassifier
from rectify.errors import InvalidArgumentError
from rectify.json_files import sha256_of
from rectify.methods.base import WarpingProcessor
from rectify.methods.method import Decoder, Method
from rectify.prefix_memo import MASKED
from rectify.trunk_states import input_device


class RewardRerankingProcessor(WarpingProcessor):
    """Keeps the `k` likeliest tokens and adds `β · (1 − toxicity)` to their logits; the warpers follow.

    Args:
        value: whose toxicity of prefixes and candidates is read.
        beta, k: see `RewardReranking`.
        model, tokenizer, sampling: see `WarpingProcessor`.
    """

    # it needs whole prefixes, and continuous batching gives the last token only
    supports_continuous_batching = False

    def __init__(
        self,
        value: DetectorValue,
        beta: float,
        k: int,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Mapping[str, Any],
    ) -> None:
        super().__init__(model, tokenizer, sampling)
        self.value, self.beta, self.k = value, beta, k

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`[B, V]` warped scores, `-inf` but for the candidates."""
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        highest, tokens = scores.topk(min(self.k, scores.shape[-1]), dim=-1)
        prefixes = input_ids.masked_fill(~self.padding.real(input_ids), MASKED)
        reward = 1 - self.value.toxicity(prefixes, tokens).to(scores.dtype)
        ranked = torch.full_like(scores, -torch.inf).scatter_(-1, tokens, highest + self.beta * reward)
        return self.warp(input_ids, ranked)

    def reset(self) -> None:
        """Forget the states of all prefixes."""
        self.value.clear()


@dataclass(frozen=True)
class RewardReranking(Method):
    """Reward-augmented decoding with the causal classifier of `path` (default: `pocket-reward`).

    Attributes:
        beta: weight of the reward, 0 or more.
        k: candidates.
    """

    name: ClassVar[str] = "reward_reranking"
    source: ClassVar[str] = (
        "Deng and Raffel, RAD, EMNLP 2023 (arXiv 2310.09520); the reward reads ids instead of text, top-p follows"
    )

    beta: float = 50.0
    k: int = 20

    def __post_init__(self) -> None:
        if not 0 <= self.beta < float("inf"):
            raise InvalidArgumentError(f"beta is {self.beta}: give 0 or more")
        if self.k < 1:
            raise InvalidArgumentError(f"k is {self.k}: give 1 or more")

    @property
    def strength(self) -> str:
        """β."""
        return "beta"

    def bind(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Mapping[str, Any]) -> Decoder:
        """See `Method.bind`."""
        classifier = ToxicityClassifier.from_pretrained(self.path or "pocket-reward", device=input_device(model))
        value = DetectorValue(classifier, tokenizer)
        processor = RewardRerankingProcessor(value, self.beta, self.k, model, tokenizer, sampling)
        return Decoder(processor, reads=(classifier,), revision=sha256_of(classifier.config.calibration))
