"""How self-detoxification data is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rectify.builders.cmd_stages import NEGATIVE, POSITIVE
from rectify.builders.settings import check_share
from rectify.errors import InvalidArgumentError
from rectify.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class CmdSettings:
    """What determines the data, beside texts, models and scorer.

    Attributes:
        attempts: fillings of a masked text that are tried until one is safe.
        min_similarity: the least cosine of a prompt and its rephrased text, where a similarity model is given.
        n: continuations of a safe prompt.
        max_new_tokens, min_new_tokens: of a continuation.
        temperature, top_p, top_k: as in `Sampling`.
        positive, negative: see `cmd_stages.chain_example`.
        batch_size: prompts at a time.
        seed: of all noise.
        validation_share: the share of prompts for validation, from 0 up to 1; by hash.
    """

    attempts: int = 4
    min_similarity: float = 0.0
    n: int = 25
    max_new_tokens: int = 20
    min_new_tokens: int = 10
    temperature: float = 1.0
    top_p: float = 0.9
    top_k: int = 0
    positive: float = POSITIVE
    negative: float = NEGATIVE
    batch_size: int = 16
    seed: int = 0
    validation_share: float = 0.1

    def __post_init__(self) -> None:
        for name in ("attempts", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"{name} is {getattr(self, name)}: give 1 or more")
        if self.n < 2:
            raise InvalidArgumentError(f"n is {self.n}: give 2 or more, one to seek and some to shun")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise InvalidArgumentError(
                f"min_new_tokens is {self.min_new_tokens}: give a number from 0 to max_new_tokens {self.max_new_tokens}"
            )
        for name in ("positive", "negative"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidArgumentError(f"{name} is {getattr(self, name)}: give a toxicity from 0 to 1")
        if not -1 <= self.min_similarity <= 1:
            raise InvalidArgumentError(f"min_similarity is {self.min_similarity}: give a cosine from -1 to 1")
        check_share(self.validation_share)
        _ = self.sampling  # refuses bad values

    @property
    def sampling(self) -> Sampling:
        """How continuations are sampled; what a model's generation_config says is not taken."""
        return Sampling(do_sample=True, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)

    @property
    def of_rephrasing(self) -> dict[str, Any]:
        """What the stage rephrase depends on."""
        return {"attempts": self.attempts, "min_similarity": self.min_similarity}

    @property
    def of_continuation(self) -> dict[str, Any]:
        """What the stage continue depends on."""
        names = ("n", "max_new_tokens", "min_new_tokens", "seed")
        return {name: getattr(self, name) for name in names} | {"sampling": repr(self.sampling)}
