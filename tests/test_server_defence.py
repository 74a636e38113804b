"""The server among attackers: whatever one client sends or holds back, the others get their answers, and soon."""

import asyncio
import base64
import json
import logging
import socket
import sys
import threading
import time
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import requests
from test_server import KEY, FakeScorer, Running, error_of, value_of

from rectify.errors import WireError
from rectify.scoring import freed_memory
from rectify.scoring.bodies import Intake
from rectify.scoring.connections import Patience, patient_protocol
from rectify.scoring.failures import TextFreeFormatter, log_loop_failure
from rectify.scoring.http_batch import MAX_CALLS, InnerCall, first_key, parse_batch
from rectify.scoring.scores import Scores
from rectify.scoring.server import MAX_BATCH_BODY, MAX_BODY, make_app
from rectify.scoring.wire import ANALYZE_PATH, SUGGEST_PATH, analyze_body, decode_body

sys.path.append(str(Path(__file__).parent.parent / "eval"))
from wild_requests import WildRequests

MARKER = "zyxmarkerxyz"
MIXED = "multipart/mixed; boundary=b"
QUICK = Patience(connections=64, head=0.3, idle=0.3, body=0.3, rest=0.3, answer=0.3)
CALL = json.dumps(analyze_body("a text", ["TOXICITY"])).encode()


@pytest.fixture(scope="module")
def server():
    with Running(make_app(FakeScorer()), backlog=256) as running:
        yield running


@pytest.fixture(scope="module")
def impatient():
    with Running(
        make_app(FakeScorer()), http=patient_protocol(QUICK), access_log=False, proxy_headers=False
    ) as running:
        yield running


@pytest.fixture(scope="module")
def guarded():
    with Running(make_app(FakeScorer(), api_keys=[KEY])) as running:
        yield running


def connect(running, data=b""):
    connection = socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])), timeout=10)
    connection.sendall(data)
    return connection


def head(method="POST", path=ANALYZE_PATH, *lines):
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


def answer(connection):
    """All that comes until the connection is closed."""
    found = b""
    while part := connection.recv(65_536):
        found += part
    return found


def first_answer(connection):
    """The first answer, while the connection stays open."""
    with connection.makefile("rb") as stream:
        lines = list(iter(stream.readline, b"\r\n"))
        length = next(int(line[15:]) for line in lines if line.lower().startswith(b"content-length:"))
        return b"".join(lines) + stream.read(length)


def part(body=CALL, path=ANALYZE_PATH, newline=b"\r\n", header=b"Content-Type: application/http"):
    return newline.join(
        [header, b"", b"POST %s HTTP/1.1" % path.encode(), b"Content-Type: application/json", b"", body]
    )


def batch(parts, newline=b"\r\n"):
    return b"".join(b"--b" + newline + part + newline for part in parts) + b"--b--" + newline


