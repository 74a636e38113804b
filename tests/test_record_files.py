"""Files as people bring them: no row and no text is merged, cut or lost; what cannot be read is refused by its line."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import threading
from contextlib import nullcontext

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rectify.builders.cmd_records import ScoredPrompt
from rectify.builders.cmd_records import read_records as read_stage
from rectify.cli import main
from rectify.detectors.templates import TEMPLATES
from rectify.errors import InvalidArgumentError, PromptError, RectifyError, TrajectoryError
from rectify.evaluation.language_model import read_lines
from rectify.evaluation.preference_pairs import preference_records
from rectify.evaluation.q_quality import read_pairs as read_counterfactuals
from rectify.evaluation.toxicity_prompts import prompt_toxicity
from rectify.generation.prompts import Prompt, read_prompts_file
from rectify.json_files import json_line, parse_json, read_object
from rectify.record_files import read_rows
from rectify.scoring.records import read_records
from rectify.text_files import read_labelled_texts, read_texts
from rectify.training.instruction_rows import read_instruction_rows
from rectify.training.moderation import read_judged_pairs
from rectify.training.trajectory_data import read_trajectories

DEEP = 100_000
LONG = 200_000
WIDE = "more than the 2 of the header"
OPEN = "begins with a quote and does not end with one"


def read(folder, name, content):
    """The rows of a file of this content."""
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return [row for _, row in read_rows(folder / name)]


# ---------------------------------------------------------------------------------------------------------------------
# Tables

TABLES = {
    # cells that begin with a quote
    "a quote that does not close": ("tsv", 'b\ta\n1\t"shut up\n0\thello\n', [('"shut up', "1"), ("hello", "0")]),
    "a quote that another row closes": ("tsv", 'b\ta\n1\t"shut up\n0\thello"\n', [('"shut up', "1"), ('hello"', "0")]),
    "the text before the label": ("tsv", 'a\tb\n"shut up\t1\nhello"\t0\n', [('"shut up', "1"), ('hello"', "0")]),
    "text after the quote": ("tsv", 'b\ta\n1\t"shut" up\n', [('"shut" up', "1")]),
    "two quotes alone": ("tsv", 'b\ta\n0\t"\n1\t"\n', [('"', "0"), ('"', "1")]),
    "quotes around a tab": ("tsv", 'a\tb\n"x\ty"\n', [('"x', 'y"')]),
    "quotes around nothing": ("tsv", 'a\tb\n""\t1\nhe said "x"\t0\n', [('""', "1"), ('he said "x"', "0")]),
    "doubled quotes and loose ones": (
        "tsv",
        'a\tb\n"say ""x"""\t1\n5" disk\t0\n',
        [('say "x"', "1"), ('5" disk', "0")],
    ),
    "a quote alone": ("tsv", 'b\ta\n1\t"\n0\thello\n', [('"', "1"), ("hello", "0")]),
    "whole quotes and loose ones": ("tsv", 'a\tb\nhe said "x"\t1\n"y"\t0\n', [('he said "x"', "1"), ('"y"', "0")]),
    "words that might be either": ("tsv", 'b\ta\nOFF\t"shut up\nNOT\thello"\n', "line 2: a cell begins with a quote"),
    "a quote that nothing closes in CSV": ("csv", 'b,a\n1,"shut up\n0,hello\n', f"line 2: a cell {OPEN}"),
    "the last quote in CSV": ("csv", 'b,a\n1,"two\nlines"\n0,"shut up\n1,x\n', f"line 4: a cell {OPEN}"),
    "the second cell of a row": ("csv", 'a,b\n"one\ntwo","three\n', f"line 3: a cell {OPEN}"),
    "text after the quote in CSV": ("csv", 'a,b\n"a" b,c\n', f"line 2: a cell {OPEN}"),
    "a quote in the header": ("csv", 'a,"b\n1,2\n', f"line 1: a cell {OPEN}"),
    # quoted cells as they should be
    "quoted with tabs": ("tsv", 'a\tb\n"say ""x"""\t1\n"y"\t0\n', [('say "x"', "1"), ("y", "0")]),
    "a line end in a cell": ("tsv", 'a\tb\n"one\ntwo"\t1\n', [("one\ntwo", "1")]),
    "a tab and a line end": ("tsv", 'b\ta\n1\t"one\ntwo\tthree"\n', [("one\ntwo\tthree", "1")]),
    "line ends in a CSV cell": ("csv", 'a,b\r\n"one\r\ntwo\rthree\n",1\r\n', [("one\r\ntwo\rthree\n", "1")]),
    "quotes within a cell": ("csv", 'a,b\nhe said "x",1\n5" disk,0\n', [('he said "x"', "1"), ('5" disk', "0")]),
    "quotes alone": ("csv", 'a,b\n"""",1\n"""x""",0\n', [('"', "1"), ('"x"', "0")]),
    "an empty cell": ("csv", 'a,b\n"",1\n,0\n', [("", "1"), ("", "0")]),
    "a comma in quotes": ("csv", 'a,b\n"Shut up, you",1\n', [("Shut up, you", "1")]),
    "other separators of lines": ("csv", "a,b\nx\u2028y\x85z\x0b\x0c\x1c,1\n", [("x\u2028y\x85z\x0b\x0c\x1c", "1")]),
    "a long cell": (
        "csv",
        f'a,b\n{"x" * 200_000},1\n"{"y" * 200_000}",0\n',
        [("x" * 200_000, "1"), ("y" * 200_000, "0")],
    ),
    # widths
    "cells beyond the header": ("csv", "b,a\n1,Shut up, you idiot\n", f"line 2: 3 cells, {WIDE}"),
    "an empty cell too many": ("csv", "a,b\nx,1\ny,0,\n", f"line 3: 3 cells, {WIDE}"),
    "a tab too many": ("tsv", "a\tb\nx\ty\t1\n", f"line 2: 3 cells, {WIDE}"),
    "a line end without quotes": ("csv", "a,b\none\ntwo,1\n", "line 2: b is None"),
    "a lone cell among tabs": ("tsv", "a\tb\none\ntwo\t1\n", "line 2: b is None"),
    "tabs stripped at the end": ("tsv", "a\tb\tc\nx\t1\ny\t0\tz\n", [("x", "1"), ("y", "0")]),
    "blank lines": ("csv", "\n  \na,b\n\n   \nx,1\n\n", [("x", "1")]),
    "commas alone": ("csv", "a,b\n,\n", [("", "")]),
    # backslashes
    "escaped quotes": ("csv", 'a,b\n"say \\"hi\\", you",1\n', 'line 2: a cell begins with a quote .*not as \\\\"'),
    "an escaped quote at the end": ("csv", 'a,b\n"no\\"",1\n"x",0\n', 'line 2: .*not as \\\\"'),
    "escaped quotes that fit": ("csv", 'a,b\n"no\\"",",x"\n', 'line 2: a backslash .*not as \\\\"'),
    "a backslash at the end": ("csv", 'a,b\n"x, C:\\",1\n"a\\","b"\n', [("x, C:\\", "1"), ("a\\", "b")]),
    "backslashes in a quoted cell": ("csv", 'a,b\n"\\""hi\\""",1\n', [('\\"hi\\"', "1")]),
    # headers
    "a column twice": ("csv", "a,a\nx,1\n", "line 1: the header names the column 'a' twice"),
    "a column twice among tabs": ("tsv", "a\tb\ta\nx\t1\t2\n", "line 1: .*'a' twice"),
    "semicolons": ("csv", "a;b\nx;1\n", "line 1: the header is one column, 'a;b': .*comma .*not a semicolon"),
    "bars": ("csv", "a|b\nx|1\n", "line 1: .*comma .*not a bar"),
    "a cell without an end in sight": (
        "csv",
        'a,b\n"' + "x" * (1 << 24) + 'y",1\n',
        "line 2: a cell of more than 16777216",
    ),
    "tabs in CSV": ("csv", "a\tb\nx\t1\n", "line 1: the header is one column.*call it .tsv"),
    "commas in TSV": ("tsv", "a,b\nx,1\n", "line 1: the header is one column.*tab .*not a comma"),
    "Excel's word on the separator": ("csv", "sep=,\na,b\nx,1\n", "line 1: 'sep=' is Excel's"),
    "a column without a name": ("csv", ",a,b\n0,x,1\n", [("x", "1")]),
    "an index in two columns": ("csv", ",,a,b\n0,1,x,1\n", [("x", "1")]),
    "a comma after the header alone": ("csv", "a,b,\nx,1\ny,0,\n", [("x", "1"), ("y", "0")]),
    "empty columns on the right": ("csv", "a,b,,\nx,1,,\n", [("x", "1")]),
    "text in a column without a name": ("csv", "a,b,,\nx,1,,\ny,0,,z\n", "line 3: 'z' stands in column 4"),
    "a header in quotes": ("csv", '"a","b"\nx,1\n', [("x", "1")]),
    "a header alone": ("csv", "a,b\n", "holds no text"),
    # line ends and encodings
    "carriage returns alone": ("csv", 'a,b\rx,1\r"y\rz",0\r', [("x", "1"), ("y\rz", "0")]),
    "line ends of two kinds": ("csv", "a,b\r\nx,1\ny,0\r\n", [("x", "1"), ("y", "0")]),
    "a carriage return in a cell": ("csv", "a,b\nx\ry,1\n", "line 2: lines end with carriage returns and with line"),
    "a mark before the header": ("csv", b"\xef\xbb\xbfa,b\nx,1\n", [("x", "1")]),
    "a mark before a quoted header": ("tsv", b'\xef\xbb\xbf"a"\t"b"\nx\t1\n', [("x", "1")]),
    "UTF-16 with its mark": ("csv", "a,b\r\nhé,1\r\n".encode("utf-16"), [("hé", "1")]),
    "UTF-16, big end first": ("tsv", b"\xfe\xff" + "a\tb\nhé\t1\n".encode("utf-16-be"), [("hé", "1")]),
    "UTF-32 with its mark": ("csv", "a,b\nh\u010a,1\n".encode("utf-32"), [("h\u010a", "1")]),
    "UTF-16 without a mark": ("csv", "a,b\nhé,1\n".encode("utf-16-le"), "line 1: a NUL at byte 1: .*iconv -f UTF-16LE"),
    "half of UTF-16": ("csv", "a,b\nhé,1\n".encode("utf-16") + b"\x00", "line 3: truncated data.*save it as UTF-8"),
    "Latin-1": ("csv", "a,b\nx,1\nhé,1\n".encode("latin-1"), "line 3: .*UTF-8 .*byte 1.*iconv -f CP1252"),
    "a NUL": ("csv", b"a,b\nx,1\n\x00\x00,1\n", "line 3: a NUL at byte 0"),
    "a workbook": ("csv", b"PK\x03\x04\x14\x00\x06\x00", "is a zip archive"),
}


