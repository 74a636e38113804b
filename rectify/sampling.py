"""The sampling warpers (temperature, top-k, top-p …), applied before the rule instead of by `generate`.

`generate` appends them after custom processors, so they would push tokens above their caps again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from rectify.errors import InvalidArgumentError

_WARPERS = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")

_NUCLEUS = 512
_EXACT = 1024.0


class NucleusWarper(TopPLogitsWarper):
    """Top-p with the same tokens as transformers' own, without sorting the vocabulary where the nucleus is small.

    On a CPU, the sort takes several times as long as a small model's step.
    """

    def __call__(self, input_ids: LongTensor, scores: FloatTensor) -> FloatTensor:
        """`[B, V]` scores, `-inf` outside the nucleus."""
        if scores.device.type != "cpu" or scores.shape[-1] <= 2 * _NUCLEUS:
            return super().__call__(input_ids, scores)
        normaliser = scores.logsumexp(-1, keepdim=True)
        if float(normaliser.abs().amax()) > _EXACT:  # rounded too coarsely to be taken away
            return super().__call__(input_ids, scores)
        kept = torch.full_like(scores, self.filter_value)
        self._keep(scores, normaliser, kept, _NUCLEUS)
        return kept  # type: ignore[return-value]

    def _keep(self, scores: Tensor, normaliser: Tensor, kept: Tensor, size: int) -> None:
        """Copy the nucleus into `kept`, looking for it among the `size` likeliest tokens first."""
        highest, tokens = scores.topk(size, dim=-1)
        mass = (highest - normaliser).exp()
        above = mass.cumsum(-1) - mass
        inside = above < self.top_p
        inside[:, : self.min_tokens_to_keep] = True
        kept.scatter_(-1, tokens, highest.masked_fill(~inside, self.filter_value))
        if size < scores.shape[-1] and (rows := inside[:, -1].nonzero()[:, 0]).numel():
            wider = kept[rows]
            self._keep(scores[rows], normaliser[rows], wider, min(4 * size, scores.shape[-1]))
            kept[rows] = wider


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are sampled, named as in `generate`; `None` leaves a warper out.

    Attributes:
        do_sample: `False`: nothing is warped (greedy and beam search). `None`: left to `generate`.
        temperature: above 0.
        top_k: tokens kept, 0 for all.
        top_p, min_p, top_h, typical_p, epsilon_cutoff, eta_cutoff: as in `generate`, from 0 to 1.
        num_beams: above 1 the warpers keep one token more than there are end tokens, as in `generate`.
        num_ends: how many end tokens the model has.
    """

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    top_h: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    num_beams: int = 1
    num_ends: int = 1

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise InvalidArgumentError(f"temperature is {self.temperature}: give a number above 0")
        if self.top_k is not None and (not float(self.top_k).is_integer() or self.top_k < 0):
            raise InvalidArgumentError(f"top_k is {self.top_k}: give a whole number, 0 for all tokens")
        for name in ("top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise InvalidArgumentError(f"{name} is {value}: give a number from 0 to 1")
        for name in ("top_p", "top_h", "typical_p"):
            if getattr(self, name) == 0:
                raise InvalidArgumentError(f"{name} is 0: give a number above 0, up to 1")
        if self.num_beams < 1:
            raise InvalidArgumentError(f"num_beams is {self.num_beams}: give 1 or more")

    @classmethod
    def resolve(cls, defaults: GenerationConfig | None, **given: Any) -> Sampling:
        """What was given, and else what a model's generation_config sets, save `do_sample`.

        The library's own default, a `top_k` of 50, is not taken.
        """
        values: dict[str, Any] = {}
        if defaults is not None:
            ends = getattr(defaults, "eos_token_id", None)
            values = {name: getattr(defaults, name, None) for name in _WARPERS}
            values["num_beams"] = getattr(defaults, "num_beams", None) or 1
            values["num_ends"] = len(ends) if isinstance(ends, list) else 1
        values |= {name: value for name, value in given.items() if value is not None}
        return cls(**values)

    @property
    def least(self) -> int:
        """How many tokens are kept at least."""
        return self.num_ends + 1 if self.num_beams > 1 else 1

    def warpers(self, device: Any = "cpu") -> LogitsProcessorList:
        """The warpers in the order of `generate`, as its own classes."""
        return LogitsProcessorList([*self.scaling(), *self.truncating(device)])

    def scaling(self) -> LogitsProcessorList:
        """Those that remove no token; `generate` has them first."""
        if self.do_sample is False or self.temperature in (None, 1.0):
            return LogitsProcessorList()
        return LogitsProcessorList([TemperatureLogitsWarper(float(cast(float, self.temperature)))])

    def truncating(self, device: Any = "cpu") -> LogitsProcessorList:
        """Those that can remove tokens, in the order of `generate`."""
        warpers = LogitsProcessorList()
        if self.do_sample is False:
            return warpers
        keep = self.least
        if self.top_h is not None:
            warpers.append(TopHLogitsWarper(top_h=self.top_h))
        if self.top_k:
            warpers.append(TopKLogitsWarper(top_k=int(self.top_k), min_tokens_to_keep=keep))
        if self.top_p is not None and self.top_p < 1:
            warpers.append(NucleusWarper(top_p=float(self.top_p), min_tokens_to_keep=keep))
        if self.min_p is not None:
            warpers.append(MinPLogitsWarper(min_p=self.min_p, min_tokens_to_keep=keep))
        if self.typical_p is not None and self.typical_p < 1:
            warpers.append(TypicalLogitsWarper(mass=self.typical_p, min_tokens_to_keep=keep))
        if self.epsilon_cutoff and self.epsilon_cutoff < 1:
            warpers.append(EpsilonLogitsWarper(epsilon=self.epsilon_cutoff, min_tokens_to_keep=keep))
        if self.eta_cutoff and self.eta_cutoff < 1:
            warpers.append(EtaLogitsWarper(epsilon=self.eta_cutoff, min_tokens_to_keep=keep, device=device))
        return warpers

    def plain_kwargs(self) -> dict[str, Any]:
        """What to pass to `generate` so that it samples in this way by itself, without a processor of ours."""
        if self.do_sample is False:
            return self.generate_kwargs()
        return self.generate_kwargs() | {name: getattr(self, name) for name in _WARPERS}

    def generate_kwargs(self, **more: Any) -> dict[str, Any]:
        """What to pass to `generate` so that it does not warp a second time.

        `None` overrides a model's generation_config, and the library's defaults too.

        Args:
            **more: further arguments of `generate`.

        Raises:
            InvalidArgumentError: one of them would have it warp a second time, contradicts the settings here, or leads
                around the processor.
        """
        for name in _WARPERS:
            if more.get(name) is not None:
                raise InvalidArgumentError(
                    f"{name} is {more[name]}, and generate would warp after the rule, which undoes it: give {name} to "
                    "the processor instead"
                )
        if self.do_sample is not None and more.get("do_sample") not in (None, self.do_sample):
            raise InvalidArgumentError(
                f"do_sample is {more['do_sample']}, and was {self.do_sample} before: give do_sample to the processor "
                "instead"
            )
        if more.get("cache_implementation") == "paged":
            raise InvalidArgumentError(
                "cache_implementation is 'paged', which drops the processor (continuous batching): leave it out"
            )
        chosen = {} if self.do_sample is None else {"do_sample": self.do_sample}
        return more | chosen | dict.fromkeys(_WARPERS)
