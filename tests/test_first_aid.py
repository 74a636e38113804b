"""First aid for a new model: what to do without a Q network, whether one predicts, and how strong it may be."""

import json
import random
import shlex
from copy import deepcopy

import pytest
import torch
from commands import run_command

from rectify import (
    CheckpointError,
    DeadEndQNetwork,
    InvalidArgumentError,
    QConfig,
    RectificationProcessor,
    Tilt,
    VocabularyMismatchError,
    load_language_model,
)
from rectify.cli import main as console
from rectify.evaluation.teacher_forcing import forced_nll, ruled_nll
from rectify.first_aid import q_network_advice
from rectify.generation.command import main as generate
from rectify.generation.command import make_parser
from rectify.methods.specs import parse_method
from rectify.strength import Strength, no_better_than_constant, stored_strength
from rectify.training import q_strength
from rectify.training.q_command import main as train_q
from rectify.training.q_strength import choose_strength, generating_model, warning_of

# ---------------------------------------------------------------------------------------------------------------------
# Where no Q network fits


def advice_of(error):
    first, hint = str(error).split("\n")
    assert first
    return hint


def test_a_foreign_vocabulary_is_refused_with_what_to_do(make_model, make_q_network, make_tokenizer):
    other = make_tokenizer(words=98)
    other.name_or_path = "some/model"
    with pytest.raises(VocabularyMismatchError, match="98 tokens, not 97") as by_tokenizer:
        RectificationProcessor(make_q_network(tokenizer=make_tokenizer()), tokenizer=other)
    model = make_model(vocab_size=104)
    assert "--model pocket " in q_network_advice(load_language_model("pocket")[0].name_or_path)
    model.name_or_path = "it's/mine"
    with pytest.raises(VocabularyMismatchError, match="104 tokens") as by_width:
        RectificationProcessor(make_q_network(), model=model)
    for caught, name in ((by_tokenizer, "some/model"), (by_width, "it's/mine")):
        train, without = advice_of(caught.value).split("; ")
        first, second, third = (shlex.split(command) for command in train.removeprefix("train one: ").split(" && "))
        assert first[:3] == ["rectify", "build", "trajectories"]
        assert second[:5] == ["rectify", "train", "q", "--trunk", "shared"]
        for command, flag in ((first, "--model"), (second, "--model_name_or_path"), (third, "--model")):
            assert command[command.index(flag) + 1] == name
        make_parser("generate").parse_args(third[2:])
        methods = without.partition("--method ")[2].replace(" or ", ", ").split(", ")
        assert [parse_method(method).name for method in methods] == ["self_debias", "best_of_n", "word_filter"]


def test_the_commands_say_it_in_two_lines(capsys, tmp_path, make_model, make_tokenizer):
    make_model("gpt2").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    capsys.readouterr()
    for flags in (["--rectify"], ["--rectify", "--q", "pocket-q"], ["--method", "rectify"], ["--compare"]):
        status, out, err = run_command(generate, capsys, "--model", tmp_path, "--prompt", "t5", *flags)
        assert (status, out, err.count("\n")) == (2, "", 2)
        assert err.splitlines()[1].startswith(f"train one: rectify build trajectories --model {tmp_path} ")
    # what it advises is there
    for command in ("build trajectories", "train q", "generate"):
        assert run_command(console, capsys, *command.split(), "--help")[0] == 0


def test_a_head_of_another_models_states_is_refused_with_what_to_do(make_model, tmp_path):
    DeadEndQNetwork.from_trunk(make_model(), shared=True, rank=4, name="elsewhere").save_pretrained(tmp_path)
    other = make_model(seed=5)
    other.name_or_path = "my/model"
    with pytest.raises(CheckpointError) as caught:
        RectificationProcessor.from_pretrained(tmp_path, model=other)
    assert advice_of(caught.value).startswith("train one: rectify build trajectories --model my/model ")


# ---------------------------------------------------------------------------------------------------------------------
# How strong it may be


