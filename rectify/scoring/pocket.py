"""The bundled scorer: a small encoder with eight outputs, on Perspective's scale; it needs no network and no GPU."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from rectify.context import context_length
from rectify.detectors.classifier import pad
from rectify.detectors.config import check_knots
from rectify.errors import CheckpointError, InvalidArgumentError, ScorerError
from rectify.hub import checkpoint_folder
from rectify.pretrained import read_model, read_tokenizer, refusing
from rectify.saved_config import read_config
from rectify.scoring.scores import Scores, check_attributes, reason_against

CONFIG_FILE, WEIGHTS_FILE = "scorer_config.json", "model.safetensors"


@dataclass
class ScorerConfig:
    """Everything about a scorer but its weights; saved as `scorer_config.json` beside them.

    Attributes:
        attributes: what the outputs stand for, in their order.
        version: of the recipe; part of the scorer's revision.
        max_length: tokens that are read at a time; longer texts are read in windows, and the greatest score counts.
        calibration: for an attribute, the knots `[scores, calibrated ones]` of a piecewise linear map.
        training: free-form record of how the weights came to be.
    """

    attributes: list[str]
    version: str = "1"
    max_length: int = 64
    calibration: dict[str, list[list[float]]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.attributes or len(set(self.attributes)) < len(self.attributes):
            raise InvalidArgumentError(f"attributes is {self.attributes!r}: give one or more, each once")
        if self.max_length < 3:
            raise InvalidArgumentError(f"max_length is {self.max_length}: give 3 or more")
        for attribute, knots in self.calibration.items():
            if attribute not in self.attributes:
                raise InvalidArgumentError(f"calibration has {attribute!r}, which is none of the attributes")
            check_knots(attribute, knots)


class PocketScorer:
    """A `Scorer` on a sequence classifier of transformers.

    Args:
        config: what is recorded beside the weights.
        model: of one output for each attribute.
        tokenizer: its tokenizer.
        batch_size: windows at a time.

    Example:
        >>> from rectify.scoring.pocket import PocketScorer
        >>> scores = PocketScorer.from_pretrained().score(["Have a nice day", "You are an idiot", ""])
        >>> scores["TOXICITY"]  # the last is NaN
    """

    reentrant = True

    def __init__(
        self,
        config: ScorerConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 256,
    ) -> None:
        if model.config.num_labels != len(config.attributes):
            raise InvalidArgumentError(
                f"attributes are {len(config.attributes)}, the model has {model.config.num_labels} outputs: "
                "give one for each"
            )
        longest = context_length(model.config)
        if longest is not None and config.max_length > longest:
            raise InvalidArgumentError(f"max_length is {config.max_length}, and the model reads {longest}: give less")
        if len(tokenizer) > cast(Any, model.get_input_embeddings()).weight.shape[0]:
            raise InvalidArgumentError(f"the tokenizer has {len(tokenizer)} tokens, the model fewer: give its own")
        self.config, self.model, self.tokenizer, self.batch_size = config, model.eval(), tokenizer, batch_size
        self.name = "pocket"
        self._settling = threading.Lock()
        self.attributes = tuple(config.attributes)
        self.revision = f"{config.version}-unsaved"

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = "pocket-scorer",
        *,
        revision: str | None = None,
        device: str | torch.device | None = None,
    ) -> PocketScorer:
        """Load a scorer from a folder, the package (`"pocket-scorer"`) or a Hub id.

        Its `revision` is the recipe's version and a digest of weights and calibration.

        Raises:
            CheckpointError: nothing usable is there.
        """
        folder = checkpoint_folder(name, revision)
        with refusing(name):
            config = read_config(ScorerConfig, folder / CONFIG_FILE, "give a folder written by save_pretrained")
            if not (folder / WEIGHTS_FILE).exists():
                raise CheckpointError(f"it holds no {WEIGHTS_FILE}: give a folder written by save_pretrained")
            tokenizer = read_tokenizer(folder)
            model, new = read_model(AutoModelForSequenceClassification, folder, dtype=torch.float32, exact=True)
            if new:
                raise CheckpointError(f"it lacks the weights {min(new)!r}: is it complete?")
            scorer = cls(config, model.to(device), tokenizer)  # type: ignore[arg-type]
        digest = hashlib.sha256((folder / WEIGHTS_FILE).read_bytes())
        digest.update(json.dumps([config.calibration, config.max_length]).encode())
        scorer.revision = f"{config.version}-{digest.hexdigest()[:12]}"
        return scorer

    def save_pretrained(self, folder: str | Path) -> None:
        """Write configuration, weights in bfloat16 and tokenizer to a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.model.to(torch.bfloat16).save_pretrained(folder)
        self.model.to(torch.float32)
        self.tokenizer.save_pretrained(folder)
        text = json.dumps(asdict(self.config), indent=2, ensure_ascii=False)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")

    def score(self, texts: Sequence[str], attributes: Sequence[str] = ("TOXICITY",)) -> Scores:
        """Score texts, in their order; those without a word have a reason in place of scores.

        Raises:
            UnknownAttributeError: an attribute is none of the scorer's.
        """
        asked = check_attributes(self, attributes)
        reasons = tuple(map(reason_against, texts))
        usable = [i for i, reason in enumerate(reasons) if reason is None]
        values = np.full((len(texts), len(self.attributes)), np.nan)
        values[usable] = self.raw_scores([texts[i] for i in usable])
        for place, attribute in enumerate(self.attributes):
            if attribute in self.config.calibration:
                knots, calibrated = self.config.calibration[attribute]
                values[:, place] = np.interp(values[:, place], knots, calibrated)
        return Scores(values[:, [self.attributes.index(attribute) for attribute in asked]], asked, reasons)

    @torch.inference_mode()
    def raw_scores(self, texts: Sequence[str]) -> np.ndarray:
        """Scores before calibration, `[N, A]` float64, of texts that are not blank.

        Raises:
            ScorerError: the model gives none.
        """
        windows, owners = self._windows(texts)
        order = np.argsort([-len(window) for window in windows], kind="stable")
        result = np.zeros((len(texts), len(self.attributes)))
        device = self.model.device
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            ids, mask = pad([windows[place] for place in places])
            logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
            found = logits.double().sigmoid().cpu().numpy()
            if np.isnan(found).any():  # of finite weights so large that their products are not
                raise ScorerError(f"the model of {self.name!r} gives NaN: put back the weights that were trained")
            np.maximum.at(result, np.asarray(owners)[places], found)
        return result

    def _windows(self, texts: Sequence[str]) -> tuple[list[list[int]], list[int]]:
        """Token ids of at most `max_length` with the classifier's own tokens, and the text that each belongs to."""
        if not texts:
            return [], []
        # without offsets, which a score needs nothing of, it takes half the time
        fast = cast(Any, self.tokenizer).backend_tokenizer
        wanted: dict[str, Any] = {"max_length": self.config.max_length, "stride": self.config.max_length // 4}
        wanted |= {"strategy": "longest_first", "direction": "right"}
        with self._settling:  # another thread may be reading, and then nothing may be set
            if fast.padding is not None or not wanted.items() <= (fast.truncation or {}).items():
                fast.enable_truncation(**wanted)
                fast.no_padding()
        windows: list[list[int]] = []
        owners: list[int] = []
        for owner, encoding in enumerate(fast.encode_batch_fast(list(texts))):
            for window in (encoding, *encoding.overflowing):
                windows.append(window.ids)
                owners.append(owner)
        return windows, owners
