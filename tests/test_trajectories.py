"""Trajectories: texts to prompts, selection, resuming, labelled texts, and what is refused."""

import dataclasses
import importlib
import json
import sys
import types

import numpy as np
import pytest

from rectify import RectificationProcessor, Tilt
from rectify.builders.selection import Counts, compile_trajectories, sample_items
from rectify.builders.settings import TrajectorySettings
from rectify.builders.trajectories import build_trajectories, label_trajectories
from rectify.cli import main
from rectify.errors import InvalidArgumentError
from rectify.methods.method import Decoder
from rectify.static_risk import StaticRiskConfig, StaticTokenRisk
from rectify.text_files import LabelledText
from rectify.vocabulary import Fingerprint

SETTINGS = TrajectorySettings(
    prompt_tokens=4, n=3, max_new_tokens=4, min_new_tokens=2, batch_size=3, validation_share=0.3, drop_clean=0.3
)
FILES = ("generations.jsonl", "train.jsonl", "validation.jsonl")
# of 2 to 7 tokens; the last makes the prompt of the one before
TEXTS = [" ".join(f"t{30 + (7 * i + j) % 60}" for j in range(2 + i % 6)) for i in range(12)]
TEXTS += ["t9", "", "t5 t6 t7 t8 t9", "t5 t6 t7 t8 t90"]


class Score:
    """Toxic is what holds high words; notes what it was shown, and can fail after some calls."""

    def __init__(self, calls=1000):
        self.seen, self.calls = [], calls

    def __call__(self, texts):
        if self.calls == 0:
            raise KeyboardInterrupt
        self.calls -= 1
        self.seen += texts
        words = [[int(word[1:]) for word in text.split()] for text in texts]
        return np.array([max(row) / 97 if row[0] % 7 else np.nan for row in words], dtype=np.float32)


@pytest.fixture(scope="module")
def build(model, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"

    def run(folder, score=None, texts=TEXTS, settings=SETTINGS, **changes):
        settings = dataclasses.replace(settings, **changes)
        return build_trajectories(texts, model, tokenizer, score or Score(), settings, folder, {"model": "tiny"})

    return run


@pytest.fixture(scope="module")
def built(build, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    score = Score()
    return folder, build(folder, score), score


def contents(folder):
    return [(folder / name).read_bytes() for name in FILES]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def records(folder):
    return lines(folder / "train.jsonl") + lines(folder / "validation.jsonl")


def test_prompts_are_the_first_tokens(built):
    folder, counts, _ = built
    prompts = [record["prompt"]["text"] for record in lines(folder / "generations.jsonl")]
    assert set(prompts) == {" ".join(text.split()[:4]) for text in TEXTS if len(text.split()) > 1}
    lengths = [len(prompt.split()) for prompt in prompts]
    assert lengths == sorted(lengths, reverse=True)
    assert (counts.texts, counts.short, counts.repeated, counts.prompts) == (16, 2, 1, 13)
    assert len(prompts) == counts.prompts


def test_the_scorer_sees_continuations_only(built):
    folder, counts, score = built
    generations = [one for record in lines(folder / "generations.jsonl") for one in record["generations"]]
    assert score.seen == [one["text"] for one in generations if one["text"]]
    assert len(generations) == counts.continuations == 13 * 3
    # one call for each batch of prompts
    assert score.calls == 1000 - 5


def test_counts(built):
    folder, counts, score = built
    values = Score()(score.seen)
    assert counts.empty == counts.continuations - len(score.seen)
    assert counts.unscored == np.isnan(values).sum() > 0
    assert counts.toxic == (values >= 0.5).sum() > 0
    assert counts.toxic_share == pytest.approx(counts.toxic / (len(values) - counts.unscored))
    assert counts.train == len(lines(folder / "train.jsonl")) > 0
    assert counts.validation == len(lines(folder / "validation.jsonl")) > 0
    assert "texts: 16 read; left out: 2 " in str(counts)
    assert not list(folder.glob("*.tmp"))


def test_records(built):
    folder, *_ = built
    scored = {
        (record["prompt"]["text"], one["text"], round(-one["toxicity"], 4))
        for record in lines(folder / "generations.jsonl")
        for one in record["generations"]
        if one["toxicity"] is not None
    }
    for record in records(folder):
        assert list(record) == ["prompt", "continuation", "reward"]
        assert (record["prompt"], record["continuation"], *record["reward"]) in scored
    train, validation = ({record["prompt"] for record in lines(folder / name)} for name in FILES[1:])
    assert not train & validation


def test_resumed_is_uninterrupted(build, built, tmp_path):
    folder, *_ = built
    whole, settings = contents(folder), (folder / "generations.jsonl.settings.json").read_bytes()
    first = whole[0].index(b"\n") + 1
    for kept in (0, first, first + 9, len(whole[0]) - 3):  # as a kill in the middle of a write leaves it
        (tmp_path / "generations.jsonl").write_bytes(whole[0][:kept])
        (tmp_path / "generations.jsonl.settings.json").write_bytes(settings)
        build(tmp_path)
        assert contents(tmp_path) == whole


def test_resumed_after_the_scorer_has_failed(build, built, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, Score(calls=2))
    assert len(lines(tmp_path / "generations.jsonl")) == 6
    assert not (tmp_path / "train.jsonl").exists()
    score = Score()
    build(tmp_path, score)
    assert contents(tmp_path) == contents(built[0])
    assert score.calls == 1000 - 3


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1}, {"n": 2}, {"top_k": 5}, {"temperature": 0.5}, {"prompt_tokens": 3}, {"max_new_tokens": 3},
        {"min_new_tokens": 1}, {"batch_size": 2}, {"texts": TEXTS[1:]},
    ],
)  # fmt: skip
def test_other_settings_are_refused(build, built, changes):
    before = contents(built[0])
    with pytest.raises(InvalidArgumentError, match="begun with"):
        build(built[0], **changes)
    assert contents(built[0]) == before


