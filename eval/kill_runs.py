"""Commands under `kill -9`: whether one that is killed again and again ends with the files of one that is not.

python eval/kill_runs.py --kills 10
python eval/kill_runs.py --commands score --texts shared/data/realtoxicityprompts/prompts.jsonl

Each run is the real command in a process of its own, on the bundled models and on texts made here, unless others are
given. It is killed at random moments, from its first sign of work on, and started again. All files that it leaves are
compared byte by byte, but for what says when and how fast it ran: caches (SQLite files, which calls fill in the order
of their answers), and of trainings the times in `all_results.json` and the Trainer's own checkpoints. While the
uninterrupted run works, a second one on the same output is started, which must be refused. `score` asks an HTTP stub
here, which counts the calls: a text that was asked for more than once has been paid for more than once. The report goes
to standard output as JSON; the exit code is 2 where anything differs.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rectify.command_line import Parser, execute, say
from rectify.errors import RectifyError
from rectify.run_lock import LOCK_ENDING, UNFINISHED_ENDING
from rectify.scoring.stub import Fault, FaultKind, StubServer, StubService

COMMAND = [sys.executable, "-c", "import sys; from rectify.cli import main; sys.exit(main())"]
WORKERS = 8
STEPS = ("--max_steps", "60", "--save_strategy", "steps", "--save_steps", "4", "--eval_strategy", "no")
DETECTOR = ("--model_name_or_path", "pocket", "--train_files", "../labelled.csv", "--report_to", "none")
COMMANDS: dict[str, tuple[str, ...]] = {
    "score": ("score", "../texts.jsonl", "--scorer", "perspective", "--rate", "100000", "--workers", str(WORKERS)),
    "score pocket": ("score", "../texts.jsonl", "--batch_size", "16"),
    "generate": ("generate", "--rectify", "--prompts_file", "../prompts.jsonl", "--batch_size", "4"),
    "detect": ("detect", "../texts.jsonl", "--detector", "detector:pocket-reward"),
    "build trajectories": (
        *("build", "trajectories", "--texts", "../texts.jsonl", "--model", "pocket", "--reward_model", "pocket-reward"),
        *("--num_texts", "120", "--n", "6", "--batch_size", "4"),
    ),
    "build cmd": (
        *("build", "cmd", "--texts", "../texts.jsonl", "--scorer", "pocket", "--span_detector", "../spans"),
        *("--model", "pocket", "--num_texts", "60", "--n", "8", "--batch_size", "4"),
    ),
    "train q": (
        *("train", "q", "--model_name_or_path", "pocket", "--train_file", "../trajectories.jsonl"),
        *("--per_device_train_batch_size", "8", "--report_to", "none", *STEPS),
    ),
    "train detector": ("train", "detector", *DETECTOR, "--per_device_train_batch_size", "8", *STEPS),
}
SUBJECTS = ("You are", "They are", "My neighbour is", "Nobody here is", "The committee was", "Your friends were")
WORDS = ("an idiot", "very kind", "so stupid", "a good cook", "fucking useless", "always late", "a moron", "at home")
ENDINGS = ("and everybody knows it", "as far as I can tell", "said the old man", "which is no surprise")


def make_parser() -> Parser:
    parser = Parser(prog="kill_runs.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--commands", nargs="+", choices=tuple(COMMANDS), default=list(COMMANDS), help="default: all")
    parser.add_argument("--texts", metavar="FILE", help="JSON lines to score, build from and so on (default: made up)")
    parser.add_argument("--count", type=int, default=400, help="made-up texts (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=10, help="of each command (default: %(default)s)")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds of a call to the stub")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--keep", metavar="DIR", help="do the runs there, and leave their files (default: a new folder)"
    )
    return parser


def write_inputs(folder: Path, given: str | None, count: int, seed: int) -> None:
    """The files that the commands read."""
    draw = random.Random(seed)
    texts = [f"{draw.choice(SUBJECTS)} {draw.choice(WORDS)}, {draw.choice(ENDINGS)}, {n}." for n in range(count)]
    lines = [json.dumps(text) + "\n" for text in texts]
    (folder / "texts.jsonl").write_text(Path(given).read_text() if given else "".join(lines))
    (folder / "prompts.jsonl").write_text("".join(lines[:120]))
    rude = [any(word in text for word in WORDS[::2]) for text in texts]
    rows = [f'"{text}",{int(toxic)}\n' for text, toxic in zip(texts, rude, strict=True)]
    (folder / "labelled.csv").write_text("text,label\n" + "".join(rows))
    records = [{"text": text, "reward": [-float(toxic)]} for text, toxic in zip(texts, rude, strict=True)]
    (folder / "trajectories.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    spans = []
    for text in texts:
        found = [(text.find(word), text.find(word) + len(word)) for word in WORDS[::2] if word in text]
        spans.append(json.dumps({"text": text, "spans": [list(span) for span in found]}) + "\n")
    (folder / "spans.jsonl").write_text("".join(spans))


@dataclass
class Runs:
    """Runs of one command in one folder.

    Attributes:
        words: the command.
        folder: where it runs; all that it writes goes there.
        sign: what changes when it works, beside its files.
    """

    words: list[str]
    folder: Path
    sign: Callable[[], object]

    def start(self) -> subprocess.Popen:
        self.folder.mkdir(exist_ok=True)
        environment = os.environ | {"PERSPECTIVE_API_KEY": "", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        return subprocess.Popen(
            [*COMMAND, *self.words], cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip

    def progress(self) -> object:
        return self.sign(), [
            (path, path.stat().st_size) for path in sorted(self.folder.rglob("*")) if path.exists() and path.is_file()
        ]

    def at_work(self, process: subprocess.Popen) -> None:
        """Wait until a run shows the first sign of work beyond the lock of its output."""
        before = None
        while process.poll() is None:
            held = [path for path in self.folder.rglob("*") if path.name.endswith(LOCK_ENDING)]
            if held and before is None:
                before = self.progress()
            elif before is not None and self.progress() != before:
                return
            time.sleep(0.002)

    def finish(self) -> float:
        """Run to the end; returns the seconds of work."""
        process = self.start()
        self.at_work(process)
        begin = time.monotonic()
        _, said = process.communicate()
        if process.returncode:
            raise RectifyError(f"{' '.join(self.words)}: exit code {process.returncode}: {said[-400:]}")
        return time.monotonic() - begin

    def finish_beside_a_second(self) -> tuple[float, bool]:
        """Run to the end, stopped while a second run is started; returns the seconds, and whether that was refused."""
        first = self.start()
        self.at_work(first)
        if first.poll() is None:
            first.send_signal(signal.SIGSTOP)
        second = self.start()
        _, said = second.communicate()
        refused = second.returncode == 2 and "by another run" in said
        first.send_signal(signal.SIGCONT)
        begin = time.monotonic()
        _, said = first.communicate()
        if first.returncode:
            raise RectifyError(f"{' '.join(self.words)}: exit code {first.returncode}: {said[-400:]}")
        return time.monotonic() - begin, refused

    def kill(self, after: float) -> bool:
        """Whether a run was killed so many seconds after it began to work; it may have ended before."""
        process = self.start()
        self.at_work(process)
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
        return process.returncode < 0


def files_of(folder: Path) -> dict[str, bytes]:
    """The files that are compared, by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and ".sqlite" not in path.name
        and not any(part.startswith("checkpoint-") for part in path.relative_to(folder).parts)
    }


