"""The models of the package `detoxify`, which is optional, as scorers."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from rectify.errors import CheckpointError, InvalidArgumentError, first_line
from rectify.extras import need_extra
from rectify.scoring.labels import outputs_by_attribute
from rectify.scoring.scores import Scores, check_attributes, reason_against

_LABELS = ("toxicity", "severe_toxicity", "obscene", "identity_attack", "insult", "threat")
_MODELS = {
    "original": _LABELS,
    "original-small": _LABELS,
    "unbiased": (*_LABELS, "sexual_explicit"),
    "unbiased-small": (*_LABELS, "sexual_explicit"),
    "multilingual": (*_LABELS, "sexual_explicit"),
}


class DetoxifyScorer:
    """A model of `detoxify` as a `Scorer`; its weights are fetched and loaded when it scores for the first time.

    The scores are on the model's own scale, which is not Perspective's.

    Args:
        model: `original`, `unbiased`, `multilingual`, or one of the first two with `-small`.
        device: where it runs.
        batch_size: texts at a time.

    Raises:
        InvalidArgumentError: there is no such model.
        MissingExtraError: the package is not installed.
    """

    def __init__(self, model: str = "original", *, device: str = "cpu", batch_size: int = 64) -> None:
        if model not in _MODELS:
            raise InvalidArgumentError(f"detoxify model is {model!r}: give one of {', '.join(_MODELS)}")
        if batch_size < 1:
            raise InvalidArgumentError(f"batch_size is {batch_size}: give 1 or more")
        need_extra("detoxify", f"scorer is 'detoxify:{model}'")
        self.name, self.revision = f"detoxify:{model}", f"detoxify {version('detoxify')}"
        self._labels = {
            attribute: _MODELS[model][place] for attribute, place in outputs_by_attribute(_MODELS[model]).items()
        }
        self.attributes = tuple(self._labels)
        self._model_type, self._device, self._batch_size = model, device, batch_size
        self._model: Any = None

    def score(self, texts: Sequence[str], attributes: Sequence[str] = ("TOXICITY",)) -> Scores:
        """Score texts; see `Scorer.score`.

        Raises:
            CheckpointError: the weights cannot be loaded.
        """
        asked = check_attributes(self, attributes)
        reasons = tuple(reason_against(text) for text in texts)
        usable = [place for place, reason in enumerate(reasons) if reason is None]
        # of nearly equal length at a time, as each batch is padded to its longest
        usable.sort(key=lambda place: -len(texts[place]))
        values = np.full((len(texts), len(asked)), np.nan)
        for start in range(0, len(usable), self._batch_size):
            batch = usable[start : start + self._batch_size]
            found = self._loaded().predict([texts[place] for place in batch])
            values[batch] = np.array([found[self._labels[attribute]] for attribute in asked], dtype=np.float64).T
        return Scores(values, asked, reasons)

    def _loaded(self) -> Any:
        if self._model is None:
            try:
                from detoxify import Detoxify

                self._model = Detoxify(self._model_type, device=self._device)
            except (ImportError, OSError, RuntimeError, ValueError) as error:
                raise CheckpointError(
                    f"{self.name!r} cannot be loaded ({first_line(error)}): its weights come from GitHub; check the "
                    "connection, and that detoxify works by itself"
                ) from error
        return self._model
