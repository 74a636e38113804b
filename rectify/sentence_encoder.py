"""Embeddings of sentences, and how alike two texts are by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rectify.detectors.classifier import pad
from rectify.errors import CheckpointError, InvalidArgumentError, first_line
from rectify.hub import model_place


class SentenceEncoder:
    """The mean of an encoder's last states, over the tokens of a text, as a vector of length 1.

    Args:
        model: any encoder of the Hugging Face form, in evaluation mode.
        tokenizer: its tokenizer.
        max_length: tokens of a text that are read, from its start.
        batch_size: texts at a time, of nearly equal length.

    Source: Reimers and Gurevych, Sentence-BERT, EMNLP 2019 (arXiv 1908.10084).

    Example:
        >>> from rectify.sentence_encoder import SentenceEncoder
        >>> encoder = SentenceEncoder.from_pretrained("sentence-transformers/all-MiniLM-L6-v2")
        >>> encoder.similarity(["Good morning"], ["Have a nice day"])
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int = 256, batch_size: int = 64
    ) -> None:
        if model.config.is_encoder_decoder:
            raise InvalidArgumentError("the sentence encoder is an encoder-decoder: give an encoder")
        self.model, self.tokenizer = cast(PreTrainedModel, model.eval()), tokenizer
        self.max_length, self.batch_size = max_length, batch_size

    @classmethod
    def from_pretrained(cls, name: str, device: str | torch.device = "cpu") -> SentenceEncoder:
        """The encoder of a folder or Hub id, in float32.

        Raises:
            CheckpointError: nothing usable is there.
        """
        place = model_place(name)
        try:
            tokenizer = AutoTokenizer.from_pretrained(place)
            model = AutoModel.from_pretrained(place, dtype=torch.float32).to(device)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"sentence encoder {name!r} cannot be loaded ({first_line(error)}): give an encoder with its "
                "tokenizer, as a folder or Hub id"
            ) from error
        return cls(model, tokenizer)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """`[N, H]` float32 vectors of length 1 on the CPU; zeros for a text without a token."""
        rows: list[list[int]] = []
        if texts:
            rows = self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]  # type: ignore[assignment]
        found = torch.zeros(len(rows), self.model.config.get_text_config().hidden_size)
        order = sorted((place for place, row in enumerate(rows) if row), key=lambda place: -len(rows[place]))
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            ids, mask = (part.to(self.model.device) for part in pad([rows[place] for place in places]))
            hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            found[places] = torch.nn.functional.normalize(masked_mean(hidden, mask), dim=-1).cpu()
        return found

    def similarity(self, texts: Sequence[str], others: Sequence[str]) -> np.ndarray:
        """The cosine of each pair, `[N]` float64 from −1 to 1."""
        first, second = self.encode(texts), self.encode(others)
        return (first * second).sum(-1).double().numpy()


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean of states over the tokens of each text, without padding.

    Args:
        hidden: `[B, T, H]`.
        mask: `[B, T]`, 0 at padding.

    Returns:
        `[B, H]`, float32 or better; zeros where there is no token.
    """
    weights = mask[..., None].to(torch.promote_types(hidden.dtype, torch.float32))
    return (hidden * weights).sum(1) / weights.sum(1).clamp_min(1)
