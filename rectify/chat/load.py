"""Chat models by name, as the commands take them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from rectify.chat.endpoint import EndpointChat
from rectify.chat.local import LocalChat
from rectify.chat.model import ChatSampling
from rectify.errors import InvalidArgumentError
from rectify.spec_pairs import read_pairs

CHATS = {
    "local:ID": "a chat model of the transformers library, folder or Hub id",
    "endpoint:URL,model=NAME": "a server of OpenAI's chat completions; its key comes from the variable CHAT_API_KEY",
}
"""What there is, and what each is."""

_SAMPLING: dict[str, Callable[[str], Any]] = {"max_new_tokens": int, "temperature": float, "top_p": float}
_LOCAL: dict[str, Callable[[str], Any]] = {"device": str}
_ENDPOINT: dict[str, Callable[[str], Any]] = {
    **{"model": str, "rate": float, "workers": int},
    **{"timeout": float, "retries": int, "backoff": float, "time_limit": float},
}


def make_chat(spec: str) -> LocalChat | EndpointChat:
    """The chat model of `local:ID[,key=value…]` or `endpoint:URL,model=NAME[,key=value…]`.

    Keys of both are `max_new_tokens`, `temperature` and `top_p`; of the first `device`; of the second `rate`,
    `workers`, `timeout`, `retries`, `backoff` and `time_limit`, as in `EndpointChat`.

    Raises:
        InvalidArgumentError: there is no such model or key, or a value is out of range.
        CheckpointError: the local model cannot be used.

    Example:
        >>> from rectify.chat import make_chat
        >>> chat = make_chat("endpoint:http://127.0.0.1:8000/v1,model=my-model,rate=2,temperature=0")
    """
    title, *pairs = spec.split(",")
    kind, _, place = title.partition(":")
    forms = [form.partition(":")[0] for form in CHATS]
    if kind not in forms or not place:
        raise InvalidArgumentError(f"chat model is {kind!r}: give one of {' or '.join(CHATS)}")
    # the rest is not repeated: somebody may have put a key there
    given = read_pairs(pairs, _SAMPLING | (_LOCAL if kind == "local" else _ENDPOINT), f"chat model {kind!r}")
    chosen = {field.name: given.pop(field.name) for field in fields(ChatSampling) if field.name in given}
    sampling = ChatSampling(**chosen)
    if kind == "local":
        return LocalChat(place, sampling=sampling, **given)
    if "model" not in given:
        raise InvalidArgumentError("chat model 'endpoint' lacks the model: give endpoint:URL,model=NAME")
    return EndpointChat(place, given.pop("model"), sampling=sampling, **given)
