"""Filling by an encoder-decoder that was trained to write a text out, such as GENIUS or BART."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase

from rectify.builders.masking import MASK
from rectify.context import context_length
from rectify.errors import InvalidArgumentError
from rectify.hub import model_place
from rectify.keyed_noise import KeyedSampling, row_keys
from rectify.pretrained import read_model, read_tokenizer, refusing_unusable
from rectify.sampling import Sampling
from rectify.trunk_states import input_device

_TOKENS_A_MASK = 5
_ROWS = 64


class Seq2SeqFiller:
    """Has an encoder-decoder write each masked text out, at most five tokens longer for each mask.

    Args:
        model: the encoder-decoder, in evaluation mode.
        tokenizer: with a mask token, which stands for `<MASK>`.
        name: of the model.
        top_p: of sampling, with keyed noise.
        seed: of the noise.

    Raises:
        InvalidArgumentError: the tokenizer has no mask token, or `top_p` is out of range.

    Source: Guo et al., GENIUS (arXiv 2211.10330), as CMD uses it (arXiv 2308.08295).

    Example:
        >>> from rectify.rephrasing.seq2seq_filler import Seq2SeqFiller
        >>> filler = Seq2SeqFiller.from_pretrained("beyond/genius-large")
        >>> filler.fill(["You are such a <MASK>, and I told you so"], attempt=0)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        top_p: float = 0.9,
        seed: int = 0,
    ) -> None:
        if tokenizer.mask_token is None:
            raise InvalidArgumentError(
                f"filler {name!r} has a tokenizer without a mask token: give a model that fills masks, as BART does"
            )
        self.model, self.tokenizer, self.seed = cast(PreTrainedModel, model.eval()), tokenizer, seed
        self.sampling = Sampling(do_sample=True, top_p=top_p)
        self.name = f"seq2seq:{name},top_p={top_p:g},seed={seed}"

    @classmethod
    def from_pretrained(
        cls, name: str, *, device: str | torch.device = "cpu", top_p: float = 0.9, seed: int = 0
    ) -> Seq2SeqFiller:
        """The model of a folder or Hub id.

        Raises:
            CheckpointError: no encoder-decoder is there.
        """
        place = model_place(name)
        with refusing_unusable(f"filler {name!r}", "give an encoder-decoder"):
            tokenizer = read_tokenizer(place)
            model, _ = read_model(AutoModelForSeq2SeqLM, place)
        return cls(model.to(device), tokenizer, name, top_p, seed)  # type: ignore[arg-type]

    @torch.no_grad()
    def fill(self, masked: Sequence[str], attempt: int, originals: Sequence[str] | None = None) -> list[str | None]:
        """See `Filler.fill`; `None` also where a text is too long for the model."""
        found: list[str | None] = [None] * len(masked)
        if not masked:
            return found
        texts = [text.replace(MASK, str(self.tokenizer.mask_token)) for text in masked]
        lengths = [len(ids) for ids in cast(list[list[int]], self.tokenizer(texts)["input_ids"])]
        limits = [length + _TOKENS_A_MASK * text.count(MASK) for length, text in zip(lengths, masked, strict=True)]
        context = context_length(self.model.config)
        # the decoder begins with one token
        fitting = [place for place, limit in enumerate(limits) if context is None or limit < context]
        order = sorted(fitting, key=lambda place: -len(texts[place]))
        for start in range(0, len(order), _ROWS):
            places = order[start : start + _ROWS]
            some = self.tokenizer([texts[place] for place in places], return_tensors="pt", padding=True)
            some = {name: some[name].to(input_device(self.model)) for name in ("input_ids", "attention_mask")}
            keys = row_keys(self.seed, [masked[place] for place in places], [attempt])
            processors = [*self.sampling.warpers(input_device(self.model)), KeyedSampling(keys, 1)]
            output = cast(Any, self.model).generate(
                **some,
                **self.sampling.generate_kwargs()
                | {"do_sample": False, "num_beams": 1, "logits_processor": processors},
                # one more, on which BART's forced end falls, so that no text's own last token depends on the others
                max_new_tokens=max(limits[place] for place in places) + 1,
            )
            for place, ids in zip(places, output[:, 1:].tolist(), strict=True):
                found[place] = (
                    str(self.tokenizer.decode(ids[: limits[place]], skip_special_tokens=True)).strip() or None
                )
        return found
