"""The gate, the detector that it makes of several adapters, and its training."""

import json
import random

import numpy as np
import pytest
import torch
from commands import run_command
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

from rectify import CheckpointError, InvalidArgumentError
from rectify.cli import main
from rectify.detectors import AdapterBlend, GatedDetector, ToxicityClassifier, load_detector
from rectify.detectors.classifier import pad
from rectify.detectors.gate import AdapterGate, GateConfig, make_network
from rectify.detectors.gated import GatedConfig
from rectify.scoring.load import load_scorer
from rectify.sentence_encoder import SentenceEncoder
from rectify.training.gate import GateSettings, gate_figures, source_weights, train_gate
from rectify.training.resumable_array import ResumableArray

TEXTS = ["t5 t6 t2", "", "t7", "t8 t9 t10 t2 t2 " * 8, " \n", "t5 t6", "t2 t2"]
READABLE = [index for index, text in enumerate(TEXTS) if text.strip()]
NAMES = ["forum", "wiki"]


@pytest.fixture(scope="session")
def adapters(make_classifier, tmp_path_factory):
    """The folders of two adapters, of which one knows what is toxic in one source only."""
    found = {}
    for name, sign in (("forum", 1), ("wiki", -1)):
        classifier = make_classifier("llama", lora_r=4)
        with torch.no_grad():
            for parameter in classifier.parameters():
                if parameter.requires_grad:
                    parameter.mul_(sign)
        found[name] = tmp_path_factory.mktemp(name)
        classifier.save_pretrained(found[name])
    return found


@pytest.fixture(scope="session")
def make_gated(adapters, backbones):
    """`make_gated(**settings of GatedConfig)`: a detector of two adapters and a random gate on an encoder."""
    blend = AdapterBlend.from_pretrained(adapters)

    def make(**settings):
        torch.manual_seed(2)
        encoder = SentenceEncoder.from_pretrained(backbones["encoder"], max_length=24)
        gate = AdapterGate(GateConfig(backbones["encoder"], NAMES, 32, max_length=24), encoder).eval()
        with torch.no_grad():
            gate.network[0].weight.mul_(20)
        return GatedDetector(GatedConfig(NAMES, **settings), gate, blend)

    return make


# --- the gate


@pytest.mark.parametrize("kind", ["encoder", "gpt2"])
@torch.no_grad()
def test_an_embedding_is_the_mean_over_the_real_tokens_at_length_one(backbones, kind):
    encoder = SentenceEncoder.from_pretrained(backbones[kind], max_length=24)
    found = encoder.embed(TEXTS)
    assert found.dtype == np.float32
    for text, row in zip(TEXTS, found, strict=True):
        ids = encoder.tokenizer(text)["input_ids"][:24]
        if not ids:
            assert not row.any()
            continue
        mean = encoder.model(input_ids=torch.tensor([ids])).last_hidden_state[0].double().mean(0)
        assert row == pytest.approx((mean / mean.norm()).numpy(), abs=1e-5)
    assert encoder.embed(TEXTS, batch_size=2) == pytest.approx(found, abs=1e-6)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_the_published_size():
    network = make_network(GateConfig("e", ["forum", "wiki", "microblog"], 384))
    assert [list(weight.shape) for weight in network.parameters()] == [[8, 384], [8], [3, 8], [3]]
    assert sum(weight.numel() for weight in network.parameters()) == 3107


def test_gates_are_a_distribution_and_a_loaded_gate_gives_the_same(make_gated, tmp_path):
    gate = make_gated().gate
    found = gate.gates(TEXTS)
    assert found.shape == (len(TEXTS), 2)
    assert found.sum(-1) == pytest.approx(1, abs=1e-6)
    assert np.ptp(found[:, 0]) > 0.05
    gate.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gate.safetensors", "gate_config.json"]
    assert np.array_equal(AdapterGate.from_pretrained(tmp_path).gates(TEXTS), found)


