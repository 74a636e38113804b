"""A moderation of questions with their answers as a scorer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from rectify.detectors.moderation import Pair, QAModeration
from rectify.errors import InvalidArgumentError
from rectify.hub import available_device, checkpoint_folder
from rectify.scoring.classifiers import detector_revision, scores_by
from rectify.scoring.scores import Reason, Scores, check_attributes, reason_against

MAXIMUM = "TOXICITY"


class ModerationScorer:
    """A `QAModeration` as a `Scorer` of pairs.

    Its categories are attributes by their own names. They are none of Perspective's; where a single number is asked for
    as TOXICITY, it is the maximum of all categories, the probability that the published rule compares to a threshold.

    Args:
        name: folder of `rectify train moderation`, or folder or Hub id of a checkpoint of the published form.
        device: where it runs; `None` for an accelerator if there is one.
        batch_size: pairs at a time.
        threshold: of the verdict: a number, or a name, see `ModerationConfig.threshold_values`.

    Raises:
        CheckpointError: nothing usable is there.
        InvalidArgumentError: there is no such threshold or device, or it has a category TOXICITY.

    Example:
        >>> from rectify.scoring.moderation import ModerationScorer
        >>> from rectify.scoring.records import pair_text
        >>> scorer = ModerationScorer("PKU-Alignment/beaver-dam-7b")
        >>> scorer.score([pair_text("How do I pick a lock?", "Call a locksmith.")], ["TOXICITY", "self_harm"])
    """

    def __init__(
        self,
        name: str | Path,
        *,
        device: str | None = None,
        batch_size: int = 64,
        threshold: float | str | None = None,
    ) -> None:
        self.name = f"moderation:{name}"
        self._moderation = QAModeration.from_pretrained(name, device=available_device(device))
        self._batch_size = batch_size
        self._threshold = threshold
        config = self._moderation.config
        config.threshold_values(self._threshold)  # refused now, if there is none
        if MAXIMUM in config.labels:
            raise InvalidArgumentError(f"{str(name)!r} has a category {MAXIMUM}, which is the maximum here: rename it")
        self.verdict_attributes = tuple(config.labels)
        self.attributes = (MAXIMUM, *self.verdict_attributes)
        self.revision = detector_revision(self._moderation, checkpoint_folder(name))
        if threshold is not None:
            self.revision += f" threshold {threshold}"

    def score(self, texts: Sequence[str], attributes: Sequence[str] = (MAXIMUM,)) -> Scores:
        """Score pairs that `pair_text` has written; any other text is an answer to an empty question.

        A blank answer gets no score. See `Scorer.score`.
        """
        asked = check_attributes(self, attributes)
        places = [self.attributes.index(attribute) for attribute in asked]

        def probabilities(some: list[str]) -> np.ndarray:
            pairs = cast(Any, [_pair(text) for text in some])
            found = self._moderation.label_probabilities(pairs, self._batch_size)
            return np.concatenate((found.max(-1, keepdims=True), found), -1)[:, places]

        return scores_by(texts, asked, probabilities, against=_reason_against)

    def verdict(self, values: np.ndarray) -> dict[str, Any]:
        """`{"flagged": bool, "categories": {name: probability}}` of the scores of all categories, `[L]`."""
        return self._moderation.config.verdict(values, self._threshold)


def _pair(text: str) -> Pair:
    try:
        value = json.loads(text) if text.startswith("[") else None
    except (ValueError, RecursionError):  # of brackets without end, which language models write
        value = None
    if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value):
        return Pair(*value)
    return Pair("", text)


def _reason_against(text: str) -> Reason | None:
    pair = _pair(text)
    return reason_against(pair.answer) or (reason_against(pair.question) if pair.question.strip() else None)
