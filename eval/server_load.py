"""`rectify serve` under load: requests a second, how long they wait, and whether every answer is right.

python eval/server_load.py --clients 32 --seconds 20
python eval/server_load.py --scorer pocket --input shared/data/realtoxicityprompts/prompts.jsonl --output load.json

The server is the real command in a process of its own; it has no cache. The load comes from wrk, a public tool
(https://github.com/wg/wrk, `apt-get install wrk`), through a Lua script: text i goes with the client token i, and an
answer must hold a token and the score that this process gave that token's text. Every text goes once, unless they run
out: `repeated` counts answers to texts that had been answered before. `alike` is the share of pairs of texts whose
scores are too near to each other to show that the two were mixed up. wrk corrects its latencies for the requests that
a client would have sent while it waited.

The result goes to standard output as a line of JSON; the exit code is 2 where an answer is wrong or lacking.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import requests

from rectify.command_line import Parser, execute, say
from rectify.errors import InvalidArgumentError, RectifyError
from rectify.json_files import write_json
from rectify.scoring.load import load_scorer
from rectify.scoring.records import read_records
from rectify.scoring.scores import Scorer
from rectify.scoring.serve_command import KEYS_VARIABLE
from rectify.scoring.wire import ANALYZE_PATH, MAX_BYTES, analyze_body

COMMAND = [sys.executable, "-c", "import sys; from rectify.scoring.serve_command import main; sys.exit(main())"]
TOLERANCE = 1e-4
TEXTS_A_SECOND = 1000
START_SECONDS, END_SECONDS = 120, 30
LATE_SECONDS = 10

WORDS = """a an the you they we he she it is are was were so very not never always and but or with without of in on
idiot fool moron liar friend teacher doctor neighbour dog train coffee garden weather movie game idea letter stupid
ugly disgusting lovely kind slow quick honest damn hell hate love like trust want kill help thank ignore shut up go home
today again please really nobody everyone"""

# wrk runs `setup` and `done` in one state, all else in a state a thread; `get` reaches the globals of a thread
SCRIPT = r"""
local threads = {}

