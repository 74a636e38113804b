"""Cascades: confidence, thresholds that are exact with ties, curves, and two detectors of any kind."""

import csv
import json

import numpy as np
import pytest
from commands import run_command
from hypothesis import given, settings
from hypothesis import strategies as st

from rectify.cli import main
from rectify.detectors.cascade import (
    accuracy_cost,
    escalated,
    least_confident,
    predicted,
    risk_coverage,
    share_of_gain,
    threshold_for_accuracy,
    threshold_for_budget,
    two_labels,
)
from rectify.errors import CheckpointError, InvalidArgumentError
from rectify.evaluation.cascade import Judged, cascade_figures
from rectify.evaluation.cascade_command import main as evaluate
from rectify.evaluation.intervals import Bootstrap, macro_f1
from rectify.scoring import load_scorer
from rectify.scoring.cascade import ALL, CascadeConfig, calibrated, confidence, correct
from rectify.scoring.scores import Scores

CONFIDENCES = st.lists(st.sampled_from([0.5, 0.6, 0.75, 0.9, 1.0, np.nan]), min_size=1, max_size=12).map(np.array)


def test_the_confidence_is_that_of_the_likeliest_label():
    labels, sure = predicted(np.array([[0.2, 0.5, 0.3], [np.nan] * 3, [0.4, 0.4, 0.2]]))
    assert labels.tolist() == [1, -1, 0]
    assert np.array_equal(sure, [0.5, np.nan, 0.4], equal_nan=True)
    assert predicted(two_labels(np.array([0.1, 0.8])))[1].tolist() == [0.9, 0.8]


@settings(max_examples=60, derandomize=True, deadline=None)
@given(CONFIDENCES, st.sampled_from([0, 0.1, 0.3, 0.5, 0.99, 1]))
def test_a_budget_is_kept_and_no_higher_threshold_keeps_it(sure, share):
    threshold = threshold_for_budget(sure, share)
    unknown = np.isnan(sure).sum()
    most = max(int(share * len(sure) + 1e-9), unknown)
    assert escalated(sure, threshold).sum() <= most
    above = [value for value in [*sure[~np.isnan(sure)], np.inf] if value > threshold]
    assert all(escalated(sure, value).sum() > share * len(sure) for value in above)
    chosen = least_confident(sure, share)
    assert chosen.sum() == int(share * len(sure) + 1e-9)
    if chosen.any() and not chosen.all():
        known = np.nan_to_num(sure, nan=-1)
        assert known[chosen].max() <= known[~chosen].min()


@settings(max_examples=60, derandomize=True, deadline=None)
@given(CONFIDENCES, st.data())
def test_curves_are_those_of_every_threshold(sure, data):
    bits = st.lists(st.booleans(), min_size=len(sure), max_size=len(sure))
    small, large = np.array(data.draw(bits)) & ~np.isnan(sure), np.array(data.draw(bits))
    curve = accuracy_cost(sure, small, large, 5.0)
    for threshold, share, accuracy, cost in zip(
        curve.threshold, curve.escalated, curve.accuracy, curve.cost, strict=True
    ):
        asked = escalated(sure, threshold)
        assert share == pytest.approx(asked.mean())
        assert accuracy == pytest.approx(np.where(asked, large, small).mean())
        assert cost == pytest.approx(1 + 5 * asked.mean())
    assert curve.escalated[-1] == 1
    thresholds, coverage, risk = risk_coverage(sure, small)
    for threshold, share, errs in zip(thresholds, coverage, risk, strict=True):
        kept = ~escalated(sure, threshold)
        assert share == pytest.approx(kept.mean())
        assert errs == pytest.approx((~small[kept]).mean())
    target = float(curve.accuracy.max())
    found = threshold_for_accuracy(sure, small, large, target)
    assert np.where(escalated(sure, found), large, small).mean() == pytest.approx(target)
    lower = curve.accuracy[curve.threshold < found]
    assert (lower < target).all()


