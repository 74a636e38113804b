"""The toxicity classifier: a backbone, a LoRA adapter or none, and a head of one logit a label, `P(label | text)`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rectify.adapters import ADAPTER_FILE, WEIGHTS_FILE, add_adapter, put_adapter, read_adapter, save_adapter
from rectify.context import longest_input
from rectify.detectors.backbone import Quantization, load_backbone
from rectify.detectors.config import DetectorConfig, Form
from rectify.errors import CheckpointError, InvalidArgumentError
from rectify.hub import checkpoint_folder
from rectify.pretrained import refusing
from rectify.quiet_peft import LoraConfig, ModulesToSaveWrapper, PeftModel, TaskType
from rectify.saved_config import read_config
from rectify.saved_weights import check_finite
from rectify.weights_digest import check_base

__all__ = ["ADAPTER_FILE", "WEIGHTS_FILE", "ToxicityClassifier"]

CONFIG_FILE, MODEL_CONFIG_FILE = "detector_config.json", "config.json"


class ToxicityClassifier(nn.Module):
    """A sequence classifier on any causal or encoder backbone of the Hugging Face form.

    Make one with `from_backbone` or `from_pretrained`. Only adapter and head are trained and saved, unless there is no
    adapter: then all weights are, in the form of `AutoModelForSequenceClassification`.

    Example:
        >>> from rectify.detectors import ToxicityClassifier
        >>> classifier = ToxicityClassifier.from_pretrained("pocket-reward")
        >>> classifier.probabilities(["Have a nice day", "You are an idiot", ""])  # the last is NaN
    """

    config_class: ClassVar[type[DetectorConfig]] = DetectorConfig
    needs_adapter: ClassVar[bool] = True
    """Whether rank 0 is refused; where it is not, all weights of such a classifier are trained."""

    def __init__(
        self, config: DetectorConfig, model: PeftModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        super().__init__()
        self.config = config
        self.model = model
        self.tokenizer = tokenizer
        inner = self.inner
        if config.form == "prefix":
            self._check_causal("form is 'prefix'")
        inner.config.get_text_config().use_cache = False
        tokenizer.truncation_side = "right"
        self._special_tokens = tokenizer.num_special_tokens_to_add()
        longest = longest_input(inner.config, tokenizer) or config.max_length
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
        labels: Sequence[str] | None = None,
        form: Form = "sequence",
        quantization: Quantization = "none",
        max_length: int = 256,
        lora_r: int = 8,
        lora_alpha: int = 16,
        lora_dropout: float = 0.0,
        target_modules: str | Sequence[str] = "all-linear",
        **settings: Any,
    ) -> Self:
        """A new classifier on a float32 backbone; adapter and head are drawn from torch's random generator.

        Args:
            name: folder, `"pocket"` or Hub id of a model and its tokenizer.
            revision: of a Hub id.
            labels, form, quantization, max_length: see `DetectorConfig`; without labels, those of `config_class`.
            lora_r, lora_alpha, lora_dropout: rank, scale and dropout of the adapter; see `needs_adapter` as to rank 0.
            target_modules: names of the modules that are adapted; `"all-linear"` for all linear ones but the head.
            settings: further fields of `config_class`.

        Raises:
            CheckpointError: nothing usable is there.
            InvalidArgumentError: a setting is out of range, or the backbone is an encoder-decoder, or no causal model
                where the form needs one.
            RectifyError: bitsandbytes is needed and not installed.
        """
        if labels is not None:
            settings["labels"] = list(labels)
        config = cls.config_class(
            base_model=name,
            base_revision=revision,
            quantization=quantization,
            max_length=max_length,
            form=form,
            **settings,
        )
        if lora_r == 0 and quantization != "none":
            raise InvalidArgumentError(f"lora_r is 0 with quantization {quantization!r}: give a rank, or none")
        backbone = load_backbone(name, revision, len(config.labels), quantization=quantization)
        inner, tokenizer, fresh, _ = backbone
        config.base_fingerprint = backbone.fingerprint
        config.base_revision = getattr(inner.config, "_commit_hash", None) or revision
        cls._complete(inner, tokenizer)
        if lora_r == 0 and not cls.needs_adapter:
            return cls(config, inner, tokenizer)
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
    ) -> Self:
        """Load a classifier in evaluation mode, its adapter folded into the backbone if that is not quantised.

        Args:
            name: a folder written by `save_pretrained`, `"pocket-reward"`, or a Hub id.
            revision: of a Hub id.
            device: where to put it.
            dtype: of the weights; probabilities are float32 whatever it is.

        Raises:
            CheckpointError: nothing usable is there.
        """
        with refusing(name):
            folder = checkpoint_folder(name, revision)
            if (folder / MODEL_CONFIG_FILE).exists() and not (folder / ADAPTER_FILE).exists():
                config = cls.read_config(folder)
                own = (folder / CONFIG_FILE).exists()  # what others wrote may hold more, and other files
                inner, tokenizer, *_ = load_backbone(
                    str(folder), None, len(config.labels), dtype, with_head=True, exact=own
                )
                cls._complete(inner, tokenizer)
                classifier = cls(config, inner, tokenizer)
            else:
                config, adapter, weights = read_classifier(folder, cls)
                inner, tokenizer, fresh = load_base(config, dtype)
                cls._complete(inner, tokenizer)
                model = put_adapter(inner, adapter, weights)
                check_own(model, fresh)
                if config.quantization == "none":
                    model.merge_adapter()  # folded into 4 bits, it would be rounded to them
                check_finite(model, "the adapted backbone")
                classifier = cls(config, model, tokenizer)
        kept = dtype if config.quantization == "none" else None  # what is quantised has a dtype of its own
        return classifier.requires_grad_(False).to(device=device, dtype=kept).eval()

    @classmethod
    def read_config(cls, folder: Path) -> DetectorConfig:
        """The configuration in a folder; to be called within `refusing`."""
        return read_config(
            cls.config_class,
            folder / CONFIG_FILE,
            "give a folder written by save_pretrained; or is it another kind of detector?",
        )

    @classmethod
    def _complete(cls, inner: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Add what a kind of classifier needs to a backbone that was loaded."""

    def save_pretrained(self, folder: str | Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write configuration, adapter and head to a folder; the backbone and its tokenizer stay where they are.

        Without an adapter all weights and the tokenizer are written, as transformers does.

        Args:
            folder: made, if it is not there.
            weights: those of `model.state_dict()`; needed where the parameters are sharded over processes.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.model, PeftModel):
            save_adapter(self.model, folder, self.config.base_model, weights)
        else:
            self.model.config.id2label = dict(enumerate(self.config.labels))
            self.model.config.label2id = {label: place for place, label in enumerate(self.config.labels)}
            self.model.config.problem_type = "multi_label_classification"  # a sigmoid a label, for whoever loads it
            self.model.save_pretrained(folder, state_dict=None if weights is None else dict(weights))
            self.tokenizer.save_pretrained(folder)
        text = json.dumps(asdict(self.config), indent=2, ensure_ascii=False)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")

    # -----------------------------------------------------------------------------------------------------------------
    # Probabilities

    @property
    def inner(self) -> PreTrainedModel:
        """The sequence classifier of transformers, with the adapter's layers in it if there is one."""
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return cast(PreTrainedModel, model)

    @property
    def causal(self) -> bool:
        """Whether the backbone reads from left to right, so that it can judge prefixes."""
        # of the architectures that transformers makes sequence classifiers of, the causal ones alone call it so
        return hasattr(self.inner, "score")

    def _check_causal(self, need: str) -> None:
        if not self.causal:
            raise InvalidArgumentError(
                f"{need}, and the backbone {self.config.base_model!r} is no causal model: give one, such as GPT-2 or "
                "Llama"
            )

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
        ids, mask, _ = self._padded_on_the_right(input_ids, attention_mask)
        inner = cast(Any, self.inner)
        if not self.causal:
            return inner(input_ids=ids, attention_mask=mask).logits.float()
        # transformers pools a causal model at the last token that is not the padding token, which a text may end with
        hidden = inner.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        last = mask.sum(-1) - 1
        return inner.score(hidden[torch.arange(len(hidden), device=last.device), last]).float()

    def position_logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The logits of each text as far as each of its tokens; those at its last token are `forward`'s.

        Args:
            input_ids, attention_mask: as for `forward`.

        Returns:
            `[B, T, L]` float32, in the places of the tokens; 0 at padding.

        Raises:
            InvalidArgumentError: the backbone is no causal model.
        """
        self._check_causal("position_logits reads prefixes")
        ids, mask, order = self._padded_on_the_right(input_ids, attention_mask)
        inner = cast(Any, self.inner)
        logits = inner.score(inner.base_model(input_ids=ids, attention_mask=mask).last_hidden_state).float()
        places = order.argsort(dim=-1)[..., None].expand_as(logits)
        return logits.gather(1, places).masked_fill(attention_mask[..., None] == 0, 0)

    def _padded_on_the_right(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ids and mask with all padding moved to the right, so that its side changes nothing, whatever the backbone
        makes of positions, and the place that each column came from."""
        order = attention_mask.argsort(dim=-1, descending=True, stable=True)
        mask = attention_mask.gather(-1, order)
        return input_ids.gather(-1, order).masked_fill(mask == 0, self.tokenizer.pad_token_id or 0), mask, order

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
        encoded = self.encode(texts)
        result = np.full((len(encoded), len(self.config.labels)), np.nan, dtype=np.float32)
        training = self.training
        self.eval()
        for places, ids, mask in batches_by_length(encoded, batch_size, progress):
            logits = self(ids.to(self.device), mask.to(self.device))
            result[places] = self.config.probabilities(logits).cpu().numpy()
        self.train(training)
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


