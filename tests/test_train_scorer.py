"""Scorers made from tables of scores: what is read, how it is split, calibrated, trained and used."""

import json
import random

import numpy as np
import pytest
from commands import run_command

from rectify.cli import main
from rectify.errors import InvalidArgumentError, TrajectoryError
from rectify.scoring import ATTRIBUTES, load_scorer
from rectify.scoring.score_tables import perspective_scores, read_scored_texts
from rectify.splits import split_of
from rectify.training.score_calibration import calibration_curve


def write_lines(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def record(number, prompt, continuation):
    return {"filename": str(number), "begin": 0, "end": 9, "prompt": prompt, "continuation": continuation}


# --- tables of scores


def test_scores_stand_in_columns_in_fields_or_in_scores(tmp_path):
    table = tmp_path / "jigsaw.csv"
    table.write_text("id,comment,toxic,identity_hate,rating\n1,you,1,,5\n2,me,0.25,false,4\n")
    found = list(read_scored_texts([table], ["comment"]))
    assert [(text, dict(scores), split) for text, scores, split in found] == [
        ("you", {"TOXICITY": 1.0}, None),
        ("me", {"TOXICITY": 0.25, "IDENTITY_ATTACK": 0.0}, None),
    ]
    assert np.array_equal(found[0].row(["INSULT", "TOXICITY"]), [np.nan, 1.0], equal_nan=True)
    lines = write_lines(
        tmp_path / "scored.jsonl",
        [{"text": "a", "toxic": 1, "scores": {"TOXICITY": 0.75}, "score_error": None}, {"prompt": "no scores"}],
    )
    assert [dict(text.scores) for text in read_scored_texts([lines])] == [{"TOXICITY": 0.75}, {}]


def test_columns_of_other_names_are_told(tmp_path):
    table = tmp_path / "t.tsv"
    table.write_text("text\trisk\ttoxicity\nfine\t0.5\t0.1\n")
    (text,) = read_scored_texts([table], score_columns={"risk": "TOXICITY"})
    assert dict(text.scores) == {"TOXICITY": 0.5}
    with pytest.raises(TrajectoryError, match="line 2: no column 'risky'"):
        list(read_scored_texts([table], score_columns={"risky": "TOXICITY"}))
    with pytest.raises(InvalidArgumentError, match="score_columns holds risk=RISK"):
        list(read_scored_texts([table], score_columns={"risk": "RISK"}))


@pytest.mark.parametrize("score", [1.5, -0.1, "high", "nan"])
def test_what_is_no_score_is_refused_by_its_line(tmp_path, score):
    path = write_lines(tmp_path / "t.jsonl", [{"text": "a", "toxicity": 0.5}, {"text": "b", "toxicity": score}])
    with pytest.raises(TrajectoryError, match="line 2: toxicity is"):
        list(read_scored_texts([path]))


def test_perspective_scores_are_read_by_split(tmp_path):
    def part(text, toxicity):
        return {"text": text, **{name.lower(): toxicity for name in ATTRIBUTES}}

    records = [
        record(number, part(f"prompt {number}", 0.25), part(" ", 0.5) if number % 2 else part("rest", None))
        for number in range(30)
    ]
    path = write_lines(tmp_path / "prompts.jsonl", records)
    parts = {split: perspective_scores(path, split) for split in ("train", "validation", "test")}
    # blank texts, and those without any score, are left out
    assert sorted(text for rows in parts.values() for text, _ in rows) == sorted(f"prompt {n}" for n in range(30))
    for split, rows in parts.items():
        assert rows
        assert all(split_of(f"{text.split()[1]}:0:9") == split and scores == [0.25] * 8 for text, scores in rows)


# --- calibration


def test_a_calibration_curve_undoes_a_distortion_and_never_falls():
    rng = np.random.default_rng(0)
    logit = rng.normal(0, 2, 2000)
    truth = 1 / (1 + np.exp(-(0.3 + 0.7 * logit + 0.05 * logit**2)))
    hard = (rng.random(2000) < truth).astype(float)
    for label, bound in ((truth, 0.01), (hard, 0.06)):
        knots, values = calibration_curve(1 / (1 + np.exp(-logit)), label)
        assert knots[0] == 0
        assert knots[-1] == 1
        assert (np.diff(knots) >= 0).all()
        assert (np.diff(values) >= 0).all()
        assert np.abs(np.interp(1 / (1 + np.exp(-logit)), knots, values) - truth).mean() < bound


def test_labels_of_one_kind_teach_no_scale():
    assert calibration_curve(np.array([0.2, 0.6]), np.zeros(2)) == [[0.0, 1.0], [0.0, 1.0]]


# --- the command


@pytest.fixture(scope="module")
def backbone(make_model, make_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    make_model("llama", pad_token_id=2).save_pretrained(folder)
    make_tokenizer(pad="t2").save_pretrained(folder)
    return folder


@pytest.fixture
def records(tmp_path):
    """RealToxicityPrompts records in which t50 is toxic and t51 an insult."""
    draw, rows = random.Random(0), []
    for number in range(150):
        parts = []
        for _ in range(2):
            words = [f"t{draw.randrange(60, 70)}" for _ in range(3)] + draw.sample(["t50", "t51", "t52"], 1)
            toxicity, insult = 0.1 + 0.7 * ("t50" in words), 0.2 + 0.6 * ("t51" in words)
            parts.append({"text": " ".join(words), "toxicity": toxicity, "insult": insult if number % 3 else None})
        rows.append(record(number, *parts))
    rows[0]["prompt"]["text"] = " "
    return write_lines(tmp_path / "prompts.jsonl", rows)


def train(capsys, *arguments):
    return run_command(main, capsys, "train", "scorer", "--report_to", "none", "--use_cpu", *arguments)


def test_a_scorer_is_trained_on_the_training_part_calibrated_and_used(backbone, records, tmp_path, capsys):
    output = tmp_path / "scorer"
    flags = ["--model_name_or_path", backbone, "--max_length", "16", "--train_files", records, "--output_dir", output]
    code, _, err = train(capsys, *flags, "--learning_rate", "1e-2", "--num_train_epochs", "6")
    assert code == 0, err
    parts = {split: perspective_scores(records, split) for split in ("train", "validation", "test")}
    assert f"texts: {len(parts['train'])} for training, {len(parts['validation'])} for validation" in err
    assert "attributes TOXICITY, INSULT" in err
    assert f"{len(parts['test'])} of RealToxicityPrompts' test part" in err
    scorer = load_scorer(f"detector:{output}")
    assert set(scorer.attributes) == {"TOXICITY", "INSULT"}
    scores = scorer.score([text for text, _ in parts["test"]], ("TOXICITY", "INSULT"))
    truth = np.array([[row[ATTRIBUTES.index(name)] for name in scores.attributes] for _, row in parts["test"]])
    known = ~np.isnan(truth)
    assert np.abs(scores.values - truth)[known].mean() < 0.1
    config = json.loads((output / "detector_config.json").read_text())
    assert set(config["calibration"]) == {"TOXICITY", "INSULT"}
    assert "finished training" in train(capsys, *flags)[2]


def test_what_cannot_be_trained_on_is_refused(backbone, records, tmp_path, capsys):
    flags = ["--model_name_or_path", backbone, "--train_files", records, "--output_dir", tmp_path / "scorer"]
    for more, said in (
        (["--attributes", "SPAM"], "SPAM"),
        (["--attributes", "THREAT"], "no score of THREAT"),
        (["--score_columns", "toxicity"], "COLUMN=ATTRIBUTE"),
        (["--text_column", "a", "b"], "text_column is given 2 times"),
    ):
        code, _, err = train(capsys, *flags, *more)
        assert code == 2
        assert said in err
        assert "Traceback" not in err
    assert not (tmp_path / "scorer").exists()
