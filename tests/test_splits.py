"""Splits of training data: nothing is learnt and asked for."""

import hashlib
import json
import random

import pytest

from rectify.builders.trajectories import label_trajectories
from rectify.splits import alike, first_words, split_by_hash, together
from rectify.text_files import LabelledText
from rectify.training.q_arguments import DataArguments
from rectify.training.q_training import _splits

WORDS = [f"w{number}" for number in range(60)]


def pairs(prompts, each=2, beginning="", seed=0, shortest=3):
    """`(prompt, text)` of several texts that go on from each of some prompts."""
    draw = random.Random(seed)
    for number in range(prompts):
        words = [*draw.choices(WORDS, k=shortest + number % 12 - 1), f"p{number}"]
        prompt = f"{beginning}{' '.join(words)}"
        for _ in range(each):
            yield prompt, f"{prompt} {' '.join(draw.choices(WORDS, k=12))}"


def q_split(tmp_path, records, percentage):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    data = DataArguments(train_file=[str(tmp_path / "t.jsonl")], validation_split_percentage=percentage)
    return _splits(data)


@pytest.mark.parametrize(
    ("prompts", "each", "beginning"),
    [(400, 2, ""), (30, 2, ""), (10, 25, ""), (200, 2, "the user says : "), (3, 4, "")],
)
def test_trajectories_of_a_prompt_are_on_one_side_also_where_only_whole_texts_are_told(
    tmp_path, prompts, each, beginning
):
    told = list(pairs(prompts, each, beginning))
    parts = q_split(tmp_path, [{"text": text, "reward": [0.0]} for _, text in told], 20)
    of = {text: prompt for prompt, text in told}
    train, held = ({of[one.continuation] for one in part} for part in parts)
    assert train
    assert held
    assert not train & held
    assert sum(map(len, parts)) == len(told)
    if prompts * each > 100:
        assert 0.05 < len(parts[1]) / len(told) < 0.4


def test_short_prompts_are_kept_together_too():
    told = list(pairs(300, 2, shortest=1))
    beginnings = first_words([text for _, text in told])
    groups = {}
    for (prompt, _), beginning in zip(told, beginnings, strict=True):
        groups.setdefault(prompt, set()).add(beginning)
    assert all(len(group) == 1 for group in groups.values())
    assert first_words([]) == []
    assert first_words(["", "a b", "A  c"]) == ["", "a", "a"]
    assert first_words(["always the same"] * 9) == ["always the same"] * 9


def test_prompts_that_are_told_are_split_by_as_they_always_were(tmp_path):
    records = [
        {"prompt": prompt, "continuation": text.removeprefix(prompt), "reward": 0.0} for prompt, text in pairs(200)
    ]
    train, held = q_split(tmp_path, records, 20)
    assert len(train) + len(held) == len(records)
    assert held == [one for one in train + held if _held(one.prompt, 0.2)]


def _held(key, share):
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < share * 2**64


def test_texts_that_differ_in_spaces_and_capitals_are_on_one_side(tmp_path):
    rows = [form.format(number) for number in range(120) for form in ("You fool {}", " you  FOOL {}\n", "YOU fool {}")]
    draw = random.Random(1)
    draw.shuffle(rows)
    train, held = split_by_hash(rows, 0.2, str)
    assert not {alike(row) for row in train} & {alike(row) for row in held}
    assert sorted(map(sorted, split_by_hash(rows[::-1], 0.2, str))) == sorted(map(sorted, (train, held)))
    # and those that are alone as ever
    plain = [f"{number} is a text" for number in range(500)]
    assert split_by_hash(plain, 0.2, str)[1] == [row for row in plain if _held(row, 0.2)]
    assert set(together(["A b", "a B", "c"]).values()) == {"A b", "c"}
    label_trajectories([LabelledText(row, 0.0) for row in rows], tmp_path, 0.2)
    written = [
        {alike(json.loads(line)["text"]) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()}
        for name in ("train", "validation")
    ]
    assert all(written)
    assert not written[0] & written[1]


@pytest.mark.parametrize("share", [1e-6, 0.05, 1 - 1e-6])
def test_neither_part_is_empty_where_that_can_be(share):
    for count in (2, 5, 20):
        assert all(split_by_hash([f"text {number}" for number in range(count)], share, str))
    assert split_by_hash(["same", "Same "], 0.5, str) in ((["same", "Same "], []), ([], ["same", "Same "]))
    assert split_by_hash([], 0.5, str) == ([], [])
