"""DExperts: an expert on clean text and an anti-expert on toxic text vote on the model's tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rectify.causal_states import NextTokenLogits
from rectify.errors import InvalidArgumentError
from rectify.methods.base import WarpingProcessor
from rectify.methods.expert_pair import load_experts
from rectify.methods.method import Decoder, Method
from rectify.prefix_memo import MASKED
from rectify.trunk_states import input_device


class DExpertsProcessor(WarpingProcessor):
    """The sampling warpers, then `α·(z⁺ − z⁻)` on the tokens that are left.

    Args:
        expert, anti_expert: language models of the model's vocabulary.
        alpha: α.
        model, tokenizer, sampling: see `WarpingProcessor`.

    Raises:
        InvalidArgumentError: an expert's logits cannot be made step by step (see `NextTokenLogits`).
    """

    # it needs whole prefixes, and continuous batching gives the last token only
    supports_continuous_batching = False

    def __init__(
        self,
        expert: PreTrainedModel,
        anti_expert: PreTrainedModel,
        alpha: float,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Mapping[str, Any],
    ) -> None:
        super().__init__(model, tokenizer, sampling)
        self.alpha = alpha
        self.expert = NextTokenLogits(expert, "expert")
        self.anti_expert = NextTokenLogits(anti_expert, "anti-expert")

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores of the ensemble, `[B, V]`, float32 or better; what the warpers removed stays removed.

        Args:
            input_ids: `[B, T]` the prefixes, left padding included.
            scores: `[B, V]` the model's logits.

        Raises:
            InvalidArgumentError: the prefixes are empty or exceed the experts' context, or the attention mask is that
                of other prompts.
        """
        prefixes = input_ids.masked_fill(~self.padding.real(input_ids), MASKED)
        votes = self.expert(prefixes) - self.anti_expert(prefixes)
        # rows that pad a model's embeddings stand for no token, and are voted on by no one
        votes = pad(votes, (0, scores.shape[-1] - votes.shape[-1])).to(scores.device)
        return self.warp(input_ids, scores) + self.alpha * votes

    def reset(self) -> None:
        """Forget the states of all prefixes."""
        self.expert.clear()
        self.anti_expert.clear()


@dataclass(frozen=True)
class DExperts(Method):
    """The ensemble with the experts of `path`, a folder that `rectify train experts` makes.

    Attributes:
        alpha: α, the weight of what the experts say, 0 or more.
    """

    name: ClassVar[str] = "dexperts"
    source: ClassVar[str] = (
        "Liu et al., ACL 2021 (arXiv 2105.03023); all warpers before the experts, as their code has top-p; LoRA "
        "experts, cached"
    )

    alpha: float = 2.0

    def __post_init__(self) -> None:
        if self.path is None:
            raise InvalidArgumentError("dexperts names no experts: give dexperts:FOLDER")
        if not 0 <= self.alpha < math.inf:
            raise InvalidArgumentError(f"alpha is {self.alpha}: give a number of 0 or more")

    @property
    def strength(self) -> str:
        """α."""
        return "alpha"

    def bind(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Mapping[str, Any]) -> Decoder:
        """See `Method.bind`."""
        pair = load_experts(cast(str, self.path), tokenizer, model.dtype, input_device(model))
        return Decoder(DExpertsProcessor(*pair, self.alpha, model, tokenizer, sampling), reads=pair)
