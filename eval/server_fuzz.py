"""`rectify serve` among people and attackers: does everyone else still get the right answer, and soon?

python eval/server_fuzz.py
python eval/server_fuzz.py --requests 2000 --crowd 200 --seconds 5

The server is the real command in a process of its own, on a free port of this machine. Wild requests (see
`wild_requests.py`) come from some connections, while a crowd of others stays silent, or sends a byte a second of a head
or a body; each of the crowd that is cut off comes again after a second. A probe in a process of its own asks for the
score of a made-up text every 20 ms, by turns on a new connection and on one that is kept, and so do many clients in the
end, the crowd still there. A first part of the wild requests, and the crowd, warm the server up before its memory is
measured.

The figures go to standard output as a line of JSON; the exit code is 2 where one misses its bar.
"""

import argparse
import asyncio
import json
import math
import multiprocessing
import os
import random
import re
import resource
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from server_load import TOLERANCE, expected_scores, health, made_up_texts, served  # beside this file
from wild_requests import Wild, WildRequests

from rectify.command_line import Parser, execute, say
from rectify.errors import InvalidArgumentError, RectifyError
from rectify.json_files import write_json
from rectify.scoring.load import load_scorer
from rectify.scoring.wire import ANALYZE_PATH, analyze_body

MARKER = "zyxmarkerxyz"
MAX_STALL, MAX_GROWTH, MIN_RATE = 0.5, 20.0, 300.0  # seconds, MB, requests a second
PROBE_SECONDS = 0.02
PATIENCE = 20.0  # longer than the server waits for a head
AT_ONCE = 12
WARM_UP, WARM_UP_SECONDS = 2000, 3
SETTLING = 12.0  # the server gives memory back every ten seconds
TEXTS = 5000