# --- the detector


@pytest.mark.parametrize("blending", ["weights", "logits"])
@pytest.mark.parametrize("routing", ["blend", "top_k", "top_1"])
@torch.no_grad()
def test_a_detector_blends_by_its_gates(make_gated, blending, routing):
    detector = make_gated(blending=blending, routing=routing, k=1)
    found = detector.label_probabilities(TEXTS)
    assert found.dtype == np.float32
    assert np.isnan(found[:, 0]).tolist() == [index not in READABLE for index in range(len(TEXTS))]
    gates = detector.gates(TEXTS)
    assert ((gates == 1).any(-1) == (routing != "blend")).all()
    blended = detector.blend if blending == "weights" else detector.blend.blended_logits
    for index in READABLE:
        ids, mask = pad(detector.encode([TEXTS[index]]))
        expected = blended(ids, mask, torch.from_numpy(gates[index : index + 1])).sigmoid()
        assert found[index] == pytest.approx(expected[0].numpy(), abs=1e-5)
    assert detector.label_probabilities(TEXTS, batch_size=2) == pytest.approx(found, abs=1e-5, nan_ok=True)
    assert detector.probabilities(TEXTS[::-1])[::-1] == pytest.approx(found[:, 0], abs=1e-5, nan_ok=True)


def test_a_folder_is_complete_and_loads_as_what_was_saved(make_gated, tmp_path):
    detector = make_gated(routing="top_k", k=2, blending="logits", calibration={"toxic": 2.0})
    expected = detector.probabilities(TEXTS)
    assert expected != pytest.approx(make_gated(blending="logits").probabilities(TEXTS), abs=1e-4, nan_ok=True)
    detector.save_pretrained(tmp_path / "a")
    loaded = load_detector(tmp_path / "a")
    assert isinstance(loaded, GatedDetector)
    assert loaded.gating == detector.gating
    assert loaded.probabilities(TEXTS) == pytest.approx(expected, abs=1e-6, nan_ok=True)
    loaded.save_pretrained(tmp_path / "a")  # over itself
    loaded.save_pretrained(tmp_path / "b")
    again = GatedDetector.from_pretrained(tmp_path / "b")
    assert again.probabilities(TEXTS) == pytest.approx(expected, abs=1e-6, nan_ok=True)
    alone = load_detector(tmp_path / "a" / "adapters" / "forum")
    assert isinstance(alone, ToxicityClassifier)


def test_it_is_a_scorer_whose_revision_follows_its_files(make_gated, tmp_path, capsys):
    detector = make_gated()
    detector.save_pretrained(tmp_path / "d")
    scorer = load_scorer(f"detector:{tmp_path / 'd'}", device="cpu")
    scores = scorer.score(["t5 t6", ""])
    assert scores["TOXICITY"] == pytest.approx([detector.probabilities(["t5 t6"])[0], np.nan], abs=1e-6, nan_ok=True)
    path = tmp_path / "d" / "gate" / "gate_config.json"
    path.write_text(path.read_text() + "\n")
    assert load_scorer(f"detector:{tmp_path / 'd'}", device="cpu").revision != scorer.revision
    arguments = ["score", "--scorer", f"detector:{tmp_path / 'd'}", "--device", "cpu", "--text", "t5 t6"]
    code, out, _ = run_command(main, capsys, *arguments)
    assert code == 0
    assert f"{detector.probabilities(['t5 t6'])[0]:.2f}" in out


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"adapters": []}, "adapters"),
        ({"adapters": ["a", "a"]}, "each once"),
        ({"adapters": ["../a"]}, r"'\.\./a'"),
        ({"routing": "best"}, "routing is 'best'"),
        ({"blending": "both"}, "blending is 'both'"),
        ({"routing": "top_k", "k": 3}, "k is 3"),
        ({"format_version": 2}, "format_version"),
    ],
)
def test_bad_settings_are_refused(settings, said):
    with pytest.raises(InvalidArgumentError, match=said):
        GatedConfig(**{"adapters": NAMES, **settings})


