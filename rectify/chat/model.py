"""What every chat model takes and gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rectify.errors import InvalidArgumentError

Message = dict[str, str]
"""`{"role": "system" | "user" | "assistant", "content": "…"}`."""

_ROLES = ("system", "user", "assistant")


class ChatModel(Protocol):
    """Anything that replies.

    Attributes:
        name: all that a reply depends on beside the conversation and the seed, as far as it can be told.
    """

    name: str

    def reply(self, messages: list[Message], seed: int) -> str:
        """The reply to a conversation, without surrounding space.

        Args:
            messages: the conversation, whose last message is the user's.
            seed: of sampling; equal seeds give equal replies, as far as the model allows.

        Raises:
            InvalidArgumentError: this is no conversation.
            ReplyError: this one gets no reply.
            ChatError: none would.
        """


@dataclass(frozen=True, kw_only=True)
class ChatSampling:
    """How replies are sampled; the defaults are those of the teacher that wrote ToxiCN's published rationales.

    Attributes:
        max_new_tokens: of a reply.
        temperature: 0 for the likeliest tokens.
        top_p: share of the probability that is sampled from, above 0 and up to 1.
    """

    max_new_tokens: int = 256
    temperature: float = 0.95
    top_p: float = 0.7

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InvalidArgumentError(f"max_new_tokens is {self.max_new_tokens}: give 1 or more")
        if not 0 <= self.temperature < float("inf"):
            raise InvalidArgumentError(f"temperature is {self.temperature}: give 0 or more")
        if not 0 < self.top_p <= 1:
            raise InvalidArgumentError(f"top_p is {self.top_p}: give a number above 0, up to 1")

    def __str__(self) -> str:
        return f"max_new_tokens={self.max_new_tokens},temperature={self.temperature:g},top_p={self.top_p:g}"


def check_messages(messages: Sequence[Message]) -> None:
    """Refuse what is no conversation.

    Raises:
        InvalidArgumentError: it is none.
    """
    for index, message in enumerate(messages):
        if set(message) != {"role", "content"} or message["role"] not in _ROLES:
            raise InvalidArgumentError(
                f"messages[{index}] is {message!r}: give a role, one of {', '.join(_ROLES)}, and a content"
            )
    if not messages or messages[-1]["role"] != "user":
        raise InvalidArgumentError("messages do not end with the user's: give a conversation to reply to")
