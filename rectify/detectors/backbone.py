"""The backbone of a classifier: loaded with a new head or its own, in 4 bits if wanted, and known by its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rectify.errors import CheckpointError, InvalidArgumentError
from rectify.extras import need_extra
from rectify.hub import model_place, weights_fingerprint
from rectify.pretrained import GIVEN, read_model, read_model_config, read_tokenizer, refusing_unusable
from rectify.quiet import quiet_loading
from rectify.weights_digest import weights_digest

Quantization = Literal["none", "nf4"]


class Backbone(NamedTuple):
    """A backbone that was loaded.

    Attributes:
        model: a sequence classifier of transformers with a new head.
        tokenizer: its tokenizer.
        fresh: the modules whose weights no checkpoint holds, the head first.
        place: see `hub.model_place`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fresh: list[str]
    place: str | Path

    @property
    def fingerprint(self) -> str | None:
        """The `weights_digest` of the body; of one in 4 bits, which tells less, `hub.weights_fingerprint`."""
        whole = None if self.is_quantized else weights_digest(self.body)
        return whole or self.of_files()

    @property
    def body(self) -> PreTrainedModel:
        """The model without its head."""
        return cast(PreTrainedModel, self.model.base_model)

    @property
    def is_quantized(self) -> bool:
        """Whether its layers are in 4 bits."""
        return getattr(self.model.config, "quantization_config", None) is not None

    def of_files(self) -> str | None:
        """Its `hub.weights_fingerprint`."""
        return weights_fingerprint(self.place, self.model.config)


def load_backbone(
    name: str,
    revision: str | None,
    num_labels: int,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization = "none",
    with_head: bool = False,
    exact: bool = False,
) -> Backbone:
    """Load a causal model or an encoder with a head, and its tokenizer.

    Args:
        name: folder, bundled name or Hub id.
        revision: of a Hub id.
        num_labels: outputs of the head.
        dtype: of the weights that are not quantised.
        quantization: `"nf4"` for the linear layers in 4 bits: NormalFloat4 with double quantisation (Dettmers et al.,
            QLoRA, NeurIPS 2023, arXiv 2305.14314). Head and embeddings stay in `dtype`.
        with_head: take the checkpoint's own head, and not a new one.
        exact: see `pretrained.read_model`.

    Raises:
        CheckpointError: nothing usable is there, or it lacks the head, or another weight where all are needed.
        InvalidArgumentError: it is an encoder-decoder.
        MissingExtraError: bitsandbytes is needed and not installed.
    """
    place = model_place(name, revision)
    given: dict[str, Any] = {}
    if quantization == "nf4":
        need_extra("quant", "quantization is 'nf4'")
    with refusing_unusable(f"backbone {name!r}", "give a model of text with its tokenizer"):
        tokenizer = read_tokenizer(place, revision)
        config = read_model_config(place, revision, num_labels=num_labels)
        if config.is_encoder_decoder:
            raise InvalidArgumentError(f"backbone {name!r} is an encoder-decoder: give a causal model or an encoder")
        if quantization == "nf4":
            given["quantization_config"] = _nf4(config)
        # the head of a classifier of more labels is no part of the backbone
        model, new = read_model(
            AutoModelForSequenceClassification,
            place,
            revision,
            config=config,
            dtype=dtype,
            new_head=not with_head,
            exact=exact,
            **given,
        )
        if with_head and new:
            raise CheckpointError(f"{name!r} lacks the weights {min(new)!r}: give a model that was trained to classify")
    _leave_unpacked(model)
    body = f"{model.base_model_prefix}."
    lacking = {key.rpartition(".")[0] for key in new if key.startswith(body)}
    return Backbone(model, tokenizer, _head(model) + sorted(lacking), place)


def _head(model: PreTrainedModel) -> list[str]:
    """The modules with weights beside the body."""
    body = model.base_model_prefix
    return [name for name, module in model.named_children() if name != body and any(True for _ in module.parameters())]


def _leave_unpacked(model: nn.Module) -> None:
    """Have evaluation leave 4-bit weights as they are.

    On CPUs with AVX512-BF16 a forward pass in evaluation mode packs them anew: every later backward pass through them
    gives gradients of zero, and layers whose outputs are no multiple of the block fail (both seen in bitsandbytes
    0.50.2).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _nf4(config: PreTrainedConfig) -> BitsAndBytesConfig:
    with torch.device("meta"), quiet_loading():
        head = _head(AutoModelForSequenceClassification.from_config(config, **GIVEN))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.accelerator.is_available() else torch.float32,
        # an encoder's pooler is trained with the head, where the checkpoint lacks it
        llm_int8_skip_modules=[*head, "pooler"],
    )