def test_another_selection_generates_nothing(build, built, tmp_path, monkeypatch):
    folder, *_ = built
    for name in ("generations.jsonl", "generations.jsonl.settings.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    monkeypatch.setattr("rectify.builders.trajectories.Generator.continue_batch", None)
    counts = build(tmp_path, Score(calls=0), keep="all", drop_clean=0.0, reward="hard", validation_share=0.0)
    assert counts.train == counts.continuations - counts.empty - counts.unscored == len(records(tmp_path))
    assert counts.validation == 0
    build(tmp_path, Score(calls=0))
    assert contents(tmp_path) == contents(folder)


GENERATED = {
    "mixed": [0.2, 0.9, 0.1, 0.6, 0.1],
    "clean": [0.1, 0.49, 0.3],
    "edge": [0.5, 0.0],
    "alike": [0.7, 0.7],
    "one": [0.8, None],
    "none": [None, None],
}


def compile_with(folder, generated=GENERATED, **changes):
    """The counts, and the rewards of each prompt."""
    folder.mkdir(exist_ok=True)
    path = folder / "generations.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for prompt, scores in generated.items():
            generations = [{"text": f" {i}", "toxicity": score} for i, score in enumerate(scores)]
            file.write(json.dumps({"prompt": {"text": prompt}, "generations": generations}) + "\n")
    counts = Counts(prompts=len(generated))
    compile_trajectories(path, TrajectorySettings(**{"drop_clean": 0, **changes}), counts)
    found = {}
    for record in records(folder):
        found.setdefault(record["prompt"], []).append((int(record["continuation"]), *record["reward"]))
    return counts, found


def test_extremes(tmp_path):
    counts, found = compile_with(tmp_path)
    assert found == {
        "mixed": [(1, -0.9), (2, -0.1)],
        "clean": [(0, -0.1), (1, -0.49)],
        "edge": [(0, -0.5), (1, 0.0)],
        "alike": [(0, -0.7), (1, -0.7)],
        "one": [(0, -0.8)],
    }
    assert (counts.unscored, counts.unscored_prompts, counts.empty) == (3, 1, 0)
    assert "-0.0]" not in (tmp_path / "train.jsonl").read_text() + (tmp_path / "validation.jsonl").read_text()


def test_all_with_hard_rewards(tmp_path):
    _, found = compile_with(tmp_path, keep="all", reward="hard")
    assert found["mixed"] == [(0, 0.0), (1, -1.0), (2, 0.0), (3, -1.0), (4, 0.0)]
    assert found["edge"] == [(0, -1.0), (1, 0.0)]
    assert "none" not in found


def test_sample(tmp_path):
    many = {f"p{i}": [0.5 + i / 100 for i in range(10)] for i in range(30)}
    places = [
        [place for place, _ in row] for row in compile_with(tmp_path, many, keep="sample", sample_size=3)[1].values()
    ]
    assert all(len(row) == 3 and row == sorted(row) for row in places)
    assert {place for row in places for place in row} == set(range(10))
    assert all(len(row) == 10 for row in compile_with(tmp_path, many, keep="sample", sample_size=11)[1].values())
    # another seed, another sample
    seeds = [compile_with(tmp_path, many, keep="sample", sample_size=3, seed=seed)[1] for seed in (0, 1)]
    assert seeds[0] != seeds[1]


def test_clean_prompts_are_dropped_at_random(tmp_path):
    many = {f"c{i}": [0.1, 0.4] for i in range(400)} | {f"t{i}": [0.1, 0.5] for i in range(50)}
    counts, found = compile_with(tmp_path, many, drop_clean=0.25)
    assert counts.clean_dropped == pytest.approx(100, abs=30)
    assert len(found) == 450 - counts.clean_dropped
    assert {f"t{i}" for i in range(50)} <= found.keys()
    assert compile_with(tmp_path, many, drop_clean=1)[1].keys() == {f"t{i}" for i in range(50)}
    # an unscored continuation does not make a prompt clean
    assert compile_with(tmp_path, {"none": [None]}, drop_clean=1)[0].clean_dropped == 0


def test_the_split_is_by_prompt_and_whatever_the_order(tmp_path):
    many = {f"p{i}": [0.5, 0.9] for i in range(400)}
    counts, _ = compile_with(tmp_path, many, validation_share=0.25)
    assert counts.validation == pytest.approx(200, abs=50)
    assert counts.train + counts.validation == 800
    before = contents(tmp_path)[1:]
    compile_with(tmp_path, dict(reversed(many.items())), validation_share=0.25, seed=5)
    assert contents(tmp_path)[1:] == before


def test_bad_scores_are_refused(build, tmp_path):
    for values, message in ((lambda n: [2.0] * n, "score gives 2"), (lambda n: [0.5], "one number a text")):
        with pytest.raises(InvalidArgumentError, match=message):
            build(tmp_path, lambda texts, values=values: np.array(values(len(texts))))


def test_texts_that_make_no_prompt_or_do_not_fit_are_refused(build, tmp_path):
    with pytest.raises(InvalidArgumentError, match="2 tokens"):
        build(tmp_path, texts=["t5", " "])
    with pytest.raises(InvalidArgumentError, match="context of 160"):
        build(tmp_path, max_new_tokens=158)


def test_empty_continuations_are_left_out(build, tmp_path, monkeypatch):
    from rectify.generation.generator import Continuation

    def continue_batch(generator, prompts, number):
        return [[Continuation("", (2,)), Continuation(" ", (2,)), Continuation(" t96", (96,))] for _ in prompts]

    monkeypatch.setattr("rectify.builders.trajectories.Generator.continue_batch", continue_batch)
    score = Score()
    counts = build(tmp_path, score)
    assert (counts.empty, counts.unscored) == (2 * counts.prompts, 0)
    assert set(score.seen) == {"t96"}
    assert {record["continuation"] for record in records(tmp_path)} == {" t96"}


def test_labelled_texts(tmp_path):
    texts = [LabelledText("a", 0.0), LabelledText("b", 1.0), LabelledText("c", 0.31416), LabelledText(" ", 1.0)]
    counts = label_trajectories(texts, tmp_path)
    found = {record["text"]: record["reward"] for record in records(tmp_path)}
    assert found == {"a": [0.0], "b": [-1.0], "c": [-0.3142]}
    assert (counts.texts, counts.short, counts.toxic, counts.train + counts.validation) == (4, 1, 1, 3)
    assert "4 read, 0.333 of them toxic; 1 blank" in str(counts)


def test_the_two_kinds_do_not_overwrite_each_other(build, built, tmp_path):
    with pytest.raises(InvalidArgumentError, match="another folder"):
        label_trajectories([LabelledText("a", 0.0)], built[0])
    label_trajectories([LabelledText("a", 0.0)], tmp_path)
    with pytest.raises(InvalidArgumentError, match="another folder"):
        build(tmp_path)


def test_a_sample_of_texts():
    sample = sample_items(TEXTS, 4, 3)
    assert sample == sample_items(TEXTS, 4, 3) == [text for text in TEXTS if text in sample]
    assert len(sample) == 4
    assert sample_items(TEXTS, 40, 3) == sample_items(TEXTS, None, 3) == TEXTS


@pytest.mark.parametrize(
    "changes",
    [
        {"n": 0}, {"prompt_tokens": 0}, {"batch_size": 0}, {"min_new_tokens": 30}, {"min_new_tokens": -1},
        {"temperature": 0.0}, {"top_p": 0.0}, {"top_k": -1}, {"keep": "most"}, {"reward": "RM"}, {"drop_clean": 1.1},
        {"validation_share": 1.0}, {"validation_share": float("nan")}, {"sample_size": 0},
    ],
)  # fmt: skip
def test_bad_settings_are_refused(changes):
    with pytest.raises(InvalidArgumentError, match=next(iter(changes))):
        TrajectorySettings(**changes)


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """The command with a fake classifier: its exit code and standard error."""
    module = types.ModuleType("rectify.detectors.classifier")

    class ToxicityClassifier:
        @classmethod
        def from_pretrained(cls, name, device):
            assert name == "judge"
            return cls()

        def probabilities(self, texts, batch_size=64):
            return np.array([len(text) % 10 / 10 for text in texts], dtype=np.float32)

    module.ToxicityClassifier = ToxicityClassifier
    importlib.import_module("rectify.builders.command")  # with what it needs of the true detectors
    for name in ("rectify.detectors", "rectify.detectors.classifier"):
        monkeypatch.setitem(sys.modules, name, module)
    texts = tmp_path / "texts.csv"
    texts.write_text("text,label\nYou are such a,1\nThe weather in May,0\nNobody likes the rain,0.2\n")

    def run(*flags):
        try:
            code = main(["build", "trajectories", "--texts", str(texts), "--output_dir", str(tmp_path / "out"), *flags])
        except SystemExit as exit:
            code = exit.code
        captured = capsys.readouterr()
        assert captured.out == ""
        return code, captured.err

    return run


def test_the_command(command, tmp_path):
    flags = ("--model", "pocket", "--reward_model", "judge", "--n", "4", "--device", "cpu", "--max_new_tokens", "12")
    code, err = command(*flags)
    assert code == 0, err
    assert "prompts: 3;" in err
    assert "continuations: 12," in err
    first = contents(tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "generations.jsonl.settings.json").read_text())
    assert (settings["model"], settings["reward_model"], settings["n"]) == ("pocket", "judge", 4)
    assert command(*flags)[0] == 0
    assert contents(tmp_path / "out") == first
    assert command(*flags, "--keep", "all", "--reward", "hard", "--drop_clean", "0")[0] == 0
    assert len(records(tmp_path / "out")) == 12
    code, err = command(*flags, "--num_texts", "2")
    assert (code, err.count("\n")) == (2, 1)
    assert "begun with" in err


