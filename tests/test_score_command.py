"""`rectify score`: what goes in and comes out, its refusals, and runs that are killed and go on."""

import json
import logging
import multiprocessing
import os
import random
import time
from collections import Counter
from functools import partial

import numpy as np
import pytest
from commands import run_command

from rectify.errors import InvalidArgumentError
from rectify.scoring import ATTRIBUTES, Reason, Scores
from rectify.scoring.cache import CachedScorer, ScoreCache
from rectify.scoring.records import Record
from rectify.scoring.score_command import main
from rectify.scoring.score_run import Inputs, write_scores
from rectify.scoring.scores import check_attributes
from rectify.scoring.stub import StubServer, StubService, pseudo_score

RTP = {
    "filename": "a.txt",
    "challenging": False,
    "prompt": {"text": "So what", "toxicity": 0.25, "threat": None},
    "continuation": {"text": " then, darn?", "toxicity": 0.5},
}


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("darn\nblast it\n")
    return path


run = partial(run_command, main)


def lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def score(value):
    return {"scores": {"TOXICITY": value}}


def test_each_form_of_a_record_comes_back_with_scores_beside_its_texts(capsys, tmp_path, words):
    records = [
        {"text": "oh darn", "id": 7},
        "blast  IT\u2028",
        RTP,
        {"prompt": "Darn", "generations": [{"text": " fine", "toxicity": 0.1}, "darn", {"text": ""}]},
        {"text": {"text": "fine", "more": [1]}},
        {"text": "fine", "scores": {"INSULT": 0.5}, "score_error": "TIMEOUT"},
        {"text": "darn \ud800"},
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n\n".join(map(json.dumps, records)) + "\n")
    code, out, err = run(capsys, source, "--scorer", f"keywords:{words}", "--output", output)
    assert (code, out) == (0, ""), err
    empty = {"text": "", "score_error": "COMMENT_EMPTY"}
    assert lines(output) == [
        {"text": "oh darn", "id": 7, **score(1.0)},
        {"text": "blast  IT\u2028", **score(1.0)},
        {
            **RTP,
            "prompt": {"text": "So what", "toxicity": 0.25, "threat": None, **score(0.0)},
            "continuation": {"text": " then, darn?", "toxicity": 0.5, **score(1.0)},
        },
        {
            "prompt": {"text": "Darn", **score(1.0)},
            "generations": [{"text": " fine", "toxicity": 0.1, **score(0.0)}, {"text": "darn", **score(1.0)}, empty],
        },
        {"text": {"text": "fine", "more": [1], **score(0.0)}},
        {"text": "fine", **score(0.0)},
        {"text": "darn \ud800", "score_error": "INVALID_UNICODE"},
    ]
    for said in ("texts: 11, 9 scored by keywords:", "mean 0.5556, 55.56% at 0.5", "2 (", "1 COMMENT_EMPTY"):
        assert said in err


def test_the_same_records_go_through_twice(capsys, tmp_path, words):
    source, once, twice = (tmp_path / name for name in ("in.jsonl", "once.jsonl", "twice.jsonl"))
    source.write_text(json.dumps(RTP) + '\n"fine"\n' + json.dumps({"prompt": "a", "generations": ["darn"]}) + "\n")
    assert run(capsys, source, "--scorer", f"keywords:{words}", "--output", once)[0] == 0
    assert run(capsys, once, "--scorer", f"keywords:{words}", "--output", twice)[0] == 0
    assert once.read_bytes() == twice.read_bytes()


def test_tables_and_plain_lines(capsys, tmp_path, words):
    (tmp_path / "a.csv").write_text('id,comment\n1,"oh,\ndarn"\n2,\n')
    (tmp_path / "b.tsv").write_text("text\tid\nfine\t3\n")
    (tmp_path / "c.txt").write_text("darn\n\nfine\n")
    code, out, err = run(
        capsys, *(tmp_path / name for name in ("a.csv", "b.tsv", "c.txt")), "--text_column", "comment", "text", "text",
        "--scorer", f"keywords:{words}",
    )  # fmt: skip
    assert code == 0, err
    assert [json.loads(line) for line in out.splitlines()] == [
        {"id": "1", "comment": "oh,\ndarn", **score(1.0)},
        {"id": "2", "comment": "", "score_error": "COMMENT_EMPTY"},
        {"text": "fine", "id": "3", **score(0.0)},
        {"text": "darn", **score(1.0)},
        {"text": "fine", **score(0.0)},
    ]


def test_texts_of_the_command_line_and_the_stub_that_says_what_it_is(capsys, caplog):
    with caplog.at_level(logging.WARNING):
        code, out, err = run(capsys, "--text", "a", "--text", "b", "--scorer", "stub", "--attributes", *ATTRIBUTES)
    assert code == 0, err
    assert [json.loads(line)["scores"]["THREAT"] for line in out.splitlines()] == [
        pseudo_score(text, "THREAT") for text in "ab"
    ]
    assert "MEAN NOTHING" in caplog.text


def test_a_score_that_is_lacking_is_no_zero():
    record = Record.of({"prompt": "a", "continuation": "b"})
    values = np.array([[0.5, np.nan], [np.nan, np.nan]])
    assert record.scored(("TOXICITY", "INSULT"), values, [Reason.SCORE_MISSING, Reason.TIMEOUT]) == {
        "prompt": {"text": "a", "scores": {"TOXICITY": 0.5}, "score_error": "SCORE_MISSING"},
        "continuation": {"text": "b", "score_error": "TIMEOUT"},
    }
    assert record.value == {"prompt": "a", "continuation": "b"}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": ', "no JSON"),
        ("7", "no text in it"),
        ('{"txt": "a"}', "no column 'text': set text_column to one of those there ('txt')"),
        ('{"text": null}', "text is None"),
        ('{"prompt": {"toxicity": 1}}', "prompt is None"),
        ('{"prompt": "a", "generations": "b"}', "generations is no list"),
        ('{"prompt": "a", "generations": ["b", 7]}', "generations.1 is 7"),
    ],
)
def test_a_bad_line_is_refused_before_any_work(capsys, tmp_path, line, says, words):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('"fine"\n' + line + "\n")
    code, _, err = run(capsys, source, "--scorer", "hf:nothing/there", "--output", output)
    assert code == 2
    assert "line 2" in err
    assert says in err
    assert not output.exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "both missing"),
        (["IN", "--text", "a"], "both given"),
        (["IN", "--batch_size", "0"], "batch_size is 0"),
        (["IN", "--output", "IN"], "an input as well"),
        (["IN", "--output", "o", "--cache", "o"], "the cache as well"),
        (["--text", "a", "--attributes", "INSULT"], "'INSULT', which the scorer"),
        (["--text", "a", "--rate", "3"], "rate is given, but the scorer"),
        (["IN", "IN", "--text_column", "a", "b", "c"], "3 times for 2 files"),
        (["IN", "--cache", "IN"], "no SQLite file"),
        ([os.curdir], "folder or a pipe"),
    ],
)
def test_what_cannot_be_meant_is_refused(capsys, tmp_path, monkeypatch, words, flags, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "IN").write_text('"fine"\n')
    code, out, err = run(capsys, *flags, "--scorer", f"keywords:{words}")
    assert (code, out) == (2, "")
    assert says in err
    assert (tmp_path / "IN").read_text() == '"fine"\n'


