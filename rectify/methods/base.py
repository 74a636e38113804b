"""The model as it is, the control of every experiment; and the warping that methods without their own share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from rectify.errors import InvalidArgumentError
from rectify.methods.method import Decoder, Method
from rectify.padding import Padding
from rectify.processor import Statistics
from rectify.sampling import Sampling
from rectify.trunk_states import input_device


class WarpingProcessor(LogitsProcessor):
    """Applies the sampling warpers and nothing else; the parent of processors that change scores around that.

    Args:
        model, tokenizer: the language model.
        sampling: the settings of `Sampling` that are given; the model's generation_config has the others.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Mapping[str, Any]) -> None:
        self.sampling = Sampling.resolve(model.generation_config, **sampling)
        self._warpers = self.sampling.warpers(input_device(model))
        self.padding = Padding(model, tokenizer)

    def warp(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`[B, V]` scores after temperature, top-k, top-p and the like, float32 or better."""
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return self._warpers(cast(LongTensor, input_ids), cast(FloatTensor, scores))

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Warped scores, `[B, V]`."""
        return self.warp(input_ids, scores)

    def set_attention_mask(self, attention_mask: Tensor | None) -> None:
        """See `Padding.set_attention_mask`."""
        self.padding.set_attention_mask(attention_mask)

    def reset(self) -> None:
        """Nothing is kept."""

    def statistics(self) -> Statistics | None:
        """Nothing is counted."""
        return None


@dataclass(frozen=True)
class Base(Method):
    """The language model as it is."""

    name: ClassVar[str] = "base"
    source: ClassVar[str] = "the language model as it is"

    def __post_init__(self) -> None:
        if self.path is not None:
            raise InvalidArgumentError(f"base is given {self.path!r}, and reads nothing: leave it out")

    def bind(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Mapping[str, Any]) -> Decoder:
        """See `Method.bind`."""
        return Decoder(WarpingProcessor(model, tokenizer, sampling))
