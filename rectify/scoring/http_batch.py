"""Google's batch format: many requests in one, as parts of a `multipart/mixed` body.

`google-api-python-client` sends it for `new_batch_http_request()`, which the scripts of RealToxicityPrompts, DExperts
and others use.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from email import message_from_bytes
from http import HTTPStatus
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

from rectify.errors import WireError

MAX_CALLS = 1000


@dataclass(frozen=True)
class InnerCall:
    """A request of a batch.

    Attributes:
        content_id: given back with the answer.
        path: of the method that is called.
        key: the API key, from the query or a header.
        body: as it came.
    """

    content_id: str
    path: str
    key: str = field(repr=False)
    body: bytes = field(repr=False)


def parse_batch(content_type: str, body: bytes) -> list[InnerCall]:
    """The requests of a batch.

    Raises:
        WireError: the body is no such batch, or holds too many requests.
    """
    try:
        # of the standard library's policies the old one is by far the quickest
        message = message_from_bytes(f"Content-Type: {content_type}\r\n\r\n".encode("latin-1") + body)
        parts = message.get_payload() if message.get_content_type() == "multipart/mixed" else []
        calls = [_call(str(part["Content-ID"] or ""), part.get_payload(decode=True)) for part in cast(Any, parts)]
    except (ValueError, LookupError, AttributeError, TypeError):  # of the parser, which expects mail
        calls = []
    if not calls:
        raise WireError("Failed to parse batch request: give multipart/mixed parts of application/http, each a POST.")
    if len(calls) > MAX_CALLS:
        raise WireError(f"The number of calls in the batch ({len(calls)}) exceeds the limit ({MAX_CALLS}).")
    return calls


def _call(content_id: str, payload: object) -> InnerCall:
    if not isinstance(payload, bytes):
        raise ValueError("a part of several parts")
    head, _, body = payload.replace(b"\r\n", b"\n").lstrip(b"\n").partition(b"\n\n")
    first, *lines = head.decode("latin-1").split("\n")
    method, target, _ = first.split(" ", 2)
    if method != "POST":
        raise ValueError(f"a part with the method {method}")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    parts = urlsplit(target)
    key = headers.get("x-goog-api-key") or parse_qs(parts.query).get("key", [""])[0]
    content_id = " ".join(content_id.split())  # it comes folded where it is long
    return InnerCall(content_id, parts.path, key, body)


def format_batch(calls: Sequence[InnerCall], answers: Sequence[tuple[int, bytes]]) -> tuple[str, bytes]:
    """The answer to a batch.

    Args:
        calls: the requests.
        answers: HTTP status and JSON body of each.

    Returns:
        The content type, and the body.
    """
    boundary = f"batch_{secrets.token_hex(16)}"
    parts = []
    for call, (status, body) in zip(calls, answers, strict=True):
        content_id = call.content_id.encode("latin-1", "replace").decode("latin-1")
        response_id = f"<response-{content_id[1:]}" if content_id.startswith("<") else f"response-{content_id}"
        head = [
            f"--{boundary}",
            "Content-Type: application/http",
            *([f"Content-ID: {response_id}"] if content_id else []),
            "",
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
            "Content-Type: application/json; charset=UTF-8",
            f"Content-Length: {len(body)}",
            "",
            "",
        ]
        parts.append("\r\n".join(head).encode("latin-1") + body + b"\r\n")
    return f"multipart/mixed; boundary={boundary}", b"".join(parts) + f"--{boundary}--\r\n".encode()
