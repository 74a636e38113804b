"""Embeddings of sentences, and how alike two texts are by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from rectify.context import context_length
from rectify.detectors.classifier import batches_by_length
from rectify.errors import InvalidArgumentError
from rectify.hub import model_place, weights_fingerprint
from rectify.pretrained import check_vocabulary, read_model, read_tokenizer, refusing_unusable


class SentenceEncoder(nn.Module):
    """A frozen model whose last hidden states, averaged over a text's tokens and scaled to length 1, stand for it.

    As in sentence-transformers, the special tokens count. Make one with `from_pretrained`.

    Args:
        model: any encoder, or the trunk of a causal model, of the Hugging Face form.
        tokenizer: its tokenizer.
        max_length: tokens of a text that are read, from its start.
        fingerprint: of its weights, see `hub.weights_fingerprint`.

    Source: Reimers and Gurevych, Sentence-BERT, EMNLP 2019 (arXiv 1908.10084).

    Example:
        >>> from rectify.sentence_encoder import SentenceEncoder
        >>> encoder = SentenceEncoder.from_pretrained("sentence-transformers/all-MiniLM-L6-v2")
        >>> encoder.similarity(["Good morning"], ["Have a nice day"])
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 256,
        fingerprint: str | None = None,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.max_length, self.fingerprint = model, tokenizer, max_length, fingerprint
        model.config.get_text_config().use_cache = False
        tokenizer.truncation_side = "right"
        positions = context_length(model.config) or max_length
        if not tokenizer.num_special_tokens_to_add() < max_length <= positions:
            raise InvalidArgumentError(
                f"max_length is {max_length}: give a number above {tokenizer.num_special_tokens_to_add()}, at most "
                f"{positions}, what the encoder reads"
            )

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        revision: str | None = None,
        max_length: int = 256,
        device: str | torch.device | None = None,
    ) -> SentenceEncoder:
        """Load an encoder, or the trunk of a causal model, in float32 and evaluation mode.

        Args:
            name: folder, bundled name or Hub id.
            revision: of a Hub id.
            max_length: tokens of a text that are read.
            device: where to put it.

        Raises:
            CheckpointError: nothing usable is there.
            InvalidArgumentError: it is an encoder-decoder, or reads fewer tokens.
        """
        place = model_place(name, revision)
        with refusing_unusable(f"encoder {name!r}", "give a model of text with its tokenizer"):
            tokenizer = read_tokenizer(place, revision)
            model, _ = read_model(AutoModel, place, revision, dtype=torch.float32)
            check_vocabulary(model, tokenizer)
        if model.config.is_encoder_decoder:
            raise InvalidArgumentError(f"encoder {name!r} is an encoder-decoder: give an encoder or a causal model")
        encoder = cls(model, tokenizer, max_length, weights_fingerprint(place, model.config))
        return encoder.requires_grad_(False).to(device=device).eval()

    @property
    def hidden_size(self) -> int:
        """The width of the embeddings."""
        return cast(int, self.model.config.get_text_config().hidden_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The embeddings of texts, `[B, H]` float32 of length 1, from `[B, T]` ids and mask, padded on the right."""
        ids = input_ids.masked_fill(attention_mask == 0, self.tokenizer.pad_token_id or 0)
        hidden = self.model(input_ids=ids, attention_mask=attention_mask).last_hidden_state
        return nn.functional.normalize(masked_mean(hidden, attention_mask).float(), dim=-1)

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], batch_size: int = 64, progress: bool = False) -> np.ndarray:
        """The embeddings of texts.

        Args:
            texts: of any length; the first `max_length` tokens count.
            batch_size: texts at a time, of nearly equal length.
            progress: show a progress bar.

        Returns:
            `[N, H]` float32, each of length 1, or 0 where a text yields no token at all.
        """
        result = np.zeros((len(texts), self.hidden_size), dtype=np.float32)
        if not texts:
            return result
        encoded = cast(
            list[list[int]], self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
        )
        device = self.model.device
        for places, ids, mask in batches_by_length(encoded, batch_size, progress):
            result[places] = self(ids.to(device), mask.to(device)).cpu().numpy()
        return result

    def similarity(self, texts: Sequence[str], others: Sequence[str]) -> np.ndarray:
        """The cosine of each pair, `[N]` float64 from −1 to 1; 0 where a text yields no token."""
        return (self.embed(texts).astype(np.float64) * self.embed(others)).sum(-1)


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
