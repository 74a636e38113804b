"""What `rectify train detector` reads: labels of many forms, sources, votes, the fixed split, and what it refuses."""

import json

import pytest
from commands import run_command

from rectify.cli import main
from rectify.errors import InvalidArgumentError, TrajectoryError
from rectify.splits import split_of
from rectify.text_files import LabelValues, labelled_rows, read_labelled_texts
from rectify.training.detector_command import DetectorFiles


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def table(tmp_path):
    """`table(rows, name)`: the path of a file of such rows."""
    return lambda rows, name="a.jsonl": write(tmp_path / name, rows)


# --- labels


def test_label_values_say_what_labels_mean(table):
    rows = [{"text": f"x{index}", "class": value} for index, value in enumerate((0, "1", 2.0, "Hate", True, 3))]
    found = read_labelled_texts([table(rows)], ["text"], ["class"], ["0=1, 1=1,2=0,hate=0.75,true=1,3="])
    assert found == [("x0", 1.0), ("x1", 1.0), ("x2", 0.0), ("x3", 0.75), ("x4", 1.0)]
    # the rows that they leave out are there to be counted
    assert [label for *_, label in labelled_rows(table(rows), "text", "class", "0=,1=,2=,hate=,true=,3=1")][5] == 1.0


def test_an_empty_cell_is_a_value_like_others(tmp_path):
    (tmp_path / "a.csv").write_text("text,class\nx,\ny,bad\n")
    assert read_labelled_texts([tmp_path / "a.csv"], ["text"], ["class"], ["=,bad=1"]) == [("y", 1.0)]


@pytest.mark.parametrize("mapping", ["hate", "hate=1,HATE=0", "1=1,1.0=0", "hate=2", "hate=bad", "hate=1,,", "a=nan"])
def test_bad_label_values_are_refused(mapping):
    with pytest.raises(InvalidArgumentError, match=r"label_values is .* give each value once, as hate=1,noHate=0"):
        LabelValues(mapping)


