"""Prompts from arguments, files and standard input: what is read, and what is refused."""

import gzip
import io
import os

import pytest

from rectify.errors import PromptError
from rectify.generation.prompts import Prompt, read_prompts_file, read_standard_input

RECORD = {"filename": "a.txt", "begin": 3, "prompt": {"text": "Hello", "toxicity": None}, "continuation": {"text": "."}}


def test_three_forms_of_a_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('"Hello"\n\n{"prompt": "Hello", "id": 7}\n' + str(RECORD).replace("'", '"').replace("None", "null"))
    prompts, skipped = read_prompts_file(path)
    assert [prompt.text for prompt in prompts] == ["Hello"] * 3
    assert [prompt.record for prompt in prompts] == [
        {"prompt": {"text": "Hello"}},
        {"prompt": "Hello", "id": 7},
        RECORD,
    ]
    assert skipped == 0


@pytest.mark.parametrize(
    "line", [b'{"prompt": ', b"7", b'""', b'{"text": "a"}', b'{"prompt": {"text": "  "}}', b'"\xff"', b"null"]
)
def test_a_bad_line_is_named_or_counted(tmp_path, line):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'"fine"\n\n' + line + b'\n"fine too"\n')
    with pytest.raises(PromptError, match="line 3"):
        read_prompts_file(path)
    prompts, skipped = read_prompts_file(path, skip_bad_lines=True)
    assert ([prompt.text for prompt in prompts], skipped) == (["fine", "fine too"], 1)


def test_bad_lines_are_told_of(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf"one"\r"\xff"\n' + b"[" * 100_000 + b'\n"two"\n7\n')
    told = {}
    prompts, skipped = read_prompts_file(path, skip_bad_lines=True, on_skip=told.__setitem__)
    assert ([prompt.text for prompt in prompts], skipped) == (["one", "two"], 3)
    assert [(number, why.partition(":")[0][:20]) for number, why in told.items()] == [
        (2, "cannot be read as UT"),
        (3, "no JSON (nested deep"),
        (5, "no prompt in it"),
    ]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path, encoding):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('"one é"\n{"prompt": "two"}\n'.encode(encoding))
    assert [prompt.text for prompt in read_prompts_file(path)[0]] == ["one é", "two"]
    path = path.with_suffix(".jsonl.gz")
    path.write_bytes(gzip.compress('"one é"\n{"prompt": "two"}\n'.encode(encoding)))
    assert [prompt.text for prompt in read_prompts_file(path)[0]] == ["one é", "two"]


def test_prompts_of_standard_input_as_a_file(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(b'\xef\xbb\xbf"one"\n\n"two"\r\n'))
    monkeypatch.setattr("sys.stdin", stream)
    assert [prompt.text for prompt in read_prompts_file("-")[0]] == ["one", "two"]


def test_a_line_separator_inside_a_string_does_not_split_a_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('"one\u2028still one\x85"\n', encoding="utf-8")
    assert [prompt.text for prompt in read_prompts_file(path)[0]] == ["one\u2028still one\x85"]


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_a_file_without_prompts_is_refused(tmp_path, content):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(PromptError, match="no usable prompt"):
        read_prompts_file(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(PromptError, match=r"absent\.jsonl"):
        read_prompts_file(tmp_path / "absent.jsonl")


def test_standard_input_from_a_pipe():
    reader, writer = os.pipe()
    os.write(writer, b"one\n\n two\r\n")
    os.close(writer)
    with os.fdopen(reader) as stream:
        assert [prompt.text for prompt in read_standard_input(stream)] == ["one", " two"]


def test_standard_input_in_another_encoding():
    for given, expected in ((b"\xef\xbb\xbfone\r two", ["one", " two"]), ("é\n".encode("utf-16"), ["é"])):
        reader, writer = os.pipe()
        os.write(writer, given)
        os.close(writer)
        with os.fdopen(reader) as stream:
            assert [prompt.text for prompt in read_standard_input(stream)] == expected
    reader, writer = os.pipe()
    os.write(writer, b"one\n\xe9\n")
    os.close(writer)
    with os.fdopen(reader) as stream, pytest.raises(PromptError, match=r"standard input .*line 2: .*UTF-8"):
        read_standard_input(stream)


def test_standard_input_that_is_closed_silent_or_not_a_file(monkeypatch):
    monkeypatch.setattr("rectify.generation.prompts._WAIT_S", 0.05)
    reader, writer = os.pipe()
    with os.fdopen(reader) as stream:
        assert read_standard_input(stream) == []
    os.close(writer)
    with open(os.devnull) as stream:
        assert read_standard_input(stream) == []
    assert read_standard_input(io.StringIO("not a real file\n")) == []
    assert read_standard_input(None) == []


def test_an_empty_prompt_is_refused():
    with pytest.raises(PromptError, match="empty"):
        Prompt.of(" ")