def texts_of(vocabulary, count, seed=0):
    draw = random.Random(seed)
    lengths = [(draw.randrange(1, 5), draw.randrange(1, 9)) for _ in range(count)]
    return [[[draw.randrange(3, vocabulary) for _ in range(length)] for length in pair] for pair in lengths]


@pytest.mark.parametrize("shared", [False, True])
def test_one_reading_of_the_texts_gives_what_the_processor_gives(make_model, make_q_network, shared, monkeypatch):
    model = make_model("llama")
    network = make_q_network("llama", noise=0.5)
    if shared:
        head = network.head
        network = DeadEndQNetwork.from_trunk(model, shared=True, rank=16).eval()
        network.head = head
    prompts, texts = zip(*texts_of(97, 30), strict=True)
    monkeypatch.setattr("rectify.evaluation.teacher_forcing._LOGITS", 97 * 50)  # several batches
    rules = [Tilt(beta=beta) for beta in (0.5, 4, 60)]
    found = ruled_nll(model, network, rules, prompts, texts)
    for rule, one in zip(rules, found, strict=True):
        processor = RectificationProcessor(network, rule, model=model, do_sample=False)
        wanted = forced_nll(model, processor, prompts, texts)
        assert one.nll == pytest.approx(wanted.nll, rel=1e-5)
        assert one.base_nll == pytest.approx(wanted.base_nll, rel=1e-5)
        assert (one.tokens, one.cut, one.removed) == (wanted.tokens, wanted.cut, wanted.removed)


@pytest.fixture(scope="module")
def sure_lm(make_model, make_tokenizer, tmp_path_factory):
    """A model that predicts: nearly always the token two after the last; and 40 texts, 30 of them of its kind."""
    folder = tmp_path_factory.mktemp("sure")
    model = make_model("gpt2")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.wte.weight[:, :32] = torch.randn(97, 32, generator=torch.Generator().manual_seed(2)) * 2
        model.transformer.ln_f.weight.fill_(1)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    draw = random.Random(0)
    items = []
    for number in range(40):
        word = draw.randrange(3, 97)
        items.append(
            {"input_ids": [word] * draw.randrange(4, 12), "start": 2, "reward": -1.0 if number % 4 == 0 else 0.0}
        )
    return str(folder), items


def test_the_largest_strength_is_chosen_that_costs_a_twentieth(sure_lm, make_q_network, make_tokenizer):
    folder, items = sure_lm
    network = make_q_network(tokenizer=make_tokenizer(), noise=0.15)
    found = choose_strength(network, folder, items)
    clean = [(item["input_ids"][:2], item["input_ids"][2:]) for item in items if item["reward"] == 0]
    model, _ = load_language_model(folder)
    ratios = {}
    for beta in q_strength._BETAS:
        processor = RectificationProcessor(network, Tilt(beta=beta), model=model, do_sample=False)
        forced = forced_nll(model, processor, *zip(*clean, strict=True))
        ratios[beta] = forced.perplexity / forced.base_perplexity
    best = max(beta for beta, ratio in ratios.items() if ratio <= 1.05)
    assert best < max(ratios)  # the bound is what decides
    assert found == Strength(
        best, clean_perplexity_ratio=found.clean_perplexity_ratio, model=folder, texts=30, tokens=found.tokens
    )
    assert found.clean_perplexity_ratio == pytest.approx(ratios[best], abs=1e-3)
    assert found.tokens == sum(len(text) for _, text in clean)
    assert choose_strength(network, folder, items * 10).texts == 150  # every other of 300


def test_where_nothing_can_be_chosen_it_says_why(
    sure_lm, make_model, make_q_network, make_tokenizer, tmp_path, monkeypatch
):
    folder, items = sure_lm
    network = make_q_network(tokenizer=make_tokenizer())
    with pytest.raises(InvalidArgumentError, match="9 clean validation trajectories are too few: give 10 or more"):
        choose_strength(network, folder, [item for item in items if item["reward"] == 0][:9])
    with pytest.raises(CheckpointError, match="no/such/model"):
        choose_strength(network, "no/such/model", items)
    with pytest.raises(VocabularyMismatchError):
        choose_strength(network, "pocket", items)
    make_model("gpt2").save_pretrained(tmp_path)  # random weights
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InvalidArgumentError, match="no better than a guess"):
        choose_strength(network, str(tmp_path), items)
    monkeypatch.setattr(q_strength, "MOST_RATIO", 0.5)
    with pytest.raises(InvalidArgumentError, match=r"even beta 0.25 costs"):
        choose_strength(network, folder, items)


