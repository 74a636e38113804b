"""A cascade of two scorers: the small one scores every text, and the larger one those that it is unsure of."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from rectify.detectors.cascade import escalated, predicted, two_labels
from rectify.detectors.config import check_temperature
from rectify.errors import CheckpointError, InvalidArgumentError
from rectify.json_files import check_format_version, write_json
from rectify.saved_config import read_config
from rectify.scoring.cache import CachedScorer, ScoreCache
from rectify.scoring.scores import Scorer, Scores, check_attributes
from rectify.scoring.streams import gathered

CONFIG_FILE = "cascade_config.json"
SCORES_FILE = "scores.sqlite"
FORMAT_VERSION = 1
_DEEPEST = 8
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
            check_temperature(name, getattr(self, name))
        check_format_version(self.format_version, FORMAT_VERSION)

    @classmethod
    def from_pretrained(cls, folder: str | Path, allow: Sequence[str] = ()) -> CascadeConfig:
        """That of a folder.

        Args:
            folder: it.
            allow: scorers that it may name though they run a command or send texts away, see `load.check_saved`.

        Raises:
            CheckpointError: there is none, it cannot be used, or it, or a cascade that it names, names such a scorer.
        """
        return cls._read(Path(folder), allow, ())

    @classmethod
    def _read(cls, folder: Path, allow: Sequence[str], within: tuple[Path, ...]) -> CascadeConfig:
        from rectify.scoring.load import check_saved  # which loads cascades, too

        path = folder.expanduser() / CONFIG_FILE
        config = read_config(cls, path, "give a folder written by `rectify train cascade`")
        if path.resolve() in within or len(within) > _DEEPEST:
            raise CheckpointError(f"{str(path)!r} is within itself, or too deep: give a cascade of other scorers")
        for name in ("small", "large"):
            spec = getattr(config, name)
            check_saved(spec, f"{name} in {str(path)!r}", allow)
            kind, _, place = spec.partition(":")
            if kind == "cascade":
                cls._read(Path(place), allow, (*within, path.resolve()))
        return config

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


def load_part(spec: str, device: str | None, allow: Sequence[str] = ()) -> Scorer:
    """The scorer of a name, as of a cascade's parts, on a device where it can be told one.

    Args:
        spec: the name.
        device: where it runs.
        allow: of a cascade, see `CascadeConfig.from_pretrained`.

    Raises:
        RectifyError: it cannot be loaded.
    """
    from rectify.scoring.load import has_option, load_scorer  # which loads cascades, too

    given = {"device": device, "allow": allow or None}
    options = {name: value for name, value in given.items() if value is not None and has_option(spec, name)}
    return load_scorer(spec, **options)


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
        allow: see `CascadeConfig.from_pretrained`.

    Raises:
        RectifyError: the folder or a scorer cannot be used.
    """

    attributes: tuple[str, ...] = ("TOXICITY",)

    def __init__(self, name: str | Path, *, device: str | None = None, allow: Sequence[str] = ()) -> None:
        self.name = f"cascade:{name}"
        self.config = CascadeConfig.from_pretrained(name, allow)
        self.small, self.large = (load_part(spec, device, allow) for spec in (self.config.small, self.config.large))
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
