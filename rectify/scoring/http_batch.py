"""Google's batch format: many requests in one, as parts of a `multipart/mixed` body.

`google-api-python-client` sends it for `new_batch_http_request()`, which the scripts of RealToxicityPrompts, DExperts
and others use. Only that format is read, in time that grows with the length of the body: no nested parts, and none
without an end.
"""

from __future__ import annotations

import binascii
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import parse_qs, urlsplit

from rectify.errors import WireError

MAX_CALLS = 1000
_MAX_HEAD = 2**16  # bytes of the headers of a part, where some clients' Content-ID holds the text, and of its request
_MAX_TARGET = 2**14
FIRST_BYTES = 2 * _MAX_HEAD
"""So many bytes of a batch have the whole head of its first request."""

_MAX_FIELDS = 100

_TYPE = re.compile(r"\s*+multipart/mixed\s*+(?:;(.*))?", re.IGNORECASE | re.DOTALL)
# the name of a parameter and its value, bare or quoted
_PARAMETER = re.compile(r'\s*+([\w-]++)\s*+=\s*+(?:"((?:[^"\\]|\\.)*+)"|([^\s;"]++))\s*+(?:;|\Z)')
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,199}[0-9A-Za-z'()+_,./:=?-]")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]++)[ \t]*+:[ \t]*+([^\x00-\x08\x0a-\x1f\x7f]*+)")
_ENCODINGS: dict[bytes, Callable[[bytes], bytes]] = {
    b"": bytes,
    b"7bit": bytes,
    b"8bit": bytes,
    b"binary": bytes,
    b"base64": binascii.a2b_base64,
    b"quoted-printable": binascii.a2b_qp,
}


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


def parse_batch(content_type: str, body: bytes | bytearray) -> list[InnerCall]:
    """The requests of a batch.

    Raises:
        WireError: the body is no such batch, or holds too many requests.
    """
    calls: list[InnerCall] = []
    try:
        for begin, end in _parts(_boundary(content_type), body):
            if len(calls) == MAX_CALLS:
                raise WireError(f"The number of calls in the batch exceeds the limit ({MAX_CALLS}).")
            calls.append(_call(bytes(body[begin:end])))
    except ValueError:  # its message holds what came
        calls = []
    if not calls:
        raise WireError("Failed to parse batch request: give multipart/mixed parts of application/http, each a POST.")
    return calls


def first_key(content_type: str, beginning: bytes | bytearray) -> str:
    """The API key of a batch's first request, of which the beginning has come; empty where there is none.

    Raises:
        WireError: this is no batch's beginning.
    """
    boundary = _boundary_or_refuse(content_type)
    # as if the batch ended here
    return parse_batch(content_type, bytes(beginning[:FIRST_BYTES]) + b"\n--" + boundary + b"--")[0].key


def key_of_query(query: str) -> str:
    """The parameter `key` of a query; empty where there is none, or too much else."""
    try:
        return parse_qs(query, max_num_fields=_MAX_FIELDS).get("key", [""])[0]
    except ValueError:
        return ""


# ---------------------------------------------------------------------------------------------------------------------


def _boundary_or_refuse(content_type: str) -> bytes:
    try:
        return _boundary(content_type)
    except ValueError:
        raise WireError("Failed to parse batch request: give multipart/mixed with a boundary.") from None


def _boundary(content_type: str) -> bytes:
    found = _TYPE.fullmatch(content_type)
    parameters = found[1] or "" if found else ""
    place = 0
    while parameter := _PARAMETER.match(parameters, place):
        place = parameter.end()
        if parameter[1].lower() == "boundary":
            boundary = re.sub(r"\\(.)", r"\1", parameter[2]) if parameter[2] is not None else parameter[3]
            if _BOUNDARY.fullmatch(boundary):
                return boundary.encode("ascii")
    raise ValueError("no multipart/mixed with a boundary")


def _parts(boundary: bytes, body: bytes | bytearray) -> Iterator[tuple[int, int]]:
    """Where the parts begin and end; what stands before the first and after the last counts for nothing."""
    delimiter = b"--" + boundary
    ends = re.compile(rb"(--)?[ \t]*+(?:\r?\n|\Z)")
    begin = None
    place = 0 if body.startswith(delimiter) else _next(body, delimiter, 0)
    while place >= 0:
        line = ends.match(body, place + len(delimiter))
        if line is None:  # a line that only begins like a delimiter
            place = _next(body, delimiter, place)
            continue
        if begin is not None:
            yield begin, max(begin, place - (2 if body[place - 2 : place] == b"\r\n" else 1))
        if line[1]:
            return
        begin = line.end()
        # the line's own end is the beginning of the next delimiter's
        place = _next(body, delimiter, begin - 1)
    raise ValueError("no closing delimiter")


def _next(body: bytes | bytearray, delimiter: bytes, place: int) -> int:
    """The place of the next delimiter that begins a line, from the end of a line on; -1 for none."""
    found = body.find(b"\n" + delimiter, place)
    return found + 1 if found >= 0 else -1


def _call(part: bytes) -> InnerCall:
    headers, content = _headers(part)
    kind = headers.get(b"content-type", b"application/http").partition(b";")[0].strip().lower()
    encoding = headers.get(b"content-transfer-encoding", b"").strip().lower()
    if kind != b"application/http" or encoding not in _ENCODINGS:
        raise ValueError("a part of another kind")
    first, newline, rest = _ENCODINGS[encoding](content).lstrip(b"\r\n").partition(b"\n")
    words = first.rstrip(b"\r").split(b" ")
    if not newline or len(first) > _MAX_TARGET or len(words) != 3 or words[0] != b"POST":
        raise ValueError("a part without a POST")
    inner, body = _headers(rest)
    target = urlsplit(words[1].decode("latin-1"))
    key = inner.get(b"x-goog-api-key", b"").decode("latin-1") or key_of_query(target.query)
    return InnerCall(headers.get(b"content-id", b"").decode("latin-1"), target.path, key, body)


def _headers(message: bytes) -> tuple[Mapping[bytes, bytes], bytes]:
    """The headers, names in lower case, and what follows the empty line.

    Raises:
        ValueError: they are malformed, too long, or without an end.
    """
    blank = re.compile(rb"(?:\A|\n)\r?\n").search(message, 0, _MAX_HEAD)
    if blank is None:
        raise ValueError("headers without an end")
    head = re.sub(rb"\r?\n[ \t]++", b" ", message[: blank.start()].rstrip(b"\r"))  # long ones come folded
    headers: dict[bytes, bytes] = {}
    for line in head.split(b"\n") if head else ():
        found = _HEADER.fullmatch(line.rstrip(b"\r"))
        if found is None:
            raise ValueError("a malformed header")
        headers.setdefault(found[1].lower(), found[2].rstrip())
    return headers, message[blank.end() :]


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
