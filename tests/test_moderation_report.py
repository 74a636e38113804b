"""Figures of moderations, and agreement with judges in the published format; the records are written here."""

import json
import runpy
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from moderation_records import record, write_backbone, write_lines

from rectify.detectors.moderation import CATEGORIES
from rectify.errors import InvalidArgumentError, TrajectoryError
from rectify.evaluation.moderation import (
    Auc,
    flagged_differences,
    flagged_estimates,
    flagged_figures,
    moderation_figures,
)
from rectify.evaluation.moderation_agreement import agreement_of, agreement_plot, read_judged
from rectify.evaluation.moderation_report import compare_moderations

EVAL = Path(__file__).parent.parent / "eval"
HARMFUL = np.array([True, False, True, False, True, False])
SCORE = np.array([0.9, 0.1, 0.4, 0.4, 0.2, 0.3])
PROMPTS = ["a", "a", "b", "b", "c", "c"]


def judged(model, **flagged):
    return {"prompt": "q", "response": f"an answer of {model}", "model": model, "flagged": flagged}


JUDGED = [
    judged("one", gpt4=True, human=True, moderation=False),
    judged("one", gpt4=False, human=True, moderation=True),
    judged("two", gpt4=False, human=None, moderation=False),
    judged("two", gpt4=False, human=False, moderation=False),
]


def test_blank_pairs_have_no_figures(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [record(" ", "")])
    with pytest.raises(InvalidArgumentError, match="records hold 1 pairs, all of them blank"):
        compare_moderations({}, [path], tmp_path / "out")


# --- figures


def test_figures_of_the_flag():
    found = flagged_figures(np.array([True, True, True, False]), np.array([True, False, True, True]))
    assert found == pytest.approx({"accuracy": 0.5, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3})
    nothing = flagged_figures(np.zeros(3, bool), np.zeros(3, bool))
    assert nothing == {"accuracy": 1.0, "precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_the_area_of_resamples():
    """Against the definition: all harmful pairs against all others, in float64."""
    draw = np.random.default_rng(0)
    score, harmful, group = draw.integers(0, 5, 30) / 4, draw.random(30) < 0.4, draw.integers(0, 8, 30)
    weights = draw.integers(0, 3, (6, 8)).astype(float)
    found = Auc(score, harmful, group).of(weights)
    for row, value in zip(weights, found, strict=True):
        copies = np.repeat(np.arange(30), row[group].astype(int))
        pairs = list(product(score[copies[harmful[copies]]], score[copies[~harmful[copies]]]))
        assert value == pytest.approx(np.mean([(a > b) + (a == b) / 2 for a, b in pairs]))


def test_intervals_are_over_prompts():
    found = flagged_estimates(SCORE > 0.3, SCORE, HARMFUL, PROMPTS)
    assert found["prompts"] == 3
    assert found["preference"]["value"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert found["auc"]["value"] == pytest.approx((3 + 2.5 + 1) / 9)
    assert found["preference"]["low"] <= 0.5 <= found["preference"]["high"]
    same = flagged_differences((SCORE > 0.3, SCORE), (SCORE > 0.3, SCORE), HARMFUL, PROMPTS)
    assert all(one == {"value": 0, "low": 0, "high": 0} for one in same.values())
    alone = flagged_estimates(SCORE > 0.3, SCORE, HARMFUL, list("uvwxyz"))
    assert np.isnan(alone["preference"]["value"])  # no prompt has two answers


def test_figures_of_categories():
    truth = np.array([[1, 0, 1], [0, 0, 1], [1, 0, 1]], bool)
    probabilities = np.array([[0.9, 0.6, 0.7], [0.2, 0.1, 0.8], [0.4, 0.1, 0.3]])
    found = moderation_figures(["a", "b", "c"], probabilities, truth, np.full(3, 0.5))
    assert found["by_category"]["a"] == pytest.approx({"n": 2, "f1": 2 / 3, "average_precision": 1.0, "auc": 1.0})
    assert found["by_category"]["b"] == {"n": 0}
    assert found["by_category"]["c"] == pytest.approx({"n": 3, "f1": 0.8})
    assert found["macro"] == pytest.approx({"f1": (2 / 3 + 0.8) / 2, "average_precision": 1.0, "auc": 1.0})
    assert found["micro"]["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))


# --- judges


def test_agreement():
    found = agreement_of(JUDGED, ["two", "absent", "one"])
    assert list(found.answers.items()) == [("two", 2), ("one", 2)]
    assert found.missing == ("absent",)
    assert found.unjudged == {"human": 1}
    metrics = found.metrics()
    assert metrics["one"] == {
        "answers": 2,
        "agreement/gpt4&moderation": 0.0,
        "agreement/gpt4&human": 0.5,
        "agreement/moderation&human": 0.5,
        "flagged_proportion/gpt4": 0.5,
        "flagged_proportion/moderation": 0.5,
        "flagged_proportion/human": 1.0,
    }
    assert metrics["two"]["flagged_proportion/human"] == 0.0  # of the one that was judged
    nobody = agreement_of([judged("one", human=None, gpt4=True)]).metrics()["one"]
    assert nobody["flagged_proportion/human"] is None


def test_the_plot():
    figure = agreement_plot(agreement_of(JUDGED, ["two", "absent", "one"]))
    bars, lines = figure.axes
    assert [patch.get_height() for patch in bars.patches] == [1.0, 0.5, 1.0, 0.5, 1.0, 0.0]
    assert [line.get_ydata().tolist() for line in lines.lines] == [[1.0, 0.0], [1.0, 0.5], [1.0, 0.5]]
    assert [label.get_text() for label in bars.get_xticklabels()] == ["two", "one"]
    assert bars.get_ylabel() == "Proportion of Safe QA Pairs"
    assert "no answers of absent" in figure.get_suptitle()


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"prompt": "q"}, "record 1: there is no response"),
        (judged("one", human="yes"), "record 1: flagged.human is 'yes'"),
    ],
)
def test_bad_judgements_are_named(tmp_path, bad, said):
    (tmp_path / "a.json").write_text(json.dumps([JUDGED[0], bad]))
    with pytest.raises(TrajectoryError, match=said):
        read_judged(tmp_path / "a.json")