def batches_by_length(
    encoded: Sequence[Sequence[int]], batch_size: int, progress: bool = False
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Texts in batches of nearly equal length, the longest first: what does not fit into memory fails at once.

    Args:
        encoded: token ids of each text; those without one are left out.
        batch_size: texts at a time.
        progress: show a progress bar.

    Yields:
        The places of a batch's texts in `encoded`, and their ids and mask, as `pad` makes them.

    Raises:
        InvalidArgumentError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise InvalidArgumentError(f"batch_size is {batch_size}: give 1 or more")
    order = sorted((place for place, ids in enumerate(encoded) if ids), key=lambda place: -len(encoded[place]))
    with tqdm(total=len(order), unit="text", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            yield places, *pad([encoded[place] for place in places])
            bar.update(len(places))


# ---------------------------------------------------------------------------------------------------------------------
# The parts of a checkpoint


def read_classifier(
    folder: Path, kind: type[ToxicityClassifier] = ToxicityClassifier
) -> tuple[DetectorConfig, LoraConfig, dict[str, Tensor]]:
    """What `save_pretrained` of a classifier with an adapter has written; to be called within `refusing`."""
    return kind.read_config(folder), *read_adapter(folder)


def load_base(
    config: DetectorConfig, dtype: torch.dtype, fingerprints: Sequence[str | None] = ()
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    """The backbone of a classifier with a new head, its tokenizer, and the modules that the adapter is to bring.

    Args:
        config: of the classifier.
        dtype: of the weights that are not quantised.
        fingerprints: of the backbone, by further classifiers on it.

    Raises:
        CheckpointError: nothing usable is there, or its weights are not those that the classifier was trained on.
    """
    backbone = load_backbone(config.base_model, config.base_revision, len(config.labels), dtype, config.quantization)
    for recorded in dict.fromkeys([config.base_fingerprint, *fingerprints]):
        check_base(backbone.body, recorded, config.base_model, "a classifier", backbone.of_files)
    return backbone.model, backbone.tokenizer, backbone.fresh


def check_own(model: PeftModel, fresh: Sequence[str]) -> None:
    """Refuse an adapter that does not bring what its backbone has not: the head would be random.

    Raises:
        CheckpointError: a module is lacking.
    """
    inner = model.get_base_model()
    for name in fresh:
        parts = name.split(".")
        places = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        if not any(isinstance(inner.get_submodule(place), ModulesToSaveWrapper) for place in places):
            raise CheckpointError(f"{ADAPTER_FILE} has no {name!r} in modules_to_save: is it complete?")
