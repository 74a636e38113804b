"""Text files: what is read of each kind, which columns and labels, and what is refused."""

import json
import math

import pytest

from rectify.errors import InvalidArgumentError, TrajectoryError
from rectify.splits import split_by_hash
from rectify.text_files import LabelledText, one_a_file, read_annotated_texts, read_labelled_texts, read_texts


def test_texts(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"text": "one"}\n\n"two"\n{"prompt": {"text": "three"}, "continuation": {"text": "no"}}\n'
        '{"prompt": "four"}\n{"text": {"text": "five\\u2028"}}\n'
    )
    (tmp_path / "b.csv").write_bytes('\ufeffid,text\r\n1,"six, ""and\nmore"""\r\n\r\n2,seven\r\n'.encode())
    (tmp_path / "c.TXT").write_bytes("eight\r\n\nnine é\u2028\n".encode())
    (tmp_path / "d.tsv").write_bytes("id\ttext\n3\tten, \u2028eleven\n".encode())
    (tmp_path / "e.data").write_text('"twelve"\n')
    found = read_texts([tmp_path / name for name in ("a.jsonl", "b.csv", "c.TXT", "d.tsv", "e.data")])
    assert found[:5] == ["one", "two", "three", "four", "five\u2028"]
    assert found[5:] == ['six, "and\nmore"', "seven", "eight", "nine é\u2028", "ten, \u2028eleven", "twelve"]
    assert read_texts([tmp_path / "b.csv"], ["id"]) == ["1", "2"]
    assert read_texts([tmp_path / "b.csv", tmp_path / "d.tsv"], ["id", "text"]) == ["1", "2", "ten, \u2028eleven"]


def test_long_texts(tmp_path):
    text = "a" * 200_000  # longer than the csv module takes by itself
    (tmp_path / "a.csv").write_text(f"text\n{text}\n")
    (tmp_path / "a.jsonl").write_text(json.dumps(text))
    assert read_texts([tmp_path / "a.csv", tmp_path / "a.jsonl"]) == [text, text]


FILES = {
    "a.csv": 'text,label\n"two\nlines, and ""quotes""",1\nclean,0\n,0.25\n',
    "b.tsv": "comment\tis_toxic\nclean\tFalse\ntoxic\tTrue\n",
    "c.ndjson": '{"text": "soft", "label": 0.75}\n\n{"text": "yes", "label": true, "more": 1}\n',
}
ROWS = [('two\nlines, and "quotes"', 1.0), ("clean", 0.0), ("", 0.25), ("clean", 0.0), ("toxic", 1.0), ("soft", 0.75)]


def test_labelled_texts_with_columns_of_their_own(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())  # with the mark that Excel writes
    paths = [str(tmp_path / name) for name in FILES]
    rows = read_labelled_texts(paths, ["text", "comment", "text"], ["label", "is_toxic", "label"])
    assert rows == [*ROWS, ("yes", 1.0)]
    assert read_labelled_texts([], [], []) == []