def post_batch(running, data, kind=MIXED, **arguments):
    return requests.post(running.url + "/batch", data=data, headers={"Content-Type": kind}, timeout=30, **arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize("newline", [b"\r\n", b"\n"])
def test_a_batch_is_read_with_either_end_of_line_and_with_what_may_stand_around_it(newline):
    whole = batch([part(newline=newline), b"Content-ID: <a\r\n b>" + newline + part(b"--bc" + newline + b"x")], newline)
    calls = [InnerCall("", ANALYZE_PATH, "", CALL), InnerCall("<a b>", ANALYZE_PATH, "", b"--bc" + newline + b"x")]
    assert parse_batch(MIXED, whole) == calls
    assert (
        parse_batch('multipart/mixed; a="x; boundary=c"; BOUNDARY="b"', b"before\n" + whole + b"after\n--b\n") == calls
    )
    assert parse_batch(MIXED, whole.replace(b"--b" + newline, b"--b \t" + newline)) == calls


def test_a_part_may_be_encoded():
    inner = b"POST /x?key=k HTTP/1.1\r\n\r\n{}"
    for encoding, content in ((b"base64", base64.encodebytes(inner)), (b"quoted-printable", inner)):
        found = parse_batch(
            MIXED,
            batch(
                [
                    b"Content-Transfer-Encoding: "
                    + encoding
                    + b"\r\n\r\n"
                    + content.replace(b"=k", b"=3Dk" if encoding != b"base64" else b"=k")
                ]
            ),
        )
        assert found == [InnerCall("", "/x", "k", b"{}")]


def nested(depth):
    body = part()
    for number in range(depth):
        body = b"Content-Type: multipart/mixed; boundary=%d\n\n--%d\n%s\n--%d--" % (number, number, body, number)
    return batch([body])


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (MIXED, b""),
        (MIXED, b"--b--"),
        (MIXED, batch([part()])[:-6]),
        (MIXED, nested(1)),
        (MIXED, nested(1500)),
        (MIXED, batch([part(header=b"Content-Type: message/rfc822")])),
        (MIXED, batch([part(header=b"Content-Type: text/plain")])),
        (MIXED, batch([part(header=b"Content-Transfer-Encoding: x-uuencode")])),
        (MIXED, batch([part(header=b"Content-Transfer-Encoding: base64")])),
        (MIXED, batch([part(header=b"no header")])),
        (MIXED, batch([part(header=b"Content-ID: a\x00b")])),
        (MIXED, batch([part(header=b"A: " + b"b" * 70_000)])),
        (MIXED, batch([part(header=b"A: b\r\n" * 20_000 + b"A: b")])),
        (MIXED, batch([part(path="/" + "a" * 20_000)])),
        (MIXED, batch([part(path="http://[")])),
        (MIXED, batch([part().replace(b"POST", b"GET")])),
        (MIXED, batch([part()] * (MAX_CALLS + 1))),
        (MIXED, b"--b\r\n" * 200_000 + b"--b--"),
        (MIXED, b"\n--b-" * 200_000),
        (MIXED, b"--b" + b" \t" * 500_000),
        (MIXED, b"--b\n" + b"A: b\n c\n" * 100_000 + b"\n--b--"),
        (MIXED, b"\r" * 10**6 + b"\n--b\r\n\r\n--b--"),
        ("multipart/mixed", batch([part()])),
        ("multipart/mixed; boundary=", batch([part()])),
        ('multipart/mixed; boundary="b', batch([part()])),
        ("multipart/mixed; boundary=" + "b" * 201, batch([part()])),
        ("multipart/mixed; boundary=\u00e9", batch([part()])),
        ("multipart/mixed; " + "a=b; " * 3000, batch([part()])),
        ("multipart/mixed; boundary*0=b", batch([part()])),
        ("multipart/alternative; boundary=b", batch([part()])),
    ],
)
def test_what_is_no_batch_is_refused_at_once(server, kind, body):
    begin = time.process_time()
    with pytest.raises(WireError, match="batch") as refused:
        parse_batch(kind, body)
    assert time.process_time() - begin < 0.2
    assert refused.value.code == 400
    if kind.isascii() and len(kind) < 9000:
        assert "batch" in error_of(post_batch(server, body, kind))["message"]


def test_the_first_key_of_a_batch_is_found_in_its_beginning():
    whole = batch([part(path=f"{ANALYZE_PATH}?alt=json&key={KEY}", body=b"a" * 300_000), part()])
    assert first_key(MIXED, whole[:200_000]) == KEY
    assert first_key(MIXED, batch([part(b"a" * 300_000)])) == ""
    with pytest.raises(WireError):
        first_key("text/plain", whole)


def test_who_has_no_key_is_told_before_the_batch_is_read(guarded):
    large = f"Content-Length: {MAX_BATCH_BODY}"
    with connect(guarded, head("POST", "/batch?key=wrong", f"Content-Type: {MIXED}", large)) as connection:
        assert b"API key not valid" in first_answer(connection)
    for key, said in (("", b"unregistered callers"), ("wrong", b"API key not valid")):
        body = batch([part(b"a" * 10**6, f"{ANALYZE_PATH}?key={key}")])
        with connect(guarded, head("POST", "/batch", f"Content-Type: {MIXED}", large) + body[:200_000]) as connection:
            assert said in first_answer(connection)
    with connect(guarded, head("POST", f"{ANALYZE_PATH}?key=wrong", f"Content-Length: {MAX_BODY}")) as connection:
        assert b"API key not valid" in first_answer(connection)
    many = [part(CALL + b" " * 1000, f"{ANALYZE_PATH}?key={KEY}")] * 400
    assert post_batch(guarded, batch(many)).text.count("attributeScores") == 400