def test_damaged_folders_are_refused(make_gated, tmp_path):
    make_gated().save_pretrained(tmp_path / "d")
    for file, text in (
        ("gate/gate.safetensors", "12"),
        ("gate/gate_config.json", "{"),
        ("adapters/wiki/adapter_config.json", "{"),
        ("gated_config.json", '{"adapters": ["wiki", "forum"]}'),
    ):
        path = tmp_path / "d" / file
        before = path.read_bytes()
        path.write_text(text)
        with pytest.raises(CheckpointError) as caught:
            GatedDetector.from_pretrained(tmp_path / "d")
        assert "\n" not in str(caught.value)
        path.write_bytes(before)
    GatedDetector.from_pretrained(tmp_path / "d")
    path = tmp_path / "d" / "gate" / "gate_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"encoder_fingerprint": "0"}))
    with pytest.raises(CheckpointError, match="trained on weights 0"):
        GatedDetector.from_pretrained(tmp_path / "d")


# --- training


def examples(count, seed, blend):
    """Texts of two sources with words of their own; in each, the source's adapter is right."""
    draw = random.Random(seed)
    texts, sources = [], []
    for index in range(count):
        words = range(40, 44) if index % 3 else range(70, 74)
        texts.append(" ".join(f"t{draw.choice(words)}" for _ in range(draw.randint(2, 5))))
        sources.append(NAMES[0] if index % 3 else NAMES[1])
    with torch.no_grad():
        ids, mask = pad(blend.encode(texts))
        own = torch.stack([blend.adapter_logits(ids, mask, place)[:, 0] for place in range(2)], -1)
    labels = [float(row[NAMES.index(source)] > 0) for row, source in zip(own, sources, strict=True)]
    return list(zip(texts, labels, sources, strict=True))


@pytest.fixture(scope="session")
def rows(make_gated):
    blend = make_gated().blend
    return examples(150, 0, blend), examples(60, 1, blend)


def settings(places, backbones, **changes):
    named = [f"{name}={place}" for name, place in places.items()]
    given = {"adapters": named, "encoder": backbones["encoder"], "encoder_max_length": 24}
    return GateSettings(**given | changes)


def arguments(folder, **changes):
    given = {
        "output_dir": str(folder),
        "learning_rate": 3e-2,
        "num_train_epochs": 4,
        "per_device_train_batch_size": 8,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**given | changes)