def test_bad_arrays_and_targets_are_refused():
    sure, right = np.array([0.5, 0.9]), np.array([True, False])
    with pytest.raises(InvalidArgumentError, match=r"target_accuracy is 0.9.*0.5000 being the most"):
        threshold_for_accuracy(sure, right, right, 0.9)
    with pytest.raises(InvalidArgumentError, match=r"share is 1\.5"):
        threshold_for_budget(sure, 1.5)
    for arrays in ((np.array([]), np.array([])), (sure, right[:1])):
        with pytest.raises(InvalidArgumentError, match="the arrays have shapes"):
            risk_coverage(*arrays)
    assert share_of_gain(0.85, 0.8, 0.9) == pytest.approx(0.5)
    assert np.isnan(share_of_gain(0.85, 0.9, 0.8))


def test_macro_f1_is_scikit_learns_and_its_interval_holds_it():
    from sklearn.metrics import f1_score

    draw = np.random.default_rng(0)
    truth, said = draw.integers(0, 2, 200), draw.integers(-1, 2, 200)
    found = Bootstrap(200, 200).estimate(macro_f1(said, truth))
    assert found.value == pytest.approx(f1_score(truth, said, labels=[0, 1], average="macro"))
    assert found.low < found.value < found.high


def judged(name, seed, count=600):
    """A small detector that is right where it is sure, and a large one that is right; both are too sure."""
    draw = np.random.default_rng(seed)
    toxic = draw.random(count) < 0.4
    odds = draw.normal(0, 1.2, count) + np.where(toxic, 1, -1)
    small = 1 / (1 + np.exp(-4 * odds))
    large = np.where(draw.random(count) < 0.95, toxic, ~toxic) * 0.98 + 0.01
    small[:3] = np.nan
    return Judged(name, small, large, toxic)


def test_figures_of_a_cascade():
    from rectify.training.cascade_command import scorer_temperature

    validation, test = judged("validation", 0), judged("test", 1)
    temperatures = tuple(scorer_temperature(each, validation.toxic) for each in (validation.small, validation.large))
    assert temperatures[0] == pytest.approx(4 * 1.44 / 2, rel=0.2)
    found = cascade_figures(test, validation, temperatures)
    rows = [found["shares"][share] for share in ("0", "0.1", "0.2", "0.3", "1")]
    assert [row["escalated"] for row in rows] == [0, 0.1, 0.2, 0.3, 1]
    assert rows[0]["accuracy"]["value"] == pytest.approx(correct(test.small, test.toxic).mean())
    assert rows[4]["accuracy"]["value"] == pytest.approx(correct(test.large, test.toxic).mean())
    assert rows[0]["accuracy"]["value"] < rows[3]["accuracy"]["value"]
    assert found["gain_at_30"]["accuracy"] > 0.5
    assert found["threshold"]["escalated"] == pytest.approx(0.3, abs=0.06)
    assert found["ece"]["small"]["after"] < found["ece"]["small"]["before"] / 2


# --- two detectors


LABELLED = [("You are an idiot", 1), ("Have a nice day", 0), ("shut your stupid mouth", 1), ("See you at noon", 0)]


def write_texts(path):
    """Each text four times, once with the other label, as labels that can be predicted without fail have no scale."""
    rows = [(text, label ^ wrong) for text, label in LABELLED for wrong in (0, 0, 0, 1)]
    path.write_text("comment,kind\n" + "".join(f"{text},{'bad' if label else 'ok'}\n" for text, label in rows))
    return path


