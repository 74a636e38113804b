"""Chains as a model is trained on them: token ids, what of them is predicted, and the continuations to compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from rectify.builders.cmd_records import ChainExample
from rectify.chain import CLOSE, frame
from rectify.detectors.classifier import pad
from rectify.errors import InvalidArgumentError

LEFT_OUT = -100
"""No token to predict, as cross_entropy calls it."""


class EncodedChains(Dataset):
    """Chains in tokens; frame, reasoning, continuation and end are tokenised apart, as a model meets and writes them.

    An item holds `input_ids` of the whole and `labels`, −100 for the frame; `template_ids`, as far as the marker that
    a continuation follows; `candidate_ids`, the continuation to seek and then those to shun, without their context;
    whether the chain calls its text `toxic`; and the `key` of its noise. A chain is never cut: one that is longer than
    allowed is left out, and counted in `too_long`.

    Args:
        tokenizer: of the model.
        examples: what to learn.
        max_length: tokens of a chain.
        candidate_tokens: of a continuation that is compared; the rest of it is cut.
        name: what a message calls them.

    Raises:
        InvalidArgumentError: none is short enough.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[ChainExample],
        max_length: int,
        candidate_tokens: int,
        name: str,
    ) -> None:
        self.close_ids = _plain(tokenizer, CLOSE)
        end = [] if tokenizer.eos_token_id is None else [cast(int, tokenizer.eos_token_id)]
        self.items: list[dict[str, Any]] = []
        self.too_long = 0
        for example in examples:
            framed = cast(list[int], tokenizer(frame(example.prompt))["input_ids"])
            reasoning = _plain(tokenizer, example.steps.reasoning)
            candidates = [_plain(tokenizer, text) for text in (example.positive, *example.negatives)]
            whole = [*framed, *reasoning, *candidates[0], *self.close_ids, *end]
            if len(whole) > max_length:
                self.too_long += 1
                continue
            self.items.append(
                {
                    "input_ids": whole,
                    "labels": [LEFT_OUT] * len(framed) + whole[len(framed) :],
                    "template_ids": [*framed, *reasoning],
                    "candidate_ids": [ids[:candidate_tokens] for ids in candidates if ids] if candidates[0] else [],
                    "toxic": example.masked is not None,
                    "key": example.prompt,
                }
            )
        if not self.items:
            remedy = "raise max_length, or give shorter prompts" if examples else "build with more prompts"
            raise InvalidArgumentError(
                f"{name}: none of {len(examples)} chains has at most {max_length} tokens: {remedy}"
            )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"])


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch.

    Returns:
        `input_ids`, `attention_mask` and `labels` `[B, T]` int64, padded on the right; `toxic` `[B]` bool; the lists
        `template_ids`, `candidate_ids` and `key`, as the items have them.
    """
    ids, mask = pad([item["input_ids"] for item in items])
    labels, _ = pad([item["labels"] for item in items])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": torch.where(mask.bool(), labels, LEFT_OUT),
        "toxic": torch.tensor([item["toxic"] for item in items]),
        **{name: [item[name] for item in items] for name in ("template_ids", "candidate_ids", "key")},
    }