function setup(thread)
  thread:set("number", #threads)
  table.insert(threads, thread)
end

-- arguments: a file of expected scores and bodies, the number of threads, the method's path, the tolerance
function init(arguments)
  local share, path, token = tonumber(arguments[2]), arguments[3], 0
  tolerance = tonumber(arguments[4])
  calls, expected, answered = {}, {}, {}
  made, answers, wrong, refused, repeated, example = 0, 0, 0, 0, 0, ""
  for line in io.lines(arguments[1]) do
    if token % share == number then
      local score, body = line:match("^(%S+) (.*)$")
      table.insert(calls, wrk.format("POST", path, {["Content-Type"] = "application/json"}, body))
      expected[token] = tonumber(score)
    end
    token = token + 1
  end
end

function request()
  made = made + 1
  return calls[(made - 1) % #calls + 1]
end

function response(status, headers, body)
  answers = answers + 1
  if status ~= 200 then
    refused = refused + 1
    return
  end
  local token = tonumber(body:match('"clientToken":"(%d+)"'))
  local score = tonumber(body:match('"summaryScore":{"value":([%d.eE+-]+)'))
  local wanted = expected[token]
  if not (wanted and score and math.abs(score - wanted) <= tolerance) then
    wrong = wrong + 1
    example = string.format("%s for text %s, not %s", tostring(score), tostring(token), tostring(wanted))
  elseif answered[token] then
    repeated = repeated + 1
  else
    answered[token] = true
  end
end

function done(summary, latency)
  local sums, example, errors = {}, "", summary.errors
  for _, thread in ipairs(threads) do
    for _, name in ipairs({"made", "answers", "wrong", "refused", "repeated"}) do
      sums[name] = (sums[name] or 0) + thread:get(name)
    end
    if thread:get("example") ~= "" then example = thread:get("example") end
  end
  io.write(string.format(
    '\n{"seconds": %.3f, "p50": %.3f, "p90": %.3f, "p99": %.3f, "made": %d, "answers": %d, "wrong": %d, '
      .. '"refused": %d, "repeated": %d, "broken": %d, "late": %d, "example": "%s"}\n',
    summary.duration / 1e6,
    latency:percentile(50) / 1e3, latency:percentile(90) / 1e3, latency:percentile(99) / 1e3,
    sums.made, sums.answers, sums.wrong, sums.refused, sums.repeated,
    errors.connect + errors.read + errors.write, errors.timeout, example
  ))
end
"""


def make_parser() -> Parser:
    parser = Parser(prog="server_load.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--clients", type=int, default=32, help="connections kept busy (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="of wrk, that share the clients (default: %(default)s)")
    parser.add_argument("--texts", type=int, help=f"at most (default: {TEXTS_A_SECOND} for each second)")
    parser.add_argument("--input", metavar="FILE", help="records to take the texts from (default: made-up texts)")
    parser.add_argument("--scorer", default="pocket", help="as in `rectify serve` (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the texts and their order (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result there too")
    return parser


@contextmanager
def served(flags: Sequence[str], said: Path, key: str = "") -> Iterator[tuple[str, subprocess.Popen]]:
    """The address, without a slash at its end, and the process of a `rectify serve` for the time of a `with` block.

    Args:
        flags: of the command, but for host and port.
        said: a file for what it writes to standard error.
        key: the API key that it wants; empty for none.

    Raises:
        RectifyError: it does not come up.
    """
    environment = {name: value for name, value in os.environ.items() if name != KEYS_VARIABLE}
    with said.open("w") as file:
        process = subprocess.Popen(
            [*COMMAND, "--port", "0", *flags], stderr=file, env=environment | ({KEYS_VARIABLE: key} if key else {})
        )
    try:
        yield _address(process, said), process
    finally:
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def serving(flags: Sequence[str], key: str = "") -> Iterator[str]:
    """The address of a `rectify serve`, whose later words are repeated at the end; see `served`."""
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "stderr"
        try:
            with served(flags, said, key) as (url, _):
                yield url
        finally:
            since = said.read_text().partition(" serves at ")[2].partition("\n")[2].strip()
            if since:
                say(f"the server said: {since}")


def _address(process: subprocess.Popen, said: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        found = re.search(r" serves at (http\S+)/\n", said.read_text())
        if found:
            health(found[1])
            return found[1]
        time.sleep(0.05)
    what = f"did not come up within {START_SECONDS} s" if process.poll() is None else "ended"
    raise RectifyError(f"the server {what}: {said.read_text().strip() or 'it said nothing'}")


def health(url: str) -> dict[str, Any]:
    """What a server says of itself.

    Raises:
        RectifyError: it does not answer.
    """
    try:
        response = requests.get(f"{url}/healthz", timeout=START_SECONDS)
        response.raise_for_status()
        return response.json()
    except requests.RequestException as error:
        raise RectifyError(f"the server at {url} does not answer ({type(error).__name__}): see what it said") from error


def made_up_texts(count: int, draw: random.Random) -> list[str]:
    """Distinct texts of 6 to 16 words."""
    words, texts = WORDS.split(), dict[str, None]()
    while len(texts) < count:
        texts[" ".join(draw.choices(words, k=draw.randint(6, 16)))] = None
    return list(texts)


def read_texts(path: str, count: int, draw: random.Random) -> list[str]:
    """Distinct texts of a file of records, in a random order, so many at most."""
    texts = list(dict.fromkeys(chain.from_iterable(record.texts for record in read_records([path]))))
    draw.shuffle(texts)
    return texts[:count]


def expected_scores(scorer: Scorer, texts: list[str]) -> dict[str, float]:
    """The score of each text that has one, and that the server takes.

    Raises:
        RectifyError: there are fewer than two.
    """
    scores = scorer.score(texts, scorer.attributes[:1])
    found = {
        text: float(value)
        for text, value, reason in zip(texts, scores.values[:, 0], scores.reasons, strict=True)
        if reason is None and len(text.encode()) <= MAX_BYTES
    }
    if len(found) < 2:
        raise RectifyError(f"{len(found)} of {len(texts)} texts can be scored: give two or more")
    return found


def alike(scores: np.ndarray, seed: int) -> float:
    """The share of pairs, of as many drawn ones as there are scores, that the tolerance does not tell apart."""
    others = np.random.default_rng(seed).permutation(scores)
    return round(float(np.mean(np.abs(scores - others) <= TOLERANCE)), 4)


def load(wrk: str, url: str, lines: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """What wrk's script counts; see its `done`.

    Args:
        wrk: the tool's path.
        url: of the server.
        lines: expected score and body of each request.
        arguments: of the command.

    Raises:
        RectifyError: wrk fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        script, calls = Path(folder) / "load.lua", Path(folder) / "calls.txt"
        script.write_text(SCRIPT)
        calls.write_text("\n".join(lines))
        flags = [f"-c{arguments.clients}", f"-t{arguments.threads}", f"-d{arguments.seconds}s"]
        flags += [f"--timeout={LATE_SECONDS}s", f"--script={script}", url, "--"]
        own = [str(calls), str(arguments.threads), ANALYZE_PATH, str(TOLERANCE)]
        done = subprocess.run([wrk, *flags, *own], capture_output=True, text=True)
    result = done.stdout.strip().rpartition("\n")[2]
    if done.returncode or not result.startswith("{"):
        raise RectifyError(f"wrk failed (exit code {done.returncode}): {(done.stderr or done.stdout).strip()}")
    return json.loads(result)


def run(arguments: argparse.Namespace) -> None:
    arguments.texts = TEXTS_A_SECOND * arguments.seconds if arguments.texts is None else arguments.texts
    for name in ("clients", "seconds", "threads", "texts"):
        if getattr(arguments, name) < 1:
            raise InvalidArgumentError(f"{name} is {getattr(arguments, name)}: give 1 or more")
    if arguments.clients % arguments.threads or arguments.texts < arguments.threads:
        raise InvalidArgumentError(
            f"threads is {arguments.threads}: give a divisor of the {arguments.clients} clients, and a text for each"
        )
    wrk = shutil.which("wrk")
    if wrk is None:
        raise RectifyError("wrk is not installed: apt-get install wrk, or build it from https://github.com/wg/wrk")
    draw = random.Random(arguments.seed)
    if arguments.input:
        texts = read_texts(arguments.input, arguments.texts, draw)
    else:
        texts = made_up_texts(arguments.texts, draw)
    scorer = load_scorer(arguments.scorer)
    expected = expected_scores(scorer, texts)
    attribute = scorer.attributes[0]
    bodies = [analyze_body(text, [attribute]) | {"clientToken": str(token)} for token, text in enumerate(expected)]
    lines = [f"{score!r} {json.dumps(body)}" for score, body in zip(expected.values(), bodies, strict=True)]
    with serving(["--scorer", arguments.scorer]) as url:
        say(f"{arguments.clients} clients ask {url} for {arguments.seconds} s")
        found = load(wrk, url, lines, arguments)
        served = health(url)["scorer"]
    # one request is made to look at and not sent; at the end, each client may wait for an answer
    lost = max(0, found["made"] - 1 - found["answers"] - arguments.clients)
    report = {
        "scorer": served["name"],
        "revision": served["revision"],
        "attribute": attribute,
        "clients": arguments.clients,
        "threads": arguments.threads,
        "cores": os.cpu_count(),
        "seconds": found["seconds"],
        "requests_per_second": round(found["answers"] / found["seconds"], 1),
        **{f"{name}_ms": found[name] for name in ("p50", "p90", "p99")},
        "answers": found["answers"],
        "wrong": found["wrong"],
        "failures": found["refused"] + found["broken"] + found["late"] + lost,
        "repeated": found["repeated"],
        "alike": alike(np.array(list(expected.values())), arguments.seed),
        "texts": len(expected),
        "texts_sha256": hashlib.sha256("\n".join(expected).encode()).hexdigest(),
        "input": arguments.input,
        "seed": arguments.seed,
    }
    print(json.dumps(report))
    if arguments.output:
        write_json(arguments.output, report)
    if report["repeated"]:
        say(f"{report['repeated']} answers are to texts that had been answered before: give more than {len(expected)}")
    if report["wrong"]:
        raise RectifyError(f"{report['wrong']} of {report['answers']} answers are wrong, as {found['example']}")
    if report["failures"] or not report["answers"]:
        failed = {name: found[name] for name in ("refused", "broken", "late")} | {"lost": lost}
        raise RectifyError(f"requests failed ({failed}), {report['answers']} were answered: see what the server said")


def main() -> int:
    return execute(run, make_parser(), None)


if __name__ == "__main__":
    sys.exit(main())