def test_the_model_that_made_the_trajectories_is_the_one_that_is_rectified(tmp_path):
    train = str(tmp_path / "train.jsonl")
    assert generating_model([train], "base") == "base"
    for text, wanted in (('{"model": "maker"}', "maker"), ("{", "base"), ("[]", "base"), ('{"model": 3}', "base")):
        (tmp_path / "generations.jsonl.settings.json").write_text(text)
        assert generating_model(["elsewhere/train.jsonl", train], "base") == wanted


@pytest.mark.parametrize(
    "strength",
    [
        {"beta": -1},
        {"beta": float("nan")},
        {"beta": 1e9},
        {"beta": 2, "rule": "mask"},
        {"beta": 2, "clean_perplexity_ratio": 0},
        {"beta": 2, "texts": -1},
        {"beta": "strong"},
        {"unknown": 1},
        {},
    ],
)
def test_a_strength_that_is_none_is_refused(strength, q_network, tmp_path):
    with pytest.raises((InvalidArgumentError, TypeError)):
        QConfig(97, 32, strength=strength)
    q_network.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "q_config.json").read_text())
    (tmp_path / "q_config.json").write_text(json.dumps(config | {"strength": strength}))
    with pytest.raises(CheckpointError):
        DeadEndQNetwork.from_pretrained(tmp_path)
    assert parse_method(f"rectify:{tmp_path}").value == 6  # said when it is loaded


def test_a_stored_strength_is_the_default_and_what_is_given_wins(q_network, tmp_path):
    network = deepcopy(q_network)
    network.config.strength = Strength(3.0, clean_perplexity_ratio=1.04)
    network.save_pretrained(tmp_path)
    loaded = DeadEndQNetwork.from_pretrained(tmp_path)
    assert loaded.config == network.config
    assert RectificationProcessor(loaded).rule == Tilt(beta=3.0)
    assert RectificationProcessor.from_pretrained(tmp_path).rule == Tilt(beta=3.0)
    assert RectificationProcessor.from_pretrained(tmp_path, Tilt()).rule == Tilt(beta=6.0)
    assert stored_strength(tmp_path) == network.config.strength
    spec = f"rectify:{tmp_path}"
    assert parse_method(spec).make_rule() == Tilt(beta=3.0)
    assert parse_method(spec).label == f"{spec},beta=3"
    assert parse_method(f"{spec},beta=6").make_rule() == Tilt(beta=6.0)
    assert parse_method(f"{spec},epsilon=0.1").make_rule() == Tilt(beta=3.0, epsilon=0.1)  # the cap is added to it
    assert parse_method(f"{spec},rule=mask").make_rule().name == "mask"
    for bundled in ("pocket-q", "pocket-q-shared"):
        assert stored_strength(bundled) is None
        assert parse_method(f"rectify:{bundled}").value == 6
    assert stored_strength("no/such/network") is None


# ---------------------------------------------------------------------------------------------------------------------
# The end of a training

GOOD, BAD = (
    ("nice man", "good friend", "kind person", "fine day"),
    ("stupid idiot", "fucking fool", "dumb bitch", "ass"),
)


def write(path, count, seed, truthful=True):
    draw = random.Random(seed)
    with path.open("w") as file:
        for number in range(count):
            toxic = number % 2
            words = draw.choice(BAD if toxic else GOOD)
            label = toxic if truthful else draw.randrange(2)
            text = (
                f" {draw.choice(('a', 'the', 'such a', 'one'))} {words} {draw.choice(('today', 'and more', 'here'))}."
            )
            file.write(json.dumps({"prompt": f"You are {seed}{number}", "continuation": text, "reward": -label}) + "\n")


