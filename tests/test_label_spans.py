"""Spans by a scorer: which words toxic pairs are blamed on, what is written, and how a build is gone on with."""

import json

import numpy as np
import pytest
from commands import run_command
from span_models import save_backbone, word_pieces

from rectify.builders.spans import label_spans, toxic_units
from rectify.cli import main
from rectify.errors import InvalidArgumentError
from rectify.scoring.scores import Reason, Scores
from rectify.text_files import read_annotated_texts

TEXTS = [
    "You IDIOT, go  kill\tyourself now",
    "",
    "fine",
    "Idiot",
    "a moron's ??? idiot moron",
    "silent idiot words",
    "!!",
]


class Words:
    """Segments are toxic with one of some words, or with two that are harmless alone; some have no score."""

    name, revision, attributes = "words", "1", ("TOXICITY",)

    def __init__(self, calls=None):
        self.calls, self.seen = calls, []

    def score(self, texts, attributes=("TOXICITY",)):
        if self.calls is not None and not self.calls:
            raise KeyboardInterrupt
        self.calls = None if self.calls is None else self.calls - 1
        self.seen += texts
        values = np.array([[self._of(text.lower())] for text in texts])
        return Scores(values, ("TOXICITY",), tuple(Reason.TIMEOUT if np.isnan(v) else None for v in values[:, 0]))

    @staticmethod
    def _of(text):
        if "silent" in text:
            return np.nan
        return 0.9 if "idiot" in text or "moron" in text or ("kill" in text and "yourself" in text) else 0.5


def test_units_are_blamed_for_what_they_alone_explain():
    no, yes, unknown = 0.5, 0.6, np.nan
    for scores, expected in {
        (no, no, no): [0, 0],
        (no, yes, yes, no, no): [0, 1, 0, 0],  # the published way takes the neighbours too
        (yes, yes, no): [1, 0],
        (no, no, yes, yes): [0, 0, 1],
        (no, no, yes, no, no): [0, 1, 1, 0],  # a phrase
        (yes, yes, yes): [1, 1],
        (yes, yes): [1],
        (unknown, yes, no, no): [1, 0, 0],
        (no, unknown, yes, no): [0, 1, 0],
        (unknown, unknown): [0],
        (yes, no, no): [1, 0],
    }.items():
        assert toxic_units(np.array(scores)).tolist() == [bool(one) for one in expected], scores


def test_spans_are_written_in_the_text_as_it_is(tmp_path):
    scorer = Words()
    counts = label_spans(TEXTS, scorer, tmp_path / "s.jsonl")
    records = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [record["text"] for record in records] == TEXTS
    found = [[record["text"][start:end] for start, end in record["spans"]] for record in records]
    assert found == [["IDIOT", "kill\tyourself"], [], [], ["Idiot"], ["moron's", "idiot moron"], ["idiot"], []]
    assert [record["unscored"] for record in records] == [0, 0, 0, 0, 0, 2, 0]
    assert str(counts) == "texts: 7, 4 with 6 toxic spans; segments without a score: 2"
    assert counts.passing == 1  # a text whose segments timed out
    assert label_spans(["!?"], scorer, tmp_path / "wordless.jsonl").passing == 0
    assert {"You", "You IDIOT", "go  kill", "now", "Idiot"} <= set(scorer.seen)  # with casing, the ends alone
    assert len(scorer.seen) == len(set(scorer.seen))
    assert [row.text for row in read_annotated_texts([tmp_path / "s.jsonl"])] == TEXTS


def test_words_keep_the_marks_of_their_last_character(tmp_path):
    scorer = Words()
    label_spans(["an idiote\u0301!", "हिन्दी"], scorer, tmp_path / "spans.jsonl")
    assert scorer.seen == ["an", "an idiote\u0301", "idiote\u0301", "हिन्दी"]
    [first, _] = read_annotated_texts([tmp_path / "spans.jsonl"])
    assert first.spans == ((3, 10),)


def test_no_texts_make_an_empty_file(tmp_path):
    assert label_spans([], Words(), tmp_path / "spans.jsonl").texts == 0
    assert (tmp_path / "spans.jsonl").read_bytes() == b""


def test_tokens_are_taken_in_pairs_as_published(tmp_path):
    class Pieces(Words):
        @staticmethod
        def _of(text):
            return float("ba" in text or "ad" in text)

    scorer = Pieces()
    label_spans(["X bax ", "bad"], scorer, tmp_path / "s.jsonl", word_pieces(), "pieces")
    assert scorer.seen == ["X", "X b", "ba", "ax", "x", "bad"]
    assert [row.spans for row in read_annotated_texts([tmp_path / "s.jsonl"])] == [((2, 4),), ((0, 3),)]


def test_a_killed_build_is_gone_on_with(tmp_path):
    texts = [f"text {index} " + TEXTS[index % 4] for index in range(200)]
    label_spans(texts, Words(), tmp_path / "whole.jsonl")
    with pytest.raises(KeyboardInterrupt):
        label_spans(texts, Words(calls=2), tmp_path / "cut.jsonl")
    with (tmp_path / "cut.jsonl").open("a") as file:
        file.write('{"text": "cut')
    second = Words()
    label_spans(texts, second, tmp_path / "cut.jsonl")
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert "text 0" not in second.seen
    with pytest.raises(InvalidArgumentError, match="was begun with texts"):
        label_spans(texts[1:], second, tmp_path / "cut.jsonl")


def test_the_command(tmp_path, capsys):
    (tmp_path / "words.txt").write_text("idiot\n")
    (tmp_path / "t.txt").write_text("you idiot\nfine\n")
    given = ["build", "spans", "--texts", tmp_path / "t.txt", "--scorer", f"keywords:{tmp_path / 'words.txt'}"]
    code, _, error = run_command(main, capsys, *given, "--output", tmp_path / "s.jsonl")
    assert code == 0
    assert "texts: 2, 1 with 1 toxic spans" in error
    assert [row.spans for row in read_annotated_texts([tmp_path / "s.jsonl"])] == [((4, 9),), ()]
    save_backbone("encoder", tmp_path / "trunk")
    tokens = ["--tokenizer", tmp_path / "trunk", "--output", tmp_path / "tokens.jsonl"]
    assert run_command(main, capsys, *given, *tokens)[0] == 0
    for wrong in (["--tokenizer", tmp_path / "nothing"], ["--device", "cpu"], ["--num_texts", "0"]):
        code, _, error = run_command(main, capsys, *given, "--output", tmp_path / "no.jsonl", *wrong)
        assert (code, error.count("\n")) == (2, 1), error
        assert wrong[0].strip("-") in error