@pytest.mark.parametrize("what", TABLES)
def test_tables(tmp_path, what):
    kind, content, expected = TABLES[what]
    if isinstance(expected, list):
        assert [(row["a"], row["b"]) for row in read(tmp_path, f"x.{kind}", content)] == expected
        return
    with pytest.raises(TrajectoryError, match=expected) as caught:
        read(tmp_path, f"x.{kind}", content)
    assert str(caught.value).startswith(f"texts '{tmp_path}/x.{kind}'")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# JSON and plain text

LINES = {
    "lists without an end": ("jsonl", '"a"\n' + "[" * DEEP, "line 2: no JSON .nested deeper than 100 levels"),
    "objects without an end": ("jsonl", '{"a":' * DEEP, "line 1: no JSON .nested"),
    "deep, with an end": ("jsonl", "[" * 5000 + "]" * 5000, "line 1: no JSON .nested"),
    "deeper than is copied": ("jsonl", "[" * 300 + "]" * 300, "line 1: no JSON .nested"),
    "a deep list": ("json", '[1,\n\n{"a": ' + "[" * DEEP, "line 3, record 1: .*nested"),
    "100 levels": ("jsonl", "[" * 100 + "]" * 100, [json.loads("[" * 100 + "]" * 100)]),
    "many brackets in a text": ("jsonl", json.dumps("[{" * 500), ["[{" * 500]),
    "a field twice": ("jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}', "line 2: .*'text' stands twice"),
    "a field twice within": ("jsonl", '{"text": {"text": "b", "x": 1, "x": 1}}', "line 1: .*'x' stands twice"),
    "an object over lines": ("jsonl", '{\n  "text": "a"\n}\n', "line 1: no JSON .*jq -c"),
    "a list over lines": ("jsonl", '[\n  "a"\n]\n', "line 1: no JSON .*jq -c"),
    "a comma too many": ("jsonl", '{"text": "a",}\n', "line 1: no JSON .*character 1[34]"),
    "two values": ("jsonl", '{"text": "a"} {"text": "b"}\n', "line 1: no JSON .more text after the value"),
    "half a string": ("jsonl", '"a"\n"b', "line 2: no JSON .Unterminated string"),
    "a huge number": ("jsonl", '"a"\n' + "1" * 5000, "line 2: no JSON .*digits"),
    "a word": ("jsonl", "hello\n", "line 1: no JSON .'hello"),
    "a NUL": ("jsonl", b'"a"\n"b\x00"\n', "line 2: a NUL at byte 2"),
    "NULs of a crash": ("jsonl", b'"a"\n\x00\x00\x00\x00', "line 2: a NUL at byte 0"),
    "a mark": ("jsonl", b'\xef\xbb\xbf"a"\n"b"\n', ["a", "b"]),
    "two marks": ("jsonl", b'\xef\xbb\xbf\xef\xbb\xbf"a"\n', ["a"]),
    "a mark within": ("jsonl", b'"a"\n\xef\xbb\xbf"b"\n', "line 2: no JSON"),
    "UTF-16": ("jsonl", '"é"\n"\u2028"\n'.encode("utf-16"), ["é", "\u2028"]),
    "bytes that are no text": ("jsonl", b'"a"\n"\xff"\n', "line 2: .*UTF-8"),
    "line ends of all kinds": ("jsonl", b'"a"\r"b"\r\n"c"\n\n"d"', ["a", "b", "c", "d"]),
    "other separators": ("jsonl", '"a\u2028b\x85c"\n', ["a\u2028b\x85c"]),
    "blank lines alone": ("jsonl", "\n  \n\n", "holds no text"),
    "nothing": ("jsonl", "", "holds no text"),
    "a mark alone": ("jsonl", b"\xef\xbb\xbf", "holds no text"),
    "a list": ("json", b'\xef\xbb\xbf \n[ "a" ,\r\n{"b": 1}\n]\n', ["a", {"b": 1}]),
    "a list with a comma too many": ("json", '["a",\n"b",\n]', "line 3, record 2: it begins a JSON list and is none"),
    "a list without commas": ("json", '["a"\n"b"]', "line 2: it begins a JSON list and is none"),
    "a list that is cut": ("json", '["a",\n"b"', "line 2: it begins a JSON list and is none .it does not end"),
    "text after a list": ("json", '["a"]\n\n["b"]', "line 3: .*stands after it"),
    "an empty list": ("json", "[]", "holds no text"),
    "lines in a .json file": ("json", '"a"\n"b"\n', ["a", "b"]),
    "carriage returns in text": ("txt", b"a\rb\r", ["a", "b"]),
    "line ends of all kinds in text": ("txt", b"a\r\nb\nc\rd\n\ne", ["a", "b", "c", "d", "e"]),
    "other separators in text": ("txt", "a\u2028b\x85c\x0bd\x0ce\x1cf\n", ["a\u2028b\x85c\x0bd\x0ce\x1cf"]),
    "a mark in text": ("txt", b"\xef\xbb\xbfa\n", ["a"]),
    "a NUL in text": ("txt", b"a\nb\x00c\n", "line 2: a NUL at byte 1"),
    "Windows' bytes": ("txt", b"caf\xe9\n", "line 1: .*iconv -f CP1252"),
    "quotes in text": ("txt", '"a\n{"b"\n', ['"a', '{"b"']),
    "packed": ("jsonl.gz", gzip.compress(b'"a"\n"b"\n'), ["a", "b"]),
    "packed without saying so": ("txt", gzip.compress(b"a\n"), ["a"]),
    "packed otherwise": ("txt.bz2", bz2.compress(b"a\n"), ["a"]),
    "packed most tightly": ("csv.xz", lzma.compress(b"a,b\nx,1\n"), [{"a": "x", "b": "1"}]),
    "packed twice": ("jsonl.gz", gzip.compress(b'"a"\n') + gzip.compress(b'"b"\n'), ["a", "b"]),
    "packed and cut": ("jsonl.gz", gzip.compress(b'"a"\n' * 999)[:-9], "cannot be read"),
    "packed and broken": ("jsonl.gz", gzip.compress(bytes(range(99)))[:50] + b"x" * 50, "cannot be read|line 1: "),
    "not packed": ("jsonl.gz", '"a"\n', "is not packed as its name says"),
    "packed as none reads": ("jsonl.zst", b"\x28\xb5\x2f\xfd\x00\x00", "is packed with zstd"),
}


@pytest.mark.parametrize("what", LINES)
def test_json_and_text(tmp_path, what):
    kind, content, expected = LINES[what]
    if isinstance(expected, list):
        assert read(tmp_path, f"x.{kind}", content) == expected
        return
    with pytest.raises(TrajectoryError, match=expected) as caught:
        read(tmp_path, f"x.{kind}", content)
    assert f"texts '{tmp_path}/x." in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


TEXTS_OR_LABELS = {
    "NaN as text": ("jsonl", '{"text": "a", "label": 1}\n{"text": NaN, "label": 1}', "line 2: nan stands where"),
    "NaN as label": ("jsonl", '{"text": "a", "label": NaN}', "line 1: label is nan"),
    "infinity as label": ("jsonl", '{"text": "a", "label": 1e400}', "line 1: label is inf"),
    "a huge label": ("jsonl", '{"text": "a", "label": ' + "9" * 4000 + "}", "line 1: label is 9{60}…"),
    "nan in a table": ("csv", "text,label\na,1\nnan,0\n", "line 3: 'nan' stands where the text"),
    "NaN in a table": ("tsv", "text\tlabel\nNaN\t0\n", "line 2: 'NaN' stands where the text"),
    "nan as a table's label": ("csv", "text,label\na,nan\n", "line 2: label is 'nan'"),
    "no label": ("csv", "text,label\na,\n", "line 2: label is ''"),
    "a number as text": ("jsonl", '{"text": 5, "label": 1}', "line 1: 5 stands where the text"),
    "half a surrogate pair": ("jsonl", r'{"text": "\ud800", "label": 1}', "line 1: no valid Unicode"),
    "a list as text": ("jsonl", json.dumps({"text": ["x" * 99], "label": 1}), "line 1: .*…"),
}


@pytest.mark.parametrize("what", TEXTS_OR_LABELS)
def test_texts_and_labels_that_are_none(tmp_path, what):
    kind, content, expected = TEXTS_OR_LABELS[what]
    (tmp_path / f"x.{kind}").write_text(content)
    with pytest.raises(TrajectoryError, match=expected):
        read_labelled_texts([tmp_path / f"x.{kind}"], ["text"], ["label"])
    if "label" not in what:
        with pytest.raises(TrajectoryError, match="line"):
            read_texts([tmp_path / f"x.{kind}"])


def test_words_that_look_like_nothing_are_texts(tmp_path):
    assert read(tmp_path, "a.txt", "nan\n") == ["nan"]
    (tmp_path / "a.csv").write_text("text\nNan\nnull\n")
    assert [record.texts for record in read_records([tmp_path / "a.csv"])] == [("Nan",), ("null",)]
    (tmp_path / "b.csv").write_text("text\nnan\n")
    with pytest.raises(TrajectoryError, match="line 2: 'nan' stands where the text"):
        list(read_records([tmp_path / "b.csv"]))
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "generations": ["nan"]}')
    assert next(read_records([tmp_path / "a.jsonl"])).texts == ("a", "nan")


