"""The toxicity classifier: a backbone, a LoRA adapter, and a head of one logit a label, `P(label | text)`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel, TaskType
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rectify.adapters import ADAPTER_FILE, WEIGHTS_FILE, add_adapter, load_adapter, quiet_loading, save_adapter
from rectify.errors import CheckpointError, InvalidArgumentError, RectifyError, first_line
from rectify.hub import checkpoint_folder, model_place

CONFIG_FILE = "detector_config.json"
FORMAT_VERSION = 1


@dataclass
class DetectorConfig:
    """Everything about a classifier but its weights; saved as `detector_config.json` beside them.

    Attributes:
        base_model: Hub id, folder or bundled name of the frozen backbone, whose tokenizer is used.
        base_revision: revision of `base_model` on the Hub.
        max_length: tokens of a text that are read, from its start.
        labels: what each logit stands for.
        calibration: for a label, the knots `[probabilities, calibrated ones]` of a piecewise linear map.
        training: free-form record of how the weights came to be.
        format_version: of the folder's files.
    """

    base_model: str
    base_revision: str | None = None
    max_length: int = 256
    labels: list[str] = field(default_factory=lambda: ["toxic"])
    calibration: dict[str, list[list[float]]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise InvalidArgumentError(f"max_length is {self.max_length}: give 1 or more")
        if not self.labels or len(set(self.labels)) < len(self.labels):
            raise InvalidArgumentError(f"labels is {self.labels!r}: give one or more, each once")
        if self.format_version > FORMAT_VERSION:
            raise InvalidArgumentError(
                f"format_version is {self.format_version}, above {FORMAT_VERSION}: update rectify to read it"
            )


class ToxicityClassifier(nn.Module):
    """A sequence classifier on any causal or encoder backbone of the Hugging Face form.

    Make one with `from_backbone` or `from_pretrained`. Only adapter and head are trained and saved.

    Example:
        >>> from rectify.detectors import ToxicityClassifier
        >>> classifier = ToxicityClassifier.from_pretrained("pocket-reward")
        >>> classifier.probabilities(["Have a nice day", "You are an idiot", ""])  # the last is NaN
    """

    def __init__(self, config: DetectorConfig, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.config = config
        self.model = model
        self.tokenizer = tokenizer
        inner = cast(PreTrainedModel, model.get_base_model())
        # of the architectures that transformers makes sequence classifiers of, the causal ones alone call it so
        self._causal = hasattr(inner, "score")
        inner.config.get_text_config().use_cache = False
        tokenizer.truncation_side = "right"
        self._special_tokens = tokenizer.num_special_tokens_to_add()
        positions = getattr(inner.config.get_text_config(), "max_position_embeddings", None)
        longest = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
        if not self._special_tokens < config.max_length <= longest:
            raise InvalidArgumentError(
                f"max_length is {config.max_length}: give a number from {self._special_tokens + 1} to the {longest} "
                f"tokens that {config.base_model!r} was made for"
            )

    # -----------------------------------------------------------------------------------------------------------------
    # Making, saving, loading

    @classmethod
    def from_backbone(
        cls,
        name: str,
        *,
        revision: str | None = None,
        labels: Sequence[str] = ("toxic",),
        max_length: int = 256,
        lora_r: int = 8,
        lora_alpha: int = 16,
        lora_dropout: float = 0.0,
        target_modules: str | Sequence[str] = "all-linear",
    ) -> ToxicityClassifier:
        """A new classifier on a frozen float32 backbone; adapter and head are drawn from torch's random generator.

        Args:
            name: folder, `"pocket"` or Hub id of a model and its tokenizer.
            revision: of a Hub id.
            labels, max_length: see `DetectorConfig`.
            lora_r, lora_alpha, lora_dropout: rank, scale and dropout of the adapter.
            target_modules: names of the modules that are adapted; `"all-linear"` for all linear ones but the head.

        Raises:
            CheckpointError: nothing usable is there.
            InvalidArgumentError: a setting is out of range, or the backbone is an encoder-decoder.
        """
        config = DetectorConfig(base_model=name, base_revision=revision, max_length=max_length, labels=list(labels))
        inner, tokenizer, fresh = _load_backbone(config, torch.float32)
        model = add_adapter(
            inner,
            name,
            task_type=TaskType.SEQ_CLS,
            lora_r=lora_r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            target_modules=target_modules,
            modules_to_save=fresh,
        )
        return cls(config, model, tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> ToxicityClassifier:
        """Load a classifier in evaluation mode, its adapter folded into the backbone.

        Args:
            name: a folder written by `save_pretrained`, `"pocket-reward"`, or a Hub id.
            revision: of a Hub id.
            device: where to put it.
            dtype: of the weights; probabilities are float32 whatever it is.

        Raises:
            CheckpointError: nothing usable is there.
        """
        folder = checkpoint_folder(name, revision)
        for file in (CONFIG_FILE, ADAPTER_FILE, WEIGHTS_FILE):
            if not (folder / file).exists():
                raise CheckpointError(f"{str(name)!r} holds no {file}: give a folder written by save_pretrained")
        try:
            config = DetectorConfig(**json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))
            inner, tokenizer, _ = _load_backbone(config, dtype)
            model = load_adapter(inner, folder)
            model.merge_adapter()
            classifier = cls(config, model, tokenizer)
        except (RectifyError, OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{str(name)!r} could not be loaded ({reason}): is it complete?") from error
        return classifier.requires_grad_(False).to(device=device, dtype=dtype).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write configuration, adapter and head to a folder; the backbone and its tokenizer stay where they are."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_adapter(self.model, folder, self.config.base_model)
        text = json.dumps(asdict(self.config), indent=2, ensure_ascii=False)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")

    # -----------------------------------------------------------------------------------------------------------------
    # Probabilities

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, its first `max_length`; none where it yields no token of its own.

        Raises:
            InvalidArgumentError: one is not a string, or no valid Unicode.
        """
        check_texts(texts)
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts),
            truncation=True,
            max_length=self.config.max_length,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        return [ids if len(ids) > self._special_tokens else [] for ids in cast(list[list[int]], encoded)]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The logits of each text.

        Args:
            input_ids: `[B, T]` int64.
            attention_mask: `[B, T]`, 0 at padding, on whichever side; every row holds a 1.

        Returns:
            `[B, L]` float32, one for each of `config.labels`.
        """
        # all padding goes to the right, so that its side changes nothing, whatever the backbone makes of positions
        order = attention_mask.argsort(dim=-1, descending=True, stable=True)
        mask = attention_mask.gather(-1, order)
        ids = input_ids.gather(-1, order).masked_fill(mask == 0, self.tokenizer.pad_token_id or 0)
        inner = cast(Any, self.model.get_base_model())
        if not self._causal:
            return inner(input_ids=ids, attention_mask=mask).logits.float()
        # transformers pools a causal model at the last token that is not the padding token, which a text may end with
        hidden = inner.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        last = mask.sum(-1) - 1
        return inner.score(hidden[torch.arange(len(hidden), device=last.device), last]).float()

    def probabilities(self, texts: Sequence[str], batch_size: int = 64, progress: bool = False) -> np.ndarray:
        """How probably each text has the first label, which is the only one in most classifiers: `[N]` float32.

        See `label_probabilities`.
        """
        return self.label_probabilities(texts, batch_size, progress)[:, 0]

    @torch.inference_mode()
    def label_probabilities(self, texts: Sequence[str], batch_size: int = 64, progress: bool = False) -> np.ndarray:
        """How probably each text has each label.

        Args:
            texts: of any length; the first `max_length` tokens count.
            batch_size: texts at a time, of nearly equal length.
            progress: show a progress bar.

        Returns:
            `[N, L]` float32 in [0, 1], in the order of the texts; NaN where a text yields no token.

        Raises:
            InvalidArgumentError: `batch_size` is below 1, or a text is not a string, or no valid Unicode.
        """
        if batch_size < 1:
            raise InvalidArgumentError(f"batch_size is {batch_size}: give 1 or more")
        encoded = self.encode(texts)
        result = np.full((len(encoded), len(self.config.labels)), np.nan, dtype=np.float32)
        # the longest first: what does not fit into memory fails at once
        order = sorted((i for i, ids in enumerate(encoded) if ids), key=lambda i: -len(encoded[i]))
        training = self.training
        self.eval()
        with tqdm(total=len(order), unit="text", disable=not progress) as bar:
            for start in range(0, len(order), batch_size):
                places = order[start : start + batch_size]
                ids, mask = pad([encoded[place] for place in places])
                logits = self(ids.to(self.device), mask.to(self.device))
                result[places] = logits.sigmoid().cpu().numpy()
                bar.update(len(places))
        self.train(training)
        for place, label in enumerate(self.config.labels):
            if label in self.config.calibration:
                knots, calibrated = self.config.calibration[label]
                result[:, place] = np.interp(result[:, place], knots, calibrated)
        return result


def check_texts(texts: Sequence[str]) -> None:
    """Refuse what no tokenizer takes.

    Raises:
        InvalidArgumentError: a text is not a string, or no valid Unicode.
    """
    for index, text in enumerate(texts):
        try:
            text.encode("utf-8")
        except (AttributeError, UnicodeEncodeError) as error:
            raise InvalidArgumentError(f"texts[{index}] is {text!r}: give a string of valid Unicode") from error


def pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of texts, `[B, T]` int64 each, padded on the right."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(longest) < lengths[:, None]).long()


def _load_backbone(
    config: DetectorConfig, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    """The backbone with a new head, its tokenizer, and the modules whose weights no checkpoint holds."""
    name, revision = config.base_model, config.base_revision or "main"
    place = model_place(name, config.base_revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, revision=revision)
        with quiet_loading():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                place,
                revision=revision,
                num_labels=len(config.labels),
                dtype=dtype,
                ignore_mismatched_sizes=True,  # the head of a classifier of more labels is no part of the backbone
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"backbone {name!r} is neither a usable folder nor a model that the Hub gives ({first_line(error)}): "
            "give a model of text with its tokenizer"
        ) from error
    if model.config.is_encoder_decoder:
        raise InvalidArgumentError(f"backbone {name!r} is an encoder-decoder: give a causal model or an encoder")
    body = model.base_model_prefix
    head = [
        child for child, module in model.named_children() if child != body and any(True for _ in module.parameters())
    ]
    lacking = {key.rpartition(".")[0] for key in report["missing_keys"] if key.startswith(f"{body}.")}
    return model, tokenizer, head + sorted(lacking)