@pytest.fixture(scope="session")
def trained(adapters, backbones, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gate")
    train_gate(settings(adapters, backbones), arguments(folder), *rows)
    return folder


def test_the_source_is_learnt(trained, rows):
    detector = GatedDetector.from_pretrained(trained)
    figures = detector.gating.training["validation"]
    texts, labels, sources = zip(*rows[1], strict=True)
    gates = detector.gates(texts)
    accuracy = np.mean([NAMES[best] == source for best, source in zip(gates.argmax(-1), sources, strict=True)])
    assert figures["source_accuracy"] == pytest.approx(accuracy)
    assert accuracy > 0.9
    assert detector.gating.blending == "weights"
    wiki = gates[np.array(sources) == "wiki"].mean(0)
    assert [figures["sources"]["wiki"]["gates"][name] for name in NAMES] == pytest.approx(wiki, abs=1e-5)
    probability = detector.probabilities(texts).astype(float)
    loss = -np.mean(np.where(np.array(labels) == 1, np.log(probability), np.log1p(-probability)))
    assert figures["log_loss"]["blend"] == pytest.approx(loss, abs=1e-5)
    assert set(figures["log_loss"]) == {"blend", *NAMES}
    assert set(figures["sources"]) == set(NAMES)
    left = {path.name for path in trained.iterdir() if not path.name.startswith("checkpoint")}
    assert left == {"gated_config.json", "gate", "adapters", "all_results.json", "run_settings.json"}


def test_the_label_is_learnt_from_the_adapters_logits(adapters, backbones, rows, tmp_path):
    train, held = ([(text, label, "mixed") for text, label, _ in part] for part in rows)
    wanted = settings(adapters, backbones, objective="label", calibration="temperature")
    detector = train_gate(wanted, arguments(tmp_path), train, [*held, ("", 1.0, "mixed")])
    figures = detector.gating.training["validation"]
    assert detector.gating.blending == "logits"
    assert figures["n"] == len(held)
    assert "source_accuracy" not in figures
    assert figures["log_loss"]["blend"] < min(figures["log_loss"][name] for name in NAMES)
    assert figures["f1_macro"]["blend"] > max(figures["f1_macro"][name] for name in NAMES)
    assert figures["log_loss"]["calibrated"] <= figures["log_loss"]["blend"]
    losses = json.loads((tmp_path / "all_results.json").read_text())["history"]
    assert losses[-2]["eval_loss"] == pytest.approx(figures["log_loss"]["blend"], abs=1e-4)


class Kill(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        if state.epoch >= 2:
            raise KeyboardInterrupt


def test_a_killed_training_goes_on_as_if_nothing_had_happened(adapters, backbones, rows, trained, tmp_path):
    wanted = settings(adapters, backbones)
    with pytest.raises(KeyboardInterrupt):
        train_gate(wanted, arguments(tmp_path), *rows, callbacks=[Kill()])
    kept = (tmp_path / "embeddings.work").stat().st_mtime_ns
    with pytest.raises(InvalidArgumentError, match="hidden_size"):
        train_gate(settings(adapters, backbones, hidden_size=4), arguments(tmp_path), *rows)
    train_gate(wanted, arguments(tmp_path), *rows, callbacks=[Seen(tmp_path / "embeddings.work", kept)])
    expected, found = (load_file(folder / "gate" / "gate.safetensors") for folder in (trained, tmp_path))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    configs = [json.loads((folder / "gated_config.json").read_text()) for folder in (trained, tmp_path)]
    assert configs[0] == configs[1]
    with pytest.raises(InvalidArgumentError, match="finished"):
        train_gate(wanted, arguments(tmp_path), *rows)


def test_an_array_that_was_begun_anew_is_not_taken_for_the_former_one(tmp_path):
    file = tmp_path / "values.work"
    former = ResumableArray(file, (4, 2), np.float32, encoder="a")
    former.values[:2] = 1
    former.save(1)
    ResumableArray(file, (4, 2), np.float32, encoder="b")  # killed before its first step
    again = ResumableArray(file, (4, 2), np.float32, encoder="a")
    assert again.done == 0
    again.save(2)
    assert ResumableArray(file, (4, 2), np.float32, encoder="a").done == 2


class Seen(TrainerCallback):
    """Looks whether a file was written again."""

    def __init__(self, path, time):
        self.path, self.time = path, time

    def on_train_begin(self, args, state, control, **kwargs):
        assert self.path.stat().st_mtime_ns == self.time


def test_early_stopping_keeps_the_best(adapters, backbones, rows, tmp_path):
    wanted = settings(adapters, backbones, early_stopping_patience=1)
    train_gate(wanted, arguments(tmp_path, learning_rate=0.3, num_train_epochs=40), *rows)
    results = json.loads((tmp_path / "all_results.json").read_text())
    losses = [entry["eval_loss"] for entry in results["history"] if "eval_loss" in entry]
    assert len(losses) < 40
    gate = AdapterGate.from_pretrained(tmp_path / "gate")
    texts, _, sources = zip(*rows[1], strict=True)
    chosen = gate.gates(texts)[np.arange(len(texts)), [NAMES.index(source) for source in sources]]
    weights = source_weights([row[2] for row in rows[0]], balanced=True)
    loss = -np.mean(np.log(chosen) * [weights[source] for source in sources])
    assert min(losses) == pytest.approx(loss, abs=1e-3)


def test_sources_weigh_alike():
    assert source_weights(["a", "a", "a", "b"], balanced=True) == pytest.approx({"a": 2 / 3, "b": 2})
    assert source_weights(["a", "a", "a", "b"], balanced=False) == {"a": 1, "b": 1}


def test_figures_of_a_gate():
    gates = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]])
    probabilities = {"blend": np.array([0.9, 0.2, 0.6, 0.4])}
    found = gate_figures(["a", "b"], gates, probabilities, np.array([1, 0, 1, 0.5]), ["a", "a", "b", "b"])
    assert found["source_accuracy"] == 0.75
    assert found["sources"]["b"]["source_accuracy"] == 0.5
    assert found["sources"]["a"]["gates"] == pytest.approx({"a": 0.75, "b": 0.25})
    terms = [np.log(0.9), np.log(0.8), np.log(0.6), (np.log(0.4) + np.log(0.6)) / 2]
    assert found["log_loss"]["blend"] == pytest.approx(-np.mean(terms))
    assert found["sources"]["a"]["f1_macro"]["blend"] == 1
    assert "f1_macro" not in found["sources"]["b"]


