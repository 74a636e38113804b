"""One run on one output: who is refused, who is not, and what is left."""

import contextlib
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commands import run_command

from rectify.cli import main
from rectify.errors import OutputError
from rectify.generation.output import GenerationFile
from rectify.run_lock import LOCK_ENDING, RunLock


@contextlib.contextmanager
def another_run(output, folder=False):
    """A thread that writes an output, as another run would."""
    taken, done = threading.Event(), threading.Event()

    def hold():
        with RunLock(output, folder=folder):
            taken.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_another_process_is_refused_until_the_first_is_killed(tmp_path, folder):
    output = tmp_path / "new" / "out"
    told, tells = os.pipe()
    child = os.fork()
    if child == 0:
        lock = RunLock(output, folder=folder)
        os.write(tells, b"held")
        time.sleep(60)
        del lock
    try:
        assert os.read(told, 4) == b"held"
        with pytest.raises(OutputError, match=rf"written by another run \(process {child} on .*, since 20"):
            RunLock(output, folder=folder)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    with RunLock(output, folder=folder):  # at once, with what the killed one has left there
        assert list(tmp_path.rglob("*lock"))
    assert not list(tmp_path.rglob("*lock"))


def test_every_name_of_an_output_is_the_same_output(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "other").symlink_to(tmp_path / "folder")
    output = tmp_path / "folder" / "out.jsonl"
    (tmp_path / "link.jsonl").symlink_to(output)
    monkeypatch.chdir(tmp_path / "folder")
    with another_run(output):
        for name in ("out.jsonl", "../folder/./out.jsonl", tmp_path / "other" / "out.jsonl", tmp_path / "link.jsonl"):
            with pytest.raises(OutputError, match="another run"):
                RunLock(name)
        RunLock("out2.jsonl").release()
        with RunLock("new/below/../out3.jsonl"):
            Path("new/below/../out3.jsonl").touch()
    first = GenerationFile(output, {})
    first.append([{"a": 1}])
    os.link(output, "hard.jsonl")
    (tmp_path / "folder" / "hard.jsonl.settings.json").write_text("{}")
    with pytest.raises(OutputError, match="under another name"):
        GenerationFile("hard.jsonl", {})
    del first
    assert GenerationFile("hard.jsonl", {}).done == 1


def test_the_thread_that_holds_it_may_take_it_again(tmp_path):
    output = tmp_path / "out.jsonl"
    outer = RunLock(output)
    with RunLock(output):
        pass
    with pytest.raises(OutputError, match="this one"), ThreadPoolExecutor() as another:
        another.submit(RunLock, output).result()
    outer.release()
    outer.release()
    with another_run(output):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_child_process_neither_keeps_nor_frees_the_lock_of_its_parent(tmp_path):
    lock = RunLock(tmp_path / "out")
    child = os.fork()
    if child == 0:
        lock.release()
        time.sleep(30)
        os._exit(0)
    try:
        with pytest.raises(OutputError):
            subprocess_take(tmp_path / "out")
        lock.release()
        subprocess_take(tmp_path / "out")  # while the child still runs
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def subprocess_take(output):
    """Take the lock file as another process would."""
    from rectify import run_lock

    place = output.with_name(f".{output.name}{run_lock.LOCK_ENDING}")
    os.close(run_lock._opened(place, output))
    place.unlink()


def test_what_is_refused_leaves_nothing_behind(capsys, tmp_path):
    output = tmp_path / "new" / "deep" / "out.jsonl"
    code, _, err = run_command(main, capsys, "score", tmp_path / "missing.txt", "--output", output)
    assert (code, err.count("\n")) == (2, 1)
    assert list(tmp_path.iterdir()) == []