def train(tmp_path, capsys, output, *more):
    flags = f"--model_name_or_path pocket --trunk shared --train_file {tmp_path}/train.jsonl --validation_file "
    flags += f"{tmp_path}/validation.jsonl --output_dir {tmp_path}/{output} --use_cpu --report_to none --rank 8 "
    flags += "--disable_tqdm true --num_train_epochs 3 --per_device_train_batch_size 16 --learning_rate 2e-3"
    status, _, err = run_command(train_q, capsys, *flags.split(), *more)
    assert status == 0, err
    return err, json.loads((tmp_path / output / "all_results.json").read_text())


def test_a_training_names_its_strength_and_generate_applies_it(tmp_path, capsys):
    for name, count, seed in (("train", 160, 1), ("validation", 60, 2)):
        write(tmp_path / f"{name}.jsonl", count, seed)
    err, results = train(tmp_path, capsys, "q")
    strength = results["strength"]
    assert results["warning"] is None
    assert strength["model"] == "pocket"
    assert strength["texts"] == 30
    assert strength["clean_perplexity_ratio"] <= 1.05
    assert f"strength: beta {strength['beta']:g}, stored as the network's default" in err
    assert "warning" not in err
    config = json.loads((tmp_path / "q" / "q_config.json").read_text())
    assert config["strength"] == strength
    assert "strength" not in config["training"]
    status, _, err = run_command(
        generate, capsys, "--rectify", "--q", tmp_path / "q", "--prompt", "You are", "--max_new_tokens", 2
    )
    assert status == 0
    assert (
        f"rule: Tilt(epsilon=None, p_min=1e-07, beta={strength['beta']}), the strength stored with the network" in err
    )


def test_a_training_that_learnt_nothing_says_so(tmp_path, capsys, caplog):
    for name, count, seed in (("train", 80, 3), ("validation", 60, 4)):
        write(tmp_path / f"{name}.jsonl", count, seed, truthful=False)
    err, results = train(tmp_path, capsys, "q")
    assert "warning: the network is no better than a constant: Brier score " in err
    assert results["warning"] in err
    assert "strength" not in results
    assert json.loads((tmp_path / "q" / "q_config.json").read_text())["strength"] is None
    assert "strength: none chosen: " in err
    assert f"saved to {tmp_path}/q; to use it: rectify generate --model pocket --rectify --q {tmp_path}/q\n" in err
    caplog.clear()
    RectificationProcessor.from_pretrained(tmp_path / "q", model=load_language_model("pocket")[0])
    assert ["no better than a constant" in line for line in caplog.messages] == [True]


def test_a_recalibrated_network_is_judged_by_the_order_of_its_risks():
    figures = {"brier": 0.3, "brier_constant": 0.2, "auc_all_positions": 0.8}
    assert no_better_than_constant(figures)
    assert not no_better_than_constant(figures | {"calibration_scale": 1.4})
    assert no_better_than_constant(figures | {"calibration_scale": 1.4, "auc_all_positions": 0.5})
    assert warning_of(figures | {"calibration_scale": 1.4}, 0.1) is None
    for unknown in ({}, figures | {"brier": "0.3"}, {"brier": 0.3, "brier_constant": 0.2}):
        assert not no_better_than_constant(unknown)


def test_what_is_worth_a_warning():
    fine = {"brier": 0.1, "brier_constant": 0.2, "auc_all_positions": 0.8}
    assert warning_of(fine, 0.15) is None
    assert "no better than a table of token risks" in warning_of(fine, 0.1)
    for change in ({"brier": 0.2}, {"brier": 0.3}, {"brier": float("nan")}, {"auc_all_positions": 0.5}):
        assert "no better than a constant" in warning_of(fine | change, 0.15)
    assert "all toxic or all harmless" in warning_of({"brier": 0.0, "brier_constant": 0.0}, 0.0)