def test_a_cascade_is_made_used_as_a_scorer_and_by_the_verb(tmp_path, capsys):
    texts, output = write_texts(tmp_path / "texts.csv"), tmp_path / "cascade"
    files = ["--text_column", "comment", "--label_column", "kind", "--label_values", "bad=1,ok=0", "--device", "cpu"]
    make = ["train", "cascade", "--small", "detector:pocket-reward", "--large", "detector:pocket-reward", *files]
    code, _, err = run_command(
        main, capsys, *make, "--validation_files", texts, "--budget", "0.5", "--output_dir", output
    )
    assert code == 0, err
    config = CascadeConfig.from_pretrained(output)
    assert config.training["validation"]["n"] == 16
    assert config.training["validation"]["escalated"] == 0.5
    assert (output / "cascade.png").exists()
    config.threshold -= 1e-6  # it is one text's confidence, which another batch may round otherwise
    config.save_pretrained(output)
    plain = [text for text, _ in LABELLED]
    first = load_scorer("detector:pocket-reward", device="cpu").score(plain)["TOXICITY"]
    asked = config.escalated(first)
    assert asked.sum() == 2
    temperatures = np.where(asked, config.large_temperature, config.small_temperature)
    expected = [float(calibrated(first[[place]], temperatures[place])[0]) for place in range(4)]
    assert load_scorer(f"cascade:{output}", device="cpu").score(plain)["TOXICITY"] == pytest.approx(expected, abs=1e-5)
    config.large = f"keywords:{tmp_path / 'words.txt'}"
    config.large_temperature = 1.0
    config.save_pretrained(output)
    (tmp_path / "words.txt").write_text("stupid\n")
    found, table = tmp_path / "found.jsonl", tmp_path / "found.csv"
    call = ["detect", texts, "--text_column", "comment", "--detector", f"cascade:{output}", "--device", "cpu"]
    code, _, err = run_command(main, capsys, *call, "--output", found, "--csv", table)
    assert code == 0, err
    records = [json.loads(line) for line in found.read_text().splitlines()]
    assert [record["decided_by"] == config.large for record in records] == list(np.repeat(asked, 4))
    assert all(record["label"] == ("toxic" if record["toxicity"] >= 0.5 else "non-toxic") for record in records)
    assert [record["confidence"] for record in records] == pytest.approx(
        confidence(np.array([record["toxicity"] for record in records]))
    )
    with table.open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["decided_by"] for row in rows] == [record["decided_by"] for record in records]
    assert sorted(path.name for path in tmp_path.glob("found.jsonl*")) == ["found.jsonl", "found.jsonl.settings.json"]
    before = found.read_text()
    assert run_command(main, capsys, *call, "--output", found)[0] == 0
    assert found.read_text() == before


