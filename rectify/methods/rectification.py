"""Rectification by a Q network, and the control that reads a context-free table in its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rectify.errors import InvalidArgumentError
from rectify.methods.method import Decoder, Method
from rectify.processor import RectificationProcessor
from rectify.q_network import DeadEndQNetwork
from rectify.risk_model import RiskModel
from rectify.rule import Rule, make_rule
from rectify.static_risk import StaticTokenRisk

_STRENGTHS = {"tilt": "beta", "advantage": "tau", "mask": "threshold", "cap": "epsilon"}


@dataclass(frozen=True)
class _Ruled(Method):
    """A rule on the values of a risk model; parameters as in `rectify.rule`, `None` for the rule's default."""

    rule: str = "tilt"
    beta: float | None = None
    tau: float | None = None
    threshold: float | None = None
    epsilon: float | None = None

    def __post_init__(self) -> None:
        rule = self.make_rule()
        object.__setattr__(self, self.strength, float(getattr(rule, self.strength)))

    @property
    def strength(self) -> str:
        """The rule's own parameter."""
        return _STRENGTHS[self.rule]

    def make_rule(self) -> Rule:
        """The rule.

        Raises:
            InvalidArgumentError: an unknown rule, a parameter of another rule, or a value out of range.
        """
        given = {name: getattr(self, name) for name in ("beta", "tau", "threshold", "epsilon")}
        return make_rule(self.rule, **given)

    def _decoder(
        self,
        risk_model: RiskModel,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Mapping[str, Any],
    ) -> Decoder:
        processor = RectificationProcessor(risk_model, self.make_rule(), model=model, tokenizer=tokenizer, **sampling)
        return Decoder(processor, reads=(cast(nn.Module, risk_model),))


@dataclass(frozen=True)
class Rectify(_Ruled):
    """Rectification by the Q network of `path`; the pocket model's own where none is given."""

    name: ClassVar[str] = "rectify"
    source: ClassVar[str] = "Cao et al., ICLR 2023 (arXiv 2302.14003); exact caps, and the tilt π₀·(1 + Q)^β"

    def bind(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Mapping[str, Any]) -> Decoder:
        """See `Method.bind`."""
        network = DeadEndQNetwork.from_pretrained(self.path or "pocket-q", device=model.device, model=model)
        return self._decoder(network, model, tokenizer, sampling)


@dataclass(frozen=True)
class Static(_Ruled):
    """The same rules on the table of token risks of `path`, which knows no context."""

    name: ClassVar[str] = "static"
    source: ClassVar[str] = "control: one risk a token, averaged over all contexts (`rectify train static`)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path is None:
            raise InvalidArgumentError("static names no table of token risks: give static:FOLDER")

    def bind(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Mapping[str, Any]) -> Decoder:
        """See `Method.bind`."""
        table = StaticTokenRisk.from_pretrained(cast(str, self.path), device=model.device)
        return self._decoder(table, model, tokenizer, sampling)
