"""Rectification by a Q network, by a detector, by both, and by a context-free table as the control."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rectify.detector_value import CANDIDATES, DetectorValue, check_candidates
from rectify.errors import InvalidArgumentError
from rectify.hub import DTYPES
from rectify.json_files import sha256_of
from rectify.methods.method import Decoder, Method
from rectify.processor import Combination, RectificationProcessor, check_combination
from rectify.q_network import DeadEndQNetwork
from rectify.risk_model import RiskModel
from rectify.rule import Rule, make_rule
from rectify.static_risk import StaticTokenRisk
from rectify.strength import stored_strength
from rectify.trunk_states import input_device

_STRENGTHS = {"tilt": "beta", "advantage": "tau", "mask": "threshold", "cap": "epsilon"}
_RULE: dict[str, Any] = {"rule": "tilt", "beta": None, "tau": None, "threshold": None, "epsilon": None}


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


@dataclass(frozen=True)
class _Valued(_Ruled):
    """A rule on the values that a risk model has for the whole vocabulary."""

    @abstractmethod
    def risk_model(self, model: PreTrainedModel) -> RiskModel:
        """What tells the risk, for a model and on its device."""

    def bind(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Mapping[str, Any]) -> Decoder:
        """See `Method.bind`."""
        return _decoder(self.make_rule(), model, tokenizer, sampling, self.risk_model(model))


@dataclass(frozen=True)
class Rectify(_Valued):
    """Rectification by the Q network of `path`; the pocket model's own where none is given.

    A β that is not given is what the network's training stored with it, if it did.

    Attributes:
        dtype: of the Q network's weights, a name in `DTYPES`. With `bfloat16` a CPU that has AVX-512 BF16 is faster.
    """

    name: ClassVar[str] = "rectify"
    source: ClassVar[str] = "Cao et al., ICLR 2023 (arXiv 2302.14003); exact caps, and the tilt π₀·(1 + Q)^β"

    dtype: str = "float32"

    def __post_init__(self) -> None:
        unsaid = self.rule == "tilt" and self.beta is None and self.path is not None
        if unsaid and (strength := stored_strength(cast(str, self.path))) is not None:
            object.__setattr__(self, "beta", strength.beta)
        super().__post_init__()
        if self.dtype not in DTYPES:
            raise InvalidArgumentError(f"dtype is {self.dtype!r}: give one of {', '.join(DTYPES)}")

    def risk_model(self, model: PreTrainedModel) -> RiskModel:
        """The Q network."""
        path, dtype = self.path or "pocket-q", DTYPES[self.dtype]
        return DeadEndQNetwork.from_pretrained(path, dtype=dtype, device=input_device(model), model=model)

    def combined_with(self, other: Method) -> Method:
        """With a detector: see `RectifyWithDetector`."""
        return RectifyWithDetector(self, other) if isinstance(other, Detector) else super().combined_with(other)


@dataclass(frozen=True)
class Static(_Valued):
    """The same rules on the table of token risks of `path`, which knows no context."""

    name: ClassVar[str] = "static"
    source: ClassVar[str] = "control: one risk a token, averaged over all contexts (`rectify train static`)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path is None:
            raise InvalidArgumentError("static names no table of token risks: give static:FOLDER")

    def risk_model(self, model: PreTrainedModel) -> RiskModel:
        """The table."""
        return StaticTokenRisk.from_pretrained(cast(str, self.path), device=input_device(model))


@dataclass(frozen=True)
class Detector(_Ruled):
    """The same rules on what the detector of `path` says of likely next tokens; all others are removed.

    Attributes:
        candidates, k: which tokens are likely; see `DetectorValue`.
        combination: beside a Q network, how the two make one risk; see `RectificationProcessor`.
    """

    name: ClassVar[str] = "detector"
    source: ClassVar[str] = "the rules of `rectify`, on the risk that a causal detector sees in each likely next token"

    candidates: float = CANDIDATES
    k: int | None = None
    combination: str = "product"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path is None:
            raise InvalidArgumentError("detector names no detector: give detector:FOLDER")
        check_candidates(self.candidates, self.k)
        check_combination(self.combination)

    def load(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> DetectorValue:
        """The detector's value, on the model's device."""
        path = cast(str, self.path)
        return DetectorValue.from_pretrained(path, tokenizer, self.candidates, self.k, device=input_device(model))

    def bind(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Mapping[str, Any]) -> Decoder:
        """See `Method.bind`.

        Raises:
            InvalidArgumentError: a combination is given, and nothing to combine with.
        """
        if self.combination != "product":
            raise InvalidArgumentError(
                f"combination is {self.combination!r}, and the detector is alone: leave it out, or give "
                f"rectify:Q+{self.label}"
            )
        return _decoder(self.make_rule(), model, tokenizer, sampling, None, self.load(model, tokenizer))

    def combined_with(self, other: Method) -> Method:
        """With rectification: see `RectifyWithDetector`."""
        return other.combined_with(self) if isinstance(other, Rectify) else super().combined_with(other)


@dataclass(frozen=True)
class RectifyWithDetector(Method):
    """One rule on the risk that a Q network and a detector see together, on the detector's candidates.

    Attributes:
        rectify: the Q network and the rule.
        detector: the detector, its candidates and the combination; its rule is that of `rectify`.
    """

    name: ClassVar[str] = "rectify+detector"
    source: ClassVar[str] = "the rules of `rectify`, on the risk of Q network and detector together"

    rectify: Rectify
    detector: Detector

    def __post_init__(self) -> None:
        plain = replace(self.detector, **_RULE)
        given = {name: getattr(self.detector, name) for name in _RULE}
        if self.detector != plain and given != {name: getattr(self.rectify, name) for name in _RULE}:
            raise InvalidArgumentError(
                f"{self.detector.label} has another rule than {self.rectify.label}: give the rule's parameters to "
                "rectify alone"
            )
        object.__setattr__(self, "detector", plain)

    def bind(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Mapping[str, Any]) -> Decoder:
        """See `Method.bind`."""
        network, detector = self.rectify.risk_model(model), self.detector.load(model, tokenizer)
        rule, combination = self.rectify.make_rule(), self.detector.combination
        return _decoder(rule, model, tokenizer, sampling, network, detector, combination)

    @property
    def strength(self) -> str:
        """The rule's own parameter."""
        return self.rectify.strength

    @property
    def value(self) -> float | None:
        """See `Method.value`."""
        return self.rectify.value

    @property
    def label(self) -> str:
        """The labels of both, the rule's parameters once."""
        return f"{self.rectify.label}+{self.detector.family}"

    @property
    def family(self) -> str:
        """See `Method.family`."""
        return f"{self.rectify.family}+{self.detector.family}"


def _decoder(
    rule: Rule,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Mapping[str, Any],
    network: RiskModel | None,
    detector: DetectorValue | None = None,
    combination: str = "product",
) -> Decoder:
    """Rectification by what is given."""
    processor = RectificationProcessor(
        network,
        rule,
        model=model,
        tokenizer=tokenizer,
        detector=detector,
        combination=cast(Combination, combination),
        **sampling,
    )
    reads = tuple(cast(nn.Module, each) for each in (network, detector) if each is not None)
    return Decoder(processor, reads=reads, revision="" if detector is None else sha256_of(detector.config.calibration))
