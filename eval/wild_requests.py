"""Requests that no client should send, as bytes: made at random, all from one seed.

Every one of them carries a marker, wherever it can hold a text.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rectify.scoring.wire import ANALYZE_PATH, SUGGEST_PATH

METHODS = ["POST"] * 80 + [
    "GET",
    "HEAD",
    "PUT",
    "DELETE",
    "OPTIONS",
    "PATCH",
    "TRACE",
    "CONNECT",
    "post",
    "QUERY",
    "PRI",
]
PATHS = [ANALYZE_PATH] * 12 + [SUGGEST_PATH] * 6 + ["/batch"] * 8 + ["/", "/healthz", "/$discovery/rest"]
VERSIONS = ["HTTP/1.1"] * 90 + ["HTTP/1.0", "HTTP/2.0", "HTTP/0.9", "HTTP/1.2", "http/1.1", "ICY/1.1", ""]
NUMBERS = [
    "0",
    "1",
    "-1",
    "0.5",
    "1e999",
    "-1e999",
    "1e-999",
    "9" * 5000,
    "0." + "3" * 9000,
    "NaN",
    "Infinity",
    "-0",
    "1E400",
]
HUGE = 2**20


@dataclass(frozen=True)
class Wild:
    """A request.

    Attributes:
        data: what is sent, in one go.
        whole: whether the server has all that it needs for an answer.
    """

    data: bytes
    whole: bool


class WildRequests:
    """An endless row of requests.

    Args:
        seed: of all of them.
        marker: of ASCII letters; a text that must turn up nowhere.
    """

    def __init__(self, seed: int, marker: str) -> None:
        self.draw, self.marker = random.Random(seed), marker

    def __iter__(self) -> Iterator[Wild]:
        while True:
            yield self.one()

    def one(self) -> Wild:
        """The next one."""
        draw = self.draw
        path = self.path()
        if "batch" in path and draw.random() < 0.8:
            kind, body = self.batch()
        else:
            kind, body = draw.choice(["application/json", "text/plain", ""]), self.body(path)
        for change in (self.broken_bytes, self.cut_bytes, self.packed):
            if draw.random() < 0.04:
                body = change(body)
        return self.framed(draw.choice(METHODS), path, kind, body)

    # -----------------------------------------------------------------------------------------------------------------
    # Of HTTP

    def path(self) -> str:
        draw = self.draw
        path = draw.choice(PATHS)
        if draw.random() < 0.1:
            path = draw.choice(
                [
                    f"/{self.marker}",
                    path + "/",
                    path + "%00",
                    path + "%ff%fe",
                    "/" + path,
                    path.upper(),
                    f"/../{path}",
                    "*",
                    f"http://{self.marker}.example{path}",
                    path + "é",
                    "/" + "a" * draw.choice([1000, 20_000]),
                    "%",
                    path + "\0",
                ]
            )
        query = [
            "",
            "",
            "",
            f"?key={self.marker}",
            "?version=v1alpha1",
            "?" + "a=1&" * 500,
            "?key=%zz%00",
            "?" + "&" * 3000,
        ]
        return path + draw.choice(query)

    def framed(self, method: str, path: str, kind: str, body: bytes) -> Wild:
        draw, marker = self.draw, self.marker
        lines = [f"{method} {path} {draw.choice(VERSIONS)}".rstrip()]
        lines += draw.choice(
            [["Host: localhost"]] * 60 + [[], ["Host: a", "Host: b"], [f"Host: {marker}"], ["Host: \x01"]]
        )
        if kind:
            lines.append(f"Content-Type: {kind}")
        more = [
            f"X-Goog-Api-Key: {marker}",
            "Connection: close",
            "Expect: 100-continue",
            "Upgrade: websocket\r\nConnection: Upgrade",
            "Origin: https://app.example\r\nAccess-Control-Request-Method: POST",
            f"Origin: https://{marker}.example",
            f"X-Forwarded-For: {marker}\r\nX-Forwarded-Proto: {marker}\r\nX-Forwarded-Host: {marker}",
            f"{marker}: {'a' * 9000}",
            f" {marker}",
            f"{marker}",
            ":",
            f"A: \x00{marker}",
            f"Cookie: {marker}\r\n {marker}",
            "\r\n".join(f"X-{number}: {marker}" for number in range(300)),
            "X: " + "a" * 70_000,
        ]
        lines += draw.sample(more, 1 if draw.random() < 0.15 else 0)
        frame = draw.choices(
            ["length", "chunked", "none", "long", "short", "wild", "bad", "twice"], [60, 30, 1, 2, 2, 2, 4, 1]
        )[0]
        whole = frame not in ("long", "bad", "twice", "wild") and method != "CONNECT"
        match frame:
            case "length":
                lines.append(f"Content-Length: {len(body)}")
            case "long":
                lines.append(f"Content-Length: {len(body) + draw.choice([1, 1000, 10**12])}")
            case "short":
                lines.append(f"Content-Length: {max(0, len(body) - draw.choice([1, 20]))}")
            case "wild":
                lines.append(
                    f"Content-Length: {draw.choice(['-1', '1e3', '0x10', '9' * 30, '+5', '1, 1', marker, ''])}"
                )
            case "twice":
                lines += [f"Content-Length: {len(body)}", "Transfer-Encoding: chunked"]
            case "chunked":
                lines.append("Transfer-Encoding: chunked")
                body = b"".join(self.chunks(body)) + b"0\r\n\r\n"
            case "bad":
                lines.append("Transfer-Encoding: " + draw.choice(["chunked"] * 5 + ["gzip", "chunked, gzip", marker]))
                body = draw.choice(
                    [body, b"zz\r\n" + body, b"%x\r\n" % (len(body) * 2) + body, b"-1\r\n" + body, b"f" * 40 + body]
                )
        data = "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n" + body
        if draw.random() < 0.02:
            data, whole = data[: draw.randrange(len(data))], False
        elif draw.random() < 0.02:
            data, whole = draw.randbytes(draw.choice([1, 50, 5000])) + self.marker.encode(), False
        elif draw.random() < 0.02:
            data = data * 3
        return Wild(data, whole)

    def chunks(self, body: bytes) -> Iterator[bytes]:
        size = self.draw.choice([1, 7, 1000, 60_000] if len(body) < 50_000 else [1000, 60_000])
        for place in range(0, len(body), size):
            part = body[place : place + size]
            yield b"%x%s\r\n%s\r\n" % (len(part), b";a=b" if self.draw.random() < 0.001 else b"", part)

    # -----------------------------------------------------------------------------------------------------------------
    # Of bodies

    def body(self, path: str) -> bytes:
        draw = self.draw
        if draw.random() < 0.06:
            return draw.choice(self.large())()
        return self.suggest() if path.startswith(SUGGEST_PATH) else self.analyze()

    def large(self) -> list[Callable[[], bytes]]:
        """Makers of bodies that take long to read, or are meant to."""
        size, draw, marker = self.draw.choice([HUGE // 16, HUGE // 4, HUGE - 100]), self.draw, self.marker
        return [
            lambda: b"[" * size,
            lambda: b'{"a":' * (size // 5),
            lambda: b"{a:" * (size // 3),
            lambda: b"[" + b"[]," * (size // 3) + b"0]",
            lambda: b"[" + b"1," * (size // 2) + b"1]",
            lambda: b"[" + b"1e1," * (size // 4) + b"1]",
            lambda: b"9" * size,
            lambda: b"a:" * (size // 2),
            lambda: b'"' * size,
            lambda: b'{"' + marker.encode() + b'":"' + b"\\u0041" * (size // 6) + b'"}',
            lambda: json.dumps({"comment": {"text": marker * (size // len(marker))}}).encode(),
            lambda: json.dumps({"languages": ["en"] * (size // 6), "comment": {"text": marker}}).encode(),
            lambda: b" " * size,
            lambda: draw.randbytes(size),
            lambda: self.call_of("a" + " " * draw.choice([2000, 20_000]) + "b").encode(),
            lambda: self.call_of("😀" * draw.choice([500, 5000]), spans=True).encode(),
            lambda: self.call_of("Ha! " * draw.choice([300, 5000]), spans=True).encode(),
            lambda: self.call_of("e" + "\u0301" * draw.choice([1000, 10_000])).encode(),
            lambda: b"0" * (HUGE + draw.choice([1, 2 * HUGE])),
        ]

    def call_of(self, text: str, spans: bool = False) -> str:
        return json.dumps(
            {"comment": {"text": text}, "requestedAttributes": {"TOXICITY": {}}, "spanAnnotations": spans},
            ensure_ascii=self.draw.random() < 0.5,
        )

    def value(self, depth: int = 0) -> str:
        """Any JSON, and what only looks like it."""
        draw = self.draw
        kind = draw.randrange(9 if depth < 3 else 6)
        if kind == 0:
            return draw.choice(NUMBERS)
        if kind < 4:
            return self.string()
        if kind < 6:
            return draw.choice(["true", "false", "null", "[]", "{}", "undefined", "'a'", '"', "\0"])
        inner = [self.value(depth + 1) for _ in range(draw.randrange(4))]
        if kind == 6:
            return f"[{','.join(inner)}]"
        return "{" + ",".join(f"{self.string()}:{value}" for value in inner) + "}"

    def string(self) -> str:
        draw, marker = self.draw, self.marker
        texts = [marker, f"You idiot {marker}", "", " ", f"{marker}\0", f"{marker}\u202e😀", f"{marker} " * 700]
        texts += [
            f"{marker}. Second! Third?",
            "é" * 9000,
            "TOXICITY",
            "en",
            "PLAIN_TEXT",
            "PROBABILITY",
            "HTML",
            "a" * 30_000,
        ]
        text = draw.choice(texts)
        if draw.random() < 0.1:
            return f'"{marker}{draw.choice([chr(92) + "ud800", chr(92) + "u0000", chr(92) + "x", chr(10), chr(92)])}"'
        return json.dumps(text, ensure_ascii=draw.random() < 0.5)

    def fields(self, fields: dict[str, str]) -> bytes:
        """An object of which some members have another value, name, or place."""
        draw = self.draw
        for name in list(fields):
            if draw.random() < 0.05:
                fields[name] = self.value()
            if draw.random() < 0.01:
                del fields[name]
        if draw.random() < 0.03:
            fields[draw.choice([self.marker, "client_token", "", "__proto__", "comment "])] = self.value()
        parts = [f"{json.dumps(name)}:{value}" for name, value in fields.items()]
        draw.shuffle(parts)
        return ("{" + ",".join(parts) + "}").encode("utf-8", "surrogatepass")

    def comment(self) -> str:
        text = json.dumps(f"{self.marker} {self.draw.random()} you are an idiot. Go away!")
        return self.fields({"text": text} | ({"type": '"PLAIN_TEXT"'} if self.draw.random() < 0.3 else {})).decode(
            "utf-8", "replace"
        )

    def common(self) -> dict[str, str]:
        more = {
            "languages": '["en"]',
            "clientToken": f'"{self.marker}"',
            "sessionId": '"a"',
            "communityId": '"b"',
            "context": '{"entries":[{"text":"a"}]}',
            "doNotStore": "true",
            "spanAnnotations": "true",
            "dropUnsupportedAttributes": "true",
        }
        return {"comment": self.comment()} | dict(self.draw.sample(list(more.items()), self.draw.randrange(4)))

    def analyze(self) -> bytes:
        names = self.draw.sample(["TOXICITY", "INSULT", "THREAT", "PROFANITY"], self.draw.randint(1, 3))
        settings = [
            self.fields({"scoreThreshold": "0.0", "scoreType": '"PROBABILITY"'}).decode("utf-8", "replace")
            for _ in names
        ]
        asked = "{" + ",".join(f'"{name}":{setting}' for name, setting in zip(names, settings, strict=True)) + "}"
        return self.fields(self.common() | {"requestedAttributes": asked})

    def suggest(self) -> bytes:
        span = self.fields({"begin": "0", "end": "2", "score": '{"value":0.5}'}).decode("utf-8", "replace")
        scores = self.fields({"summaryScore": '{"value":1,"type":"PROBABILITY"}', "spanScores": f"[{span}]"})
        return self.fields(
            self.common() | {"attributeScores": '{"TOXICITY":' + scores.decode("utf-8", "replace") + "}"}
        )

    def batch(self) -> tuple[str, bytes]:
        """Content type and body of a batch."""
        draw, marker = self.draw, self.marker
        boundary = draw.choice(["batch_x", "=====1==", "b", "x" * 70])
        end = draw.choice([b"\r\n", b"\n"])
        if draw.random() < 0.2:
            return draw.choice(self.wild_batches())
        parts = []
        for number in range(draw.choice([1, 2, 5, 40])):
            inner = self.analyze() if draw.random() < 0.8 else self.suggest()
            head = [f"Content-Type: {draw.choice(['application/http'] * 20 + ['multipart/mixed; boundary=y', marker])}"]
            head += (
                [f"Content-ID: <{marker}+{number}>"]
                if draw.random() < 0.8
                else [f"Content-ID: {marker}\x01"][: draw.randrange(2)]
            )
            head += draw.choice([[]] * 9 + [["Content-Transfer-Encoding: base64"], [marker], ["A:" + "b" * 70_000]])
            target = draw.choice(
                [ANALYZE_PATH] * 20
                + [SUGGEST_PATH, "/batch", f"/{marker}", "http://[", ANALYZE_PATH + f"?key={marker}"]
            )
            start = f"{draw.choice(['POST'] * 30 + ['GET', marker])} {target} HTTP/1.1"
            lines = [*head, "", start, "Content-Type: application/json", "", ""]
            parts.append(end.join(line.encode("latin-1", "replace") for line in lines) + inner)
        delimiter = f"--{boundary}".encode()
        body = (
            b"".join(delimiter + end + part + end for part in parts)
            + delimiter
            + (b"--" if draw.random() < 0.95 else b"")
        )
        quoted = draw.choice([f'"{boundary}"', boundary])
        return f"multipart/mixed; boundary={quoted}", body + end

    def wild_batches(self) -> list[tuple[str, bytes]]:
        marker, draw = self.marker.encode(), self.draw
        size = draw.choice([2**10, 2**14, 2**18])
        mixed = "multipart/mixed; boundary=b"
        nested = marker
        for number in range(draw.choice([2, 30, 300])):
            nested = b"Content-Type: multipart/mixed; boundary=%d\n\n--%d\n%s\n--%d--" % (
                number,
                number,
                nested,
                number,
            )
        return [
            (mixed, b"--b\n" * (size // 4) + b"--b--"),
            (mixed, b"--b\n" + b"A: " + b"b" * size + b"\n\n--b--"),
            (mixed, b"--b\n" + b"A: b\n c\n" * (size // 8) + b"\n\n--b--"),
            (mixed, b"--b\n\nPOST " + b"/" * size + b" HTTP/1.1\n\n{}\n--b--"),
            (mixed, b"--b\n\nPOST /?" + b"a&" * size + b" HTTP/1.1\n\n{}\n--b--"),
            (mixed, b"--b\n\nPOST / HTTP/1.1\n\n{}\n" * (size // 30) + b"--b--"),
            (mixed, b"--b" + b" " * size + marker),
            (mixed, b"--b" + b" \t" * size),
            (mixed, b"\n--b-" * size),
            (mixed, b"\r" * size + b"\n--b\r\n\r\n\r\n--b--"),
            (mixed, b"--b\n" + nested + b"\n--b--"),
            ("multipart/mixed; boundary=" + "a" * 300, b"--" + b"a" * size),
            ('multipart/mixed; boundary="', marker),
            ("multipart/mixed; " + "a=b; " * 1500 + "boundary=b", b"--b--"),
            ("multipart/mixed; boundary*0=b; boundary*1=c", b"--bc\n\n\n--bc--"),
            ("multipart/mixed; boundary=\xff", b"--\xff--"),
            ("multipart/mixed", marker),
            ("multipart/mixed; boundary=b", marker),
            ("multipart/alternative; boundary=b", b"--b\n\n" + marker + b"\n--b--"),
        ]

    # -----------------------------------------------------------------------------------------------------------------

    def broken_bytes(self, body: bytes) -> bytes:
        place = self.draw.randrange(len(body) + 1)
        return (
            body[:place] + self.draw.choice([b"\xff", b"\x00", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\\"]) + body[place:]
        )

    def cut_bytes(self, body: bytes) -> bytes:
        return body[: self.draw.randrange(len(body) + 1)]

    def packed(self, body: bytes) -> bytes:
        return gzip.compress(self.draw.choice([body, b"\0" * (HUGE * 4)]))
