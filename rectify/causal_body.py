"""The body of a causal language model: what turns token ids into the states that its output embedding reads."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers import MODEL_MAPPING, PreTrainedModel

from rectify.errors import InvalidArgumentError
from rectify.quiet_peft import PeftMixedModel, PeftModel


def causal_body(model: nn.Module, name: str = "model") -> PreTrainedModel:
    """The body of a decoder-only model, without its output embedding.

    A `PeftModel` and a compiled model are looked through, so that the layers of an adapter stay in the body. That of a
    vision-language model, which reads text alone as well, is the whole of it.

    Args:
        model: a causal model with its output embedding or another head, or a body itself.
        name: what messages call it.

    Returns:
        The body, the same object at every call, with input embeddings and a `hidden_size`.

    Raises:
        InvalidArgumentError: the model has no such body, for a reason that the message names.
    """
    whole = _unwrapped(model, name)
    kind = type(whole).__name__
    if not isinstance(whole, PreTrainedModel):
        raise InvalidArgumentError(f"{name} is a {kind}: give a causal model of transformers")
    # a body may carry the decoder's configuration, and AutoModel makes the whole of it all the same
    both = all(isinstance(getattr(whole, part, None), nn.Module) for part in ("encoder", "decoder"))
    if both or getattr(whole.config, "is_encoder_decoder", False):
        raise InvalidArgumentError(f"{name} is a {kind}, an encoder-decoder: give a decoder-only causal model")
    body: nn.Module | None = whole.base_model
    if body is whole and whole.get_output_embeddings() is not None:  # the prefix of some classes names no module
        body = _only_child(whole)
    elif not _has_embeddings(
        cast(nn.Module, body)
    ):  # of encoder-decoders' decoders alone it is a wrapper that nothing calls
        body = whole.get_decoder()
    if not isinstance(body, PreTrainedModel) or not _has_embeddings(body):
        raise InvalidArgumentError(f"{name} is a {kind}, in which no body with embeddings is found: give another model")
    if getattr(body.config, "is_decoder", True) is False and hasattr(body.config, "add_cross_attention"):
        raise InvalidArgumentError(
            f"{name} is a {kind} with is_decoder=False, whose states read what follows: load it with is_decoder=True"
        )
    try:
        width = body.config.get_text_config().hidden_size
    except (AttributeError, ValueError):
        width = None
    if not isinstance(width, int):
        raise InvalidArgumentError(f"{name} is a {kind}, whose configuration has no hidden_size: give another model")
    return body


def loads_alone(body: PreTrainedModel) -> bool:
    """Whether `AutoModel` makes of a body's configuration what the body is; not so of an encoder-decoder's decoder."""
    kinds: Any = MODEL_MAPPING.get(type(body.config), None)
    return kinds is None or isinstance(body, kinds)


def is_body_of(body: object, model: nn.Module) -> bool:
    """Whether an object is the body of a model, which may be one that has none."""
    try:
        return body is causal_body(model)
    except InvalidArgumentError:
        return False


def _unwrapped(model: nn.Module, name: str) -> nn.Module:
    """A model without what torch and peft put around it."""
    while True:
        if isinstance(model, PeftModel | PeftMixedModel):
            if any(config.is_prompt_learning for config in model.peft_config.values()):
                raise InvalidArgumentError(
                    f"{name} has a {_kind(model)} adapter, which is no part of its layers: give one whose adapter is"
                )
            model = cast(nn.Module, model.base_model.model)
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # of torch.compile
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def _kind(model: PeftModel | PeftMixedModel) -> str:
    return next(
        str(getattr(config.peft_type, "value", config.peft_type))
        for config in model.peft_config.values()
        if config.is_prompt_learning
    )


def _only_child(model: PreTrainedModel) -> nn.Module | None:
    bodies = [child for child in model.children() if isinstance(child, PreTrainedModel) and _has_embeddings(child)]
    return bodies[0] if len(bodies) == 1 else None


def _has_embeddings(body: nn.Module) -> bool:
    try:
        embeddings = cast(PreTrainedModel, body).get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return False
    return isinstance(getattr(embeddings, "weight", None), nn.Parameter)
