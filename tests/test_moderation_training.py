"""`rectify train moderation`: records, splits by prompt, votes, thresholds. All records are written here, in
BeaverTails' format."""

import json
import random
import sys

import numpy as np
import pytest
from moderation_records import record, votes, write_backbone, write_lines

from rectify import InvalidArgumentError
from rectify.cli import main
from rectify.detectors.moderation import CATEGORIES, QAModeration
from rectify.errors import MissingExtraError, TrajectoryError
from rectify.evaluation.moderation import tuned_thresholds
from rectify.evaluation.preference_pairs import preference_records
from rectify.training.moderation import (
    JudgedPair,
    joined_votes,
    read_judged_pairs,
    split_by_prompt,
    without_prompts_of,
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return read_judged_pairs([write_lines(tmp_path_factory.mktemp("votes") / "votes.jsonl", votes())])[0]


# --- records


def test_lines_and_lists_hold_the_same(tmp_path):
    lines = write_lines(tmp_path / "a.jsonl", votes(2))
    (tmp_path / "b.json").write_text(json.dumps(votes(2), indent=1))
    found, categories = read_judged_pairs([lines])
    assert read_judged_pairs([str(tmp_path / "b.json")]) == (found, categories)
    assert categories == list(CATEGORIES)
    assert found[0].pair == ("How about thing 0?", "The bad answer, number 0.")
    assert found[0].labels == (1.0, *[0.0] * 13)


def test_the_order_of_the_labels_is_the_published_one(tmp_path):
    turned = record("q", "a", "self_harm")
    turned["category"] = dict(reversed(turned["category"].items()))
    (one,), categories = read_judged_pairs([write_lines(tmp_path / "a.jsonl", [turned])])
    assert categories == list(CATEGORIES)
    assert one.labels.index(1.0) == CATEGORIES.index("self_harm")
    own = {"prompt": "q", "response": "a", "category": {"unsafe": True, "rude": False}}
    assert read_judged_pairs([write_lines(tmp_path / "b.jsonl", [own])])[1] == ["unsafe", "rude"]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"prompt": "q", "response": "a"}, "line 2: there is 'prompt', 'response': give records"),
        (record("q", "a") | {"response": None}, "line 2: response is None"),
        (record("\ud800", "a"), "line 2: no valid Unicode text"),
        (record("q", "a") | {"category": {}}, "line 2: category is {}"),
        (record("q", "a") | {"category": {"self_harm": 2}}, "line 2: 'self_harm' is 2"),
        (record("q", "a") | {"category": {"self_harm": True}}, "line 2: the categories are not those of the first"),
    ],
)
def test_bad_records_are_named(tmp_path, bad, said):
    with pytest.raises(TrajectoryError, match=said):
        read_judged_pairs([write_lines(tmp_path / "a.jsonl", [record("q", "a"), bad])])


def test_a_data_set_of_the_hub_needs_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"is no file here, .*pip install 'rectify-lm\[datasets\]'"):
        read_judged_pairs(["PKU-Alignment/BeaverTails:30k_train"])
    with pytest.raises(TrajectoryError, match="cannot be read"):
        read_judged_pairs(["nowhere.jsonl"])


# --- splits and votes


def test_a_random_split_leaks_and_one_by_prompt_does_not(rows):
    shuffled = random.Random(0).sample(rows, len(rows))
    cut = len(rows) // 10
    seen = {row.pair for row in shuffled[cut:]}
    assert np.mean([row.pair in seen for row in shuffled[:cut]]) > 0.9  # the very pair, by another annotator
    train, held = split_by_prompt(rows, 0.2)
    assert len(train) + len(held) == len(rows)
    assert held
    assert not {row.pair.question for row in train} & {row.pair.question for row in held}


def test_a_prompt_is_the_same_however_it_is_written(rows):
    like = JudgedPair(rows[0].pair._replace(question="  how about\nTHING 0? "), rows[0].labels)
    assert like.prompt == rows[0].prompt
    assert without_prompts_of(rows, [like]) == rows[6:]
    assert JudgedPair(rows[0].pair._replace(question=" "), rows[0].labels).prompt == "the bad answer, number 0."


def test_disagreement_becomes_soft_labels(rows):
    joined = joined_votes(rows)
    assert len(joined) == len(rows) / 3
    assert joined[0].labels[:4] == pytest.approx((1.0, 1 / 3, 1 / 3, 0.0))
    assert joined[1].labels == (0.0,) * 14


# --- thresholds


