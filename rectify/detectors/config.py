"""What a toxicity classifier is but for its weights, and how its logits become probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rectify.detectors.backbone import Quantization
from rectify.errors import InvalidArgumentError
from rectify.json_files import check_format_version

FORMAT_VERSION = 1

Form = Literal["sequence", "prefix"]


@dataclass
class DetectorConfig:
    """Everything about a classifier but its weights; saved as `detector_config.json` beside them.

    Attributes:
        base_model: Hub id, folder or bundled name of the backbone, whose tokenizer is used.
        base_revision: revision of `base_model` on the Hub; of a new classifier, the commit that was loaded.
        max_length: tokens of a text that are read, from its start.
        labels: what each logit stands for.
        form: `"sequence"`, trained to tell the label of a text from all of it, or `"prefix"`, trained to predict the
            label of the finished text at each of its tokens; the second needs a causal backbone.
        quantization: `"nf4"` where the adapter was trained on a backbone of 4 bits; it is loaded on one again.
        base_fingerprint: what `base_model` is known again by, see `Backbone.fingerprint`; `None` to take any.
        calibration: for a label, the temperature that its logit is divided by, or the knots
            `[probabilities, calibrated ones]` of a piecewise linear map; `probabilities` applies them.
        training: free-form record of how the weights came to be.
        format_version: of the folder's files.
    """

    base_model: str
    base_revision: str | None = None
    max_length: int = 256
    labels: list[str] = field(default_factory=lambda: ["toxic"])
    form: Form = "sequence"
    quantization: Quantization = "none"
    base_fingerprint: str | None = None
    calibration: dict[str, float | list[list[float]]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise InvalidArgumentError(f"max_length is {self.max_length}: give 1 or more")
        if not self.labels or len(set(self.labels)) < len(self.labels):
            raise InvalidArgumentError(f"labels is {self.labels!r}: give one or more, each once")
        for name, known in (("form", get_args(Form)), ("quantization", get_args(Quantization))):
            if getattr(self, name) not in known:
                raise InvalidArgumentError(f"{name} is {getattr(self, name)!r}: give one of {', '.join(known)}")
        check_calibration(self.calibration)
        if unknown := set(self.calibration) - set(self.labels):
            raise InvalidArgumentError(f"calibration has {min(unknown)!r}, which is none of the labels: leave it out")
        check_format_version(self.format_version, FORMAT_VERSION)

    def probabilities(self, logits: Tensor) -> Tensor:
        """The calibrated probabilities of logits, `[..., L]` of any float dtype to `[..., L]` float32 in [0, 1]."""
        columns = []
        for label, column in zip(self.labels, logits.float().unbind(-1), strict=True):
            how = self.calibration.get(label, 1.0)
            if isinstance(how, int | float):
                columns.append((column / how).sigmoid())
            else:
                columns.append(_interpolate(column.sigmoid(), how))
        return torch.stack(columns, -1)


def check_calibration(calibration: Mapping[str, float | list[list[float]]]) -> None:
    """Refuse a calibration that makes no probabilities, see `DetectorConfig`.

    Raises:
        InvalidArgumentError: a temperature or a knot is out of range.
    """
    for label, how in calibration.items():
        if not isinstance(how, int | float):
            check_knots(label, how)
        else:
            check_temperature(f"calibration of {label!r}", how)


def check_temperature(name: str, temperature: float) -> None:
    """Refuse a temperature that logits cannot be divided by.

    Raises:
        InvalidArgumentError: it is not from 0.001 to 1000; what `score_calibration` fits is from 0.1 to 100.
    """
    if not 1e-3 <= temperature <= 1e3:
        raise InvalidArgumentError(f"{name} is {temperature}: give a temperature above 0, from 0.001 to 1000")


def check_knots(name: str, knots: Sequence[Sequence[float]]) -> None:
    """Refuse what is no piecewise linear map of probabilities to probabilities.

    Raises:
        InvalidArgumentError: there are not two rows of two or more numbers from 0 to 1, as many in both, the first
            one ascending.
    """
    if len(knots) != 2 or len(knots[0]) != len(knots[1]) or len(knots[0]) < 2:
        raise InvalidArgumentError(f"calibration of {name!r} has rows of {[len(row) for row in knots]}: give two alike")
    across, up = knots
    if not all(0 <= value <= 1 for value in (*across, *up)):
        outside = next(value for value in (*across, *up) if not 0 <= value <= 1)
        raise InvalidArgumentError(f"calibration of {name!r} holds {outside}: give numbers from 0 to 1")
    if any(after < before for before, after in pairwise(across)):
        raise InvalidArgumentError(f"calibration of {name!r} has knots that do not ascend: sort them")


def _interpolate(values: Tensor, knots: list[list[float]]) -> Tensor:
    """`numpy.interp` on any device: a piecewise linear map through the knots, constant outside them; NaN stays."""
    across, up = torch.tensor(knots, device=values.device)
    place = (torch.searchsorted(across, values.contiguous(), right=True) - 1).clamp(0, len(across) - 2)
    width = across[place + 1] - across[place]
    share = torch.where(width > 0, (values - across[place]) / width, 1.0).clamp(0, 1)
    return torch.where(values.isnan(), values, up[place] + share * (up[place + 1] - up[place]))
