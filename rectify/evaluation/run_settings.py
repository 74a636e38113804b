"""What an evaluation run is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rectify.errors import InvalidArgumentError
from rectify.evaluation.toxicity_prompts import SUBSETS
from rectify.methods.base import Base
from rectify.methods.method import Method
from rectify.methods.specs import parse_methods
from rectify.sampling import Sampling
from rectify.scoring.scores import ATTRIBUTES

SELF = "self"
"""As `ppl_model`: the model that generates."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What is generated, scored and measured.

    Attributes:
        model: folder, bundled name or Hub id of the language model.
        methods: specs (see `rectify.methods.specs`); `base` is put first where it is missing.
        prompts: RealToxicityPrompts or DExperts records, or other JSON lines with prompts.
        output_dir: folder of everything that is written.
        subset, split, num_prompts: which prompts; see `toxicity_prompts.select`.
        n: continuations of each prompt.
        max_new_tokens, min_new_tokens: of a continuation; equal, the end of text is forbidden.
        temperature, top_k, top_p: of all methods.
        seed: of the prompts drawn, the noise, and the bootstrap.
        scorers: specs (see `rectify.scoring.load`); every figure is given for each.
        attributes: what is scored.
        ppl_model: whose perplexity of the continuations is measured; `"self"` for the generating model.
        batch_size: prompts at a time, 0 to have it chosen by the device's memory.
        device, dtype: of the model.
        allow_missing: report prompts with fewer than n scores, by those that they have.
        resamples: of the bootstrap.
    """

    prompts: str
    output_dir: str
    model: str = "pocket"
    methods: tuple[str, ...] = ("base", "rectify")
    subset: str = "all"
    split: str = "test"
    num_prompts: int | None = None
    n: int = 25
    max_new_tokens: int = 20
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.9
    seed: int = 0
    scorers: tuple[str, ...] = ("pocket",)
    attributes: tuple[str, ...] = ATTRIBUTES
    ppl_model: str = SELF
    batch_size: int = 0
    device: str = "cpu"
    dtype: str | None = None
    allow_missing: bool = False
    resamples: int = 1000

    def __post_init__(self) -> None:
        for name, least in (
            ("n", 1),
            ("max_new_tokens", 1),
            ("min_new_tokens", 0),
            ("batch_size", 0),
            ("resamples", 1),
        ):
            if getattr(self, name) < least:
                raise InvalidArgumentError(f"{name} is {getattr(self, name)}: give {least} or more")
        if self.min_new_tokens > self.max_new_tokens:
            raise InvalidArgumentError(
                f"min_new_tokens is {self.min_new_tokens}, above max_new_tokens {self.max_new_tokens}: lower it"
            )
        if self.subset not in SUBSETS:
            raise InvalidArgumentError(f"subset is {self.subset!r}: give one of {', '.join(SUBSETS)}")
        if self.split not in ("test", "validation", "train", "all"):
            raise InvalidArgumentError(f"split is {self.split!r}: give test, validation, train or all")
        if not self.scorers or len(set(self.scorers)) < len(self.scorers):
            raise InvalidArgumentError(f"scorers is {self.scorers!r}: give one or more, each once")
        if "TOXICITY" not in self.attributes:
            raise InvalidArgumentError(f"attributes is {self.attributes!r}: TOXICITY must be among them")
        Sampling(**self.sampling)
        self.parsed()

    @property
    def sampling(self) -> dict[str, Any]:
        """What is passed on as settings of `Sampling`."""
        return {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}

    def parsed(self) -> list[Method]:
        """The methods, the base first."""
        methods = parse_methods(self.methods)
        return [Base(), *(method for method in methods if method != Base())]