def test_resumed_is_uninterrupted_wherever_the_file_was_cut(capsys, tmp_path):
    source, whole, broken = (tmp_path / name for name in ("in.jsonl", "whole.jsonl", "broken.jsonl"))
    source.write_text("".join(json.dumps(RTP | {"n": n}) + "\n" for n in range(9)))
    flags = (source, "--scorer", "stub", "--batch_size", 5)
    code, _, err = run(capsys, *flags, "--output", whole)
    assert code == 0
    summary = err.splitlines()[-2:]
    assert run(capsys, *flags, "--output", broken)[0] == 0
    content = whole.read_bytes()
    first = content.index(b"\n") + 1
    for kept in (0, first - 1, first, first + 7, len(content) - 1, len(content)):
        broken.write_bytes(content[:kept])
        code, _, err = run(capsys, *flags, "--output", broken)
        assert code == 0, err
        assert broken.read_bytes() == content
        assert err.splitlines()[-2:] == summary
    assert "holds 18 of 18 texts" in err
    code, _, err = run(capsys, *flags, "--output", broken, "--attributes", "INSULT")
    assert code == 2
    assert "was begun with attributes ['TOXICITY'], not ['INSULT']" in err
    source.write_text('"another"\n')
    assert "was begun with inputs" in run(capsys, *flags, "--output", broken)[2]
    assert broken.read_bytes() == content


