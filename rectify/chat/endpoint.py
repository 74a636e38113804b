"""A chat model behind an endpoint of OpenAI's chat completions, which most servers of language models speak too."""

from __future__ import annotations

import math
import os
import threading
from typing import Any
from urllib.parse import urlsplit

from requests.adapters import BaseAdapter

from rectify.chat.model import ChatSampling, Message, check_messages
from rectify.errors import ChatError, ReplyError
from rectify.scoring.http_calls import PASSING_STATUSES, Calls, Key, warn_if_shown, whole_address
from rectify.scoring.rate_limit import Clock
from rectify.scoring.scores import Reason

KEY_VARIABLE = "CHAT_API_KEY"
_PATH = "/chat/completions"


class EndpointChat:
    """A `ChatModel` that asks a server; safe with threads.

    What may pass (429, 5xx, timeouts, broken connections, answers that are cut short) is tried again, `retries` times
    and for `time_limit` seconds at most; see `rectify.scoring.http_calls.Calls`. The seed is sent along; whether equal
    seeds give equal replies is up to the server. The key goes in a header: no address, hence no log and no error, holds
    it.

    Args:
        endpoint: base address, as "https://api.openai.com/v1", or the whole one, which ends in "/chat/completions".
        model: what the server is to reply with.
        key: by default the environment's `CHAT_API_KEY`; may be empty.
        sampling: how replies are sampled.
        rate: calls a second; infinity for no limit.
        workers: conversations at the same time.
        timeout, retries, backoff, max_retry_after, time_limit, adapter, clock: see `Calls`.

    Raises:
        InvalidArgumentError: an argument is out of range or malformed.

    Example:
        >>> from rectify.chat import EndpointChat
        >>> chat = EndpointChat("http://127.0.0.1:8000/v1", "my-model")
        >>> chat.reply([{"role": "user", "content": "Is 'have a nice day' rude? Answer yes or no."}], seed=0)
    """

    def __init__(
        self,
        endpoint: str,
        model: str,
        *,
        key: str | None = None,
        sampling: ChatSampling | None = None,
        rate: float = math.inf,
        workers: int = 4,
        timeout: float = 120.0,
        retries: int = 6,
        backoff: float = 1.0,
        max_retry_after: float = 60.0,
        time_limit: float = 600.0,
        adapter: BaseAdapter | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.model, self.sampling, self.workers = model, sampling or ChatSampling(), workers
        url = whole_address(endpoint, _PATH, _PATH, f"the key goes into {KEY_VARIABLE}")
        secret = Key(os.environ.get(KEY_VARIABLE, "") if key is None else key, "Authorization", "Bearer ")
        warn_if_shown(url, secret)
        self.name = f"endpoint:{url.removesuffix(_PATH)},model={model},{self.sampling}"
        self._stop = threading.Event()
        self._calls = Calls(
            url,
            secret,
            gone=self._gone,
            rate=rate,
            workers=workers,
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            max_retry_after=max_retry_after,
            time_limit=time_limit,
            adapter=adapter,
            clock=clock,
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, rate={self._calls.rate:g}, workers={self.workers})"

    def __enter__(self) -> EndpointChat:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections, and end all waiting for another try."""
        self._stop.set()
        self._calls.close()

    def reply(self, messages: list[Message], seed: int) -> str:
        """The reply to a conversation; see `ChatModel.reply`."""
        check_messages(messages)
        body = {
            "model": self.model,
            "messages": messages,
            "max_tokens": self.sampling.max_new_tokens,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "seed": seed,
        }
        replies: list[str] = []
        said = ""

        def judge(status: int, answer: Any) -> Reason | None:
            nonlocal said
            if status != 200:
                message = _message(answer)
                host = urlsplit(self._calls.url).netloc
                said = f"{host} answers {status}, {self._calls.key.hide_in(message or '')[:400]!r}"
                return self._judge_error(status, message is not None, said)
            try:
                content = answer["choices"][0]["message"]["content"]
            except (TypeError, LookupError):
                return Reason.BAD_RESPONSE
            if not isinstance(content, str):  # refused, or a call of a tool
                return Reason.INVALID_REQUEST
            try:
                content.encode()
            except UnicodeEncodeError:  # half of a surrogate pair, where a server cuts between tokens
                return Reason.BAD_RESPONSE
            replies.append(content.strip())
            return None

        reason = self._calls.post(body, judge, self._stop)
        if reason is not None:
            raise ReplyError(reason, said)
        return replies[-1]

    def _judge_error(self, status: int, own: bool, said: str) -> Reason:
        """What an error comes to; `own`: whether it has the form of the service's errors."""
        if status in PASSING_STATUSES:
            named = {408: Reason.TIMEOUT, 429: Reason.RATE_LIMIT_EXCEEDED}
            return named.get(status, Reason.SERVER_ERROR)
        if status in (404, 405, 410) or status < 400:
            raise ChatError(
                f"endpoint {self._calls.url!r} has no chat completions of the model {self.model!r} ({said}): give the "
                "base address, which often ends in /v1, and a model that it has"
            )
        if not own:  # of a proxy, a firewall or another service
            return Reason.BLOCKED
        if status in (401, 403):
            state = "refused" if self._calls.key else "missing"
            raise ChatError(f"key is {state} ({said}): give one that this server accepts in {KEY_VARIABLE}")
        if status not in (400, 413, 422):
            raise ChatError(f"endpoint {self._calls.url!r} refuses ({said}): mend what it says, or give another")
        return Reason.COMMENT_TOO_LONG if status == 413 else Reason.INVALID_REQUEST

    def _gone(self, problem: str) -> ChatError:
        return ChatError(
            f"endpoint {self._calls.url!r} is out of reach ({problem}): mend that, or give another; replies are kept, "
            "and the same command goes on"
        )


def _message(answer: Any) -> str | None:
    """The message of an error in one of the forms of servers of chat completions; `None` for another form."""
    if not isinstance(answer, dict):
        return None
    error = answer.get("error")
    if answer.get("object") == "error":
        error = answer
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else None