def test_thresholds_have_the_highest_f1():
    draw = np.random.default_rng(0)
    harmful = draw.random((80, 3)) < (0.4, 0.1, 0.0)
    probabilities = np.clip(0.3 * harmful + 0.7 * draw.random((80, 3)), 0, 1)
    found = tuned_thresholds(probabilities, harmful)

    def f1(place, threshold):
        said = probabilities[:, place] > threshold
        return 2 * (said & harmful[:, place]).sum() / (said.sum() + harmful[:, place].sum())

    for place in (0, 1):
        best = max(f1(place, value) for value in (-1.0, *probabilities[:, place]))
        assert f1(place, found[place]) == pytest.approx(best)
    assert found[2] == 0.5  # no pair of it


# --- the command


def test_the_command(tmp_path, capsys):
    backbone = write_backbone(tmp_path / "backbone")
    file = write_lines(tmp_path / "votes.jsonl", votes(28))
    flags = ["train", "moderation", "--model_name_or_path", backbone, "--train_files", file, "--max_length", "48"]
    flags += ["--output_dir", str(tmp_path / "out"), "--soft_labels", "--validation_share", "0.3", "--use_cpu"]
    flags += ["--num_train_epochs", "3", "--learning_rate", "0.02", "--class_weights", "balanced", "--lora_r", "4"]
    assert main([*flags, "--disable_tqdm", "True", "--bf16", "True", "--gradient_checkpointing", "True"]) == 0
    said = capsys.readouterr().err
    assert "112 joined with others of the same question and answer" in said
    assert "flagged, thresholds tuned: accuracy" in said
    assert "categories, macro: f1" in said
    assert "0 cut to 48 tokens" in said
    moderation = QAModeration.from_pretrained(tmp_path / "out")
    assert set(moderation.config.thresholds) == {"prediction", "evaluation", "tuned"}
    assert set(moderation.config.thresholds["tuned"]) == set(CATEGORIES)
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["flagged"]["tuned"] == moderation.config.training["flagged"]["tuned"]
    # it has learnt which answers are harmful, though hardly in what category
    bad, kind = (
        moderation.label_probabilities([("How about thing 90?", f"The {word} answer, number 90.")]).max()
        for word in ("bad", "kind")
    )
    assert bad > kind


def test_validation_files_share_no_prompt_with_training(tmp_path, capsys):
    # 9 prompts have none of some categories
    train, held = (write_lines(tmp_path / f"{name}.jsonl", votes(n)) for name, n in (("train", 9), ("held", 5)))
    backbone = write_backbone(tmp_path / "backbone")
    flags = ["train", "moderation", "--model_name_or_path", backbone, "--train_files", train, "--use_cpu"]
    flags += ["--validation_files", held, "--output_dir", str(tmp_path / "out"), "--max_length", "48"]
    assert main([*flags, "--max_steps", "1", "--lora_r", "0", "--disable_tqdm", "True"]) == 0
    assert "30 of train_files left out, as validation_files have their prompts" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert main([*flags, "--max_steps", "1", "--template", "chat"]) == 2
    own = write_lines(tmp_path / "own.jsonl", [{"prompt": "q", "response": "a", "category": {"unsafe": True}}])
    assert main([*flags[:-4], "--validation_files", own, "--output_dir", str(tmp_path / "b")]) == 2
    assert "differ in the category" in capsys.readouterr().err


# --- preferences between dialogues


def test_preferences_become_pairs(tmp_path):
    opening = "\n\nHuman: Hello.\n\nAssistant: Hello!"
    lines = [
        {"chosen": f"{opening}\n\nHuman: How?\n\nAssistant: No.", "rejected": "\n\nHuman: How?\n\nAssistant: So."},
        {"chosen": opening, "rejected": opening},  # nothing is told
        {"chosen": "\n\nHuman: How?\n\nAssistant:", "rejected": opening},
    ]
    found = list(preference_records(_lines(tmp_path / "a.jsonl", lines)))
    assert [(one["prompt"], one["response"], one["category"]["unsafe"], one["is_safe"]) for one in found] == [
        ("How?", "No.", False, True),
        ("How?", "So.", True, False),
    ]
    with pytest.raises(TrajectoryError, match="line 2: give"):
        list(preference_records(_lines(tmp_path / "b.jsonl", [*lines[:1], {"chosen": "x"}])))


def _lines(path, rows):
    write_lines(path, rows)
    return path


def test_a_share_out_of_range(rows):
    with pytest.raises(InvalidArgumentError, match="validation_share is 0"):
        split_by_prompt(rows, 0)