def test_an_output_that_was_changed_by_hand_is_refused(tmp_path):
    inputs, output = Inputs((), ("a", "b")), tmp_path / "out.jsonl"
    with ScoreCache(tmp_path / "cache") as cache:
        scorer = CachedScorer(SlowScorer(tmp_path / "log"), cache)
        write_scores(inputs, scorer, ("TOXICITY",), output)
        output.write_text('{"text": "a", "scores": {"TOXICITY": 0.5}}\n[]\n')
        with pytest.raises(InvalidArgumentError, match="line 2"):
            write_scores(inputs, scorer, ("TOXICITY",), output)


def test_calls_to_a_service_are_kept_beside_the_output_unless_told_otherwise(capsys, tmp_path):
    source, output = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("one\ntwo\none\n")
    service = StubService()
    with StubServer(service) as server:
        flags = (source, "--scorer", "perspective", "--endpoint", server.url, "--rate", "1000", "--output", output)
        for reused in ("1", "3"):
            code, _, err = run(capsys, *flags)
            assert code == 0, err
            assert f"cache: {output}.cache.sqlite" in err
            assert f"{reused} texts were known" in err
            output.unlink()
    assert service.calls == {"one": 1, "two": 1}


# ---------------------------------------------------------------------------------------------------------------------
# Killed at any moment


class SlowScorer:
    """Notes each text in a file before it gives its score, as a service would count its calls."""

    name, revision, attributes = "slow", "1", ATTRIBUTES

    def __init__(self, log):
        self.log = log

    def score(self, texts, attributes=("TOXICITY",)):
        asked = check_attributes(self, attributes)
        with open(self.log, "ab", buffering=0) as log:
            log.write("".join(f"{text}\n" for text in texts).encode())
        time.sleep(0.003 * len(texts))
        values = np.array([[pseudo_score(text, attribute) for attribute in asked] for text in texts])
        return Scores(values, asked, (None,) * len(texts))


class SlowStream(SlowScorer):
    def score_stream(self, texts, attributes=("TOXICITY",)):
        for index, text in enumerate(texts):
            yield index, self.score([text], attributes).values[0], None


def work(kind, folder):
    with ScoreCache(folder / "cache.sqlite") as cache:
        scorer = CachedScorer(kind(folder / "paid.log"), cache, chunk_size=4)
        write_scores(Inputs((str(folder.parent / "in.jsonl"),), ()), scorer, ("TOXICITY",), folder / "out.jsonl", 16)


@pytest.mark.parametrize(("kind", "in_flight"), [(SlowStream, 1), (SlowScorer, 4)])
def test_killed_again_and_again_it_ends_as_if_uninterrupted_and_pays_for_the_calls_in_flight_only(
    tmp_path, kind, in_flight
):
    texts = [f"text {number}" for number in range(96)]
    records = [{"prompt": texts[i], "generations": texts[i + 1 : i + 4]} for i in range(0, 96, 4)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    work(kind, whole)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rectify.scoring.score_run", "rectify.scoring.cache", "rectify.scoring.stub"])
    draw, kills = random.Random(7), 0
    paid = killed / "paid.log"
    paid.touch()
    while True:
        size = paid.stat().st_size
        process = context.Process(target=work, args=(kind, killed))
        process.start()
        while process.is_alive() and paid.stat().st_size == size:  # until it scores
            time.sleep(0.001)
        process.join(draw.uniform(0, 0.1))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        kills += 1
        assert kills < 100
    assert kills >= 3
    assert (killed / "out.jsonl").read_bytes() == (whole / "out.jsonl").read_bytes()
    calls = Counter(paid.read_text().splitlines())
    assert set(calls) == set(texts)
    assert sum(calls.values()) <= len(texts) + kills * in_flight
