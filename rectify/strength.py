"""How strongly a Q network is applied where nobody says: chosen at the end of its training, and stored with it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rectify.errors import InvalidArgumentError, RectifyError
from rectify.hub import checkpoint_folder
from rectify.rule import Tilt

_CONFIG_FILE = "q_config.json"


@dataclass(frozen=True)
class Strength:
    """A rule with its parameter, and what that costs.

    Attributes:
        beta: of the rule `Tilt`.
        rule: its name; there is no other yet.
        clean_perplexity_ratio: perplexity of clean texts under the rule over that without, 1 or a little more; `None`
            where it was not measured.
        model: that was rectified for the measurement.
        texts, tokens: how many were measured.

    Raises:
        InvalidArgumentError: a value is out of range.
    """

    beta: float
    rule: Literal["tilt"] = "tilt"
    clean_perplexity_ratio: float | None = None
    model: str | None = None
    texts: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        if self.rule != "tilt":
            raise InvalidArgumentError(f"rule of strength is {self.rule!r}: give 'tilt'")
        self.make_rule()
        ratio = self.clean_perplexity_ratio
        if ratio is not None and not 0 < ratio < math.inf:
            raise InvalidArgumentError(f"clean_perplexity_ratio is {ratio}: give a positive number")
        if self.texts < 0 or self.tokens < 0:
            raise InvalidArgumentError(f"texts is {self.texts}, tokens {self.tokens}: give 0 or more of both")

    def make_rule(self) -> Tilt:
        """The rule."""
        return Tilt(beta=self.beta)

    def __str__(self) -> str:
        ratio = "" if self.clean_perplexity_ratio is None else f", {self.clean_perplexity_ratio:.3f} × the perplexity"
        return f"tilt, beta {self.beta:g}{ratio}"


def no_better_than_constant(figures: Mapping[str, Any], prefix: str = "") -> bool:
    """Whether the figures of a training say that the network predicts no better than one risk for everything.

    Args:
        figures: see `q_metrics.value_metrics`; where one is missing, or is no number, nothing is said. Of a network
            that was recalibrated on other texts the order of its risks counts alone.
        prefix: of their names.
    """
    auc, brier, constant = (figures.get(prefix + name) for name in ("auc_all_positions", "brier", "brier_constant"))
    if not all(isinstance(each, int | float) for each in (auc, brier, constant)):
        return False
    calibrated = figures.get("calibration_scale") is not None
    return not auc > 0.5 or not (calibrated or brier < constant)  # type: ignore[operator]


def stored_strength(name: str | Path) -> Strength | None:
    """That of the Q network of a folder, bundled name or Hub id, of which nothing else is read; `None` without one.

    Whatever else is wrong with the folder is said where the network is loaded.
    """
    try:
        file = checkpoint_folder(name, files=[_CONFIG_FILE]) / _CONFIG_FILE
        return Strength(**json.loads(file.read_text(encoding="utf-8"))["strength"])
    except (RectifyError, OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
