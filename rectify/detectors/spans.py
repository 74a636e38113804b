"""The span detector: a trunk, an adapter or none, and a head that says which characters of a text are toxic."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from rectify.adapters import add_adapter, load_adapter, save_adapter
from rectify.context import longest_input
from rectify.detectors.classifier import batches_by_length
from rectify.detectors.span_decoding import EncodedTexts, Span, encode_windows, spans_of, word_scores
from rectify.detectors.span_heads import HEADS, SegmentHead, TokenHead
from rectify.errors import CheckpointError, InvalidArgumentError
from rectify.hub import checkpoint_folder, current_fingerprint, model_place
from rectify.json_files import check_format_version
from rectify.pretrained import check_vocabulary, read_model, read_tokenizer, refusing, refusing_unusable
from rectify.quiet_peft import PeftModel, TaskType
from rectify.saved_config import read_config
from rectify.saved_weights import check_finite, fill
from rectify.weights_digest import check_base, weights_digest

__all__ = ["Span", "SpanConfig", "SpanDetector"]

CONFIG_FILE, HEAD_FILE, TRUNK_FOLDER = "span_config.json", "head.safetensors", "trunk"
FORMAT_VERSION = 1


@dataclass
class SpanConfig:
    """Everything about a span detector but its weights; saved as `span_config.json` beside them.

    Attributes:
        base_model: Hub id, folder or bundled name of the trunk, whose tokenizer is used.
        base_revision: revision of `base_model` on the Hub.
        base_fingerprint: digest of the weights of `base_model`, where an adapter of them was trained, see
            `weights_digest`; `None` to take any.
        head: `"token"`, plain token classification, or `"segment"`, Segment-CNN.
        adapter: only an adapter was trained, and the trunk is still at `base_model`; else it is saved with the head.
        max_length: tokens of a window, special ones included.
        overlap: tokens that neighbouring windows of a longer text share.
        threshold: probability from which on a word, by the mean of its tokens, is toxic.
        training: free-form record of how the weights came to be.
        format_version: of the folder's files.
    """

    base_model: str
    base_revision: str | None = None
    head: Literal["token", "segment"] = "token"
    adapter: bool = False
    max_length: int = 256
    overlap: int = 64
    threshold: float = 0.5
    base_fingerprint: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise InvalidArgumentError(f"head is {self.head!r}: give one of {', '.join(HEADS)}")
        if self.max_length < 1 or self.overlap < 0:
            raise InvalidArgumentError(
                f"max_length is {self.max_length}, overlap {self.overlap}: give 1 or more, and 0 or more"
            )
        _check_threshold(self.threshold)
        check_format_version(self.format_version, FORMAT_VERSION)


class SpanDetector(nn.Module):
    """Finds the toxic spans of texts, with any encoder or causal trunk of the Hugging Face form.

    Make one with `from_backbone` or `from_pretrained`. The state of a token in a causal trunk sees nothing of what
    follows it, not even the rest of its word; Segment-CNN then sees one token more.

    Example:
        >>> from rectify.detectors.spans import SpanDetector
        >>> detector = SpanDetector.from_pretrained("my-spans")
        >>> [spans] = detector.find(["Have a nice day, you idiot"])
        >>> spans
        [Span(start=21, end=26, score=0.98)]
    """

    def __init__(
        self, config: SpanConfig, trunk: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        super().__init__()
        self.config = config
        self.trunk = trunk
        self.tokenizer = tokenizer
        text = self.backbone.config.get_text_config()
        text.use_cache = False
        self.head: TokenHead | SegmentHead = HEADS[config.head](text.hidden_size)
        if not tokenizer.is_fast:
            raise InvalidArgumentError(
                f"the tokenizer of {config.base_model!r} does not say where tokens are: give a model with a fast one"
            )
        tokenizer.truncation_side = "right"
        longest = longest_input(text, tokenizer) or config.max_length
        least = tokenizer.num_special_tokens_to_add() + config.overlap + 1
        if not least <= config.max_length <= longest:
            raise InvalidArgumentError(
                f"max_length is {config.max_length} with overlap {config.overlap}: give a number from {least} to the "
                f"{longest} tokens that {config.base_model!r} was made for, or less overlap"
            )

    # -----------------------------------------------------------------------------------------------------------------
    # Making, saving, loading

    @classmethod
    def from_backbone(
        cls,
        name: str,
        *,
        revision: str | None = None,
        head: Literal["token", "segment"] = "token",
        max_length: int = 256,
        overlap: int = 64,
        lora_r: int = 0,
        lora_alpha: int = 16,
        lora_dropout: float = 0.0,
        target_modules: str | Sequence[str] = "all-linear",
    ) -> SpanDetector:
        """A new detector in float32; head and adapter are drawn from torch's random generator.

        Args:
            name: folder, `"pocket"` or Hub id of a model and its tokenizer, a fast one.
            revision: of a Hub id.
            head, max_length, overlap: see `SpanConfig`.
            lora_r: rank of the adapter on a frozen trunk; 0 for a trunk that is trained and saved whole.
            lora_alpha, lora_dropout, target_modules: see `add_adapter`.

        Raises:
            CheckpointError: nothing usable is there.
            InvalidArgumentError: a setting is out of range, the tokenizer is slow, or the trunk an encoder-decoder.
        """
        config = SpanConfig(name, revision, head, bool(lora_r), max_length, overlap)
        trunk: PreTrainedModel | PeftModel
        place = model_place(name, revision)
        trunk, tokenizer = _load_trunk(place, revision, torch.float32, name)
        if lora_r:
            config.base_fingerprint = weights_digest(trunk)
            trunk = add_adapter(
                trunk,
                name,
                task_type=TaskType.FEATURE_EXTRACTION,
                lora_r=lora_r,
                lora_alpha=lora_alpha,
                lora_dropout=lora_dropout,
                target_modules=target_modules,
            )
        return cls(config, trunk, tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> SpanDetector:
        """Load a detector in evaluation mode, its adapter folded into the trunk.

        Args:
            name: a folder written by `save_pretrained`, or a Hub id.
            revision: of a Hub id.
            device: where to put it.
            dtype: of the weights; scores are float32 whatever it is.

        Raises:
            CheckpointError: nothing usable is there.
        """
        folder = checkpoint_folder(name, revision)
        with refusing(name):
            config = read_config(SpanConfig, folder / CONFIG_FILE, "give a folder written by save_pretrained")
            trunk: PreTrainedModel | PeftModel
            if config.adapter:
                place = model_place(config.base_model, config.base_revision)
                trunk, tokenizer = _load_trunk(place, config.base_revision, dtype, config.base_model)
                at = config.base_model, config.base_revision
                check_base(trunk, config.base_fingerprint, at[0], repr(str(name)), lambda: current_fingerprint(*at))
                trunk = load_adapter(trunk, folder)
                trunk.merge_adapter()
                check_finite(trunk, "the adapted trunk")
            else:
                place = folder / TRUNK_FOLDER
                if not place.is_dir():
                    raise CheckpointError(f"it holds no {TRUNK_FOLDER}: is it complete?")
                trunk, tokenizer = _load_trunk(place, None, dtype, TRUNK_FOLDER, exact=True)
            detector = cls(config, trunk, tokenizer)
            fill(detector.head, folder / HEAD_FILE)
        return detector.requires_grad_(False).to(device=device, dtype=dtype).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write configuration, head, and the adapter or else the trunk with its tokenizer to a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.trunk, PeftModel):
            save_adapter(self.trunk, folder, self.config.base_model)
        else:
            self.trunk.save_pretrained(str(folder / TRUNK_FOLDER))
            cast(Any, self.tokenizer).backend_tokenizer.no_truncation()  # else it keeps that of its last call
            self.tokenizer.save_pretrained(str(folder / TRUNK_FOLDER))
        save_file({name: weight.contiguous() for name, weight in self.head.state_dict().items()}, folder / HEAD_FILE)
        text = json.dumps(asdict(self.config), indent=2, ensure_ascii=False)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")

    # -----------------------------------------------------------------------------------------------------------------
    # Scores and spans

    @property
    def backbone(self) -> PreTrainedModel:
        """The trunk without its adapter's wrapping."""
        trunk = self.trunk
        return cast(PreTrainedModel, trunk.get_base_model() if isinstance(trunk, PeftModel) else trunk)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """Texts as overlapping windows of at most `max_length` tokens.

        Raises:
            InvalidArgumentError: a text is not a string, or no valid Unicode.
        """
        return encode_windows(self.tokenizer, texts, self.config.max_length, self.config.overlap)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, own: Tensor) -> Tensor:
        """The logits of what the head judges.

        Args:
            input_ids: `[B, T]` int64.
            attention_mask: `[B, T]`, 0 at padding, which is on the right.
            own: `[B, T]` bool, the text's own tokens: neither padding nor special.

        Returns:
            `[B, T]` float32, or `[B, T + 1]` of segments; `head.token_logits` makes `[B, T]` of either.
        """
        hidden = self.trunk(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(hidden, own)

    @torch.inference_mode()
    def token_scores(self, encoded: EncodedTexts, batch_size: int = 32, progress: bool = False) -> list[np.ndarray]:
        """How probably each token is toxic.

        Args:
            encoded: what `encode` gave.
            batch_size: windows at a time, of nearly equal length.
            progress: show a progress bar.

        Returns:
            For each text `[n]` float32 in [0, 1], in the order of its tokens.

        Raises:
            InvalidArgumentError: `batch_size` is below 1.
        """
        windows = encoded.windows
        rows: list[np.ndarray] = [np.empty(0)] * len(windows)
        training = self.training
        self.eval()
        for places, ids, mask in batches_by_length([window.input_ids for window in windows], batch_size, progress):
            batch = [windows[place] for place in places]
            own = pad_flags([window.own for window in batch])
            logits = self(ids.to(self.device), mask.to(self.device), own.to(self.device))
            scores = self.head.token_logits(logits).sigmoid().cpu().numpy()
            for row, place, window in zip(scores, places, batch, strict=True):
                rows[place] = row[window.begin : window.begin + window.count]
        self.train(training)
        return encoded.merged(rows)

    def find(
        self, texts: Sequence[str], threshold: float | None = None, batch_size: int = 32, progress: bool = False
    ) -> list[list[Span]]:
        """The toxic spans of texts.

        Args:
            texts: of any length; casing, blanks and Unicode are those of the text as it is.
            threshold: probability from which on a word is toxic; `None` for the one that was tuned.
            batch_size: windows of text at a time.
            progress: show a progress bar.

        Returns:
            For each text its spans, sorted and without overlaps; none where it has no token.

        Raises:
            InvalidArgumentError: an argument is out of range, or a text is not a string, or no valid Unicode.
        """
        threshold = self.config.threshold if threshold is None else _check_threshold(threshold)
        encoded = self.encode(texts)
        scores = self.token_scores(encoded, batch_size, progress)
        return [
            spans_of(text, offsets, word_scores(text, offsets, found), threshold)
            for text, offsets, found in zip(texts, encoded.offsets, scores, strict=True)
        ]


def pad_flags(rows: Sequence[np.ndarray]) -> Tensor:
    """Rows of `[T]` bool as one tensor, `[B, T]` bool, False at the padding on the right."""
    return nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True)


def _check_threshold(threshold: float) -> float:
    if not 0 <= threshold <= 1:
        raise InvalidArgumentError(f"threshold is {threshold}: give a probability from 0 to 1")
    return threshold


def _load_trunk(
    place: str | Path, revision: str | None, dtype: torch.dtype, name: str, exact: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A trunk without what pools or predicts, and its tokenizer."""
    with refusing_unusable(f"backbone {name!r}", "give a model of text with its tokenizer"):
        tokenizer = read_tokenizer(place, revision)
        trunk, _ = read_model(AutoModel, place, revision, dtype=dtype, exact=exact)
        check_vocabulary(trunk, tokenizer)
    if trunk.config.is_encoder_decoder:
        raise InvalidArgumentError(f"backbone {name!r} is an encoder-decoder: give a causal model or an encoder")
    if getattr(trunk, "pooler", None) is not None:
        cast(Any, trunk).pooler = None  # it is of no use to tokens, and would be trained
    return cast(PreTrainedModel, trunk), tokenizer
