"""The arms of an experiment: the base model, or a rule with the risk model that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from rectify.errors import InvalidArgumentError
from rectify.rule import Cap, Rule, make_rule

RiskName = Literal["q", "static"]

_MAIN = {"tilt": "beta", "advantage": "tau", "mask": "threshold", "cap": "epsilon"}


@dataclass(frozen=True)
class Arm:
    """The base model where both are `None`, else a rule and which risk model it reads.

    Attributes:
        risk: `"q"` for the Q network, `"static"` for the table of token risks.
        rule: the rule.
    """

    risk: RiskName | None = None
    rule: Rule | None = None

    @classmethod
    def parse(cls, spec: str) -> Arm:
        """The arm of `[q/|static/]RULE[:NAME=VALUE[,NAME=VALUE…]]`, such as `static/tilt:beta=3,epsilon=0.1`.

        Raises:
            InvalidArgumentError: it has another form, an unknown rule or parameter, or a value out of range.
        """
        risk, slash, rest = spec.rpartition("/")
        if slash and risk not in ("q", "static"):
            raise InvalidArgumentError(f"arms hold {spec!r}: {risk!r} is no risk model: give q or static before the /")
        name, _, given = rest.partition(":")
        parameters: dict[str, float | None] = {}
        for pair in filter(None, given.split(",")):
            key, _, value = pair.partition("=")
            try:
                number = float(value)
            except ValueError as error:
                raise InvalidArgumentError(
                    f"arms hold {spec!r}: {pair!r} is no parameter: give NAME=NUMBER, as in tilt:beta=6"
                ) from error
            if key in parameters:
                raise InvalidArgumentError(f"arms hold {spec!r}: {key} is given twice: give it once")
            parameters[key] = number
        try:
            rule = make_rule(name, **parameters)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"arms hold {spec!r}: {error}") from error
        return cls("static" if risk == "static" else "q", rule)

    @property
    def label(self) -> str:
        """`base`, or the spec with every parameter that matters; equal arms have equal labels."""
        if self.rule is None:
            return "base"
        parameters = [f"{self.parameter}={self.value:g}"]
        for field in fields(self.rule):
            value = getattr(self.rule, field.name)
            if field.name != self.parameter and value != field.default:
                parameters.append(f"{field.name}={value:g}")
        return f"{'static/' if self.risk == 'static' else ''}{self.rule.name}:{','.join(parameters)}"

    @property
    def parameter(self) -> str | None:
        """The name of the rule's own parameter."""
        return _MAIN[self.rule.name] if self.rule is not None else None

    @property
    def value(self) -> float | None:
        """The value of the rule's own parameter."""
        return getattr(self.rule, self.parameter) if self.parameter is not None else None

    @property
    def family(self) -> str:
        """What arms share that differ in the rule's own parameter alone."""
        if self.rule is None:
            return "base"
        cap = "" if isinstance(self.rule, Cap) or self.rule.epsilon is None else f" + cap {self.rule.epsilon:g}"
        return f"{self.rule.name}{cap}, {'token risks' if self.risk == 'static' else 'Q network'}"

    @property
    def file_name(self) -> str:
        """The label as part of a file's name on any system."""
        return self.label.replace("/", "-").replace(":", "-").replace(",", "-")


def parse_arms(specs: Sequence[str]) -> list[Arm]:
    """The base arm and those of the specs.

    Raises:
        InvalidArgumentError: a spec cannot be used, or two mean the same arm.
    """
    arms = [Arm()]
    for spec in specs:
        arm = Arm.parse(spec)
        if arm in arms:
            raise InvalidArgumentError(f"arms hold {spec!r} twice ({arm.label}): give it once")
        arms.append(arm)
    return arms
