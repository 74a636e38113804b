"""A chat model of the transformers library, here in this process."""

from __future__ import annotations

import threading
from typing import Any, cast

import torch
from jinja2 import TemplateError

from rectify.chat.model import ChatSampling, Message, check_messages
from rectify.context import context_length
from rectify.errors import CheckpointError, InvalidArgumentError, ReplyError
from rectify.hub import available_device, load_language_model
from rectify.sampling import Sampling
from rectify.scoring.scores import Reason
from rectify.trunk_states import input_device


class LocalChat:
    """A `ChatModel` that runs here; conversations are written as the tokenizer's chat template has it.

    Args:
        model: folder or Hub id of a causal language model whose tokenizer has a chat template.
        sampling: how replies are sampled.
        device: where it runs; `None` for an accelerator if there is one.

    Raises:
        CheckpointError: nothing usable is there, or it has no chat template.
        InvalidArgumentError: there is no such device.

    Example:
        >>> from rectify.chat import LocalChat
        >>> chat = LocalChat("Qwen/Qwen2.5-0.5B-Instruct")
        >>> chat.reply([{"role": "user", "content": "Is 'have a nice day' rude? Answer yes or no."}], seed=0)
    """

    workers = 1
    """Conversations at the same time."""

    def __init__(self, model: str, *, sampling: ChatSampling | None = None, device: str | None = None) -> None:
        self.sampling = sampling or ChatSampling()
        self.name = f"local:{model},{self.sampling}"
        self._model, self._tokenizer = load_language_model(model, device=available_device(device))
        if not self._tokenizer.chat_template:
            raise CheckpointError(f"model {model!r} has no chat template: give one that was made for conversations")
        # what the model's own generation_config says is not taken
        self._decoding = Sampling(
            do_sample=self.sampling.temperature > 0,
            temperature=self.sampling.temperature or None,
            top_p=self.sampling.top_p,
        ).plain_kwargs()
        self._context = context_length(self._model.config)
        self._lock = threading.Lock()

    @torch.inference_mode()
    def reply(self, messages: list[Message], seed: int) -> str:
        """The reply to a conversation; see `ChatModel.reply`."""
        check_messages(messages)
        try:
            written = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except TemplateError as error:  # such as a template without a place for a system message
            raise InvalidArgumentError(
                f"messages do not fit the model's chat template ({error}): give others, or another model"
            ) from error
        inputs = cast(Any, written).to(input_device(self._model))
        length = inputs["input_ids"].shape[1]
        if self._context is not None and length + self.sampling.max_new_tokens > self._context:
            raise ReplyError(Reason.COMMENT_TOO_LONG)
        device = input_device(self._model)
        devices = [device] if device.type != "cpu" else []
        # one at a time, as the random generator is that of the process
        with (
            self._lock,
            torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"),
        ):
            torch.manual_seed(seed)
            output = cast(Any, self._model).generate(
                **inputs,
                **self._decoding,
                max_new_tokens=self.sampling.max_new_tokens,
                pad_token_id=self._tokenizer.pad_token_id,
            )
        return cast(str, self._tokenizer.decode(output[0, length:], skip_special_tokens=True)).strip()
