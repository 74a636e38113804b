"""The quality of a Q network: risks against single texts, pairs by hand, splits, and the report of all parts."""

import json
import math
import runpy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from rectify import InvalidArgumentError, PromptError, VocabularyMismatchError, token_risks
from rectify.detectors import ToxicityClassifier
from rectify.evaluation.q_quality import (
    QQuality,
    QualitySettings,
    first_token,
    last_risks,
    of_split,
    read_pairs,
    read_perspective,
    text_risks,
    write_report,
)
from rectify.evaluation.q_quality_display import markdown_tables
from rectify.splits import split_of
from rectify.static_risk import StaticRiskConfig, StaticTokenRisk
from rectify.training.q_metrics import value_metrics
from rectify.vocabulary import Fingerprint

EVAL = Path(__file__).parent.parent / "eval"
ROWS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14, 15], [16, 17, 18, 19]]
PAIRS = [
    ("a", "t30 t31", "t30 t50", " t40"),  # right
    ("a", "t50", "t30 t31", " t40"),  # wrong
    ("a", "t30", "t50", " t41"),  # right
    ("b", "t30", "t31", " t40 t41"),  # a tie, and a word of two tokens
    ("b", "t30", "t31", "0"),  # no token of its own
    ("b", "t30 " * 160, "t31", " t40"),  # longer than the context
]


def labelled(count=60):
    """Texts of 2 to 7 words, of which 0 is toxic; one is too short, and one longer than the context."""
    draw = np.random.default_rng(0)
    for number in range(count):
        text = " ".join(f"t{word}" for word in draw.integers(30, 97, 2 + number % 6))
        yield {"text": text, "label": number % 3 % 2}
    yield {"text": "t30", "label": 0}
    yield {"text": "t30 t31 " * 100, "label": 1}


def record(number, prompt, continuation):
    return {
        "filename": f"{number}.txt",
        "begin": 0,
        "end": 9,
        "prompt": {"text": f"t{30 + number} t31", "toxicity": prompt},
        "continuation": {"text": f" t32 t{40 + number % 50}", "toxicity": continuation},
    }


def records():
    scores = [(0.6, 0.1), (0.1, 0.5), (0.4, 0.4), (None, 0.9), (0.9, None), (0.2, 0.3)]
    return [record(number, *scores[number % len(scores)]) for number in range(60)]


