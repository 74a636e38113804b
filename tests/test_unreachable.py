"""Services that cannot be reached: told at once, with what it was, by every client and by the command's exit code."""

import socket
import ssl
import threading
import time

import numpy as np
import pytest
import requests
from commands import run_command
from requests import exceptions as failures
from urllib3 import exceptions as below

from rectify.chat import EndpointChat
from rectify.cli import main
from rectify.errors import ChatError, EndpointError
from rectify.scoring import score_command
from rectify.scoring.perspective import PerspectiveScorer
from rectify.scoring.scores import Reason, Scores
from rectify.scoring.stub import StubServer, StubService
from rectify.scoring.unreachable import why_unreachable


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("PERSPECTIVE_API_KEY", "PERSPECTIVE_API_URL", "CHAT_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def port():
    """Of a server that says the bytes `port.says` to everybody, whatever they want."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        class Port(int):
            says = b""

        number = Port(listening.getsockname()[1])

        def serve():
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(2**16)
                    connection.sendall(number.says)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield number
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def told(url, says):
    """Both clients tell of it, with all their patience, at once."""
    begin = time.monotonic()
    with pytest.raises(EndpointError, match=says), PerspectiveScorer(endpoint=url, rate=1000) as scorer:
        scorer.score(["one", "two"])
    with pytest.raises(ChatError, match=says), EndpointChat(url, "m") as chat:
        chat.reply([{"role": "user", "content": "one"}], 0)
    assert time.monotonic() - begin < 3


def test_a_port_where_nothing_listens():
    told(f"http://127.0.0.1:{free_port()}", r"it refuses connections: is it running\?")


def test_a_name_that_does_not_resolve(monkeypatch):
    def no_address(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_address)
    told("http://nowhere.invalid", "its name does not resolve")


def test_tls_where_there_is_none_and_the_other_way_round(port):
    with StubServer(StubService()) as server:
        told(server.url.replace("http:", "https:"), r"it does not speak TLS: is it http://\?")
    port.says = b"\x15\x03\x01\x00\x02\x02\x46\r\n"
    told(f"http://127.0.0.1:{port}", r"it does not speak HTTP: is it https://\?")
    port.says = b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n"
    told(f"http://127.0.0.1:{port}", "answers 400, and not in the service's own form")


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_refuses_or_is_not_there(port, monkeypatch, scheme):
    url = f"{scheme}://service.invalid"
    monkeypatch.setenv(f"{scheme}_proxy", f"http://127.0.0.1:{port}")
    for status, phrase in ((407, "Proxy Authentication Required"), (403, "Forbidden")):
        port.says = f"HTTP/1.1 {status} {phrase}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
        told(url, f"the proxy refuses, with {status}" if scheme == "https" else f"something on the way.* {status}")
    monkeypatch.setenv(f"{scheme}_proxy", f"http://127.0.0.1:{free_port()}")
    told(url, "the proxy refuses connections")


@pytest.mark.parametrize("proxied", [False, True])
def test_a_head_that_comes_byte_by_byte_is_not_waited_for(proxied, monkeypatch):
    over = threading.Event()

    def drip(listening):
        connection, _ = listening.accept()
        with connection:
            while not over.wait(0.02):
                connection.sendall(b"H")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=drip, args=[listening], daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        if proxied:
            monkeypatch.setenv("https_proxy", url)
        begin = time.monotonic()
        endpoint = "https://service.invalid" if proxied else url
        with PerspectiveScorer(endpoint=endpoint, rate=1000, timeout=0.2, retries=0) as scorer:
            assert scorer.score(["one"]).reasons == (Reason.TIMEOUT,)
        assert time.monotonic() - begin < 2
        over.set()
        thread.join()


def test_certificates_that_are_not_there(monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere/certificates.pem")
    told("https://127.0.0.1:1", "the certificates that the environment names cannot be read")


def wrapped(error, kind=failures.ConnectionError):
    return kind(below.MaxRetryError(None, "/?key=SECRET", error))


def untrusted():
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_message, error.reason = "self-signed certificate", "CERTIFICATE_VERIFY_FAILED"
    return error


def eof():
    return ssl.SSLEOFError(8, "UNEXPECTED_EOF_WHILE_READING")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            wrapped(below.SSLError(untrusted()), failures.SSLError),
            r"certificate is not trusted \(self-signed certificate",
        ),
        (wrapped(below.SSLError(ssl.SSLError(1, "x")), failures.SSLError), "TLS fails"),
        (wrapped(below.SSLError(eof()), failures.SSLError), None),
        (wrapped(below.NewConnectionError(None, "x")), None),
        (wrapped(OSError(101, "Network is unreachable")), "no way leads to its address"),
        (
            wrapped(below.ProxyError("x", OSError("Tunnel connection failed: 502 Bad gateway")), failures.ProxyError),
            None,
        ),
        (wrapped(below.ProxyError("x", OSError("Tunnel connection failed: 429 Slow")), failures.ProxyError), None),
        (wrapped(below.ProxyError("x", socket.gaierror(-2, "x")), failures.ProxyError), "the proxy's name"),
        (failures.InvalidURL("http://u:SECRET@/"), "cannot be used"),
        (failures.ConnectionError(below.ProtocolError("x", ConnectionResetError(104, "reset"))), None),
        (requests.RequestException("SECRET"), None),
    ],
    ids=range(11),
)
def test_what_may_pass_is_told_from_what_does_not(error, says):
    found = why_unreachable(error)
    if says is None:
        assert found is None
    else:
        with pytest.raises(RuntimeError, match=says):
            raise RuntimeError(found)
        assert "SECRET" not in found


def test_the_exit_code_says_whether_a_score_may_be_had_another_time(capsys, tmp_path, monkeypatch):
    class Failing:
        name, revision, attributes = "failing", "1", ("TOXICITY",)

        def __init__(self, reason):
            self.reason = reason

        def score(self, texts, attributes=("TOXICITY",)):
            return Scores(np.full((len(texts), 1), np.nan), tuple(attributes), (self.reason,) * len(texts))

    for reason in Reason:
        with monkeypatch.context() as patched:
            patched.setattr(score_command, "load_scorer", lambda *_, reason=reason, **__: Failing(reason))
            for output in ([], ["--output", tmp_path / f"{reason}.jsonl"]):
                assert run_command(main, capsys, "score", "--text", "a", *output)[0] == (3 if reason.passing else 0)
    words = ("score", "--text", "a", "--scorer", "perspective", "--endpoint", f"http://127.0.0.1:{free_port()}")
    code, out, err = run_command(main, capsys, *words, "--output", tmp_path / "out.jsonl")
    assert (code, out) == (2, "")
    assert "is out of reach (it refuses connections" in err.splitlines()[-1]
    with StubServer(StubService()) as server:  # mended, it goes on
        code, _, err = run_command(main, capsys, *words[:-1], server.url, "--output", tmp_path / "out.jsonl")
    assert code == 0, err
    assert "scores" in (tmp_path / "out.jsonl").read_text()
    for words in (["score"], ["detect"], ["build", "spans"], ["build", "rationales"]):
        assert "Exit code: 2" in " ".join(run_command(main, capsys, *words, "--help")[1].split())
