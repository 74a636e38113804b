"""The word filter: listed words are never generated."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rectify.errors import InvalidArgumentError
from rectify.json_files import sha256_of
from rectify.methods.base import WarpingProcessor
from rectify.methods.method import Decoder, Method
from rectify.scoring.keywords import read_terms
from rectify.trunk_states import input_device


class WordFilterProcessor(WarpingProcessor):
    """Forbids the token that would complete a listed word, and warps what is left.

    A word is met as it is listed, in lower case, capitalised and in capitals; at the start of a text or after a space,
    and without a space only where no word is going on. What follows is not known when its last token is chosen, so
    longer words that begin with the tokens of a listed one are forbidden too, as in every filter of this kind; words
    that other tokens make up are missed.

    Args:
        terms: the words, of one token or several.
        model, tokenizer, sampling: see `WarpingProcessor`.
    """

    # it needs whole prefixes, and continuous batching gives the last token only
    supports_continuous_batching = False

    def __init__(
        self,
        terms: Iterable[str],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Mapping[str, Any],
    ) -> None:
        super().__init__(model, tokenizer, sampling)
        width = model.config.get_text_config().vocab_size
        pieces = tokenizer.batch_decode([[token] for token in range(min(width, len(tokenizer)))])
        goes_on = torch.zeros(width, dtype=torch.bool)
        goes_on[: len(pieces)] = torch.tensor([piece[-1:].isalnum() for piece in pieces])
        self._goes_on = goes_on.to(input_device(model))
        by_length: dict[int, set[tuple[bool, tuple[int, ...]]]] = defaultdict(set)
        for term in terms:
            for form in {term, term.lower(), term.capitalize(), term.upper()}:
                for spaced, ids in _spellings(tokenizer, form):
                    by_length[len(ids)].add((spaced, ids))
        self._words = [
            (
                torch.tensor([ids for _, ids in sorted(words)], device=input_device(model)),
                torch.tensor([spaced for spaced, _ in sorted(words)], device=input_device(model)),
            )
            for _, words in sorted(by_length.items())
        ]

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Warped scores without the tokens that complete a listed word, `[B, V]`."""
        banned = torch.zeros_like(scores, dtype=torch.bool)
        # padding ends like a text's start
        ids = input_ids.masked_fill(~self.padding.real(input_ids), -1)
        for words, spaced in self._words:
            before = words.shape[1] - 1
            if before > ids.shape[1]:
                continue
            met = (ids[:, None, ids.shape[1] - before :] == words[:, :-1]).all(-1)
            if before < ids.shape[1]:
                last = ids[:, -before - 1]
                inside = self._goes_on[last.clamp_min(0)] & (last >= 0)
                met &= spaced | ~inside[:, None]
            rows, which = met.nonzero(as_tuple=True)
            banned[rows, words[which, -1]] = True
        left = scores.masked_fill(banned, -torch.inf)
        nothing = ~(left > -torch.inf).any(-1, keepdim=True)
        return self.warp(input_ids, torch.where(nothing, scores, left))


def _spellings(tokenizer: PreTrainedTokenizerBase, form: str) -> Iterator[tuple[bool, tuple[int, ...]]]:
    """The ids of a word after a space (True) and without one (False), where the vocabulary can spell it."""

    def ids_of(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    # SentencePiece writes a space before whatever a text begins with, but none after the end of a line
    line = ids_of("\n")
    for spaced in (True, False):
        text = " " * spaced + form
        ids = ids_of("\n" + text)
        ids = ids[len(line) :] if ids[: len(line)] == line else ids_of(text)
        if ids and tokenizer.unk_token_id not in ids:
            yield spaced, ids


@dataclass(frozen=True)
class WordFilter(Method):
    """The words of the list at `path` have probability zero."""

    name: ClassVar[str] = "word_filter"
    source: ClassVar[str] = "word filtering of Gehman et al., Findings of EMNLP 2020; before the warpers"

    def __post_init__(self) -> None:
        if self.path is None:
            raise InvalidArgumentError("word_filter names no word list: give word_filter:FILE")

    def bind(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Mapping[str, Any]) -> Decoder:
        """See `Method.bind`."""
        terms = [term.strip() for term in read_terms(Path(cast(str, self.path))) if term.strip()]
        if not terms:
            raise InvalidArgumentError(f"word_filter {self.path!r} holds no word: give a word a line")
        return Decoder(WordFilterProcessor(terms, model, tokenizer, sampling), revision=sha256_of(terms))