def test_what_is_undefined_is_not_written_as_json_knows_it_not():
    record = parse_json('{"text": "a\\ud800", "note": [NaN, 1e400, {"x": -Infinity}], "n": 1}')
    assert json_line(record) == '{"text": "a\\ud800", "note": [null, null, {"x": null}], "n": 1}\n'


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.tsv", b'text\tn\n"a\t1\n', '"a'),
        ("x.json", b'["a"]', "a"),
        ("x.txt", '"é\n'.encode("utf-16"), '"é'),
        ("x.jsonl", gzip.compress(b'"a"', mtime=0), "a"),
        ("x.jsonl", b'"fine"\n"\xff"\n', None),
        ("x.jsonl", b'"fine"\n"\x00"\n', None),
    ],
)
def test_pipes_are_read_once(tmp_path, name, content, expected):
    os.mkfifo(tmp_path / name)
    writer = threading.Thread(target=(tmp_path / name).write_bytes, args=(content,))
    writer.start()
    with nullcontext() if expected else pytest.raises(TrajectoryError, match="line 2"):
        assert read_texts([tmp_path / name]) == [expected]
    writer.join()


def test_several_files_are_read_side_by_side(tmp_path):
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text('text\n"' + "x" * 200_000 + '"\n"' + "y" * 200_000 + '"\n')
    one, other = read_rows(tmp_path / "a.csv"), read_rows(tmp_path / "b.csv")
    assert len(next(one)[1]["text"]) == len(next(other)[1]["text"]) == 200_000
    list(one)
    assert len(next(other)[1]["text"]) == 200_000


