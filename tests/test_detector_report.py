"""Figures of detectors, against slow recomputation and hand-made cases."""

import json

import numpy as np
import pytest
from sklearn.metrics import f1_score

from rectify.errors import TrajectoryError
from rectify.evaluation.detector_intervals import detector_difference, detector_figures
from rectify.evaluation.detector_report import compare_detectors
from rectify.evaluation.functional_tests import FunctionalTest, functional_accuracy, read_functional_tests
from rectify.evaluation.intervals import macro_f1
from rectify.json_files import write_figures
from rectify.scoring.scores import Reason, Scores
from rectify.text_files import LabelledText


def test_macro_f1_of_resamples_is_that_of_the_repeated_texts():
    random = np.random.default_rng(0)
    said, toxic = random.random((2, 40)) < 0.4
    drawn = random.integers(40, size=(5, 40))
    weights = np.array([np.bincount(row, minlength=40) for row in drawn], float)
    expected = [f1_score(toxic[row], said[row], average="macro") for row in drawn]
    assert macro_f1(said, toxic).of(weights) == pytest.approx(expected)
    assert macro_f1(said, toxic).value == pytest.approx(f1_score(toxic, said, average="macro"))


def test_texts_without_a_score_are_counted_and_left_out():
    figures = detector_figures(np.array([0.9, np.nan, 0.1, 0.5]), np.array([1.0, 1.0, 0.0, 0.0]))
    assert (figures["n"], figures["unscored"]) == (3, 1)
    assert figures["accuracy"]["value"] == pytest.approx(2 / 3)  # 0.5 counts as toxic
    assert detector_figures(np.array([np.nan]), np.array([1.0])) == {"n": 0, "unscored": 1}


def test_undefined_figures_are_null_in_files(tmp_path):
    write_figures(tmp_path / "f.json", {"auc": float("nan"), "rows": [(1.5, np.inf), "nan"], "n": 3})
    text = (tmp_path / "f.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"auc": None, "rows": [[1.5, None], "nan"], "n": 3}


def test_a_difference_is_paired():
    label = np.arange(60) % 2.0
    right, wrong = np.where(label > 0, 0.8, 0.2), np.where(label > 0, 0.2, 0.8)
    assert detector_difference(right, right, label) == {"n": 60, "value": 0, "low": 0, "high": 0}
    assert detector_difference(right, wrong, label) == {"n": 60, "value": 1, "low": 1, "high": 1}


def test_functional_tests_by_hand(tmp_path):
    file = tmp_path / "tests.csv"
    file.write_text(
        "functionality,test_case,label_gold,other\nslur,a b,hateful,x\nslur,c,non-hateful,\nhope,d,hateful,\n"
    )
    tests = read_functional_tests(file)
    assert tests[1] == FunctionalTest("slur", "c", False)
    found = functional_accuracy(tests, np.array([0.5, 0.7, np.nan]))
    assert found["slur"] == {"n": 2, "unscored": 0, "accuracy": 0.5}
    assert (found["hope"]["n"], found["hope"]["unscored"]) == (0, 1)
    assert np.isnan(found["hope"]["accuracy"])
    assert found["all"] == {"n": 2, "unscored": 1, "accuracy": 0.5}


@pytest.mark.parametrize(
    ("row", "message"),
    [("slur,a,maybe", "line 2: label_gold is 'maybe'"), (",a,hateful", "line 2: no 'functionality'")],
)
def test_functional_tests_that_cannot_be_used(tmp_path, row, message):
    file = tmp_path / "tests.csv"
    file.write_text(f"functionality,test_case,label_gold\n{row}\n")
    with pytest.raises(TrajectoryError, match=message):
        read_functional_tests(file)


class Lengths:
    """A scorer by the length of a text."""

    name, revision, attributes = "lengths", "1", ("TOXICITY",)

    def score(self, texts, attributes=("TOXICITY",)):
        values = np.array([[min(len(text) / 10, 1.0) if text else np.nan] for text in texts])
        return Scores(values, ("TOXICITY",), tuple(None if text else Reason.COMMENT_EMPTY for text in texts))


def test_the_report_holds_what_was_measured(tmp_path):
    sources = {
        "forum": [LabelledText("a" * n, float(n > 4)) for n in range(10)],
        "wiki": [LabelledText("b" * n, float(n < 3)) for n in range(1, 8)],
    }
    tests = [FunctionalTest("slur", "c" * 9, True)]
    metrics = compare_detectors(
        {"one": Lengths(), "two": Lengths()}, sources, tmp_path, reference="one", functional=tests, resamples=20
    )
    assert json.loads((tmp_path / "metrics.json").read_text())["detectors"] == metrics["detectors"]
    forum = metrics["detectors"]["two"]["sources"]["forum"]
    assert (forum["n"], forum["unscored"], forum["f1_macro"]["value"]) == (9, 1, 1)
    assert metrics["detectors"]["two"]["over_reference"]["wiki"]["value"] == 0
    assert metrics["functional"]["one"]["all"]["accuracy"] == 1
    report = (tmp_path / "report.md").read_text()
    assert "| one | 1.000 (" in report
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "report.md", "calibration.png", "matrix.png"}