def test_each_part_of_a_batch_has_the_limit_of_a_call(server):
    found = post_batch(server, batch([part(b" " * MAX_BODY + CALL), part()])).text
    assert found.count("HTTP/1.1 413") == 1
    assert found.count("HTTP/1.1 200") == 1
    for data in (b"a" * (MAX_BATCH_BODY + 1), iter([b"a" * MAX_BATCH_BODY, b"a"])):
        assert "exceeds the limit" in error_of(post_batch(server, data), 413)["message"]


def test_suggestions_and_the_parts_of_batches_count():
    app = make_app(FakeScorer(), api_keys=["a", "b"], quota_per_minute=3, clock=lambda: 0.0)
    suggestion = {"comment": {"text": "a"}, "attributeScores": {"TOXICITY": {"summaryScore": {"value": 1}}}}
    with Running(app) as running:
        assert [running.post(suggestion, SUGGEST_PATH, params={"key": "a"}).status_code for _ in range(4)] == [
            200
        ] * 3 + [429]
        found = post_batch(running, batch([part()] * 5), params={"key": "b"}).text
        assert [found.count(f"HTTP/1.1 {status}") for status in (200, 429)] == [3, 2]
        assert error_of(post_batch(running, b"a", params={"key": "b"}), 429)["status"] == "RESOURCE_EXHAUSTED"


# ---------------------------------------------------------------------------------------------------------------------
# Bodies


@pytest.mark.parametrize(
    "data",
    [
        b"[" * MAX_BODY,
        b"{a:" * (MAX_BODY // 3),
        b"[" + b"[]," * (MAX_BODY // 3) + b"0]",
        b'{"a":' + b"9" * 10**6 + b"}",
    ],
)
def test_json_that_is_made_to_be_slow_is_refused(data):
    with pytest.raises(WireError, match="Invalid JSON payload received"):
        decode_body(data)


def test_a_list_of_languages_has_an_end(server):
    error = error_of(server.post(analyze_body("a", ["TOXICITY"], languages=["en"] * 101)))
    assert error["details"][0]["errorType"] == "INVALID_REQUEST"


def test_a_compressed_body_is_refused(server):
    response = requests.post(server.url + ANALYZE_PATH, data=CALL, headers={"Content-Encoding": "gzip"}, timeout=10)
    assert "gzip is not supported" in error_of(response, 415)["message"]


def test_large_bodies_have_so_much_room_together():
    async def main():
        intake = Intake(room=2**18)

        class Request:
            def __init__(self, size):
                self.size, self.headers = size, {}

            async def stream(self):
                for _ in range(self.size // 1000):
                    yield b"a" * 1000

        async with intake.body(Request(200_000), MAX_BODY) as first:
            with pytest.raises(WireError, match="at present"):
                async with intake.body(Request(200_000), MAX_BODY):
                    pass
            async with intake.body(Request(100_000), MAX_BODY) as small:
                sizes = len(first), len(small)
        async with intake.body(Request(200_000), MAX_BODY):
            return sizes

    assert asyncio.run(main()) == (200_000, 100_000)


def test_a_refusal_reaches_a_client_that_is_still_sending(server):
    for close in ((), ("Connection: close",)):
        with connect(server, head("POST", "/none", f"Content-Length: {4 * 10**6}", *close)) as connection:
            connection.sendall(b"a" * 4 * 10**6)
            assert connection.recv(12) == b"HTTP/1.1 404"


def test_a_body_of_two_lengths_is_refused_and_nothing_after_it_is_read(server):
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(CALL), CALL)
    lines = head("POST", ANALYZE_PATH, "Transfer-Encoding: chunked", "Content-Length: 3")
    with connect(server, lines + chunked + head("GET", "/healthz")) as connection:
        found = answer(connection)
    assert found.startswith(b"HTTP/1.1 400")
    assert found.count(b"HTTP/1.1 ") == 1


def test_a_client_that_waits_for_leave_to_send_gets_an_answer_and_no_second_request(server):
    with connect(server, head("POST", "/none", "Content-Length: 5", "Expect: 100-continue")) as connection:
        found = answer(connection)
    assert found.startswith(b"HTTP/1.1 404")
    assert b"connection: close" in found
    with connect(
        server, head("POST", ANALYZE_PATH, f"Content-Length: {len(CALL)}", "Expect: 100-continue")
    ) as connection:
        assert connection.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(CALL)
        assert b"200 OK" in connection.recv(65_536)


# ---------------------------------------------------------------------------------------------------------------------
# Connections


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /v1al",
        head()[:-2],
        head("POST", ANALYZE_PATH, "Content-Length: 5000") + b"{",
        head("POST", ANALYZE_PATH, "Transfer-Encoding: chunked") + b"5\r\n{",
        head("GET", "/", "Content-Length: 5000"),
        head("GET", "/none", "Content-Length: 5000"),
        head("GET", "/healthz"),
        head("GET", "/healthz") + b"GET",
    ],
)
@pytest.mark.parametrize("trickle", [False, True])
def test_a_client_that_keeps_the_server_waiting_is_cut_off(impatient, sent, trickle):
    begin = time.monotonic()
    with connect(impatient, sent) as connection:
        connection.settimeout(0.1)
        while time.monotonic() - begin < 8:
            try:
                if not connection.recv(65_536):
                    break
                continue
            except TimeoutError:
                pass
            except ConnectionError:
                break
            if trickle:
                try:
                    connection.sendall(b"a")
                except OSError:
                    break
    assert time.monotonic() - begin < 4


