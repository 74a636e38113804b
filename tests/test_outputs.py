"""Outputs: resumed whatever a crash or a hand did to them, and one line where they cannot be written."""

import errno
import json
import os
import sys
from functools import partial

import numpy as np
import pytest
from commands import run_command

from rectify import command_line
from rectify.builders.spans import label_spans
from rectify.cli import main
from rectify.command_line import Parser, execute
from rectify.errors import InvalidArgumentError, OutputError
from rectify.evaluation.parts import Parts
from rectify.generation.output import GenerationFile
from rectify.json_files import append_records, write_json, write_records
from rectify.scoring.stub import StubScorer
from rectify.training.resumable_array import ResumableArray


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("".join(f"text {number}\n" for number in range(6)))
    return path


@pytest.fixture(params=["generate", "score", "detect"])
def command(request, capsys, texts, tmp_path):
    """A command with the output `out.jsonl`, one record for each of six texts."""
    if request.param == "generate":
        prompts = texts.read_text().splitlines()
        lines = [json.dumps({"prompt": {"text": prompt}, "n": n}) for n, prompt in enumerate(prompts)]
        (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
        source = ("--prompts_file", tmp_path / "prompts.jsonl", "--max_new_tokens", 2, "--batch_size", 2)
    else:
        source = (texts, *(("--detector", "stub") if request.param == "detect" else ("--scorer", "stub")))
    return request.param, partial(run_command, main, capsys, request.param, *source, "--output", tmp_path / "out.jsonl")


# ---------------------------------------------------------------------------------------------------------------------
# Resumed


def test_a_broken_end_is_dropped_and_said_and_anything_else_refused_by_its_line(command, tmp_path):
    name, command = command
    output, slow = tmp_path / "out.jsonl", name != "score"
    code, _, err = command()
    assert code == 0, err
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    start = b"".join(lines[:4])
    ends = [b"", lines[4][:9], b"\0" * 50, b"\0" * 50 + b"\n", lines[4][:9] + b"\0" * 99, lines[4][:9] + b"\n"]
    ends += [b"\0\n\0\n" + lines[4][:5], lines[4][:-1], b"\xff\xfe"]
    for end in ends[3 if slow else 0 : 4 if slow else None]:
        output.write_bytes(start + end)
        code, _, err = command()
        assert code == 0, err
        assert output.read_bytes() == whole, end
        assert (f"the last {len(end)} bytes were no whole record" in err) == bool(end)
    other = json.dumps({"text": "another", "prompt": {"text": "another"}, "generations": []}).encode() + b"\n"
    half, nul = lines[2][:9] + b"\n", b"\0" * 9 + b"\n"
    for number, wrong in {
        1: [lines[1:5], [nul, *lines[1:]], [b"\n", *lines], [other, *lines[1:]], [b"label,text\n"], lines[::-1]],
        3: [[*lines[:2], half, *lines[3:5]], [*lines[:2], *lines[3:]], [*lines[:2], lines[1]], [*lines[:2], b"[]\n"]],
        4: [[*lines[:3], nul, *lines[4:]], [*lines[:3], b'"text 3"\n', *lines[4:]], [*lines[:3], b"here ends it\n"]],
        7: [[*lines, lines[0]]],
    }.items():
        for content in map(b"".join, wrong[: (number == 1) if slow else None]):
            output.write_bytes(content)
            code, _, err = command()
            assert (code, err.count(f"out.jsonl', line {number}: not what this run wrote there")) == (2, 1), err
            assert output.read_bytes() == content


@pytest.mark.parametrize(
    "beside",
    ["", ', "scores": {}', ', "scores": {"INSULT": 0.5}', ', "scores": {"TOXICITY": NaN}', ', "score_error": "HM"'],
)
def test_a_text_without_its_score_does_not_count_as_scored(capsys, tmp_path, beside):
    (tmp_path / "in.jsonl").write_text('{"text": "One"}\n{"text": "Two"}\n')
    arguments = ("score", tmp_path / "in.jsonl", "--scorer", "stub", "--output", tmp_path / "out.jsonl")
    assert run_command(main, capsys, *arguments)[0] == 0
    line = f'{{"text": "One"{beside}}}\n'
    (tmp_path / "out.jsonl").write_text(line)
    code, _, err = run_command(main, capsys, *arguments)
    assert code == 2
    assert "out.jsonl', line 1: not what this run wrote" in err
    assert (tmp_path / "out.jsonl").read_text() == line


def test_spans_and_the_stages_of_a_build_are_matched_too(tmp_path):
    output, texts = tmp_path / "spans.jsonl", ["one two", "three", "four five six"]
    label_spans(texts, StubScorer(), output)
    whole = output.read_bytes()
    output.write_bytes(whole[whole.index(b"\n") + 1 :])
    with pytest.raises(InvalidArgumentError, match="line 1"):
        label_spans(texts, StubScorer(), output)
    output.write_bytes(whole[:-4] + b"\0\0\n")
    label_spans(texts, StubScorer(), output)
    assert output.read_bytes() == whole


def test_an_output_that_is_removed_meanwhile_is_missed(tmp_path):
    file = GenerationFile(tmp_path / "o.jsonl", {})
    file.append([{"a": 1}])
    file.path.unlink()
    with pytest.raises(OutputError, match="was removed while it was written"):
        file.append([{"a": 2}])
    again = GenerationFile(tmp_path / "o.jsonl", {})  # of the same thread, with the former one still there
    again.append([{"a": 3}])
    assert (again.done, file.path.read_text()) == (1, '{"a": 3}\n')


def test_broken_settings_are_named(tmp_path):
    output, beside = tmp_path / "o.jsonl", tmp_path / "o.jsonl.settings.json"
    for content in ("\0\0\0", "[]", "", "[" * 100_000):
        output.write_text("{}\n")
        beside.write_text(content)
        with pytest.raises(InvalidArgumentError, match=r"settings\.json' is broken"):
            GenerationFile(output, {"a": 1})
        assert output.read_text() == "{}\n"


@pytest.mark.parametrize("left", [b"", b"\0" * 20, b'{"number'])
def test_a_part_that_a_crash_has_cut_is_made_again(tmp_path, left):
    parts = Parts(tmp_path, {})
    parts.complete([0, 1], lambda number: {"number": number})
    parts.path(1).write_bytes(left)
    assert parts.missing([0, 1]) == [1]
    parts.complete([0, 1], lambda number: {"number": number})
    assert [part["number"] for part in parts.read([0, 1])] == [0, 1]


def test_an_array_that_a_crash_has_cut_is_made_again(tmp_path):
    array = ResumableArray(tmp_path / "a.bin", (4, 2), np.int16, key="k")
    array.values[:] = 7
    array.save(4)
    assert ResumableArray(tmp_path / "a.bin", (4, 2), np.int16, key="k").done == 4
    os.truncate(tmp_path / "a.bin", 6)
    assert ResumableArray(tmp_path / "a.bin", (4, 2), np.int16, key="k").done == 0
    for content in ("[]", '{"done": null}', "\0"):
        (tmp_path / "a.json").write_text(content)
        assert ResumableArray(tmp_path / "a.bin", (4, 2), np.int16, key="k").done == 0


# ---------------------------------------------------------------------------------------------------------------------
# That cannot be written

PLACES = {"/dev/full": "a device", "file/out": "File exists|Not a directory", "x" * 300: "too long", ".": "is a folder"}
PLACES |= {"loop": "loop|levels of symbolic links", "sub/\0": "no path"}


@pytest.mark.parametrize("place", PLACES, ids=range(len(PLACES)))
@pytest.mark.parametrize(
    "words",
    ["generate --prompt a --output", "score --text a --scorer stub --output", "detect --text a --detector stub --csv",
     "build spans --texts t --scorer stub --output", "generate --prompt a --rectify --trace"],
    ids=lambda words: words[:11],
)  # fmt: skip
def test_a_place_where_no_file_can_be_is_refused_in_one_line(capsys, tmp_path, monkeypatch, place, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    code, out, err = run_command(main, capsys, *words.split(), place)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert any(said in err for said in PLACES[place].split("|"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


@pytest.mark.parametrize("words", ["import x", "train q --model_name_or_path a --train_file t --output_dir"])
def test_a_place_where_no_folder_can_be_is_too(capsys, tmp_path, words):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "out", "/dev/full"):
        code, out, err = run_command(main, capsys, *words.split(), place)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert f"output '{place}' cannot be" in err


LIMITED = """
import resource, sys
from pathlib import Path
from rectify.errors import OutputError
from rectify.json_files import append_records, write_json, write_records
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
path, big = Path("out"), [{"text": "x" * 500}] * 4
append_records(path, big)
for write in (lambda: append_records(path, big), lambda: write_records((Path("a"), big), (Path("b"), big * 2)),
              lambda: write_json(path, big * 2)):
    try:
        write()
    except OutputError as error:
        print(error)
"""


def test_what_was_written_before_stays_where_a_disk_is_full(tmp_path, monkeypatch):
    child = os.fork()  # as the limit is of a whole process
    if child == 0:
        try:
            os.chdir(tmp_path)
            sys.stdout = open("said", "w", buffering=1)  # noqa: SIM115
            exec(LIMITED, {})
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    said = (tmp_path / "said").read_text().splitlines()
    assert [line.split("'")[1] for line in said] == ["out", "b", "out"]
    assert all("cannot be written (File too large): raise the limit" in line for line in said)
    assert len((tmp_path / "out").read_bytes().splitlines()) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "said"]  # not even "a", and no piece of a file


def test_a_device_that_is_full_is_an_output_error(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_records((tmp_path / "a", [{"a": 1}]))
    monkeypatch.setattr(os, "fsync", full)
    for write in (append_records, lambda path, records: write_json(path, records)):
        with pytest.raises(OutputError, match=r"No space left on device.*make room"):
            write(tmp_path / "a", [{"a": 2}])
    assert (tmp_path / "a").read_text() == '{"a": 1}\n'
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match="No space left"):
        ResumableArray(tmp_path / "b", (4,), np.int16)


@pytest.mark.parametrize("to", ["full", "closed", "pipe"])
def test_a_standard_output_that_takes_nothing_is_told_of(tmp_path, to):
    """Of a process, as the interpreter flushes once more at its end."""
    told, tells = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(tells, 2)
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        if to == "closed":
            sys.stdout = None
        else:
            read, write = os.pipe()
            os.close(read)
            os.dup2(os.open("/dev/full", os.O_WRONLY) if to == "full" else write, 1)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        code = main(["score", "--text", "a", "--scorer", "stub"])
        if sys.stdout is not None:
            sys.stdout.flush()
        os._exit(code)
    os.close(tells)
    with open(told) as lines:
        last = lines.read().splitlines()[-1]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert last.startswith("rectify score: error: standard output")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.EROFS, "Read-only file system", "/some/where"), "'/some/where' cannot be written or used"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (MemoryError(), "memory is used up"),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0"), "weights cannot be written"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 640 vs 534"), "weights cannot be"),
    ],
)
def test_what_no_command_foresaw_of_the_system_is_one_line_and_bugs_are_not(capsys, error, says):
    def run(_):
        raise error

    code, _, err = run_command(lambda argv: execute(run, Parser(prog="x"), argv), capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert says in err
    error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        execute(run, Parser(prog="x"), [])


def test_messages_do_not_go_to_standard_output_where_standard_error_is_closed(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    command_line.say("a message")
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------------------------------------------------------------
# That are something else as well


def test_an_output_that_is_an_input_is_refused_by_whatever_name(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.jsonl").write_text('"text"\n')
    os.link("t.jsonl", "hard.jsonl")
    (tmp_path / "soft.jsonl").symlink_to("t.jsonl")
    (tmp_path / "sub").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    for name in ("t.jsonl", "hard.jsonl", "soft.jsonl", "sub/../t.jsonl"):
        for words in (
            ["score", "t.jsonl", "--scorer", "stub", "--output", name],
            ["generate", "--prompts_file", "t.jsonl", "--output", name],
            ["detect", "t.jsonl", "--detector", "stub", "--csv", name],
            ["build", "spans", "--texts", "t.jsonl", "--scorer", "stub", "--output", name],
        ):
            code, _, err = run_command(main, capsys, *words)
            assert (code, err.count("\n")) == (2, 1), err
            assert f"'{name}' is" in err
            assert "as well" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "t.jsonl").read_text() == '"text"\n'


def test_training_data_are_not_written_over_the_texts_they_are_made_of(capsys, tmp_path):
    source = tmp_path / "train.jsonl"
    source.write_text('{"text": "one", "label": 1}\n')
    words = ("build", "trajectories", "--texts", source, "--label_column", "label", "--output_dir", tmp_path)
    code, _, err = run_command(main, capsys, *words)
    assert (code, err.count("\n")) == (2, 1)
    assert "train.jsonl" in err
    assert source.read_text() == '{"text": "one", "label": 1}\n'
