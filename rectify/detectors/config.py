"""What a toxicity classifier is but for its weights, and how its logits become probabilities."""

from __future__ import annotations

from dataclasses import dataclass, field
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
        form: `"sequence"`, trained to tell the label of a text from all of it, or `"prefix"`, trained to foretell the
            label of the finished text at each of its tokens; the second needs a causal backbone.
        quantization: `"nf4"` where the adapter was trained on a backbone of 4 bits; it is loaded on one again.
        base_fingerprint: what `base_model` is known again by, see `backbone.Backbone`; `None` to take any.
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
        for label, how in self.calibration.items():
            if isinstance(how, int | float) and not 0 < how < float("inf"):
                raise InvalidArgumentError(f"calibration of {label!r} is {how}: give a temperature above 0")
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


def _interpolate(values: Tensor, knots: list[list[float]]) -> Tensor:
    """`numpy.interp` on any device: a piecewise linear map through the knots, constant outside them; NaN stays."""
    across, up = torch.tensor(knots, device=values.device)
    place = (torch.searchsorted(across, values.contiguous(), right=True) - 1).clamp(0, len(across) - 2)
    width = across[place + 1] - across[place]
    share = torch.where(width > 0, (values - across[place]) / width, 1.0).clamp(0, 1)
    return torch.where(values.isnan(), values, up[place] + share * (up[place + 1] - up[place]))