@pytest.mark.parametrize("at_once", [False, True])
def test_a_client_that_takes_no_answer_is_cut_off(at_once):
    body = batch([part(json.dumps(analyze_body("a", ["TOXICITY"]) | {"clientToken": "a" * 10**6}).encode())] * 7)
    request = head("POST", "/batch", f"Content-Type: {MIXED}", f"Content-Length: {len(body)}") + body
    if at_once:  # many requests, of which the later wait for the answers to the first
        request = head("GET", "/") * 4000
    with Running(make_app(FakeScorer()), http=patient_protocol(QUICK)) as running, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", int(running.url.rpartition(":")[2])))
        connection.settimeout(1)
        with suppress(OSError):
            connection.sendall(request)
        held = running._server.server_state.connections
        deadline = time.monotonic() + 8
        while not held and time.monotonic() < deadline:
            time.sleep(0.001)
        while held and time.monotonic() < deadline:
            time.sleep(0.05)
        assert time.monotonic() < deadline


def test_a_new_client_gets_in_however_many_hold_connections():
    with (
        Running(make_app(FakeScorer()), http=patient_protocol(Patience(connections=16))) as running,
        ExitStack() as crowd,
    ):
        kinds = b"", b"POST /", head("POST", ANALYZE_PATH, "Content-Length: 5000") + b"{", head("GET", "/healthz")
        for number in range(60):
            crowd.enter_context(connect(running, kinds[number % len(kinds)]))
            if number % 5 == 0:
                assert running.post(json.loads(CALL)).status_code == 200
        assert len(running._server.server_state.connections) <= 17


def test_who_is_being_answered_is_not_cut_off_for_those_who_are_silent():
    scorer = FakeScorer()
    scorer.gate.clear()
    with Running(make_app(scorer), http=patient_protocol(Patience(connections=8))) as running, ExitStack() as crowd:
        sent = head("POST", ANALYZE_PATH, f"Content-Length: {len(CALL)}", "Connection: close") + CALL
        asking = [crowd.enter_context(connect(running, sent)) for _ in range(5)]
        time.sleep(0.1)
        for _ in range(20):
            crowd.enter_context(connect(running))
        time.sleep(0.1)
        # and where all are being answered, there is no place
        asking += [crowd.enter_context(connect(running, sent)) for _ in range(3)]
        time.sleep(0.1)
        with connect(running, sent) as late:
            refused = late.recv(65_536)
        assert refused.startswith(b"HTTP/1.1 503")
        assert json.loads(refused.partition(b"\r\n\r\n")[2])["error"]["status"] == "UNAVAILABLE"
        scorer.gate.set()
        assert [answer(connection)[:12] for connection in asking] == [b"HTTP/1.1 200"] * 8


def test_stopping_answers_what_came_whole_and_waits_for_nothing_else():
    scorer = FakeScorer()
    scorer.gate.clear()
    with ExitStack() as crowd:
        with Running(make_app(scorer), timeout_graceful_shutdown=5) as running:
            request = head("POST", ANALYZE_PATH, f"Content-Length: {len(CALL)}") + CALL
            asking = crowd.enter_context(connect(running, request))
            for sent in (b"", b"POST", request[:-3], head("GET", "/healthz"), b"no HTTP\r\n\r\n"):
                crowd.enter_context(connect(running, sent))
            time.sleep(0.2)
            begin = time.monotonic()
            threading.Timer(0.3, scorer.gate.set).start()
        assert time.monotonic() - begin < 3
        assert answer(asking).startswith(b"HTTP/1.1 200")


