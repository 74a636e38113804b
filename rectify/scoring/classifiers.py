"""Scorers made of models: the project's own detectors, and text classifiers of the Hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rectify.context import longest_input
from rectify.detectors import ToxicityClassifier
from rectify.detectors.classifier import batches_by_length
from rectify.detectors.gated import ADAPTERS_FOLDER, GATE_FOLDER, GatedDetector, load_detector
from rectify.errors import CheckpointError, InvalidArgumentError
from rectify.hub import available_device, checkpoint_folder, files_digest, model_place
from rectify.pretrained import check_vocabulary, read_model, read_tokenizer, refusing_unusable
from rectify.quiet_peft import PeftModel
from rectify.scoring.labels import outputs_by_attribute
from rectify.scoring.scores import Reason, Scores, check_attributes, reason_against

_LONGEST = 512  # tokens, where neither the model nor its tokenizer says less
_MODEL_FILES = {".safetensors", ".bin", ".json", ".model", ".txt"}


class DetectorScorer:
    """A `ToxicityClassifier` or `GatedDetector` of this project as a `Scorer`.

    Args:
        name: folder written by its `save_pretrained`, bundled name, or Hub id.
        device: where it runs; `None` for an accelerator if there is one.
        batch_size: texts at a time.

    Raises:
        CheckpointError: nothing usable is there.
        InvalidArgumentError: none of its labels is an attribute, or there is no such device.
    """

    def __init__(self, name: str | Path, *, device: str | None = None, batch_size: int = 64) -> None:
        self.name = f"detector:{name}"
        self._detector = load_detector(name, device=available_device(device))
        self._outputs = outputs_by_attribute(self._detector.config.labels)
        self._batch_size = batch_size
        self.attributes = tuple(self._outputs)
        self.revision = detector_revision(self._detector, checkpoint_folder(name))

    def score(self, texts: Sequence[str], attributes: Sequence[str] = ("TOXICITY",)) -> Scores:
        """Score texts by their first `max_length` tokens; see `Scorer.score`."""
        asked = check_attributes(self, attributes)
        places = [self._outputs[attribute] for attribute in asked]
        return scores_by(
            texts, asked, lambda some: self._detector.label_probabilities(some, self._batch_size)[:, places]
        )


def detector_revision(detector: ToxicityClassifier | GatedDetector, folder: Path) -> str:
    """The files of a detector and of its local models, and the commits of those that came from the Hub."""
    config, folders = detector.config, [folder]
    models: list[tuple[str, str | None, PreTrainedModel]]
    if isinstance(detector, GatedDetector):
        gate = detector.gate
        models = [(config.base_model, config.base_revision, detector.blend.backbone)]
        models += [(gate.config.encoder, gate.config.encoder_revision, gate.encoder.model)]
        folders += [folder / GATE_FOLDER, *(folder / ADAPTERS_FOLDER / name for name in detector.blend.names)]
    elif isinstance(detector.model, PeftModel):
        models = [(config.base_model, config.base_revision, detector.inner)]
    else:  # nothing is anywhere else
        models = []
    commits = ""
    for name, revision, model in models:
        place = model_place(name, revision)
        if isinstance(place, Path):
            folders.append(place)
        else:
            commits += f" on {model.config._commit_hash}"
    return files_digest(*folders, suffixes=_MODEL_FILES) + commits


class HfScorer:
    """Any text classifier of the transformers library as a `Scorer`.

    Labels become attributes by their names, as `obscene` PROFANITY. A model of several attributes has a sigmoid for
    each, one that chooses between a toxic and other labels a softmax, unless its configuration's `problem_type` says
    otherwise. The scores are on the model's own scale, which is not Perspective's.

    Args:
        name: a folder or a Hub id, or `ID@REVISION`.
        labels: what labels mean whose names do not say it, as `{"LABEL_1": "TOXICITY"}`; the others then count as none.
        device: where it runs; `None` for an accelerator if there is one.
        batch_size: texts at a time, of nearly equal length.

    Raises:
        CheckpointError: nothing usable is there.
        InvalidArgumentError: no label means an attribute, or there is no such device.
    """

    def __init__(
        self,
        name: str,
        *,
        labels: Mapping[str, str] | None = None,
        device: str | None = None,
        batch_size: int = 64,
    ) -> None:
        if batch_size < 1:
            raise InvalidArgumentError(f"batch_size is {batch_size}: give 1 or more")
        self.name, self._batch_size = f"hf:{name}", batch_size
        self._device = available_device(device)
        place, _, wanted = (name, "", "") if Path(name).expanduser().exists() else name.partition("@")
        source = model_place(place, wanted or None)
        with refusing_unusable(f"text classifier {name!r}", "check the path, or the id and the connection"):
            self._tokenizer = read_tokenizer(source, wanted or None)
            model, new = read_model(AutoModelForSequenceClassification, source, wanted or None, dtype=torch.float32)
            check_vocabulary(model, self._tokenizer)
        if new:
            raise CheckpointError(f"{name!r} lacks the weights {min(new)}: give a model that was trained to classify")
        self._model = model.to(self._device).eval()  # type: ignore[arg-type]
        config = self._model.config
        self._outputs = outputs_by_attribute([config.id2label[index] for index in range(config.num_labels)], labels)
        self.attributes = tuple(self._outputs)
        self._to_probabilities = _function(name, config.problem_type, config.num_labels, len(self._outputs))
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token or self._tokenizer.unk_token
        if config.pad_token_id is None:
            config.pad_token_id = self._tokenizer.pad_token_id
        self._max_length = self._longest()
        self._special = self._tokenizer.num_special_tokens_to_add()
        origin = files_digest(source, suffixes=_MODEL_FILES) if isinstance(source, Path) else config._commit_hash
        self.revision = f"{origin}{_named(labels)}"

    def score(self, texts: Sequence[str], attributes: Sequence[str] = ("TOXICITY",)) -> Scores:
        """Score texts by as many of their tokens as the model reads; see `Scorer.score`."""
        asked = check_attributes(self, attributes)
        places = [self._outputs[attribute] for attribute in asked]
        return scores_by(texts, asked, lambda some: self._probabilities(some)[:, places])

    @torch.inference_mode()
    def _probabilities(self, texts: list[str]) -> np.ndarray:
        encoded = self._tokenizer(texts, truncation=True, max_length=self._max_length, return_attention_mask=False)
        rows: list[list[int]] = encoded["input_ids"]
        result = np.full((len(texts), self._model.config.num_labels), np.nan)
        readable = [ids if len(ids) > self._special else [] for ids in rows]
        for batch, ids, mask in batches_by_length(readable, self._batch_size):
            ids = ids.masked_fill(mask == 0, self._model.config.pad_token_id or 0)
            logits = self._model(input_ids=ids.to(self._device), attention_mask=mask.to(self._device)).logits
            result[batch] = self._to_probabilities(logits.double()).cpu().numpy()
        return result

    def _longest(self) -> int:
        return min(longest_input(self._model.config, self._tokenizer) or _LONGEST, _LONGEST)


def _function(name: str, problem_type: str | None, outputs: int, attributes: int) -> Callable:
    """What makes probabilities of a model's logits."""
    if problem_type == "regression":
        raise InvalidArgumentError(f"{name!r} is a regression, whose outputs are no probabilities: give a classifier")
    if problem_type is None:
        problem_type = "multi_label_classification" if attributes > 1 or outputs == 1 else "single_label_classification"
    if problem_type == "multi_label_classification":
        return torch.sigmoid
    return lambda logits: logits.softmax(-1)


def scores_by(
    texts: Sequence[str],
    asked: tuple[str, ...],
    probabilities: Callable[[list[str]], np.ndarray],
    unknown: Reason = Reason.COMMENT_EMPTY,
    against: Callable[[str], Reason | None] = reason_against,
) -> Scores:
    """Scores of texts, of which the model gets those that can be scored.

    Args:
        texts: them.
        asked: the A attributes.
        probabilities: `[n, A]` of some texts, NaN where it cannot tell.
        unknown: why it cannot; by default as there is no token in a text.
        against: what keeps a text from the model.
    """
    reasons = [against(text) for text in texts]
    usable = [place for place, reason in enumerate(reasons) if reason is None]
    values = np.full((len(texts), len(asked)), np.nan)
    if usable:
        values[usable] = probabilities([texts[place] for place in usable])
    for place in usable:
        if np.isnan(values[place]).any():
            reasons[place] = unknown
    return Scores(values, asked, tuple(reasons))


def _named(labels: Mapping[str, str] | None) -> str:
    return "".join(f" {label}={attribute}" for label, attribute in sorted((labels or {}).items()))