def test_unfinished_files_of_a_killed_run_go(tmp_path):
    for name in ("out.jsonl.123.rectify.tmp", "out.jsonl.settings.json.9.rectify.tmp", "other.1.rectify.tmp", "a.tmp"):
        (tmp_path / name).touch()
    RunLock(tmp_path / "out.jsonl").release()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tmp", "other.1.rectify.tmp"]
    RunLock(tmp_path, folder=True).release()
    assert [path.name for path in tmp_path.iterdir()] == ["a.tmp"]


def test_where_there_are_no_locks_it_is_said_once_and_gone_on(tmp_path, monkeypatch, caplog):
    from rectify import run_lock

    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", no_locks)
    for _ in range(2):
        with RunLock(tmp_path / "out"):
            pass
    assert caplog.text.count("has no locks (No locks available)") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Every command

TRAIN = ("detector", "moderation", "gate", "scorer", "instruction", "spans", "experts", "cmd")
WITH_FILE = {
    "generate": "generate --prompt a --output OUT.jsonl",
    "compare": "generate --prompt a --compare --output OUT.jsonl",
    "trace": "generate --prompt a --rectify --trace OUT.html",
    "score": "score --text a --output OUT.jsonl",
    "detect": "detect --text a --detector pocket --output OUT.jsonl",
    "detect csv": "detect --text a --detector pocket --csv OUT.csv",
    "rationales": "build rationales --texts t --teacher local:x --output OUT.jsonl",
    "spans": "build spans --texts t --scorer pocket --output OUT.jsonl",
}
WITH_FOLDER = {
    "trajectories": "build trajectories --texts t --label_column l --output_dir OUT",
    "cmd": "build cmd --texts t --output_dir OUT",
    "import": "import somewhere OUT",
    "cascade": "train cascade --small a --large b --validation_files v --threshold .9 --output_dir OUT",
    "static": "train static --model_name_or_path pocket --train_file t --output_dir OUT",
    "substitutions": "train substitutions --train_files t --output_dir OUT",
    "train_q": "train q --model_name_or_path pocket --train_file t --output_dir OUT",
    **{f"train {kind}": f"train {kind} --model_name_or_path pocket --train_files t --output_dir OUT" for kind in TRAIN},
}
WITH_FOLDER["train gate"] = "train gate --adapters a=b c=d --encoder pocket --train_files t --output_dir OUT"
WITH_FOLDER["train cmd"] = "train cmd --model_name_or_path pocket --data_dir d --output_dir OUT"
WITH_FOLDER["train scorer"] = "train scorer --model_name_or_path pocket --train_files t --output_dir OUT"


@pytest.mark.parametrize("name", [*WITH_FILE, *WITH_FOLDER])
def test_a_second_run_of_any_command_is_refused_and_touches_nothing(capsys, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    words = (WITH_FILE | WITH_FOLDER)[name].split()
    place = next(word for word in words if word.startswith("OUT"))
    with another_run(place, folder=name in WITH_FOLDER):
        before = {path: path.stat() for path in tmp_path.rglob("*")}
        code, out, err = run_command(main, capsys, *words)
        assert (code, out) == (2, ""), err
        assert err.count("\n") == 1
        assert f"'{place}' is being written by another run" in err
        assert {path: path.stat() for path in tmp_path.rglob("*")} == before


def test_the_first_of_the_processes_of_one_run_holds_the_output_for_all(capsys, tmp_path, monkeypatch):
    words = ("score", "--text", "a", "--scorer", "stub", "--output", tmp_path / "out.jsonl")
    monkeypatch.setenv("RANK", "0")
    with another_run(tmp_path / "folder", folder=True):
        assert run_command(main, capsys, "import", "x", tmp_path / "folder")[2].count("another run") == 1
        monkeypatch.setenv("RANK", "1")
        assert "another run" not in run_command(main, capsys, "import", "x", tmp_path / "folder")[2]
        assert (tmp_path / "folder" / LOCK_ENDING).exists()
    assert run_command(main, capsys, *words)[0] == 0
    assert len(json.loads((tmp_path / "out.jsonl").read_text())["scores"]) == 1
