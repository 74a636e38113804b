"""What every decoding method is: parameters, and a processor of next-token scores for one model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rectify.errors import InvalidArgumentError
from rectify.processor import Statistics

if TYPE_CHECKING:  # the generator is made for methods
    from rectify.generation.generator import Continuation, Generator
    from rectify.generation.prompts import Prompt


class MethodProcessor(Protocol):
    """From the scores of a model to those of a method: a function of (prefix ids, scores).

    It applies the sampling warpers itself (temperature, top-k, top-p), where its method has them; nothing warps after
    it. What it caches is a memo keyed by prefix.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`[B, T]` prefixes, left padding included, and `[B, V]` scores to `[B, V]` scores, float32 or better."""

    def set_attention_mask(self, attention_mask: Tensor | None) -> None:
        """Say where the next prompts have padding: `[prompts, length]`, as in `rectify.padding.Padding`."""

    def reset(self) -> None:
        """Forget statistics and caches."""

    def statistics(self) -> Statistics | None:
        """What was done since the last reset; `None` for a method that does not count."""


@dataclass(frozen=True)
class Decoder:
    """A method, bound to a model.

    Attributes:
        processor: from the model's scores to the method's.
        draws: continuations that are drawn for each one that is kept.
        toxicity: of `draws` texts, by what the kept one is chosen: the least; NaN is never chosen while there is
            another. `None` where nothing is chosen.
        reads: the networks that it runs besides the model.
        revision: what else of its files its choices depend on, such as the digest of a word list.
        write: of a method that writes continuations itself, by another model or from another text: from a generator of
            the model that it is bound to and prompts to `num_return_sequences` continuations of each. `processor` then
            counts what is counted, and is not to be called. `None` where the generator continues the prompts.
    """

    processor: MethodProcessor
    draws: int = 1
    toxicity: Callable[[Sequence[str]], np.ndarray] | None = None
    reads: tuple[nn.Module, ...] = ()
    revision: str = ""
    write: Callable[[Generator, list[Prompt]], list[list[Continuation]]] | None = None


@dataclass(frozen=True)
class Method(ABC):
    """A decoding method with its parameters; nothing is loaded before `bind`.

    Each parameter is a field of a subclass, `float`, `int` or `str`, and checked in `__post_init__`.

    Attributes:
        path: what follows the colon of its name: weights, a word list; `None` for the method's default, if it has one.
    """

    name: ClassVar[str]
    """On the command line."""
    source: ClassVar[str]
    """Who published it, and where ours differs."""

    path: str | None = field(default=None, kw_only=True)

    @abstractmethod
    def bind(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Mapping[str, Any]) -> Decoder:
        """Load what the method reads, onto the model's device.

        Args:
            model, tokenizer: the language model, as it is.
            sampling: the settings of `Sampling` that were given (`temperature`, `top_p` …); none of them warp where
                the probability of given texts is measured.

        Raises:
            RectifyError: something cannot be loaded, or does not fit the model.
        """

    def combined_with(self, other: Method) -> Method:
        """One method that does what both do, as `A+B` names it.

        Raises:
            InvalidArgumentError: these two cannot be combined.
        """
        raise InvalidArgumentError(
            f"{self.label} and {other.label} cannot be combined: give rectify and detector, as in "
            "rectify:Q,beta=6+detector:FOLDER, cmd and another, as in cmd:FOLDER+rectify:Q, or one of them"
        )

    @property
    def strength(self) -> str | None:
        """The name of the parameter by which toxicity is traded for fluency; `None` where there is none."""
        return None

    @property
    def label(self) -> str:
        """The method's name with its path and all parameters that are not at their default; `strength` always."""
        return ",".join([self._title(), *self._given()])

    @property
    def value(self) -> float | None:
        """The value of `strength`."""
        return None if self.strength is None else float(getattr(self, self.strength))

    @property
    def family(self) -> str:
        """What methods share that differ in `strength` alone: a line of a plot."""
        return ",".join([self._title(), *self._given(but=self.strength)])

    def _title(self) -> str:
        return self.name + (f":{self.path}" if self.path else "")

    def _given(self, but: str | None = None) -> list[str]:
        return [
            f"{each.name}={_shown(getattr(self, each.name))}"
            for each in fields(self)
            if each.name not in ("path", but)
            and (each.name == self.strength or getattr(self, each.name) != each.default)
        ]


def _shown(value: object) -> str:
    if isinstance(value, float) and float(short := f"{value:g}") == value:
        return short
    return str(value)