def test_labels(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("".join(json.dumps({"c": "x", "y": y}) + "\n" for y in (0, 1, True, False, 0.25, " TRUE ", "1")))
    assert [row.label for row in read_labelled_texts([path], ["c"], ["y"])] == [0, 1, 1, 0, 0.25, 1, 1]


BAD_TEXTS = {
    "a broken line": ("x.jsonl", '{"text": "a", "label": 0}\n{"text": \n', ["line 2", "no JSON"]),
    "another kind": ("x.parquet", "PAR1", [".csv, .tsv or .txt"]),
    "no text": ("x.jsonl", '{"text": null, "label": 0}\n', ["line 1", "None", "string"]),
    "a number": ("x.jsonl", '{"text": 3, "label": 1}\n', ["line 1", "3", "string"]),
    "surrogates": ("x.jsonl", '{"text": "\\ud800", "label": 1}\n', ["line 1", "Unicode"]),
    "no text column in JSON": ("x.jsonl", '{"comment": "a", "label": 0}\n', ["line 1", "text_column", "'comment', "]),
    "no text column in a table": ("x.tsv", "comment\tlabel\na\t1\n", ["line 2", "'text'", "text_column", "'comment'"]),
    "no label column": ("x.jsonl", '{"text": "a", "toxic": 1}\n', ["line 1", "'label'", "label_column", "'toxic'"]),
    "no object": ("x.jsonl", "[1]\n", ["line 1", "no column 'label'", "list"]),
    "a string": ("x.jsonl", '"a"\n', ["line 1", "no column 'label'", "str"]),
    "plain text": ("x.txt", "a\n", ["line 1", "no column 'label'", ".csv or .tsv"]),
    "a label out of range": ("x.jsonl", '{"text": "a", "label": 0}\n\n{"text": "a", "label": 1.5}', ["line 3", "1.5"]),
    "a word as label": ("x.csv", "text,label\nfine,0\nbad,maybe\n", ["line 3", "'maybe'", "0, 1, true, false"]),
    "a label after a long row": ("x.csv", 'text,label\n"a\nb",0\nbad,2\n', ["line 4", "'2'", "label_column"]),
    "a label after a blank line": ("x.csv", "text,label\nfine,0\n\nbad,2\n", ["line 4", "'2'"]),
    "a short row": ("x.csv", "text,label\nfine\n", ["line 2", "None"]),
    "null": ("x.jsonl", '{"text": "a", "label": null}\n', ["line 1", "label is None"]),
    "NaN": ("x.jsonl", '{"text": "a", "label": NaN}\n', ["line 1", "label is nan"]),
    "a header alone": ("x.csv", "text,label\n", ["holds no text"]),
    "an empty table": ("x.csv", "", ["holds no text"]),
    "an empty file": ("x.jsonl", "\n", ["holds no text"]),
}


@pytest.mark.parametrize("what", BAD_TEXTS)
def test_bad_texts_are_refused_by_name_and_line(tmp_path, what):
    name, text, said = BAD_TEXTS[what]
    (tmp_path / name).write_text(text)
    with pytest.raises(TrajectoryError) as caught:
        read_labelled_texts([tmp_path / name], ["text"], ["label"])
    for part in [name, *said]:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_annotated_texts(tmp_path):
    # as in SemEval-2021 Task 5: characters as a literal of Python, lines within cells, blanks at the edges of spans
    cells = ['"[8, 9, 10, 11, 12, 15, 16]","You\r\nand idiots, too"', "[],fine", '"[3, 2, 2, 0]",é🤦🏽b']
    (tmp_path / "a.csv").write_bytes("\r\n".join(["spans,text", *cells, ""]).encode())
    (tmp_path / "b.jsonl").write_text(
        '{"text": "a bad, bad one", "spans": [[7, 10], [2, 5], [4, 6]], "unscored": 0}\n{"text": "", "spans": []}\n'
    )
    assert read_annotated_texts([tmp_path / "a.csv", tmp_path / "b.jsonl"]) == [
        ("You\r\nand idiots, too", ((8, 13), (15, 17))),
        ("fine", ()),
        ("é🤦🏽b", ((0, 1), (2, 4))),
        ("a bad, bad one", ((2, 6), (7, 10))),
        ("", ()),
    ]


BAD_SPANS = {
    "no column": ("x.csv", "span,text\n[],a\n", ["line 2", "no column 'spans'"]),
    "no object": ("x.jsonl", '"a"\n', ["line 1", "str"]),
    "no literal": ("x.csv", 'spans,text\n"[1, 2",abc\n', ["line 2", "spans is '[1, 2'", "[[4, 7]]"]),
    "code": ("x.csv", "spans,text\nexit(),abc\n", ["line 2", "spans is 'exit()'"]),
    "a word": ("x.csv", 'spans,text\n"two\nlines",b\n', ["line 2", "two"]),
    "a short row": ("x.csv", "text,spans\nabc\n", ["line 2", "spans is None"]),
    "a number": ("x.jsonl", '{"text": "abc", "spans": 1}\n', ["line 1", "spans is 1"]),
    "fractions": ("x.jsonl", '{"text": "abc", "spans": [0.5]}\n', ["line 1", "spans is [0.5]"]),
    "triples": ("x.jsonl", '{"text": "abc", "spans": [[0, 1, 2]]}\n', ["line 1", "spans is [[0, 1, 2]]"]),
    "truth": ("x.jsonl", '{"text": "abc", "spans": [true]}\n', ["line 1", "spans is [True]"]),
    "beyond the text": ("x.csv", 'spans,text\n[2],abc\n"[2, 3]",abc\n', ["line 3", "hold 3", "text of 3 characters"]),
    "an end beyond": ("x.jsonl", '{"text": "abc", "spans": [[1, 4]]}\n', ["line 1", "hold [1, 4]"]),
    "before the text": ("x.jsonl", '{"text": "abc", "spans": [-1]}\n', ["line 1", "hold -1"]),
    "backwards": ("x.jsonl", '{"text": "abc", "spans": [[2, 1]]}\n', ["line 1", "hold [2, 1]"]),
    "long": ("x.jsonl", json.dumps({"text": "abc", "spans": "x" * 500}) + "\n", ["line 1", "x…"]),
}


@pytest.mark.parametrize("what", BAD_SPANS)
def test_bad_spans_are_refused_by_name_and_line(tmp_path, what):
    name, text, said = BAD_SPANS[what]
    (tmp_path / name).write_text(text)
    with pytest.raises(TrajectoryError) as caught:
        read_annotated_texts([tmp_path / name])
    for part in [name, *said]:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_files_that_are_no_text_are_refused(tmp_path):
    for name in ("x.csv", "x.tsv", "x.jsonl", "x.txt"):
        # well behind what is decoded at a time
        line = b'"fine"\n' if name == "x.jsonl" else b"fine\n"
        (tmp_path / name).write_bytes((b'"text"\n' if name == "x.jsonl" else b"text\n") + line * 9998 + b"\xff\xfe\n")
        with pytest.raises(TrajectoryError, match=r"texts '.*line 10000: .*give .*UTF-8"):
            read_texts([tmp_path / name])
    for name in ("missing.csv", "missing.jsonl", "."):
        with pytest.raises(TrajectoryError, match=r"texts '.*cannot be read .*give"):
            read_texts([tmp_path / name])


def test_columns_are_given_once_or_once_a_file():
    assert one_a_file("text_column", ["a"], 3) == ["a"] * 3
    assert one_a_file("text_column", ["a", "b"], 2) == ["a", "b"]
    with pytest.raises(InvalidArgumentError, match="text_column is given 2 times for 3 files"):
        one_a_file("text_column", ["a", "b"], 3)


def text_of(row):
    return row.text


def test_the_split_depends_on_the_text_alone():
    rows = [LabelledText(f"t{index % 150}", index % 2) for index in range(200)]
    train, held = split_by_hash(rows, 0.2, text_of)
    assert sorted(train + held) == sorted(rows)
    assert 0.1 < len(held) / len(rows) < 0.3
    assert not {row.text for row in train} & {row.text for row in held}
    assert split_by_hash(rows[::-1], 0.2, text_of) == (train[::-1], held[::-1])
    for share in (0, 1, -0.1, math.nan):
        with pytest.raises(InvalidArgumentError, match="validation_share"):
            split_by_hash(rows, share, text_of)
