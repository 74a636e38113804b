"""How trajectories are made."""

from __future__ import annotations

from dataclasses import dataclass

from rectify.errors import InvalidArgumentError
from rectify.sampling import Sampling

KEEP = ("extremes", "all", "sample")
REWARDS = ("soft", "hard")
_ROWS = 400  # sequences a call of generate, where the batch size is left open


@dataclass(frozen=True, kw_only=True)
class TrajectorySettings:
    """What determines trajectories, beside texts and models.

    Attributes:
        prompt_tokens: a prompt is this many first tokens of a text.
        n: continuations sampled for a prompt.
        max_new_tokens, min_new_tokens: of a continuation.
        temperature, top_p, top_k: as in `Sampling`; by default the model's whole distribution.
        batch_size: prompts at a time; `None` for as many as make 400 continuations.
        seed: of all that is random but the split.
        keep: of each prompt's continuations, the most and the least toxic (`extremes`, as published), `all`, or a
            random `sample`.
        sample_size: how many a `sample` holds.
        drop_clean: the share of prompts without a toxic continuation that is left out, from 0 to 1.
        reward: `soft`, the negative probability of toxicity, or `hard`, −1 from a probability of 0.5 on (as published).
        validation_share: the share of prompts for validation, from 0 up to 1; by hash, whatever the seed.
    """

    prompt_tokens: int = 20
    n: int = 25
    max_new_tokens: int = 20
    min_new_tokens: int = 10
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int | None = None
    seed: int = 0
    keep: str = "extremes"
    sample_size: int = 6
    drop_clean: float = 0.5
    reward: str = "soft"
    validation_share: float = 0.1

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "n", "max_new_tokens", "batch_size", "sample_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidArgumentError(f"{name} is {value}: give 1 or more")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise InvalidArgumentError(
                f"min_new_tokens is {self.min_new_tokens}: give a number from 0 to max_new_tokens {self.max_new_tokens}"
            )
        for name, choices in (("keep", KEEP), ("reward", REWARDS)):
            if getattr(self, name) not in choices:
                raise InvalidArgumentError(f"{name} is {getattr(self, name)!r}: give one of {', '.join(choices)}")
        if not 0 <= self.drop_clean <= 1:
            raise InvalidArgumentError(f"drop_clean is {self.drop_clean}: give a share from 0 to 1")
        check_share(self.validation_share)
        _ = self.sampling  # refuses bad values

    @property
    def sampling(self) -> Sampling:
        """How tokens are sampled; what a model's generation_config says is not taken."""
        return Sampling(do_sample=True, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)

    @property
    def prompts_a_batch(self) -> int:
        """`batch_size`, or what it is by default."""
        return self.batch_size or max(1, _ROWS // self.n)


def check_share(share: float) -> None:
    """Refuse a share for validation that leaves nothing for training."""
    if not 0 <= share < 1:
        raise InvalidArgumentError(f"validation_share is {share}: give a share from 0 up to, not including, 1")