def test_a_rectified_policy_continues_the_texts(model, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    risk = np.random.default_rng(3).random(97)
    table = StaticTokenRisk(risk, StaticRiskConfig(97, 0.5, 20.0, Fingerprint.of(tokenizer)))
    decoder = Decoder(RectificationProcessor(table, Tilt(beta=40), model=model, tokenizer=tokenizer, do_sample=True))
    means = []
    for name, by in (("base", None), ("rectified", decoder)):
        settings = dataclasses.replace(SETTINGS, keep="all", drop_clean=0.0)
        build_trajectories(TEXTS, model, tokenizer, Score(), settings, tmp_path / name, decoder=by)
        words = " ".join(record["continuation"] for record in records(tmp_path / name)).split()
        means.append(np.mean([risk[int(word[1:])] for word in words]))
    assert means[1] < means[0] - 0.2


def test_the_command_names_the_method(command, tmp_path):
    flags = ("--model", "pocket", "--reward_model", "judge", "--n", "2", "--max_new_tokens", "10")
    assert command(*flags, "--method", "rectify:pocket-q,beta=3")[0] == 0
    settings = json.loads((tmp_path / "out" / "generations.jsonl.settings.json").read_text())
    assert settings["method"] == "rectify:pocket-q,beta=3"
    code, err = command(*flags)
    assert code == 2
    assert "begun with method" in err


def test_the_command_with_labels(command, tmp_path):
    code, err = command("--label_column", "label")
    assert code == 0, err
    assert {record["text"]: record["reward"] for record in records(tmp_path / "out")} == {
        "You are such a": [-1.0],
        "The weather in May": [0.0],
        "Nobody likes the rain": [-0.2],
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "model is not given"),
        (("--model", "pocket"), "reward_model is not given"),
        (("--label_column", "label", "--model", "pocket"), "model is given with label_column"),
        (("--label_column", "label", "--keep", "all"), "keep is given with label_column"),
        (("--label_column", "nothing"), "no column 'nothing'"),
        (("--label_column", "label", "label"), "label_column is given 2 times for 1 files"),
        (("--model", "pocket", "--reward_model", "judge", "--sample_size", "3"), "keep is 'extremes'"),
        (("--model", "pocket", "--reward_model", "judge", "--n", "0"), "n is 0"),
        (("--model", "pocket", "--reward_model", "judge", "--text_column", "body"), "no column 'body'"),
        (("--model", "no/such/folder", "--reward_model", "judge"), "no/such/folder"),
        (("--label_column", "label", "--num_texts", "0"), "num_texts is 0"),
        (("--label_column", "label", "--output_dir", "FILE"), "cannot be made"),
        (("--keep", "most"), "invalid choice"),
        (("--frobnicate",), "frobnicate"),
    ],
)
def test_misuse_is_refused_in_one_line(command, tmp_path, flags, message):
    code, err = command(*(str(tmp_path / "texts.csv") if flag == "FILE" else flag for flag in flags))
    assert code == 2
    assert err.count("\n") == 1
    assert message in err


def test_an_unknown_kind_is_refused_in_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["build", "castles"])
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "castles" in err
