"""Filling by a chat model, local or behind an OpenAI-compatible endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from rectify.builders.masking import MASK
from rectify.chat import ChatModel, Message
from rectify.errors import ReplyError

_INSTRUCTION = (
    f"Each message is a text in which offensive words were replaced by {MASK}. Answer with the same text, in which "
    f"each {MASK} is replaced by polite words that fit, or by nothing. Change no other word, explain nothing, and "
    "answer with the text alone."
)
_QUOTES = {'"': '"', "“": "”", "'": "'", "«": "»"}


class ChatFiller:
    """Asks a chat model to write each masked text out.

    Args:
        chat: the model; as many texts are asked for at the same time as it has `workers`.
        seed: of its sampling.
    """

    def __init__(self, chat: ChatModel, seed: int = 0) -> None:
        self.chat, self.seed = chat, seed
        self.name = f"chat:{chat.name},seed={seed}"

    def fill(self, masked: Sequence[str], attempt: int, originals: Sequence[str] | None = None) -> list[str | None]:
        """See `Filler.fill`; `None` where no answer comes, or an empty one, or one that has a mask in it still.

        Raises:
            ChatError: no text would get an answer.
        """

        def ask(text: str) -> str | None:
            try:
                return _text(self.chat.reply(_messages(text), self.seed + attempt), text)
            except ReplyError:
                return None

        with ThreadPoolExecutor(getattr(self.chat, "workers", 1)) as threads:
            return list(threads.map(ask, masked))


def _messages(masked: str) -> list[Message]:
    return [{"role": "system", "content": _INSTRUCTION}, {"role": "user", "content": masked}]


def _text(reply: str, masked: str) -> str | None:
    """The text of a reply, without quotation marks that the masked text has not."""
    text = reply.strip()
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and masked.strip()[:1] != text[0]:
        text = text[1:-1].strip()
    return text if text and MASK not in text else None
