"""A stand-in for an endpoint of chat completions, for tests without a network: replies and faults at will."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from rectify.chat.model import Message
from rectify.scoring.stub import Faults, StubReply, json_reply, pseudo_score, reply_with


def _made_up(messages: list[Message]) -> str:
    return f"Reply {pseudo_score(messages[-1]['content'], 'reply'):.6f}."


class ChatStub:
    """Answers the requests of `EndpointChat`; behind `rectify.scoring.stub.StubServer` or `StubAdapter`.

    Args:
        reply: from a conversation to its reply; made up, and always the same, by default.
        faults: which calls go wrong, and how, by the last message.
        key: the one that is accepted; `None` for any or none.

    Attributes:
        calls: how many calls came with each last message.
        requests: the decoded bodies, as they came.

    Example:
        >>> from rectify.chat import EndpointChat
        >>> from rectify.chat.stub import ChatStub
        >>> from rectify.scoring.stub import StubServer
        >>> with StubServer(ChatStub(lambda messages: "Yes.")) as server:
        ...     EndpointChat(server.url, "any").reply([{"role": "user", "content": "Well?"}], seed=0)
        'Yes.'
    """

    def __init__(
        self,
        reply: Callable[[list[Message]], str] = _made_up,
        faults: Faults | None = None,
        *,
        key: str | None = None,
    ) -> None:
        self.reply, self.faults, self.key = reply, faults, key
        self.calls: Counter[str] = Counter()
        self.requests: list[Any] = []
        self._lock = threading.Lock()

    def answer(self, target: str, headers: Mapping[str, str], body: bytes) -> StubReply:
        """Answer a POST; `headers` are looked up as `Authorization`."""
        if not target.endswith("/chat/completions"):
            return _error(404, f"Unknown request URL: POST {target}")
        if self.key is not None and headers.get("Authorization") != f"Bearer {self.key}":
            return _error(401, f"Incorrect API key provided: {headers.get('Authorization', '')}")
        request = json.loads(body)
        messages = request["messages"]
        asked = messages[-1]["content"]
        with self._lock:
            attempt = self.calls[asked]
            self.calls[asked] += 1
            self.requests.append(request)
        fault = self.faults(asked, attempt) if self.faults else None
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": self.reply(messages)},
        }
        answer = {"object": "chat.completion", "model": request["model"], "choices": [choice]}
        return reply_with(fault, answer)


def _error(status: int, message: str) -> StubReply:
    return json_reply(status, {"error": {"message": message, "type": "invalid_request_error"}})