def test_a_cascade_that_was_killed_goes_on(tmp_path, monkeypatch):
    from rectify.detectors import decisions as module

    (tmp_path / "words.txt").write_text("idiot\n")
    CascadeConfig("stub", f"keywords:{tmp_path / 'words.txt'}", 0.8).save_pretrained(tmp_path / "cascade")
    texts = [f"text {number} idiot" for number in range(40)]
    spec, writing = f"cascade:{tmp_path / 'cascade'}", module.Writing()
    whole = module.decisions(spec, texts, writing, output=tmp_path / "whole.jsonl")
    assert {record["decided_by"] for record in whole} == {"stub", f"keywords:{tmp_path / 'words.txt'}"}
    monkeypatch.setattr(module, "_CHUNK", 7)
    loaded, load = [], module.load_part

    def counting(spec, device, allow=()):
        loaded.append(spec)
        if len(loaded) == 2:
            raise KeyboardInterrupt
        return load(spec, device, allow)

    monkeypatch.setattr(module, "load_part", counting)
    with pytest.raises(KeyboardInterrupt):
        module.decisions(spec, texts, writing, output=tmp_path / "o.jsonl")
    assert module.decisions(spec, texts, writing, output=tmp_path / "o.jsonl") == whole
    assert [name.partition(":")[0] for name in loaded] == ["stub", "keywords", "keywords"]  # the small one's are kept
    assert (tmp_path / "o.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert module.decisions(spec, texts, writing, output=tmp_path / "o.jsonl") == whole
    assert len(loaded) == 3


def test_decisions_of_another_threshold_are_not_taken_for_these(tmp_path):
    from rectify.detectors.decisions import Writing, decisions

    (tmp_path / "words.txt").write_text("idiot\n")
    spec, output = f"cascade:{tmp_path / 'cascade'}", tmp_path / "o.jsonl"
    CascadeConfig("stub", f"keywords:{tmp_path / 'words.txt'}", 0.5).save_pretrained(tmp_path / "cascade")
    found = decisions(spec, ["text"], Writing(), output=output)
    assert decisions(spec, ["text"], Writing(batch_size=2), output=output) == found
    CascadeConfig("stub", f"keywords:{tmp_path / 'words.txt'}", 1).save_pretrained(tmp_path / "cascade")
    with pytest.raises(InvalidArgumentError, match=r"begun with threshold 0\.5, not 1\.0"):
        decisions(spec, ["text"], Writing(), output=output)


def test_what_was_scored_is_not_scored_again(tmp_path, monkeypatch):
    from rectify.scoring import cascade as module

    class Counting:
        name, revision, attributes = "counting", "1", ("TOXICITY",)

        def score(self, texts, attributes=("TOXICITY",)):
            asked.extend(texts)
            if len(texts) < 256:
                raise KeyboardInterrupt
            return Scores(np.full((len(texts), 1), 0.25), ("TOXICITY",), (None,) * len(texts))

    asked, texts = [], [f"text {number}" for number in range(300)]
    monkeypatch.setattr(module, "load_part", lambda spec, device, allow=(): Counting())
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            module.toxicity_by("counting", texts, tmp_path / "scores.sqlite")
    assert asked == [*texts, *texts[256:]]


def test_thresholds_of_all_and_none_are_kept_as_json(tmp_path):
    sure = np.array([0.5, 1.0, np.nan])
    for threshold, count in ((np.inf, 3), (-np.inf, 1)):
        CascadeConfig("a", "b", threshold).save_pretrained(tmp_path)
        json.loads((tmp_path / "cascade_config.json").read_text(), parse_constant=pytest.fail)
        assert escalated(sure, CascadeConfig.from_pretrained(tmp_path).threshold).sum() == count
    assert CascadeConfig("a", "b", 9).threshold == ALL
    with pytest.raises(InvalidArgumentError, match="threshold is nan"):
        CascadeConfig("a", "b", np.nan)
    with pytest.raises(CheckpointError, match=r"holds no cascade_config.json"):
        CascadeConfig.from_pretrained(tmp_path / "nowhere")


def test_the_evaluation_writes_tables_and_pictures(tmp_path, capsys):
    texts, output = write_texts(tmp_path / "wiki.csv"), tmp_path / "found"
    files = [
        "--test_files",
        texts,
        "--text_column",
        "comment",
        "--label_column",
        "kind",
        "--label_values",
        "bad=1,ok=0",
    ]
    call = ["--small", "detector:pocket-reward", "--large", "stub", *files, "--output_dir", output]
    code, _, err = run_command(evaluate, capsys, *call)
    assert code == 2
    assert "give validation_files or fixed_split" in err
    code, out, err = run_command(evaluate, capsys, *call, "--validation_files", texts)
    assert code == 0, err
    assert out == (output / "cascade.md").read_text()
    assert out.count("| wiki |") == 7
    report = json.loads((output / "cascade.json").read_text())
    assert list(report["sources"]["wiki"]["shares"]) == ["0", "0.1", "0.2", "0.3", "1"]
    assert (output / "wiki.png").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["--label_values", "bad=1,ok=1"], "texts of one label"),
        (["--label_values", ""], "kind is 'bad'"),
        (["--small", "nothing"], "scorer is 'nothing'"),
        (["--budget", "30", "--small", "nothing"], "budget is 30.0: give a number from 0 to 1"),
    ],
)
def test_what_makes_no_cascade_is_refused(tmp_path, capsys, changes, says):
    texts = write_texts(tmp_path / "texts.csv")
    flags = {
        "--small": "stub",
        "--large": "stub",
        "--validation_files": texts,
        "--text_column": "comment",
        "--label_column": "kind",
        "--label_values": "bad=1,ok=0",
        "--budget": 0.3,
        "--output_dir": tmp_path / "out",
    }
    flags |= dict(zip(changes[::2], changes[1::2], strict=True))
    code, _, err = run_command(main, capsys, "train", "cascade", *(part for pair in flags.items() for part in pair))
    assert code == 2
    assert says in err
