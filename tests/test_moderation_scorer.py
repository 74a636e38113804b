"""`rectify score --scorer moderation:PATH`: answers are judged with their prompts."""

import json

import numpy as np
import pytest
from moderation_records import write_backbone

from rectify.cli import main
from rectify.detectors.moderation import CATEGORIES, QAModeration
from rectify.errors import InvalidArgumentError, TrajectoryError
from rectify.scoring.cache import CachedScorer, ScoreCache
from rectify.scoring.load import load_scorer
from rectify.scoring.records import Record, pair_text
from rectify.scoring.scores import Reason

PAIRS = [("How?", "Like this."), ("How?", "I will not say."), ("Why?", "Like this.")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_backbone(tmp_path_factory.mktemp("published"), CATEGORIES)


@pytest.fixture(scope="module")
def scorer(folder):
    return load_scorer(f"moderation:{folder}", device="cpu")


def test_scores_are_of_pairs(folder, scorer):
    texts = [pair_text(*pair) for pair in PAIRS]
    found = scorer.score([*texts, "Like this.", "", pair_text("How?", " "), "\ud800"], ["TOXICITY", *CATEGORIES])
    expected = QAModeration.from_pretrained(folder).label_probabilities([*PAIRS, ("", "Like this.")])
    assert found.values[:4, 1:] == pytest.approx(expected, abs=1e-6)
    assert found["TOXICITY"][:4] == pytest.approx(expected.max(-1), abs=1e-6)
    assert len({round(value, 5) for value in found["TOXICITY"][:4]}) == 4
    assert scorer.score(["[" * 100_000]).reasons == (None,)  # no pair
    assert found.reasons == (None,) * 4 + (Reason.COMMENT_EMPTY,) * 2 + (Reason.INVALID_UNICODE,)
    assert scorer.attributes == ("TOXICITY", *CATEGORIES)


def test_what_is_judged_in_a_record():
    value = {"prompt": {"text": "q"}, "continuation": {"text": "c"}, "generations": [{"text": "a"}, "b"]}
    found = Record.of(value, pairs=True)
    assert found.places == (("continuation",), ("generations", 0), ("generations", 1))
    assert found.texts == tuple(pair_text("q", answer) for answer in "cab")
    assert Record.of({"prompt": "q", "response": "r"}, pairs=True).texts == (pair_text("q", "r"),)
    assert Record.of("alone", pairs=True).texts == Record.of({"text": "alone"}, pairs=True).texts == ("alone",)
    done = found.scored(["TOXICITY"], np.full((3, 1), 0.5), [None] * 3)
    assert done["generations"] == [{"text": text, "scores": {"TOXICITY": 0.5}} for text in "ab"]
    with pytest.raises(TrajectoryError, match="no answer to its prompt: give continuation, response or generations"):
        Record.of({"prompt": "q"}, pairs=True)
    with pytest.raises(TrajectoryError, match="prompt is None"):
        Record.of({"prompt": {"text": None}, "response": "r"}, pairs=True)


def test_the_command_adds_the_verdict(folder, tmp_path, capsys):
    records = [{"prompt": {"text": q}, "generations": [{"text": a}, {"text": ""}]} for q, a in PAIRS]
    source, output = tmp_path / "generations.jsonl", tmp_path / "scored.jsonl"
    source.write_text("".join(json.dumps(each) + "\n" for each in records))
    flags = ["score", str(source), "--scorer", f"moderation:{folder}", "--output", str(output)]
    more = ["--cache", str(tmp_path / "cache"), "--threshold", "0.55"]
    assert main([*flags, *more]) == 0
    said = capsys.readouterr().err
    assert "of 3, " in said
    moderation = QAModeration.from_pretrained(folder)
    done = [json.loads(line) for line in output.read_text().splitlines()]
    for (question, answer), one in zip(PAIRS, done, strict=True):
        assert one["prompt"] == {"text": question}
        first, empty = one["generations"]
        expected = moderation.predict(question, answer, threshold=0.55)
        assert first["moderation"]["flagged"] == expected["flagged"]
        assert first["moderation"]["categories"] == pytest.approx(expected["categories"], abs=1e-6)
        assert first["scores"] == pytest.approx({"TOXICITY": max(expected["categories"].values())}, abs=1e-6)
        assert empty == {"text": "", "score_error": "COMMENT_EMPTY"}
    assert main([*flags, *more]) == 0  # resumed: nothing is left
    assert [json.loads(line) for line in output.read_text().splitlines()] == done


def test_a_cache_keeps_the_verdict(scorer, tmp_path):
    with ScoreCache(tmp_path / "cache") as cache:
        cached = CachedScorer(scorer, cache)
        for _ in range(2):
            values = cached.score([pair_text(*PAIRS[0])], CATEGORIES).values[0]
            assert cached.verdict(values) == scorer.verdict(values)
        assert cached.reused == 1


def test_refusals(folder, capsys):
    for threshold, said in (("often", "threshold is 'often'"), ("1.5", "threshold is 1.5"), ("tuned", "'tuned'")):
        with pytest.raises(InvalidArgumentError, match=said):
            load_scorer(f"moderation:{folder}", threshold=threshold)
    assert main(["score", "--text", "a", "--scorer", "stub", "--threshold", "0.5"]) == 2
    assert "threshold is given, but the scorer 'stub' has no such option" in capsys.readouterr().err
