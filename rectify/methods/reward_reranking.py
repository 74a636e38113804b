"""Reward-augmented decoding: the likeliest tokens, ranked anew by the reward of the text that each would make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rectify.detectors import ToxicityClassifier
from rectify.errors import InvalidArgumentError, VocabularyMismatchError
from rectify.generation.output import sha256_of
from rectify.methods.base import WarpingProcessor
from rectify.methods.causal_states import CausalStates
from rectify.methods.method import Decoder, Method
from rectify.prefix_memo import MASKED, PrefixMemo
from rectify.vocabulary import Fingerprint


class PrefixToxicity:
    """The toxicity that a causal classifier sees in a prefix and each of some next tokens.

    It reads the ids, not their text, and so shares the vocabulary of the language model.

    Args:
        classifier: with a causal backbone and this tokenizer.
        tokenizer: of the language model.

    Raises:
        InvalidArgumentError: the classifier reads texts from both sides.
        VocabularyMismatchError: it has another vocabulary.
    """

    def __init__(self, classifier: ToxicityClassifier, tokenizer: PreTrainedTokenizerBase) -> None:
        if not classifier.causal:
            raise InvalidArgumentError(
                f"the classifier's backbone {classifier.config.base_model!r} is no causal model: train one on a "
                "causal backbone of the language model's vocabulary"
            )
        own, other = Fingerprint.of(classifier.tokenizer), Fingerprint.of(tokenizer)
        if own.sha256 != other.sha256:
            raise VocabularyMismatchError(
                f"tokenizer {tokenizer.name_or_path!r} of {other.size} tokens is not that of the classifier, whose "
                f"backbone {classifier.config.base_model!r} has {own.size} tokens: train one on a backbone of this "
                "vocabulary"
            )
        inner = cast(Any, classifier.inner)
        self.classifier = classifier
        self._states = CausalStates(cast(PreTrainedModel, inner.base_model))
        self._memo = PrefixMemo(self._states)
        self._score = inner.score

    def clear(self) -> None:
        """Forget all prefixes."""
        self._memo.clear()

    @torch.no_grad()
    def __call__(self, prefixes: Tensor, tokens: Tensor) -> Tensor:
        """`[B, T]` ids, `MASKED` at padding, and `[B, K]` tokens to `[B, K]` float32 probabilities of the first label.

        All tokens of all rows are read in one run, over the shared states of their prefixes.

        Raises:
            InvalidArgumentError: the prefixes are empty, or longer than the classifier's context.
        """
        self._states.check(prefixes, "classifier", more=1)
        if self._states.branches:
            hidden = self._memo.branch_states(prefixes, tokens)
        else:
            count = tokens.shape[1]
            texts = torch.cat((prefixes.repeat_interleave(count, 0), tokens.reshape(-1, 1)), 1)
            hidden = PrefixMemo(self._states, use_cache=False).last_hidden(texts).view(*tokens.shape, -1)
        return self.classifier.config.probabilities(self._score(hidden))[..., 0]


class RewardRerankingProcessor(WarpingProcessor):
    """Keeps the `k` likeliest tokens and adds `β · (1 − toxicity)` to their logits; the warpers follow.

    Args:
        toxicity: of prefixes and candidates.
        beta, k: see `RewardReranking`.
        model, tokenizer, sampling: see `WarpingProcessor`.
    """

    # it needs whole prefixes, and continuous batching gives the last token only
    supports_continuous_batching = False

    def __init__(
        self,
        toxicity: PrefixToxicity,
        beta: float,
        k: int,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Mapping[str, Any],
    ) -> None:
        super().__init__(model, tokenizer, sampling)
        self.toxicity, self.beta, self.k = toxicity, beta, k

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`[B, V]` warped scores, `-inf` but for the candidates."""
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        highest, tokens = scores.topk(min(self.k, scores.shape[-1]), dim=-1)
        prefixes = input_ids.masked_fill(~self.padding.real(input_ids), MASKED)
        reward = 1 - self.toxicity(prefixes, tokens).to(scores.dtype)
        ranked = torch.full_like(scores, -torch.inf).scatter_(-1, tokens, highest + self.beta * reward)
        return self.warp(input_ids, ranked)

    def reset(self) -> None:
        """Forget the states of all prefixes."""
        self.toxicity.clear()


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
        classifier = ToxicityClassifier.from_pretrained(self.path or "pocket-reward", device=model.device)
        toxicity = PrefixToxicity(classifier, tokenizer)
        processor = RewardRerankingProcessor(toxicity, self.beta, self.k, model, tokenizer, sampling)
        return Decoder(processor, reads=(classifier,), revision=sha256_of(classifier.config.calibration))
