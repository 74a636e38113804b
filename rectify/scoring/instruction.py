"""An instruction-style detector as a scorer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rectify.detectors.instruction import InstructionDetector
from rectify.hub import available_device, checkpoint_folder, files_digest, model_place
from rectify.scoring.classifiers import scores_by
from rectify.scoring.scores import Reason, Scores, check_attributes

_FILES = {".safetensors", ".json"}


class InstructionScorer:
    """An `InstructionDetector` as a `Scorer`: TOXICITY is the probability of its template's toxic labels.

    Args:
        name: folder of `rectify train instruction`, or Hub id.
        device: where it runs; `None` for an accelerator if there is one.
        batch_size: texts at a time.

    Raises:
        CheckpointError: nothing usable is there.
        InvalidArgumentError: there is no such device.
    """

    attributes: tuple[str, ...] = ("TOXICITY",)

    def __init__(self, name: str | Path, *, device: str | None = None, batch_size: int = 32) -> None:
        self.name = f"instruction:{name}"
        self.detector = InstructionDetector.from_pretrained(name, device=available_device(device))
        self._batch_size = batch_size
        config = self.detector.config
        backbone, folder = model_place(config.base_model, config.base_revision), checkpoint_folder(name)
        if isinstance(backbone, Path):
            self.revision = files_digest(folder, backbone, suffixes=_FILES)
        else:
            self.revision = f"{files_digest(folder, suffixes=_FILES)} on {self.detector.model.config._commit_hash}"

    def score(self, texts: Sequence[str], attributes: Sequence[str] = ("TOXICITY",)) -> Scores:
        """Score texts by their first `max_length` tokens; see `Scorer.score`."""
        detector = self.detector
        return scores_by(
            texts,
            check_attributes(self, attributes),
            lambda some: detector.toxicity(detector.label_probabilities(some, self._batch_size))[:, None],
            Reason.UNPARSED,
        )
