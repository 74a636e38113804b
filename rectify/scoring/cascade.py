"""A cascade of two scorers: the small one scores every text, and the larger one those that it is unsure of."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from rectify.detectors.cascade import escalated, predicted, two_labels
from rectify.errors import CheckpointError, InvalidArgumentError, first_line
from rectify.json_files import check_format_version, write_json
from rectify.scoring.cache import CachedScorer, ScoreCache
from rectify.scoring.scores import Scorer, Scores, check_attributes
from rectify.scoring.streams import gathered

CONFIG_FILE = "cascade_config.json"
SCORES_FILE = "scores.sqlite"
FORMAT_VERSION = 1
ALL = float(np.nextafter(1, 2))
"""A threshold above every confidence."""


@dataclass
class CascadeConfig:
    """A cascade; saved as `cascade_config.json`.

    Attributes:
        small, large: the scorers, by name.
        threshold: the large one decides where the small one's confidence, 0.5 to 1, is below.
        small_temperature, large_temperature: that the log-odds of their scores are divided by.
        training: free-form record of how these were chosen.
        format_version: of the file.
    """

    small: str
    large: str
    threshold: float
    small_temperature: float = 1.0
    large_temperature: float = 1.0
    training: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if np.isnan(self.threshold):
            raise InvalidArgumentError(f"threshold is {self.threshold}: give a confidence from 0 to 1")
        self.threshold = float(np.clip(self.threshold, 0, ALL))  # JSON has no infinities
        for name in ("small_temperature", "large_temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InvalidArgumentError(f"{name} is {getattr(self, name)}: give a number above 0")
        check_format_version(self.format_version, FORMAT_VERSION)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> CascadeConfig:
        """That of a folder.

        Raises:
            CheckpointError: there is none, or it cannot be used.
        """
        path = Path(folder).expanduser() / CONFIG_FILE
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise CheckpointError(
                f"{str(folder)!r} holds no {CONFIG_FILE}: give a folder written by `rectify train cascade`"
            ) from error
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{str(path)!r} cannot be used ({first_line(error)}): write it anew") from error

    def save_pretrained(self, folder: str | Path) -> None:
        """Write it to a folder, which is made."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(Path(folder) / CONFIG_FILE, asdict(self))

    def escalated(self, toxicity: np.ndarray) -> np.ndarray:
        """Which texts the large scorer decides, `[N]` bool, from the small one's scores as they come."""
        return escalated(confidence(calibrated(toxicity, self.small_temperature)), self.threshold)


def calibrated(toxicity: np.ndarray, temperature: float) -> np.ndarray:
    """Scores `[N]` in [0, 1] whose log-odds are divided by a temperature; NaN stays."""
    return 1 / (1 + np.exp(-log_odds(toxicity) / temperature))


def log_odds(toxicity: np.ndarray) -> np.ndarray:
    """`log(p / (1 − p))` of scores `[N]`, those at 0 and 1 taken to be a little inside; NaN stays."""
    inside = np.clip(np.asarray(toxicity, dtype=np.float64), 1e-7, 1 - 1e-7)
    return np.log(inside / (1 - inside))


def confidence(toxicity: np.ndarray) -> np.ndarray:
    """The probability of the label that scores `[N]` speak for, 0.5 to 1; NaN stays."""
    return predicted(two_labels(toxicity))[1]


def correct(toxicity: np.ndarray, toxic: np.ndarray) -> np.ndarray:
    """Whether scores `[N]` speak for the `[N]` bool labels; a text without a score is not told right."""
    return ~np.isnan(toxicity) & ((toxicity >= 0.5) == toxic)


def toxicity_by(spec: str, texts: Sequence[str], cache: str | Path, device: str | None = None) -> np.ndarray:
    """What a scorer makes of texts, `[N]` float64, NaN where it has no score; it is in memory no longer than that.

    Args:
        spec: the scorer's name.
        texts: them.
        cache: a `ScoreCache`'s file, from which a killed run goes on.
        device: where it runs, if that can be chosen.

    Raises:
        RectifyError: the scorer cannot be loaded, or cannot go on.
    """
    with ScoreCache(cache) as known:
        scorer = CachedScorer(load_part(spec, device), known)
        stream = tqdm(scorer.score_stream(texts), desc=spec, total=len(texts), unit="text", disable=None)
        values = gathered(stream, len(texts), ("TOXICITY",))["TOXICITY"]
        del scorer, stream
    free_memory()
    return values


def load_part(spec: str, device: str | None) -> Scorer:
    """The scorer of a name, as of a cascade's parts, on a device where it can be told one.

    Raises:
        RectifyError: it cannot be loaded.
    """
    from rectify.scoring.load import has_option, load_scorer  # which loads cascades, too

    return load_scorer(spec, **({"device": device} if device is not None and has_option(spec, "device") else {}))


def free_memory() -> None:
    """Give back what models held that are gone."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.memory.empty_cache()


class CascadeScorer:
    """A cascade as a `Scorer`, both of its scorers in memory.

    Args:
        name: folder of `rectify train cascade`.
        device: where the two run; `None` for an accelerator if there is one.

    Raises:
        RectifyError: the folder or a scorer cannot be used.
    """

    attributes: tuple[str, ...] = ("TOXICITY",)

    def __init__(self, name: str | Path, *, device: str | None = None) -> None:
        self.name = f"cascade:{name}"
        self.config = CascadeConfig.from_pretrained(name)
        self.small, self.large = (load_part(spec, device) for spec in (self.config.small, self.config.large))
        self.revision = (
            f"{self.small.revision} / {self.config.small_temperature:g} below {self.config.threshold:g} "
            f"{self.large.revision} / {self.config.large_temperature:g}"
        )

    def score(self, texts: Sequence[str], attributes: Sequence[str] = ("TOXICITY",)) -> Scores:
        """Score texts; see `Scorer.score`."""
        asked = check_attributes(self, attributes)
        first = self.small.score(texts, asked)
        values, reasons = calibrated(first["TOXICITY"], self.config.small_temperature), list(first.reasons)
        places = np.flatnonzero(self.config.escalated(first["TOXICITY"])).tolist()
        if places:
            second = self.large.score([texts[place] for place in places], asked)
            values[places] = calibrated(second["TOXICITY"], self.config.large_temperature)
            for place, reason in zip(places, second.reasons, strict=True):
                reasons[place] = reason
        return Scores(values[:, None], asked, tuple(reasons))
