"""`rectify score` under `kill -9`: whether a run that is killed again and again ends as one that is not.

python eval/kill_score.py --kills 10 --texts 4000
python eval/kill_score.py --scorer pocket --input shared/data/realtoxicityprompts/prompts.jsonl

Each run is the real command in a process of its own. `perspective` asks an HTTP stub here, which counts the calls: a
text that was asked for more than once has been paid for more than once. The result goes to standard output as JSON.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

from rectify.command_line import Parser, execute, say
from rectify.errors import RectifyError
from rectify.scoring.records import SCORES, Record, at
from rectify.scoring.stub import Fault, FaultKind, StubServer, StubService

COMMAND = [sys.executable, "-c", "import sys; from rectify.scoring.score_command import main; sys.exit(main())"]
WORKERS = 8


def make_parser() -> Parser:
    parser = Parser(prog="kill_score.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--scorer", default="perspective", help="default: %(default)s, of an HTTP stub")
    parser.add_argument("--input", metavar="FILE", help="records to score (default: made-up texts)")
    parser.add_argument("--texts", type=int, default=4000, help="made-up texts (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--longest", type=float, default=1.0, help="seconds of scoring before a kill, at most")
    parser.add_argument("--latency", type=float, default=0.01, help="seconds of a call to the stub")
    parser.add_argument("--attributes", nargs="+", default=["TOXICITY"])
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    return parser


class Runs:
    """Runs of the command on one input.

    Args:
        flags: of the command, but for its output.
        service: the stub that counts the calls.
    """

    def __init__(self, flags: list[str], service: StubService) -> None:
        self.flags, self.service = flags, service

    def calls(self) -> int:
        return sum(self.service.calls.copy().values())

    def start(self, output: Path) -> subprocess.Popen:
        environment = os.environ | {"PERSPECTIVE_API_KEY": "", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*COMMAND, *self.flags, "--output", str(output)], stderr=subprocess.PIPE, text=True, env=environment
        )

    def finish(self, output: Path) -> None:
        process = self.start(output)
        _, said = process.communicate()
        if process.returncode:
            raise RectifyError(f"the command failed: {said}")

    def kill(self, output: Path, after: float) -> bool:
        """Whether a run was killed so many seconds after it began to score; it may have ended before."""
        before = self.progress(output)
        process = self.start(output)
        while process.poll() is None and self.progress(output) == before:
            time.sleep(0.002)
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
        return process.returncode < 0

    def progress(self, output: Path) -> tuple[int, int]:
        return self.calls(), output.stat().st_size if output.exists() else 0


def scores_of(path: Path) -> list[tuple[str, dict[str, float]]]:
    """Each text with its scores, in the file's order."""
    found = []
    for line in path.read_bytes().splitlines():
        value = json.loads(line)
        record = Record.of(value)
        found += [
            (text, at(value, place).get(SCORES, {})) for text, place in zip(record.texts, record.places, strict=True)
        ]
    return found


def largest_difference(one: list, other: list) -> float:
    """Of two equal lists of texts, the largest difference of a score; infinity where they are not equal."""
    if [(text, set(scores)) for text, scores in one] != [(text, set(scores)) for text, scores in other]:
        return float("inf")
    pairs = zip(one, other, strict=True)
    return max(chain([0.0], (abs(a[name] - b[name]) for (_, a), (_, b) in pairs for name in a)))


def run(arguments: argparse.Namespace) -> None:
    latency = Fault(FaultKind.SLOW, arguments.latency)
    draw = random.Random(arguments.seed)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        source = Path(arguments.input) if arguments.input else folder / "texts.txt"
        if not arguments.input:
            source.write_text("".join(f"text number {number}\n" for number in range(arguments.texts)))
        outputs, calls = [folder / "whole.jsonl", folder / "killed.jsonl"], []
        kills = 0
        for output in outputs:
            service = StubService(lambda text, attempt: latency)
            flags = [str(source), "--scorer", arguments.scorer, "--attributes", *arguments.attributes]
            flags += ["--batch_size", str(arguments.batch_size)]
            if arguments.scorer == "perspective":
                url = stack.enter_context(StubServer(service)).url
                flags += ["--endpoint", url, "--rate", "100000", "--workers", str(WORKERS)]
            runs = Runs(flags, service)
            if output is outputs[1]:
                while kills < arguments.kills and runs.kill(output, draw.uniform(0, arguments.longest)):
                    kills += 1
                    lines = output.read_bytes().count(b"\n") if output.exists() else 0
                    say(f"kill {kills}: {lines} records, {runs.calls()} calls")
            runs.finish(output)
            calls.append(runs.calls())
        whole, killed = map(scores_of, outputs)
        report = {
            "scorer": arguments.scorer,
            "texts": len(whole),
            "kills": kills,
            "identical_files": outputs[0].read_bytes() == outputs[1].read_bytes(),
            "largest_difference": largest_difference(whole, killed),
            "missing_or_double": len(killed) - len(whole),
        }
        if calls[0]:
            report |= {
                "calls": calls[1],
                "paid_twice": calls[1] - calls[0],
                "in_flight_at_kills_at_most": WORKERS * kills,
            }
        print(json.dumps(report, indent=2))
        if kills < arguments.kills:
            raise RectifyError(f"the run ended after {kills} kills: give more texts, or a lower --longest")


def main() -> int:
    return execute(run, make_parser(), None)


if __name__ == "__main__":
    sys.exit(main())