def test_what_is_not_answered_in_time_at_the_end_gets_an_error():
    scorer = FakeScorer()
    scorer.gate.clear()
    with ExitStack() as crowd:
        with Running(make_app(scorer), timeout_graceful_shutdown=0.2) as running:
            asking = crowd.enter_context(
                connect(running, head("POST", ANALYZE_PATH, f"Content-Length: {len(CALL)}") + CALL)
            )
            time.sleep(0.2)
        scorer.gate.set()
        assert answer(asking).startswith(b"HTTP/1.1 503")


def test_what_a_gone_client_asked_for_is_not_scored(caplog):
    scorer = FakeScorer()
    scorer.gate.clear()
    with Running(make_app(scorer, max_batch=1)) as running:
        sent = head("POST", ANALYZE_PATH, f"Content-Length: {len(CALL)}") + CALL
        many = batch([part()] * 50)
        with connect(running, sent), connect(running, sent):
            connect(
                running, head("POST", "/batch", f"Content-Type: {MIXED}", f"Content-Length: {len(many)}") + many
            ).close()
            time.sleep(0.2)
        time.sleep(0.2)
        scorer.gate.set()
        assert running.post(json.loads(CALL)).status_code == 200
    assert len(scorer.batches) == 2  # the first was being scored
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


# ---------------------------------------------------------------------------------------------------------------------
# The log