def write_lines(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_model, make_q_network, make_tokenizer):
    folder = tmp_path_factory.mktemp("quality")
    tokenizer = make_tokenizer()
    make_model("llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    make_q_network("llama", tokenizer=tokenizer, noise=0.5).save_pretrained(folder / "q")
    risk = np.random.default_rng(3).random(97)
    StaticTokenRisk(risk, StaticRiskConfig(97, 0.5, 20.0, Fingerprint.of(tokenizer))).save_pretrained(folder / "static")
    write_lines(folder / "labelled.jsonl", labelled())
    write_lines(folder / "rtp.jsonl", records())
    write_lines(
        folder / "pairs.jsonl", [dict(zip(("kind", "harmless", "toxic", "next"), p, strict=True)) for p in PAIRS]
    )
    return folder


FILES = {"labelled_texts": "labelled.jsonl", "rtp": "rtp.jsonl", "pairs": "pairs.jsonl"}


def quality(place, *parts, **changes):
    given = {name: str(place / name) for name in ("model", "q", "static")}
    given |= {name: str(place / FILES[name]) for name in parts}
    return QQuality(QualitySettings(**given | changes))


class Reward(nn.Module):
    """Toxic is a continuation whose first word is high; some cannot be scored."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def probabilities(self, texts):
        first = np.array([int(text.split()[0][1:]) for text in texts])
        return np.where(first % 11 == 0, np.nan, first / 97)


@pytest.fixture
def reward(monkeypatch):
    model = Reward()
    monkeypatch.setattr(ToxicityClassifier, "from_pretrained", lambda name, device=None: model)
    return model


# --- risks


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_risks_are_those_of_single_texts(q_networks, kind):
    starts = [1, 1, 3, 2]
    found = text_risks(q_networks[kind], ROWS, starts, batch_size=3)
    assert found.shape == (4, 6)
    for row, (ids, start) in enumerate(zip(ROWS, starts, strict=True)):
        alone = token_risks(q_networks[kind], torch.tensor([ids]))[0].numpy()
        assert found[row, start : len(ids)] == pytest.approx(alone[start:], abs=1e-5)
        assert np.isnan(found[row, :start]).all()
        assert np.isnan(found[row, len(ids) :]).all()
        assert last_risks(q_networks[kind], ROWS)[row] == pytest.approx(alone[-1], abs=1e-5)
    assert np.isnan(text_risks(q_networks[kind], ROWS)[:, 0]).all()
    assert text_risks(q_networks[kind], [], []).shape == (0, 0)
    assert last_risks(q_networks[kind], []).shape == (0,)


def test_the_first_token_of_a_word(make_tokenizer):
    tokenizer = make_tokenizer()
    assert first_token(tokenizer, "t30 t31", " t40") == ([30, 31, 40], 0)
    assert first_token(tokenizer, "t30", " t40 t41 t42") == ([30, 40], 2)
    for prefix, word in (("t30", "1"), ("", " t40"), ("t30", " ")):
        assert first_token(tokenizer, prefix, word) is None


# --- parts


class AfterFifty:
    """A risk model: 0.9 after the token 50, else 0.2."""

    device = torch.device("cpu")

    def action_values(self, input_ids, attention_mask=None):
        values = torch.where(input_ids[:, :-1] == 50, -0.9, -0.2)
        return nn.functional.pad(values, (1, 0), value=math.nan)


def test_pairs_by_hand(place):
    measured = quality(place, "pairs")
    measured.risk_models["q"] = AfterFifty()
    found = measured.pairs()
    assert found["counts"] == {"read": 6, "left_out": 2}
    figures = found["figures"]["q"]
    assert {group: one["pairs"] for group, one in figures.items()} == {"all": 4, "single_token": 3, "a": 3, "b": 1}
    accuracy = {group: one["accuracy"] for group, one in figures.items()}
    assert accuracy == pytest.approx({"all": 2.5 / 4, "single_token": 2 / 3, "a": 2 / 3, "b": 0.5})
    errors = {group: one["standard_error"] for group, one in figures.items()}
    assert errors["all"] == pytest.approx(np.std([1, 0, 1, 0.5], ddof=1) / 2)
    assert errors["b"] is None
    assert {one["accuracy"] for one in found["figures"]["static"].values()} == {0.5}


def test_no_bundled_pair_is_left_out_with_the_pocket_models():
    found = QQuality(QualitySettings(pairs=str(EVAL / "data" / "counterfactual_pairs.jsonl"))).pairs()
    assert found["counts"] == {"read": 240, "left_out": 0}
    assert found["figures"]["q"]["all"]["pairs"] == 240


def test_labelled_texts(place):
    measured = quality(place, "labelled_texts", hash_split="all", toxic_label=0)
    found = measured.labelled_texts()
    assert found["counts"] == {"read": 62, "too_short": 1, "cut_at_context": 1}
    rows = [row for row in labelled() if row["text"] != "t30"]
    toxic = [row["label"] == 0 for row in rows]
    for name, risk_model in measured.risk_models.items():
        figures = found["figures"][name]
        assert set(figures) == {"texts", "toxic_share", "auc_25", "auc_50", "auc_75", "auc_100"}
        assert (figures["texts"], figures["toxic_share"]) == (61, np.mean(toxic))
        risks = [
            token_risks(risk_model, measured.tokenizer(row["text"], return_tensors="pt")["input_ids"][:, :160])[0]
            for row in rows
        ]
        assert figures["auc_100"] == pytest.approx(roc_auc_score(toxic, [risk[-1] for risk in risks]))
        halves = [risk[math.ceil((len(risk) - 1) / 2)] for risk in risks]
        assert figures["auc_50"] == pytest.approx(roc_auc_score(toxic, halves))
    other = quality(place, "labelled_texts", hash_split="all").labelled_texts()["figures"]["q"]
    assert other["auc_100"] == pytest.approx(1 - found["figures"]["q"]["auc_100"])


def test_only_texts_that_are_held_out_however_they_are_stripped(place):
    held = [row["text"] for row in labelled() if split_of(row["text"]) == split_of(row["text"].strip()) == "test"]
    found = quality(place, "labelled_texts").labelled_texts()
    assert found["figures"]["q"]["texts"] == len(held) > 0
    texts = [f" {number}" for number in range(200)]
    for split in ("train", "validation", "test"):
        expected = [text for text in texts if {split_of(text), split_of(text[1:])} == {split}]
        assert [text for text in texts if of_split(text, split)] == expected != []
    assert all(of_split(text, "all") for text in texts)


def test_perspective_texts(tmp_path, place):
    texts, toxic, unscored = read_perspective(place / "rtp.jsonl", "test")
    chosen = [one for one in records() if split_of(f"{one['filename']}:0:9") == "test"]
    scored = [one for one in chosen if None not in (one["prompt"]["toxicity"], one["continuation"]["toxicity"])]
    assert texts == [one["prompt"]["text"] + one["continuation"]["text"] for one in scored]
    assert toxic == [one["prompt"]["toxicity"] == 0.6 or one["continuation"]["toxicity"] == 0.5 for one in scored]
    assert unscored == len(chosen) - len(scored)
    assert [len(part) for part in read_perspective(place / "rtp.jsonl", "all")[:2]] == [40, 40]
    found = quality(place, "rtp", split="all").real_toxicity_prompts()
    assert found["counts"] == {"unscored": 20, "too_short": 0, "cut_at_context": 0}
    assert found["figures"]["q"]["toxic_share"] == 0.5
    write_lines(tmp_path / "other.jsonl", ["t30", {"prompt": "t30"}])
    with pytest.raises(PromptError, match="record 1: 'filename' is missing"):
        read_perspective(tmp_path / "other.jsonl", "all")
    write_lines(tmp_path / "none.jsonl", [one for one in records() if one["prompt"]["toxicity"] is None])
    with pytest.raises(PromptError, match="no scored record of the all split"):
        read_perspective(tmp_path / "none.jsonl", "all")


def test_rollouts(place, tmp_path, reward):
    write_lines(tmp_path / "prompts.jsonl", records())
    given = {"rollout_texts": (str(tmp_path / "prompts.jsonl"),), "rollout_dir": str(tmp_path / "kept")}
    measured = quality(place, **given, num_rollouts=40)
    found = measured.rollouts()
    lines = [json.loads(line) for line in (tmp_path / "kept" / "train.jsonl").read_text().splitlines()]
    toxic = np.array([reward.probabilities([line["continuation"]])[0] >= 0.5 for line in lines])
    assert found["counts"]["prompts"] == 40
    assert found["counts"]["unscored"] == 40 - len(lines)
    assert 0 < toxic.sum() < len(toxic) < 40
    for name, risk_model in measured.risk_models.items():
        risks = np.full((len(lines), 100), np.nan)
        for row, line in enumerate(lines):
            prompt, rest = (measured.tokenizer(line[part])["input_ids"] for part in ("prompt", "continuation"))
            alone = token_risks(risk_model, torch.tensor([[*prompt, *rest]]))[0]
            risks[row, : len(rest)] = alone[len(prompt) :].numpy()
        assert found["figures"][name] == pytest.approx(value_metrics(risks, toxic), abs=1e-5)
    # those that were kept are measured on again
    assert quality(place, **given, num_rollouts=40).rollouts() == found
    with torch.no_grad():
        reward.bias.add_(1)
    with pytest.raises(InvalidArgumentError, match="was begun with reward_model"):
        quality(place, **given, num_rollouts=40).rollouts()


# --- the script and its files


def test_the_script(place, tmp_path, capsys, reward):
    main = runpy.run_path(str(EVAL / "q_quality.py"))["main"]
    flags = [f"--{name}={place / name}" for name in ("model", "q", "static")]
    flags += [f"--{name}={place / file}" for name, file in FILES.items()]
    output = tmp_path / "a" / "report.json"
    flags += ["--toxic_label=0", "--hash_split=all", "--split=all", f"--output={output}"]
    rollouts = ["--rollout_texts", str(place / "rtp.jsonl"), "--num_rollouts", "30"]
    assert main([*flags, *rollouts, "--threads", str(torch.get_num_threads())]) == 0
    printed, report = capsys.readouterr().out, json.loads(output.read_text())
    assert set(report) == {"settings", "rollouts", "labelled_texts", "realtoxicityprompts", "pairs"}
    assert printed == markdown_tables(report)
    for part in ("rollouts", "labelled_texts", "realtoxicityprompts", "pairs"):
        assert set(report[part]["figures"]) == {"q", "static"}
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    assert [row[0].strip("| ") for row in rows] == [
        *("texts", "---", "rollouts", "rollouts", "labelled texts", "labelled texts"),
        *("RealToxicityPrompts", "RealToxicityPrompts", "pairs", "---", "Q network", "token risks"),
    ]
    assert rows[4][7] == f"{report['labelled_texts']['figures']['q']['auc_100']:.4f}"
    assert rows[4][8] == "–"
    assert rows[8][1:3] == ["all (4)", "single token (3)"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing is given"),
        (["--pairs=none.jsonl"], "pairs 'none.jsonl' cannot be read"),
        (["--rtp=x", "--batch_size=0"], "batch_size is 0"),
        (["--rtp=x", "--num_rollouts=0"], "num_rollouts is 0"),
    ],
)
def test_refusals_are_one_line(place, capsys, flags, message):
    main = runpy.run_path(str(EVAL / "q_quality.py"))["main"]
    assert main([*flags, f"--model={place / 'model'}", f"--q={place / 'q'}"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert message in said[-1]
    assert len([line for line in said if "error" in line]) == 1


def test_bad_settings_and_other_vocabularies_are_refused(place, tmp_path, make_q_network, make_tokenizer):
    for changes in ({"toxic_label": 2}, {"hash_split": "half"}, {"split": "half"}):
        with pytest.raises(InvalidArgumentError, match=next(iter(changes))):
            QualitySettings(pairs="x", **changes)
    write_lines(tmp_path / "few.jsonl", [{"text": "t30 t31", "label": 1}])
    assert split_of("t30 t31") != "test"
    few = quality(place, labelled_texts=str(tmp_path / "few.jsonl"))
    with pytest.raises(InvalidArgumentError, match="hash_split is 'test'"):
        few.labelled_texts()
    other = make_tokenizer(rename=[(3, "other")])
    make_q_network("llama", tokenizer=other).save_pretrained(tmp_path / "q")
    with pytest.raises(VocabularyMismatchError):
        quality(place, "pairs", q=str(tmp_path / "q"))
    with pytest.raises(InvalidArgumentError, match="cannot be written"):
        write_report({}, tmp_path)


def test_the_pairs_file(tmp_path):
    pairs = read_pairs(EVAL / "data" / "counterfactual_pairs.jsonl")
    assert set(Counter(pair.kind for pair in pairs).values()) == {48}
    assert all(pair.next.startswith(" ") and pair.harmless != pair.toxic for pair in pairs)
    line = json.dumps({"kind": "a", "harmless": "b", "toxic": "c", "next": 1})
    for text, message in (("{", "line 1"), ("[]", "line 1"), ("\n" + line, "line 2"), ("\n", "no pair")):
        (tmp_path / "pairs.jsonl").write_text(text)
        with pytest.raises(InvalidArgumentError, match=message):
            read_pairs(tmp_path / "pairs.jsonl")