def test_the_label_of_several_annotators_is_their_mean(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,a,b,c\nall,1,1,0\none,,1, \nnone,,,\n")
    found = [row[1:] for row in labelled_rows(path, "text", "a+b+c")]
    assert found == [("all", pytest.approx(2 / 3)), ("one", 1.0), ("none", None)]
    path.write_text("text,a,b\nx,hate,ok\ny,hate,unsure\nz,unsure,unsure\n")
    found = [label for *_, label in labelled_rows(path, "text", "a+b", "hate=1,ok=0,unsure=")]
    assert found == [0.5, 1.0, None]
    path.write_text("text,a+b\nx,1\n")
    assert [label for *_, label in labelled_rows(path, "text", "a+b")] == [1.0]
    with pytest.raises(TrajectoryError, match=r"line 2: no column 'a': set label_column"):
        list(labelled_rows(path, "text", "a+c"))


# --- files


def test_every_row_keeps_its_source(table):
    first = table([{"text": "t1", "label": 1}, {"text": "t2", "label": 0}], "forum.jsonl")
    second = table([{"tweet": "t3", "class": "2"}, {"tweet": "t4", "class": "7"}], "microblog.jsonl")
    given = {"text_column": ["text", "tweet"], "label_column": ["label", "class"], "label_values": ["", "2=0,7="]}
    train, held, left_out = DetectorFiles([first], [second], **given).read()
    assert train == [("t1", 1.0, "forum"), ("t2", 0.0, "forum")]
    assert held == [("t3", 0.0, "microblog")]
    assert str(left_out) == "0 blank ones left out, 1 left out by label_values"
    named = DetectorFiles([first], [second], **given, sources=["one"]).read()
    assert {row.source for rows in named[:2] for row in rows} == {"one"}
    with pytest.raises(InvalidArgumentError, match="sources is given 3 times for 2 files"):
        DetectorFiles([first], [second], **given, sources=["a", "b", "c"]).read()


def test_blank_texts_are_counted_and_the_first_is_named(table):
    path = table([{"text": "t1", "label": 1}, {"text": " \n", "label": 1}, {"text": "", "label": 0}])
    *_, left_out = DetectorFiles([path]).read()
    assert left_out.blank == 2
    assert f"2 blank ones left out (the first: texts '{path}', line 2)" in str(left_out)


def test_votes_become_one_row_with_their_mean(table):
    votes = [("t1", 1), ("t2", 0), ("t1", 0), ("t1", 1), ("t2", 0)]
    first, second = (table([{"text": text, "label": label} for text, label in votes], name) for name in ("a", "b"))
    train, held, left_out = DetectorFiles([first], [second], join_votes=True).read()
    assert train == [("t1", pytest.approx(2 / 3), "a"), ("t2", 0.0, "a")]
    assert [row[:2] for row in held] == [row[:2] for row in train]
    assert left_out.votes == 6
    assert len(DetectorFiles([first], [second]).read()[0]) == 5


def test_the_fixed_split(table):
    texts = [f"t{index}" for index in range(100)]
    first = table([{"text": text, "label": 1} for text in texts])
    second = table([{"text": text, "label": 0} for text in texts[:50]], "b.jsonl")
    by = {split: [text for text in texts if split_of(text) == split] for split in ("train", "validation", "test")}
    assert all(by.values())
    train, held, left_out = DetectorFiles([first], fixed_split=True).read()
    assert ([row.text for row in train], [row.text for row in held]) == (by["train"], by["validation"])
    assert left_out.test == len(by["test"])
    # where other files validate, all but the test part trains, and they lose theirs too
    train, held, left_out = DetectorFiles([first], [second], fixed_split=True).read()
    assert {row.text for row in train} == set(texts) - set(by["test"])
    assert [row.text for row in held] == [text for text in texts[:50] if split_of(text) != "test"]
    assert left_out.test == 150 - len(train) - len(held)


# --- refusals of the command


BAD = {
    "an unknown class": ([{"text": "t5", "label": 9}], ["--label_values", "0=1,1=0"], ["line 1", "9=1"]),
    "a class without label_values": ([{"text": "t5", "label": "hate"}], [], ["line 1", "'hate'", "label_values"]),
    "another label column": ([{"text": "t5", "class": 1}], [], ["line 1", "no column 'label'", "'class'"]),
    "one class": ([{"text": f"t{index}", "label": 1} for index in range(40)], [], ["have the label 1", "label_values"]),
    "blank texts alone": ([{"text": " ", "label": 1}], [], ["none with a token"]),
    "a bad mapping": ([{"text": "t5", "label": 1}], ["--label_values", "hate"], ["label_values is 'hate'"]),
    "a form for causal models": ([{"text": "t5", "label": 1}], ["--form", "prefix"], ["form is 'prefix'", "causal"]),
    "another form": ([{"text": "t5", "label": 1}], ["--form", "infix"], ["infix"]),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_in_one_line(table, encoder, tmp_path, capsys, what):
    rows, flags, said = BAD[what]
    given = ["--model_name_or_path", encoder, "--train_files", table(rows), "--output_dir", tmp_path / "out"]
    code, _, error = run_command(main, capsys, "train", "detector", *given, *flags, "--max_length", "24")
    lines = [line for line in error.splitlines() if not line.startswith("texts: ")]
    assert code == 2
    assert len(lines) == 1
    assert all(part in lines[0] for part in said), lines


def test_a_file_that_is_not_utf8_is_refused_in_one_line(encoder, tmp_path, capsys):
    path = tmp_path / "latin.csv"
    path.write_bytes("text,label\nfine,0\nnaïf,1\n".encode("latin-1"))
    given = ["--model_name_or_path", encoder, "--train_files", path, "--output_dir", tmp_path / "out"]
    code, _, error = run_command(main, capsys, "train", "detector", *given)
    assert (code, error.count("\n")) == (2, 1)
    assert f"texts '{path}', line 3" in error
    assert "UTF-8" in error


@pytest.fixture(scope="module")
def encoder(make_tokenizer, tmp_path_factory):
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("encoder")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=97, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    make_tokenizer(pad="t0").save_pretrained(folder)
    return str(folder)