def make_parser() -> Parser:
    parser = Parser(prog="server_fuzz.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--requests", type=int, default=20_000, help="wild ones (default: %(default)s)")
    parser.add_argument("--crowd", type=int, default=1100, help="slow connections (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=64, help="busy ones in the end (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=15, help="that these ask (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the wild requests (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures there too")
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# Good clients


class Calls:
    """Good requests, each with the answer that is right."""

    def __init__(self, count: int, seed: int) -> None:
        scorer = load_scorer("pocket")
        self.expected = expected_scores(scorer, made_up_texts(count, random.Random(seed)))
        self.requests = []
        for text, score in self.expected.items():
            body = json.dumps(analyze_body(text, ["TOXICITY"])).encode()
            head = f"POST {ANALYZE_PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            self.requests.append((head.encode() + body, score))

    def cycle(self, start: int = 0) -> Iterator[tuple[bytes, float]]:
        """All of them, again and again."""
        start %= len(self.requests)
        return cycle([*self.requests[start:], *self.requests[:start]])


def verdict(status: int, body: bytes, score: float) -> str:
    """How an answer is: right, wrong, or an error's number."""
    if status != 200:
        return str(status)
    found = re.search(rb'"summaryScore":\{"value":([0-9.eE+-]+)', body)
    return "right" if found and abs(float(found[1]) - score) <= TOLERANCE else "wrong"


def read_answer(stream: socket.SocketIO | Any) -> tuple[int, bytes]:
    """Status and body of an answer, from a file of bytes.

    Raises:
        ConnectionError: there is none.
    """
    status = stream.readline()
    if not status.startswith(b"HTTP/1.1 "):
        raise ConnectionError("no answer")
    length = 0
    while (line := stream.readline()) not in (b"\r\n", b""):
        if line.lower().startswith(b"content-length:"):
            length = int(line.partition(b":")[2])
    return int(status.split()[1]), stream.read(length)


def probe(port: int, calls: Calls, stop: Any, results: Any) -> None:
    """Ask until told to stop; puts how long each answer took, and how it was."""
    waits, verdicts, kept = [], Counter(), None
    for number, (request, score) in enumerate(calls.cycle()):
        if stop.is_set():
            break
        begin = time.perf_counter()
        try:
            if number % 2 or kept is None:
                connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
            else:
                connection = kept
            connection.sendall(request)
            with connection.makefile("rb") as stream:
                verdicts[verdict(*read_answer(stream), score)] += 1
            if kept is None:
                kept = connection
            elif connection is not kept:
                connection.close()
        except OSError as error:
            verdicts[type(error).__name__] += 1
            kept = None
        waits.append(time.perf_counter() - begin)
        time.sleep(max(0.0, PROBE_SECONDS - waits[-1]))
    results.put((waits, verdicts))


async def busy(port: int, calls: Calls, clients: int, seconds: float) -> tuple[float, list[int], Counter]:
    """Answers a second, those of each second, and how they were, of clients that ask without a pause."""
    verdicts: Counter = Counter()
    begin = time.perf_counter()
    seen = [0] * math.ceil(seconds)

    async def ask(client: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for request, score in calls.cycle(client * 7919):
            writer.write(request)
            try:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(re.search(rb"(?i)content-length: (\d+)", head)[1])
                answer = verdict(int(head.split()[1]), await reader.readexactly(length), score)
            except (OSError, EOFError) as error:
                verdicts[type(error).__name__] += 1
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                continue
            now = time.perf_counter() - begin
            if now >= seconds:
                break
            verdicts[answer] += 1
            seen[int(now)] += 1
        writer.close()

    await asyncio.gather(*(ask(client) for client in range(clients)))
    return sum(seen) / seconds, seen, verdicts


# ---------------------------------------------------------------------------------------------------------------------
# The others


async def wild(port: int, requests: Iterator[Wild], statuses: Counter) -> None:
    """Send wild requests one after another, each on a connection of its own, and count how they are answered."""
    for request in requests:
        writer = None
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request.data)
            status = await asyncio.wait_for(_status(reader), PATIENCE if request.whole else 0.05)
            statuses[status] += 1
        except TimeoutError:
            statuses["silence" if request.whole else "unfinished"] += 1
        except (OSError, EOFError):
            statuses["closed"] += 1
        finally:
            if writer is not None:
                writer.transport.abort()


async def _status(reader: asyncio.StreamReader) -> str:
    """The status of the answer, after those that only say to go on."""
    while True:
        line = await reader.readline()
        if not line:
            return "closed"
        if line.startswith(b"HTTP/") and not line.startswith(b"HTTP/1.1 100"):
            return line.split()[1].decode()


async def slow(port: int, kind: int, opened: list[int]) -> None:
    """One of the crowd: silent, or slow with its head or its body; it comes again when it is cut off."""
    body = b"Host: a\r\nContent-Length: 5000\r\n\r\n" + MARKER.encode()
    beginning = {
        0: b"",
        1: f"POST {ANALYZE_PATH}?{MARKER} HTT".encode(),
        2: f"POST {ANALYZE_PATH} HTTP/1.1\r\n".encode() + body,
        3: b"POST /batch HTTP/1.1\r\nContent-Type: multipart/mixed; boundary=a\r\n" + body,
        4: b"GET / HTTP/1.1\r\n" + body,
        5: b"HEAD /healthz HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
    }[kind]
    while True:
        writer = None
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            opened[0] += 1
            writer.write(beginning)
            while True:
                await asyncio.sleep(1)
                if reader.at_eof() or writer.transport.is_closing():
                    break
                if kind:
                    writer.write(b"a")
        except OSError:
            pass
        finally:
            if writer is not None:
                writer.transport.abort()
        await asyncio.sleep(1)


# ---------------------------------------------------------------------------------------------------------------------


def megabytes(process: psutil.Process) -> float:
    return process.memory_info().rss / 1e6


async def attack(port: int, server: psutil.Process, calls: Calls, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything at once; the figures."""
    processes = multiprocessing.get_context("fork")
    stop, results = processes.Event(), processes.Queue()
    watcher = processes.Process(target=probe, args=(port, calls, stop, results), daemon=True)
    watcher.start()
    opened = [0]
    crowd = [asyncio.create_task(slow(port, number % 6, opened)) for number in range(arguments.crowd)]
    requests, statuses = iter(WildRequests(arguments.seed, MARKER)), Counter[str]()
    shares = min(WARM_UP, arguments.requests), max(0, arguments.requests - WARM_UP)
    for number, share in enumerate(islice(requests, count) for count in shares):
        before, begin = megabytes(server), time.perf_counter()  # in the end: after the warm-up
        await asyncio.gather(*(wild(port, share, statuses) for _ in range(AT_ONCE)))
        wild_seconds = time.perf_counter() - begin
        if number == 0:
            await busy(port, calls, arguments.clients, WARM_UP_SECONDS)
            await asyncio.sleep(SETTLING)
    rate, seconds, verdicts = await busy(port, calls, arguments.clients, arguments.seconds)
    await asyncio.sleep(SETTLING)
    after = megabytes(server)
    stop.set()
    waits, probed = await asyncio.to_thread(results.get, True, PATIENCE * 2)
    watcher.join()
    for task in crowd:
        task.cancel()
    await asyncio.gather(*crowd, return_exceptions=True)
    good = probed + verdicts
    return {
        "wild_requests": sum(statuses.values()),
        "wild_per_second": round(shares[-1] / wild_seconds, 1),
        "statuses": dict(sorted(statuses.items())),
        "crowd": arguments.crowd,
        "crowd_connections": opened[0],
        "good_answers": dict(sorted(good.items())),
        "server_errors": sum(count for status, count in (statuses + good).items() if status.startswith("5")),
        "unanswered": statuses["silence"],
        "failed_good": sum(good.values()) - good["right"],
        "probes": len(waits),
        "probe_p50_ms": round(1e3 * sorted(waits)[len(waits) // 2], 1),
        "probe_p99_ms": round(1e3 * sorted(waits)[len(waits) * 99 // 100], 1),
        "longest_stall_s": round(max(waits), 3),
        "rss_mb": round(before, 1),
        "rss_growth_mb": round(after - before, 1),
        "clients": arguments.clients,
        "requests_per_second": round(rate, 1),
        "requests_in_slowest_second": min(seconds),
    }


def run(arguments: argparse.Namespace) -> None:
    for name in ("requests", "clients", "seconds"):
        if getattr(arguments, name) < 1:
            raise InvalidArgumentError(f"{name} is {getattr(arguments, name)}: give 1 or more")
    needed, most = arguments.crowd + arguments.clients + 256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if most != resource.RLIM_INFINITY and most < needed:
        raise RectifyError(f"{most} files may be open, {needed} are needed: raise the limit, or give a smaller crowd")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, most))
    calls = Calls(TEXTS, arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "stderr"
        with served(["--cors", "https://app.example"], said) as (url, process):
            say(f"{arguments.requests} wild requests and {arguments.crowd} slow connections go to {url}")
            report = asyncio.run(attack(urlsplit(url).port, psutil.Process(process.pid), calls, arguments))
            alive = health(url)["status"]
        log = said.read_text(errors="replace")
    report |= {
        "health": alive,
        "exit_code": process.returncode,
        "log_lines": log.count("\n") - 1,
        "texts_in_log": log.count(MARKER) + log.count("idiot"),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "seed": arguments.seed,
    }
    print(json.dumps(report))
    if arguments.output:
        write_json(arguments.output, report)
    missed = [
        f"{name} is {report[name]}, not {bar}"
        for name, bar, kept in (
            ("server_errors", 0, report["server_errors"] == 0),
            ("unanswered", 0, report["unanswered"] == 0),
            ("failed_good", 0, report["failed_good"] == 0),
            ("longest_stall_s", f"{MAX_STALL} or less", report["longest_stall_s"] <= MAX_STALL),
            ("rss_growth_mb", f"{MAX_GROWTH} or less", report["rss_growth_mb"] <= MAX_GROWTH),
            ("requests_in_slowest_second", f"{MIN_RATE} or more", report["requests_in_slowest_second"] >= MIN_RATE),
            ("texts_in_log", 0, report["texts_in_log"] == 0),
        )
        if not kept
    ]
    if missed:
        said_lines = "; ".join(log.splitlines()[1:6])
        raise RectifyError(f"{'; '.join(missed)}{f' (the server said: {said_lines})' if said_lines else ''}")


def main() -> int:
    return execute(run, make_parser(), None)


if __name__ == "__main__":
    sys.exit(main())
