"""A program of the user's own as a scorer."""

import json
import runpy
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from rectify.errors import ScorerError
from rectify.scoring import Reason, load_scorer

PROGRAM = """
import json, sys
if sys.argv[1:] == ["--version"]:
    print("counting 1")
    sys.exit()
for line in sys.stdin:
    text = json.loads(line)
    print("null" if text == "unknown" else text.count("7") / 10)
"""


@pytest.fixture
def scorer_of(tmp_path):
    def make(program=PROGRAM):
        path = tmp_path / "program.py"
        path.write_text(program)
        return load_scorer(f"process:'{sys.executable}' '{path}'")

    return make


def test_texts_are_scored_in_order(scorer_of):
    scorer = scorer_of()
    assert scorer.revision == "counting 1"
    scores = scorer.score(["77", " ", "unknown", "ü\n7", "\ud800"])
    np.testing.assert_equal(scores["TOXICITY"], [0.2, np.nan, np.nan, 0.1, np.nan])
    assert scores.reasons == (None, Reason.COMMENT_EMPTY, Reason.SCORE_MISSING, None, Reason.INVALID_UNICODE)
    assert len(scorer.score([])) == 0


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("print(0.5)", "answered 1 of 2 texts"),
        ("print(0.5); print(7)", "answered '7'"),
        ("print(0.5); print('high')", "answered 'high'"),
        ("import nothing_of_this_name", "ended with 1"),
    ],
)
def test_what_cannot_be_used_is_an_error(scorer_of, program, said):
    scorer = scorer_of()
    Path(scorer._command[1]).write_text(program)
    with pytest.raises(ScorerError, match=said):
        scorer.score(["a", "b"])


def test_a_program_that_is_not_there():
    with pytest.raises(ScorerError, match="cannot be run"):
        load_scorer("process:/no/such/program")


def test_the_profanity_judge(monkeypatch, capsys):
    """`eval/profanity_judge.py`, with its package in disguise."""
    package = types.ModuleType("profanity_check")
    package.predict_prob = lambda texts: [len(text) / 10 for text in texts]
    monkeypatch.setitem(sys.modules, "profanity_check", package)
    main = runpy.run_path(str(Path(__file__).parent.parent / "eval" / "profanity_judge.py"))["main"]
    monkeypatch.setattr(sys, "argv", ["profanity_judge.py"])
    monkeypatch.setattr(sys, "stdin", iter([json.dumps("abcd"), json.dumps(" ")]))
    main()
    assert capsys.readouterr().out.split() == ["0.4", "null"]
