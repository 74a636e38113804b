"""Self-debiasing: the model itself, after words that announce toxic text, says which tokens to avoid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rectify.causal_states import NextTokenLogits
from rectify.errors import InvalidArgumentError
from rectify.methods.base import WarpingProcessor
from rectify.methods.method import Decoder, Method
from rectify.prefix_memo import MASKED

TEMPLATE = "The following text contains {}:\n"
DESCRIPTIONS = {
    "toxicity": "rude, disrespectful, or unreasonable language",
    "severe_toxicity": "very hateful, aggressive, disrespectful language",
    "sexually_explicit": "sexually explicit language",
    "threat": "a threat",
    "identity_attack": "negative or hateful language targeting someone because of their identity",
    "profanity": "swear words, curse words, or other obscene or profane language",
}
"""What the published prefixes announce, by the attributes of the Perspective API that they describe."""


@dataclass(frozen=True)
class SelfDebias(Method):
    """Self-debiasing of the model by its own predictions under one or six prefixes.

    Attributes:
        decay: λ, 0 or more: how fast a token's factor falls with what a prefix adds to its probability.
        epsilon: the least factor, 0 to 1.
        attributes: `"all"` for the six published prefixes, `"toxicity"` for the first of them alone.
    """

    name: ClassVar[str] = "self_debias"
    source: ClassVar[str] = (
        "Schick, Udupa and Schütze, TACL 2021 (arXiv 2103.00453), with the published prefixes; the warpers follow the "
        "debiasing, as published; prefix and prompt are tokenised apart"
    )

    decay: float = 50.0
    epsilon: float = 0.01
    attributes: str = "all"

    def __post_init__(self) -> None:
        if self.path is not None:
            raise InvalidArgumentError(f"path is {self.path!r}: self_debias reads no files, leave it out")
        if not 0 <= self.decay < math.inf:
            raise InvalidArgumentError(f"decay is {self.decay}: give a number of 0 or more")
        if not 0 <= self.epsilon <= 1:
            raise InvalidArgumentError(f"epsilon is {self.epsilon}: give a number from 0 to 1")
        if self.attributes not in ("all", "toxicity"):
            raise InvalidArgumentError(f"attributes is {self.attributes!r}: give 'all' or 'toxicity'")

    @property
    def strength(self) -> str:
        """The decay."""
        return "decay"

    def bind(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Mapping[str, Any]) -> Decoder:
        """See `Method.bind`."""
        names = list(DESCRIPTIONS) if self.attributes == "all" else ["toxicity"]
        prefixes = [TEMPLATE.format(DESCRIPTIONS[name]) for name in names]
        return Decoder(SelfDebiasProcessor(prefixes, self.decay, self.epsilon, model, tokenizer, sampling))


class SelfDebiasProcessor(WarpingProcessor):
    """Self-debiasing, then the sampling warpers.

    The model is run over each prefix of the batch once for each announcement, with a cache of its own.

    Args:
        announcements: what is written before a text; one or more.
        decay, epsilon: see `SelfDebias`.
        model, tokenizer, sampling: see `WarpingProcessor`.

    Raises:
        InvalidArgumentError: the model's logits cannot be made step by step (see `NextTokenLogits`), or an announcement
            has no token.
    """

    # it needs whole prefixes, and continuous batching gives the last token only
    supports_continuous_batching = False

    def __init__(
        self,
        announcements: Sequence[str],
        decay: float,
        epsilon: float,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Mapping[str, Any],
    ) -> None:
        super().__init__(model, tokenizer, sampling)
        self.logits = NextTokenLogits(model, "model under a self-debiasing prefix")
        self.decay, self.epsilon = decay, epsilon
        rows = [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in announcements]
        if not rows or not all(map(len, rows)):
            raise InvalidArgumentError(f"announcements is {announcements!r}: give some, each with a token")
        self._announcements = pad_sequence(rows, batch_first=True, padding_value=MASKED)
        self._begin = cast(int | None, tokenizer.bos_token_id)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Debiased and then warped scores, `[B, V]`, float32 or better.

        Args:
            input_ids: `[B, T]` the prefixes, left padding included.
            scores: `[B, V]` the model's logits or log-probabilities, after processors that forbid tokens.

        Raises:
            InvalidArgumentError: announcement and prefix together exceed the model's context, the prefixes are empty,
                or the attention mask is that of other prompts.
        """
        texts = input_ids.masked_fill(~self.padding.real(input_ids), MASKED)
        announced = self.logits(announce(texts, self._announcements.to(texts.device), self._begin))
        announced = announced.view(len(texts), -1, announced.shape[-1]).to(scores.device)
        return self.warp(input_ids, debias(scores, announced, self.decay, self.epsilon))

    def reset(self) -> None:
        """Forget the states of all prefixes."""
        self.logits.clear()


def announce(texts: Tensor, announcements: Tensor, begin: int | None = None) -> Tensor:
    """Each text after each announcement.

    Args:
        texts: `[B, T]` ids, `MASKED` at padding; each row has a token.
        announcements: `[K, P]` ids, `MASKED` at padding.
        begin: the token that a text may begin with; it then stands before the announcement.

    Returns:
        `[B * K, 1 + P + T]` ids, `MASKED` at padding, which may stand anywhere; the announcements of a text follow one
        another.
    """
    rows, count = len(texts), len(announcements)
    first = (texts != MASKED).to(torch.uint8).argmax(-1, keepdim=True)
    token = texts.gather(-1, first)
    begins = token == begin if begin is not None else torch.zeros_like(token, dtype=torch.bool)
    moved = token.where(begins, MASKED)
    texts = texts.scatter(-1, first, token.where(~begins, MASKED))
    parts = (
        moved[:, None].expand(rows, count, -1),
        announcements.expand(rows, count, -1),
        texts[:, None].expand(rows, count, -1),
    )
    return torch.cat(parts, -1).flatten(0, 1)


def debias(scores: Tensor, announced: Tensor, decay: float, epsilon: float) -> Tensor:
    """`log(α(Δ)·p)` up to a constant: Δ = p − the highest announced p, α = 1 if Δ ≥ 0, else max(e^{λΔ}, ε).

    Args:
        scores: `[B, V]` logits or log-probabilities of p; `-inf` for forbidden tokens.
        announced: `[B, K, V]` logits after each announcement; what is forbidden in `scores` is forbidden here too.
        decay: λ, 0 or more.
        epsilon: ε, the least factor, 0 to 1.

    Returns:
        `[B, V]`, float32 or better; with λ = 0, `scores`.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    announced = announced.masked_fill((scores == -torch.inf)[:, None], -torch.inf).softmax(-1)
    difference = scores.softmax(-1) - announced.amax(1)
    return scores + (decay * difference).clamp(math.log(epsilon) if epsilon else -math.inf, 0)