def without_times(name: str, content: bytes) -> bytes:
    """The content of a file, without the seconds that a training took."""
    if not name.endswith(".json") or b"runtime" not in content:
        return content

    def timeless(value: object) -> object:
        if isinstance(value, dict):
            return {key: timeless(each) for key, each in value.items() if not key.endswith(("runtime", "per_second"))}
        return [timeless(each) for each in value] if isinstance(value, list) else value

    return json.dumps(timeless(json.loads(content))).encode()


def try_command(name: str, place: Path, arguments: argparse.Namespace, draw: random.Random) -> dict[str, object]:
    """What comes of one command."""
    calls, folders = [], []
    port = free_port()  # one for both runs, as outputs know the address
    report: dict[str, object] = {}
    seconds = 0.0
    kills = 0
    with ExitStack() as stack:
        for kind in ("whole", "killed"):
            service = StubService(lambda text, attempt: Fault(FaultKind.SLOW, arguments.latency))
            words = list(COMMANDS[name])
            words += ["--output_dir", "out"] if words[0] in ("build", "train") else ["--output", "out.jsonl"]
            if name == "score":
                words += ["--endpoint", stack.enter_context(StubServer(service, port)).url]
            folder = place / f"{name.replace(' ', '-')}-{kind}"
            runs = Runs(words, folder, lambda service=service: sum(service.calls.copy().values()))
            if kind == "whole":
                seconds, report["second_run_refused"] = runs.finish_beside_a_second()
            else:
                while kills < arguments.kills and runs.kill(draw.uniform(0, seconds / 8)):
                    kills += 1
                    say(f"{name}: kill {kills}, {sum(map(len, files_of(folder).values()))} bytes are there")
                runs.finish()
            calls.append(sum(service.calls.values()))
            folders.append(folder)
            stack.close()
    whole, killed = map(files_of, folders)
    timeless = [{key: without_times(key, content) for key, content in files.items()} for files in (whole, killed)]
    differing = sorted(key for key in whole.keys() | killed.keys() if timeless[0].get(key) != timeless[1].get(key))
    left = [key for key in killed if key.endswith(("lock", UNFINISHED_ENDING, ".tmp"))]
    report |= {"kills": kills, "seconds": round(seconds, 1), "files": len(whole), "differing": differing, "left": left}
    if name == "score":
        report |= {"calls": calls[1], "paid_twice": calls[1] - calls[0], "in_flight_at_most": WORKERS * kills}
    return report


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def run(arguments: argparse.Namespace) -> None:
    draw = random.Random(arguments.seed)
    with ExitStack() as stack:
        place = Path(arguments.keep or stack.enter_context(tempfile.TemporaryDirectory()))
        place.mkdir(parents=True, exist_ok=True)
        write_inputs(place, arguments.texts, arguments.count, arguments.seed)
        if "build cmd" in arguments.commands:
            words = ["train", "spans", "--model_name_or_path", "pocket", "--train_files", "../spans.jsonl"]
            Runs(
                [*words, "--max_steps", "40", "--report_to", "none", "--output_dir", "../spans"], place / "x", str
            ).finish()
        report = {}
        for name in arguments.commands:
            report[name] = try_command(name, place, arguments, draw)
            say(f"{name}: {report[name]}")
        print(json.dumps(report, indent=2))
    wrong = [
        name
        for name, found in report.items()
        if found["differing"] or found["left"] or not found["second_run_refused"]
        or found.get("paid_twice", 0) > found.get("in_flight_at_most", 0)
    ]  # fmt: skip
    if wrong:
        raise RectifyError(f"not as uninterrupted: {', '.join(wrong)}")
    early = [name for name, found in report.items() if found["kills"] < arguments.kills]
    if early:
        raise RectifyError(f"ended before {arguments.kills} kills: {', '.join(early)}: give more texts")


def main() -> int:
    return execute(run, make_parser(), None)


if __name__ == "__main__":
    sys.exit(main())