READERS = {
    "trajectories": (read_trajectories, {"text": "a", "reward": 0}),
    "preferences": (lambda paths: list(preference_records(paths[0])), {"chosen": "a", "rejected": "b"}),
    "pairs": (
        lambda paths: read_counterfactuals(paths[0]),
        {"kind": "a", "harmless": "b", "toxic": "c", "next": "d"},
    ),
    "samples": (lambda paths: read_lines(paths[0]), {"text": "a"}),
    "records": (lambda paths: list(read_stage(paths[0], ScoredPrompt)), None),
    "prompts_file": (lambda paths: read_prompts_file(paths[0]), {"prompt": "a"}),
    "alpaca": (
        lambda paths: read_instruction_rows(paths, TEMPLATES["toxic"], ["text"], ["label"]),
        {"instruction": "a", "output": "Label: toxic"},
    ),
    "judged": (
        lambda paths: read_judged_pairs(map(str, paths)),
        {"prompt": "a", "response": "b", "category": {"c": 1}},
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_every_reader_refuses_by_the_line(tmp_path, name):
    reader, record = READERS[name]
    path = tmp_path / "x.jsonl"
    fine = "" if record is None else json.dumps(record)
    for bad in (
        "[" * DEEP,
        '{"a": ' * DEEP,
        '{"a": 1, "a": 2}',
        "1" * 5000,
        '{"text": NaN, "reward": NaN}',
        "\0",
        "\udcff",
    ):
        if name == "samples" and bad not in ("\0", "\udcff"):
            continue  # of plain text, which this is
        path.write_text(f"\ufeff{fine}\r\n\n{bad}\n", errors="surrogateescape", newline="")
        with pytest.raises(RectifyError, match="line 3") as caught:
            reader([path])
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400 + len(str(tmp_path))
    for missing in (tmp_path, tmp_path / "none.jsonl"):
        with pytest.raises(RectifyError, match="cannot be read"):
            reader([missing])


def test_numbers_are_no_instructions_and_scores_that_are_unknown_select_nothing(tmp_path):
    (tmp_path / "a.json").write_text('[\n{"instruction": 5, "output": "Label: toxic"}]')
    with pytest.raises(TrajectoryError, match="line 2, record 0: 5 stands where a text should be"):
        read_instruction_rows([tmp_path / "a.json"], TEMPLATES["toxic"], ["text"], ["label"])
    values = [float("nan"), None, 0.5, "0.5", 7, 10**400]
    prompts = [Prompt.of({"prompt": {"text": "a", "toxicity": value}}) for value in values]
    assert [prompt_toxicity(prompt) for prompt in prompts[:3]] == [None, None, 0.5]
    for prompt in prompts[3:]:
        with pytest.raises(PromptError, match=r"toxicity .*give a number from 0 to 1"):
            prompt_toxicity(prompt)


@pytest.mark.parametrize("content", ["{", "[1]", "[" * DEEP, '{"a": 1, "a": 2}', "\udcff"])
def test_what_a_run_wrote_is_broken(tmp_path, content):
    (tmp_path / "settings.json").write_text(content, errors="surrogateescape")
    with pytest.raises(InvalidArgumentError, match=r"settings.json' is broken .*remove it") as caught:
        read_object(tmp_path / "settings.json")
    assert "\n" not in str(caught.value)


def test_commands_refuse_in_one_line(tmp_path, capsys):
    files = {
        "a.csv": b"label,text\n1,Shut up, you idiot\n",
        "b.jsonl": b"[" * DEEP,
        "c.jsonl": '"a"'.encode("utf-16-le"),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        path, folder = str(tmp_path / name), ["--output_dir", str(tmp_path / "out")]
        for command in (
            ["score", path],
            ["detect", path, "--detector", "pocket"],
            ["build", "trajectories", "--texts", path, "--label_column", "label", *folder],
            ["train", "detector", "--model_name_or_path", "pocket", "--train_files", path, *folder],
            ["generate", "--prompts_file", path],
            ["train", "q", "--model_name_or_path", "pocket", "--train_file", path, *folder],
        ):
            assert main(command) == 2
            said = capsys.readouterr()
            assert said.out == ""
            assert said.err.count("\n") == 1
            assert f"{name}', line " in said.err
    assert main(["detect", "--detector", "pocket", "--text", "a\udcff"]) == 2
    assert "text 1: no valid Unicode" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Whatever is written is read, and whatever is damaged is refused or read as it stands

TEXTS = st.lists(
    st.text(st.one_of(st.sampled_from(" ab\"\\,;\t\n\r'\u2028\x85\x0b\x1c"), st.characters(exclude_categories=["Cs"]))),
    min_size=1,
    max_size=6,
).filter(lambda texts: not any("\0" in text or text in ("nan", "NaN", "<NA>") for text in texts))


def written(texts, delimiter, quoting, end):
    """A table of texts and labels, as Python's csv module writes it."""
    table = io.StringIO(newline="")
    writer = csv.writer(table, delimiter=delimiter, quoting=quoting, lineterminator=end)
    writer.writerows([["label", "text"], *([number % 2, text] for number, text in enumerate(texts))])
    return table.getvalue()


@settings(max_examples=100, deadline=None)
@given(TEXTS, st.sampled_from([",", "\t"]), st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]))
def test_tables_are_read_as_they_were_written(tmp_path_factory, texts, delimiter, quoting):
    path = tmp_path_factory.getbasetemp() / ("x.csv" if delimiter == "," else "x.tsv")
    path.write_bytes(written(texts, delimiter, quoting, "\r\n").encode())
    assert read_texts([path]) == texts


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.booleans(), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))
def test_json_lines_are_read_as_they_were_written(tmp_path_factory, texts, ascii_only, encoding):
    path = tmp_path_factory.getbasetemp() / "x.jsonl"
    path.write_bytes(
        "".join(json.dumps({"text": text}, ensure_ascii=ascii_only) + "\n" for text in texts).encode(encoding)
    )
    assert read_texts([path]) == texts
    path = path.with_suffix(".json")
    path.write_bytes(json.dumps(texts, ensure_ascii=ascii_only, indent=1).encode(encoding))
    assert read_texts([path]) == texts