@pytest.mark.parametrize("method", ["HEAD", "GET", "POST"])
def test_what_is_no_http_is_refused_without_a_word_of_it_in_the_log(impatient, method, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    text = json.dumps(analyze_body(MARKER, ["TOXICITY"])).encode()
    for path in ("/", ANALYZE_PATH):
        for lines in ((), ("Connection: close",)):
            for late in (False, True):
                for body in (
                    text + b"\r\n",
                    b"5\r\n12345\r\n" + text + b"\r\n0\r\n\r\n",
                    b"ffff\r\n" + text,
                    b"0\r\n" + text + b"\r\n\r\n",
                ):
                    with connect(impatient, head(method, path, "Transfer-Encoding: chunked", *lines)) as connection:
                        if late:
                            time.sleep(0.002)
                        try:
                            connection.sendall(body)
                            connection.recv(65_536)
                        except OSError:
                            pass
    assert_no_text(caplog, capfd)


def test_wild_requests_get_no_server_error_and_leave_no_word_in_the_log(impatient, caplog, capfd):
    caplog.set_level(logging.INFO)
    answered = 0
    for request in islice(WildRequests(1, MARKER), 250):
        with connect(impatient) as connection:
            connection.settimeout(10 if request.whole else 0.02)
            try:
                connection.sendall(request.data)
                status = connection.recv(65_536)
            except ConnectionError:  # what is no HTTP is not read to its end
                continue
            except TimeoutError:
                assert not request.whole, request
                continue
        answered += status.startswith(b"HTTP/1.1 ")
        assert not status.startswith(b"HTTP/1.1 5"), request
    assert answered > 200
    assert impatient.post(json.loads(CALL)).json()["attributeScores"]["TOXICITY"]["summaryScore"]["value"] == value_of(
        "a text", "TOXICITY"
    )
    assert_no_text(caplog, capfd)


def assert_no_text(caplog, capfd):
    others = ("urllib3", "uvicorn.access")  # the test's own client, and a log of paths that the command has not
    said = "\n".join(caplog.handler.format(record) for record in caplog.records if not record.name.startswith(others))
    assert MARKER not in said
    assert "Traceback" not in said
    assert MARKER not in "".join(capfd.readouterr())


def test_errors_are_logged_by_their_kind_and_place(caplog):
    def fail():
        raise ValueError(MARKER)

    def callback(text):
        fail()

    async def main():
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(log_loop_failure)
        loop.call_soon(callback, MARKER)
        await asyncio.sleep(0.01)

    asyncio.run(main())
    try:
        fail()
    except ValueError:
        logging.getLogger("a").exception("it failed")
    lines = [TextFreeFormatter().format(record) for record in caplog.records]
    assert len(lines) == 2
    for line in lines:
        assert "ValueError" in line
        assert MARKER not in line
        assert "in fail" in line


class Faulty(FakeScorer):
    def __init__(self, result):
        super().__init__()
        self.result = result

    def score(self, texts, attributes=("TOXICITY",)):
        if isinstance(self.result, Exception):
            raise self.result
        values = np.full((len(texts), 1), self.result)
        found = Scores(np.zeros((len(texts), 1)), ("TOXICITY",), (None,) * len(texts))
        object.__setattr__(found, "values", values)
        return found


@pytest.mark.parametrize("result", [ValueError(MARKER), MemoryError(MARKER), float("nan"), float("inf"), -0.5, 1.5])
def test_a_scorer_that_fails_is_an_error_and_no_score(result, caplog):
    with Running(make_app(Faulty(result))) as running:
        response = running.post(analyze_body(MARKER, ["TOXICITY"]))
        assert response.status_code in (500, 503)
        assert response.json()["error"]["status"] in ("INTERNAL", "UNAVAILABLE")
        assert "attributeScores" not in response.json()
        assert running.post(analyze_body(MARKER, ["TOXICITY"], span_annotations=True)).status_code >= 500
    said = "\n".join(caplog.handler.format(record) for record in caplog.records if "urllib3" not in record.name)
    assert MARKER not in said


def test_freed_memory_is_given_back_again_and_again(monkeypatch):
    calls, twice = [], threading.Event()

    def trim(kept):
        calls.append(kept)
        if len(calls) == 2:
            twice.set()

    monkeypatch.setattr(freed_memory, "_trim", lambda: trim)
    with freed_memory.memory_given_back(0.001):
        assert twice.wait(5)
    monkeypatch.setattr(freed_memory, "_trim", lambda: None)
    with freed_memory.memory_given_back(0.001):
        pass


# ---------------------------------------------------------------------------------------------------------------------
# Browsers


def origin_of(response):
    return response.headers.get("Access-Control-Allow-Origin")


def test_pages_of_other_sites_may_call_only_where_they_were_let_in(server):
    app = make_app(
        FakeScorer(), api_keys=[KEY], quota_per_minute=1, cors=["https://App.example:443/", "http://localhost:3000"]
    )
    with Running(app) as running:
        url = running.url + ANALYZE_PATH
        for origin, allowed in (
            ("https://app.example", True),
            ("http://localhost:3000", True),
            ("https://b.example", False),
        ):
            asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            asked["Access-Control-Request-Headers"] = "content-type,x-goog-api-key"
            asked["Access-Control-Request-Private-Network"] = "true"
            response = requests.options(url, headers=asked, timeout=10)
            assert (response.status_code == 200) is allowed
            assert origin_of(response) == (origin if allowed else None)
            assert not allowed or "x-goog-api-key" in response.headers["Access-Control-Allow-Headers"].lower()
        own = {"Origin": "https://app.example"}
        codes = []
        for key in ("", "wrong", KEY, KEY):
            response = running.post(json.loads(CALL), headers=own | {"X-Goog-Api-Key": key})
            codes.append(response.status_code)
            assert origin_of(response) == own["Origin"]
            assert "Origin" in response.headers["Vary"]
            assert "Retry-After" in response.headers["Access-Control-Expose-Headers"]
        assert codes == [403, 400, 200, 429]
        assert origin_of(requests.get(running.url + "/none", headers=own, timeout=10)) == own["Origin"]
        assert origin_of(running.post({}, headers={"Origin": "https://b.example"})) is None
    with Running(make_app(Faulty(ValueError()), cors=["*"])) as running:
        response = running.post(json.loads(CALL), headers=own)
        assert (response.status_code, origin_of(response)) == (500, "*")
    assert origin_of(server.post(json.loads(CALL), headers=own)) is None
    assert requests.options(server.url + ANALYZE_PATH, headers=own, timeout=10).status_code == 405


@pytest.mark.parametrize(
    "url", ["https://scores.example/perspective", "http://scores.example:8080/", "https://[::1]:1"]
)
def test_the_discovery_document_may_name_a_public_address(url):
    with Running(make_app(FakeScorer(), public_url=url)) as running:
        found = requests.get(running.url + "/$discovery/rest?version=v1alpha1", timeout=10).json()
    assert found["rootUrl"] == found["baseUrl"] == url.rstrip("/") + "/"
