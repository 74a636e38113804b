"""Which positions of a batch of prefixes are padding, where `generate` does not say."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rectify.errors import InvalidArgumentError
from rectify.thread_lock import ThreadLocal


def follows(real: Tensor) -> Tensor:
    """Which tokens come after another one of their text: `[B, T]` 0 and 1, or bool, to `[B, T]` bool."""
    real = real.bool()
    return torch.nn.functional.pad(real[:, :-1], (1, 0)) & real


class Padding:
    """Tells padding from text in left-padded prefixes.

    Args:
        model, tokenizer: whose padding, end and begin tokens count; the tokenizer's where both are given.
    """

    def __init__(self, model: PreTrainedModel | None = None, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        names = tokenizer if tokenizer is not None else model.generation_config if model is not None else None
        self._pad_token_id: int | None = getattr(names, "pad_token_id", None)
        ends = getattr(names, "eos_token_id", None)
        texts = [*(ends if isinstance(ends, list) else [ends]), getattr(names, "bos_token_id", None)]
        self._pad_is_text = self._pad_token_id in texts
        self._attention_mask: Tensor | None = None
        self._maker = threading.get_ident()
        self._own = ThreadLocal()

    def set_attention_mask(self, attention_mask: Tensor | None) -> None:
        """Say where the next prompts have padding; it holds until it is set again.

        What is said in another thread than the one that made the processor concerns the prompts of that thread alone.

        Without a mask, the padding tokens at the start of a row are padding. Where that token can also begin a text (it
        is the end or the begin token as well), those that *every* row of the batch begins with are text.

        Args:
            attention_mask: `[prompts, length]`, 0 at padding; or `None`.

        Raises:
            InvalidArgumentError: it is not two-dimensional.
        """
        if attention_mask is not None and attention_mask.ndim != 2:
            raise InvalidArgumentError(
                f"attention_mask has shape {tuple(attention_mask.shape)}: give a row for each prompt, [prompts, length]"
            )
        mask = None if attention_mask is None else attention_mask.bool()
        if threading.get_ident() == self._maker:
            self._attention_mask = mask
        else:
            self._own.mask = mask

    def real(self, input_ids: Tensor) -> Tensor:
        """Where the text is: `[B, T]` ids to `[B, T]` bool, False at padding.

        Raises:
            InvalidArgumentError: the attention mask is that of other prompts.
        """
        mask = getattr(self._own, "mask", self._attention_mask)
        if mask is not None:
            (prompts, length), (rows, total) = mask.shape, input_ids.shape
            if rows % prompts or total < length:
                raise InvalidArgumentError(
                    f"attention_mask has shape {(prompts, length)}, the prefixes have shape {(rows, total)}: "
                    "call set_attention_mask with the mask of these prompts, or with None"
                )
            # `generate` repeats each prompt's row for its beams and samples
            mask = mask.to(input_ids.device).repeat_interleave(rows // prompts, dim=0)
            return torch.nn.functional.pad(mask, (0, total - length), value=True)
        if self._pad_token_id is None:
            return torch.ones_like(input_ids, dtype=torch.bool)
        leading = (input_ids == self._pad_token_id).cumprod(-1).sum(-1, keepdim=True)
        padding = leading - leading.min() if self._pad_is_text else leading
        padding = padding.clamp_max(input_ids.shape[1] - 1)
        return torch.arange(input_ids.shape[1], device=input_ids.device) >= padding


def pad_left(rows: Sequence[Sequence[int]], device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of texts, `[B, T]` int64 each, padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*[0] * (longest - len(row)), *row] for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, (torch.arange(longest, 0, -1, device=device) <= lengths[:, None]).long()