@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_tables_without_quoting_are_read_line_by_line(tmp_path_factory, texts):
    texts = [text for text in ("".join(text.split("\t")) for text in texts) if not set("\r\n") & set(text)] or ["a"]
    path = tmp_path_factory.getbasetemp() / "y.tsv"
    path.write_text(
        "label\ttext\n" + "".join(f"{number % 2}\t{text}\n" for number, text in enumerate(texts)), newline=""
    )
    found = read_texts([path])
    assert len(found) == len(texts)
    unquoted = [text[1:-1].replace('""', '"') if text[:1] == text[-1:] == '"' else text for text in texts]
    assert all(one in pair for one, pair in zip(found, zip(texts, unquoted, strict=True), strict=True))


@settings(max_examples=120, deadline=None)
@given(TEXTS, st.sampled_from(["csv", "tsv", "jsonl"]), st.data())
def test_a_damaged_file_is_refused_or_has_the_rows_that_another_reader_finds(tmp_path_factory, texts, kind, data):
    path = tmp_path_factory.getbasetemp() / f"z.{kind}"
    if kind == "jsonl":
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    else:
        content = written(texts, "," if kind == "csv" else "\t", csv.QUOTE_MINIMAL, "\n").encode()
    place = data.draw(st.integers(0, len(content) - 1))
    put = data.draw(st.sampled_from([b"", b'"', b"\\", b"\n", b"\r", b",", b"\t", b"\x00", b"\xff", b"{"]))
    path.write_bytes(content[:place] + put + content[place + data.draw(st.integers(0, 1)) :])
    found, refusal = [], None
    try:
        found = [row for _, row in read_rows(path)]
    except RectifyError as error:
        refusal = str(error)
    if refusal is not None:
        assert path.name in refusal
        assert "\n" not in refusal
        return
    text = path.read_bytes().decode()
    if kind == "jsonl":
        assert found == [json.loads(line) for line in re.split("[\r\n]", text) if line.strip()]
        return
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter="," if kind == "csv" else "\t") if row]
    rows = [row for row in rows if len(row) == len(rows[0]) or "".join(row).strip()]
    lines = [line for line in text.split("\n") if line.strip(" \r")]
    assert len(found) in ({len(rows) - 1} if kind == "csv" else {len(rows) - 1, len(lines) - 1})
