"""Replies that are paid for once."""

from __future__ import annotations

import hashlib
import json

from rectify.chat.model import ChatModel, Message
from rectify.sqlite_file import SqliteFile


class ReplyCache(SqliteFile):
    """A SQLite file of replies, safe with several threads and processes.

    The key is the SHA-256 of the model's name, the conversation and the seed. Conversations and the keys of services
    are not kept, nor that there was no reply. What `put` was given survives the end of the process at any moment.

    Args:
        path: the file; it and its folder are made.

    Raises:
        InvalidArgumentError: the path is a folder.
        CacheError: the file is broken, something else, or cannot be written; it is left as it is.

    Example:
        >>> from rectify.chat import CachedChat, ReplyCache, make_chat
        >>> with ReplyCache("replies.sqlite") as cache:
        ...     chat = CachedChat(make_chat("endpoint:http://127.0.0.1:8000/v1,model=my-model"), cache)
    """

    application_id = 0x72656368
    tables = "CREATE TABLE IF NOT EXISTS replies (key BLOB PRIMARY KEY, reply TEXT NOT NULL) WITHOUT ROWID"

    def __len__(self) -> int:
        """How many replies it holds."""
        with self._lock, self._errors():
            return self._connection.execute("SELECT count(*) FROM replies").fetchone()[0]

    def get(self, name: str, messages: list[Message], seed: int) -> str | None:
        """The reply of a model, if it is known.

        Raises:
            CacheError: the file cannot be read.
        """
        with self._lock, self._errors():
            row = self._connection.execute(
                "SELECT reply FROM replies WHERE key = ?", [_key(name, messages, seed)]
            ).fetchone()
        return None if row is None else row[0]

    def put(self, name: str, messages: list[Message], seed: int, reply: str) -> None:
        """Keep a reply; one that is kept already stays.

        Raises:
            CacheError: the file cannot be written.
        """
        with self._lock, self._errors(), self._transaction(self._connection):
            self._connection.execute(
                "INSERT INTO replies (key, reply) VALUES (?, ?) ON CONFLICT DO NOTHING",
                [_key(name, messages, seed), reply],
            )


class CachedChat:
    """A chat model that asks a cache first.

    Args:
        chat: what replies where the cache knows nothing.
        cache: where replies are looked up and kept.

    Attributes:
        reused: how many replies were found in the cache.
    """

    def __init__(self, chat: ChatModel, cache: ReplyCache) -> None:
        self.chat, self.cache = chat, cache
        self.name = chat.name
        self.workers: int = getattr(chat, "workers", 1)
        self.reused = 0

    def close(self) -> None:
        """Close what the chat model has open; the cache stays."""
        if hasattr(self.chat, "close"):
            self.chat.close()

    def reply(self, messages: list[Message], seed: int) -> str:
        """The reply to a conversation; see `ChatModel.reply`."""
        known = self.cache.get(self.name, messages, seed)
        if known is not None:
            self.reused += 1
            return known
        reply = self.chat.reply(messages, seed)
        self.cache.put(self.name, messages, seed, reply)
        return reply


def _key(name: str, messages: list[Message], seed: int) -> bytes:
    return hashlib.sha256(json.dumps([name, messages, seed], sort_keys=True).encode()).digest()