# --- the script


def test_the_script(tmp_path, capsys):
    main = runpy.run_path(str(EVAL / "moderation.py"))["main"]
    folders = {name: write_backbone(tmp_path / name, CATEGORIES, seed=seed) for seed, name in enumerate("ab")}
    rows = [record(f"q{n}", f"an answer {n}", *["self_harm"] * (n % 2)) for n in range(8)]
    records = write_lines(tmp_path / "records.jsonl", rows)
    (tmp_path / "judged.json").write_text(json.dumps([one | {"flagged": {"human": True}} for one in JUDGED]))
    flags = ["--moderations", f"a={folders['a']}", f"b={folders['b']}", "--reference", "b", "--records", records]
    flags += ["--judged", str(tmp_path / "judged.json")]
    flags += ["--models", "one", "gone", "--output_dir", str(tmp_path / "run")]
    assert main(flags) == 0
    said = capsys.readouterr()
    assert "judged: no answers of gone, which are left out" in said.err
    assert "## Over b" in said.out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert set(metrics["moderations"]["a"]["over_reference"]) >= {"auc", "preference", "f1"}
    assert metrics["moderations"]["a"]["categories"]["by_category"]["self_harm"]["n"] == 4
    folder = tmp_path / "run" / "a"
    predictions = json.loads((folder / "predictions.json").read_text())
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert [one["flagged"]["moderation"] for one in evaluation] == [one["flagged"] for one in predictions]
    assert json.loads((folder / "agreement.json").read_text())["missing_models"] == ["gone"]
    assert (folder / "flagged-proportion.png").read_bytes()[:4] == b"\x89PNG"
    assert main([*flags[:-5], "--models", "gone", "--output_dir", str(tmp_path / "run")]) == 2
    assert "has no answer of them: give some of one, two" in capsys.readouterr().err
    assert main(["--moderations", "a", "--output_dir", str(tmp_path)]) == 2