def test_what_cannot_be_trained_is_refused_in_one_line(adapters, backbones, make_classifier, rows, tmp_path):
    two = tmp_path / "two"
    make_classifier("llama", labels=("toxic", "rude")).save_pretrained(two)
    train, held = rows
    for changes, part, said in (
        ({"adapters": ["forum"]}, train, "'forum': give NAME=FOLDER"),
        ({"adapters": ["a=x", "a=y"]}, train, "each once"),
        ({"hidden_size": 0}, train, "hidden_size"),
        ({"early_stopping_patience": 0}, train, "early_stopping_patience"),
        ({"k": 3, "routing": "top_k"}, train, "k is 3"),
        ({"encoder_max_length": 161}, train, "max_length is 161"),
        ({}, [("t5", 1.0, "chat"), *train], "source 'chat' has no adapter"),
        ({}, [row for row in train if row[2] == "wiki"], "adapter 'forum' has no texts"),
        ({}, [("t5", 2.0, "wiki"), *train], r"train\[0\] has the label 2.0"),
        ({"objective": "label", "adapters": [f"two={two}"]}, train, "labels"),
        ({"encoder": "nowhere/at/all"}, train, "nowhere"),
    ):
        with pytest.raises((InvalidArgumentError, CheckpointError), match=said) as caught:
            train_gate(settings(adapters, backbones, **changes), arguments(tmp_path / "out"), part, held)
        assert "\n" not in str(caught.value)


def test_the_command(adapters, backbones, rows, tmp_path, capsys):
    files = []
    for name in NAMES:
        files.append(tmp_path / f"{name}.jsonl")
        texts = [{"text": text, "label": label} for text, label, source in rows[0] if source == name]
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in [*texts, {"text": " ", "label": 1}]))
    given = ["train", "gate", "--adapters", *(f"{name}={place}" for name, place in adapters.items())]
    given += ["--train_files", *files, "--encoder", backbones["encoder"], "--encoder_max_length", "24"]
    given += ["--output_dir", tmp_path / "out", "--use_cpu", "--disable_tqdm", "True", "--num_train_epochs", "2"]
    code, _, said = run_command(main, capsys, *given, "--sources", "forum")
    assert (code, said.count("\n")) == (2, 2)
    assert "adapter 'wiki' has no texts" in said
    code, _, said = run_command(main, capsys, *given, "--fixed_split")
    assert code == 0
    for part in ("of the fixed test part", "2 blank", "wiki: mean gates forum", "all: macro F1 blend", "log loss"):
        assert part in said
    assert isinstance(load_detector(tmp_path / "out"), GatedDetector)
