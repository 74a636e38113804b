"""What a toxicity detector says of next tokens: the risk of the few that are likely, all of them read in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import PreTrainedTokenizerBase

from rectify.causal_body import causal_body
from rectify.causal_states import CausalStates
from rectify.detectors import DetectorConfig, ToxicityClassifier
from rectify.errors import InvalidArgumentError, VocabularyMismatchError
from rectify.padding import follows
from rectify.prefix_memo import PrefixMemo
from rectify.support import Support, candidates_of
from rectify.vocabulary import Fingerprint

CANDIDATES = 0.01
"""Least probability of a token that is read."""


class DetectorValue(nn.Module):
    """The risk of likely next tokens, by a detector that reads from left to right: Q = −P(toxic).

    A token is read after its prefix, as ids, so the detector shares the vocabulary of the language model. One of form
    `"prefix"` predicts whether the finished text will be toxic; one of form `"sequence"` judges what is there as if it
    were finished. To read a token costs nearly a step of the detector's backbone, where a Q network values the whole
    vocabulary at once: so only candidates are read, and `RectificationProcessor` removes all others.

    Args:
        classifier: with a causal backbone; put in evaluation mode. Its first label is the toxicity.
        tokenizer: of the language model.
        candidates: least probability of a candidate under the policy after temperature, top-k and top-p, above 0 and up
            to 1; the likeliest token is always one.
        k: so many of the likeliest tokens are candidates instead; `None` for those of that probability.
        use_cache: reuse states between calls; `False` is the slow reference, which reads each text by itself.

    Raises:
        InvalidArgumentError: the classifier reads texts from both sides, or a value is out of range.
        VocabularyMismatchError: it has another vocabulary.

    Example:
        >>> from rectify import DetectorValue, RectificationProcessor, Tilt, load_language_model
        >>> model, tokenizer = load_language_model("pocket")
        >>> value = DetectorValue.from_pretrained("pocket-reward", tokenizer)
        >>> processor = RectificationProcessor(None, Tilt(beta=6.0), detector=value, model=model, tokenizer=tokenizer)
        >>> inputs = tokenizer("You are such a", return_tensors="pt")
        >>> options = processor.generate_kwargs()
        >>> ids = model.generate(**inputs, logits_processor=[processor], **options, max_new_tokens=9)
    """

    def __init__(
        self,
        classifier: ToxicityClassifier,
        tokenizer: PreTrainedTokenizerBase,
        candidates: float = CANDIDATES,
        k: int | None = None,
        use_cache: bool = True,
    ) -> None:
        super().__init__()
        check_candidates(candidates, k)
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
        self.classifier = classifier.eval()  # with dropout it would be no function of the prefix
        self.candidates, self.k = candidates, k
        self.states = CausalStates(causal_body(classifier.inner, "classifier"))
        self._memo = PrefixMemo(self.states, use_cache and self.states.branches)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        candidates: float = CANDIDATES,
        k: int | None = None,
        device: str | torch.device | None = None,
    ) -> DetectorValue:
        """With the detector of a folder, a bundled name or a Hub id."""
        check_candidates(candidates, k)
        return cls(ToxicityClassifier.from_pretrained(name, device=device), tokenizer, candidates, k)

    @property
    def config(self) -> DetectorConfig:
        """The detector's."""
        return self.classifier.config

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.classifier.device

    @property
    def context(self) -> int | None:
        """Longest text in tokens, the candidate included, or `None` for no limit."""
        return self.states.context

    def clear(self) -> None:
        """Forget all prefixes; needed only after the detector's weights change."""
        self._memo.clear()

    # -----------------------------------------------------------------------------------------------------------------
    # Next tokens

    def candidates_of(self, scores: Tensor, least: int = 1) -> Support:
        """The candidates of `[B, V]` warped scores, `least` of the likeliest tokens among them."""
        return candidates_of(scores, self.candidates if self.k is None else None, self.k, least)

    @torch.no_grad()
    def toxicity(self, prefixes: Tensor, tokens: Tensor, real: Tensor | None = None) -> Tensor:
        """The probability of the first label after each of some next tokens.

        Args:
            prefixes: `[B, T]` int64, `MASKED` at padding.
            tokens: `[B, K]` int64; ids beyond the embeddings stand for no token, and have any value.
            real: `[B, K]` bool, which tokens are asked for; `None` for all. The others have any value.

        Returns:
            `[B, K]` float32.

        Raises:
            InvalidArgumentError: the prefixes are empty, or longer than the detector's context.
        """
        return self.config.probabilities(self._logits(prefixes, tokens, real))[..., 0]

    @torch.no_grad()
    def log_survival(self, prefixes: Tensor, candidates: Support) -> Tensor:
        """`log(1 + Q)` of the candidates after each prefix, on the device of the prefixes: `[B, K]` float32.

        Of what stands for no token, and where a row is filled up, it is `-inf`. Errors as of `toxicity`.
        """
        tokens, real = candidates
        real = real & (tokens < self.states.config.vocab_size)
        found = self._log_survival_of(self._logits(prefixes, tokens, real))
        return found.to(prefixes.device).masked_fill(~real, -torch.inf)

    def _logits(self, prefixes: Tensor, tokens: Tensor, real: Tensor | None) -> Tensor:
        self.states.check(prefixes, "classifier", more=1)
        given = [None if each is None else each.to(self.device) for each in (prefixes, tokens, real)]
        hidden = self._memo.branch_states(cast(Tensor, given[0]), cast(Tensor, given[1]), given[2])
        return cast(Any, self.classifier.inner).score(hidden).float()

    def _log_survival_of(self, logits: Tensor) -> Tensor:
        """`[..., L]` logits to `[...]`; where a temperature calibrates them, no digits are lost near certain risk."""
        how = self.config.calibration.get(self.config.labels[0], 1.0)
        if isinstance(how, int | float):
            return logsigmoid(-logits[..., 0] / how)
        return (-self.config.probabilities(logits)[..., 0]).log1p()

    # -----------------------------------------------------------------------------------------------------------------
    # Finished texts

    @torch.no_grad()
    def action_values(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Q of each token that was taken, given its prefix: `[B, T]` float32, NaN at padding and the first real token.

        Args:
            input_ids: `[B, T]` int64.
            attention_mask: `[B, T]`, 0 at padding.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if self.states.abilities.rotation is None:
            logits = self.classifier.position_logits(input_ids, mask)
        else:  # the states of a long text are not those of its beginnings
            logits = cast(Any, self.classifier.inner).score(self.states.encode(input_ids, mask)).float()
        values = self._log_survival_of(logits).expm1()
        return values.masked_fill(~follows(mask), torch.nan)


def check_candidates(candidates: float, k: int | None) -> None:
    """Refuse what chooses no candidates.

    Raises:
        InvalidArgumentError: the probability is not above 0 and up to 1, `k` is below 1, or both are given.
    """
    if not 0 < candidates <= 1:
        raise InvalidArgumentError(f"candidates is {candidates}: give a probability above 0, up to 1")
    if k is not None and k < 1:
        raise InvalidArgumentError(f"k is {k}: give 1 or more")
    if k is not None and candidates != CANDIDATES:
        raise InvalidArgumentError(f"candidates is {candidates}, and k is {k}: give one of them")
