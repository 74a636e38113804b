"""The toxicity classifier: padding, saving, and how its training is fed, killed and resumed."""

import json
import math
import random
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration, TrainerCallback
from transformers import TrainingArguments as Arguments

from rectify import CheckpointError, InvalidArgumentError
from rectify.cli import main
from rectify.detectors import DetectorConfig, ToxicityClassifier
from rectify.errors import RectifyError
from rectify.training.detector import DetectorSettings, train_detector
from rectify.training.detector_figures import validation_figures
from rectify.training.length_groups import LengthGroups

KINDS = ["gpt2", "llama", "encoder"]
TEXTS = ["t5 t6 t2", "", "t7", "t8 t9 t10 t2 t2 " * 8, " \n", "t5 t6", "t2 t2"]
READABLE = [index for index, text in enumerate(TEXTS) if text.strip()]
BAD_WORD = "t50"


def examples(count, seed):
    """Texts of 1 to 5 words; those with the bad word are toxic."""
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        words = [f"t{draw.randrange(60, 70)}" for _ in range(draw.randint(1, 5))]
        if index % 2:
            words[draw.randrange(len(words))] = BAD_WORD
        rows.append((" ".join(words), float(index % 2)))
    return rows


TRAIN, HELD = examples(160, seed=0), examples(60, seed=1)


def padded(texts, side):
    longest = max(map(len, texts))
    ids, mask = torch.full((len(texts), longest), 2), torch.zeros(len(texts), longest, dtype=torch.int64)
    for row, text in enumerate(texts):
        place = slice(0, len(text)) if side == "right" else slice(longest - len(text), longest)
        ids[row, place], mask[row, place] = torch.tensor(text), 1
    return ids, mask


# --- probabilities


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gives_the_probabilities_of_its_texts_in_their_order(make_classifier, kind):
    classifier = make_classifier(kind)
    together = classifier.probabilities(TEXTS)
    assert together.dtype == np.float32
    assert np.isnan(together).tolist() == [index not in READABLE for index in range(len(TEXTS))]
    alone = np.concatenate([classifier.probabilities([text]) for text in TEXTS])
    assert together == pytest.approx(alone, abs=1e-6, nan_ok=True)
    assert together == pytest.approx(classifier.probabilities(TEXTS, batch_size=2), abs=1e-6, nan_ok=True)
    assert together[::-1] == pytest.approx(classifier.probabilities(TEXTS[::-1]), abs=1e-6, nan_ok=True)
    # the padding token is a token like others where a text ends with it
    assert len({round(float(together[index]), 5) for index in READABLE}) == len(READABLE)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_side_of_padding_changes_nothing(make_classifier, kind):
    classifier = make_classifier(kind)
    texts = [[5, 6, 2], [7], [8, 9, 10, 2, 2], [2]]
    right, left = (classifier(*padded(texts, side)) for side in ("right", "left"))
    assert torch.equal(right, left)
    for logit, text in zip(right, texts, strict=True):
        alone = classifier(torch.tensor([text]), torch.ones(1, len(text), dtype=torch.int64))
        assert torch.allclose(logit, alone, atol=1e-5)


def test_the_logit_of_a_causal_model_is_that_of_transformers(make_classifier):
    classifier = make_classifier("llama")
    text = [5, 6, 7, 8]
    expected = classifier.model(input_ids=torch.tensor([text])).logits.squeeze(-1)
    assert torch.allclose(classifier(torch.tensor([text]), torch.ones(1, 4, dtype=torch.int64)), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@torch.no_grad()
def test_the_logits_of_each_position_are_those_of_its_prefix(make_classifier, kind):
    classifier = make_classifier(kind, form="prefix", labels=("toxic", "rude"))
    texts = [[5, 6, 2], [7], [8, 9, 10, 2, 2], [2]]
    for side in ("right", "left"):
        ids, mask = padded(texts, side)
        found = classifier.position_logits(ids, mask)
        assert found.shape == (4, 5, 2)
        assert found.dtype == torch.float32
        assert (found[mask == 0] == 0).all()
        for row, text in enumerate(texts):
            for end in range(1, len(text) + 1):
                alone = classifier(torch.tensor([text[:end]]), torch.ones(1, end, dtype=torch.int64))
                assert torch.allclose(found[row][mask[row] == 1][end - 1], alone[0], atol=1e-5)


def test_prefixes_need_a_causal_backbone(make_classifier):
    classifier = make_classifier("encoder")
    assert not classifier.causal
    with pytest.raises(InvalidArgumentError, match=r"position_logits .* no causal model: give one"):
        classifier.position_logits(*padded([[5, 6]], "right"))
    with pytest.raises(InvalidArgumentError, match=r"form is 'prefix', and the backbone .* no causal model: give one"):
        make_classifier("encoder", form="prefix")


def test_the_start_of_a_long_text_counts(make_classifier):
    classifier = make_classifier()
    long = " ".join(f"t{number}" for number in range(10, 60))
    assert classifier.probabilities([long]) == classifier.probabilities([" ".join(long.split()[:24])])
    assert classifier.probabilities([long]) != classifier.probabilities([" ".join(long.split()[-24:])])


def test_no_texts_and_bad_texts(make_classifier):
    classifier = make_classifier()
    assert classifier.probabilities([]).shape == (0,)
    for bad in (None, 3, "\ud800"):
        with pytest.raises(InvalidArgumentError, match=r"texts\[1\]"):
            classifier.probabilities(["t5", bad])
    with pytest.raises(InvalidArgumentError, match="batch_size"):
        classifier.probabilities(["t5"], batch_size=0)


def test_dropout_is_off_while_texts_are_scored(make_classifier):
    classifier = make_classifier(lora_dropout=0.5).train()
    assert np.array_equal(classifier.probabilities(["t5 t6"]), classifier.probabilities(["t5 t6"]))
    assert classifier.training


# --- saving and loading


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_equals_what_was_saved(make_classifier, tmp_path, kind):
    classifier = make_classifier(kind)
    classifier.config.training["texts"] = 12
    expected = classifier.probabilities(TEXTS)
    classifier.save_pretrained(tmp_path / "a")
    files = {"detector_config.json", "adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == files
    assert not [name for name in load_file(tmp_path / "a" / "adapter_model.safetensors") if "embed" in name]
    loaded = ToxicityClassifier.from_pretrained(tmp_path / "a")
    assert loaded.config == classifier.config
    assert not loaded.training
    assert not [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]
    assert loaded.probabilities(TEXTS) == pytest.approx(expected, abs=1e-5, nan_ok=True)
    loaded.save_pretrained(tmp_path / "b")
    for name in files:
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    half = ToxicityClassifier.from_pretrained(tmp_path / "a", dtype=torch.bfloat16).probabilities(TEXTS)
    assert half.dtype == np.float32
    assert half == pytest.approx(expected, abs=0.05, nan_ok=True)


def without_the_head(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: w for name, w in weights.items() if "score" not in name}, folder / "adapter_model.safetensors")


def with_config(**changes):
    def change(folder):
        path = folder / "detector_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


HARM = {
    "no config": lambda folder: (folder / "detector_config.json").unlink(),
    "config is cut": lambda folder: (folder / "detector_config.json").write_text("{"),
    "config has another field": with_config(depth=3),
    "config of a later version": with_config(format_version=2),
    "config of two labels": with_config(labels=["toxic", "rude"]),
    "no backbone": with_config(base_model="nowhere/at/all"),
    "no adapter config": lambda folder: (folder / "adapter_config.json").unlink(),
    "adapter config is cut": lambda folder: (folder / "adapter_config.json").write_text("{"),
    "no weights": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "weights are cut": lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"12"),
    "no head": without_the_head,
}


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_folder_is_refused(make_classifier, tmp_path, harm):
    make_classifier().save_pretrained(tmp_path / "d")
    HARM[harm](tmp_path / "d")
    with pytest.raises(CheckpointError) as caught:
        ToxicityClassifier.from_pretrained(tmp_path / "d")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "d") in str(caught.value)


def test_an_adapter_of_another_backbone_is_refused(make_classifier, make_model, backbones, tmp_path):
    classifier = make_classifier()
    folder = tmp_path / "backbone"
    shutil.copytree(backbones["llama"], folder)
    classifier.config.base_model = str(folder)
    classifier.save_pretrained(tmp_path / "d")
    ToxicityClassifier.from_pretrained(tmp_path / "d")
    make_model("llama", seed=5, pad_token_id=2).save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"was trained on other weights .* put the former back") as caught:
        ToxicityClassifier.from_pretrained(tmp_path / "d")
    assert "\n" not in str(caught.value)
    with_config(base_fingerprint=None)(tmp_path / "d")  # as older folders are
    ToxicityClassifier.from_pretrained(tmp_path / "d")


def test_unusable_backbones_and_settings_are_refused(backbones, make_tokenizer, tmp_path):
    for settings in (
        {"form": "infix"},
        {"quantization": "int3"},
        {"max_length": 0},
        {"max_length": 161},
        {"lora_r": 0},
        {"target_modules": ["nowhere"]},
    ):
        with pytest.raises(InvalidArgumentError, match=next(iter(settings))) as caught:
            ToxicityClassifier.from_backbone(backbones["llama"], **settings)
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="nothing"):
        ToxicityClassifier.from_backbone(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty"):
        ToxicityClassifier.from_backbone(str(tmp_path / "empty"))
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    T5ForConditionalGeneration(T5Config(vocab_size=97, **sizes)).save_pretrained(tmp_path / "t5")
    make_tokenizer().save_pretrained(tmp_path / "t5")
    with pytest.raises(InvalidArgumentError, match="encoder-decoder"):
        ToxicityClassifier.from_backbone(str(tmp_path / "t5"))
    with pytest.raises(InvalidArgumentError, match="labels"):
        DetectorConfig("pocket", labels=[])


# --- batches, figures


def test_batches_are_of_nearly_equal_length():
    lengths = np.random.default_rng(0).integers(1, 200, 1003)
    sampler = LengthGroups(lengths, batch_size=8, seed=5)
    order = list(sampler)
    assert sorted(order) == list(range(1003))
    batches = [lengths[order[start : start + 8]] for start in range(0, 1000, 8)]
    assert np.mean([np.ptp(batch) for batch in batches]) < 10
    # in random order
    assert abs(np.corrcoef(range(125), [batch.mean() for batch in batches])[0, 1]) < 0.3
    assert list(sampler) == order
    sampler.set_epoch(1)
    assert list(sampler) != order
    assert list(LengthGroups(lengths[:3], 8, 0)) != []


def test_figures():
    figures = validation_figures(np.array([0.9, 0.4, 0.6, 0.1]), np.array([1, 1, 0, 0]))
    expected = {"n": 4, "toxic_share": 0.5, "auc": 0.75, "average_precision": 5 / 6, "accuracy": 0.5, "f1": 0.5}
    expected |= {"f1_macro": 0.5, "brier": (0.01 + 0.36 + 0.36 + 0.01) / 4, "brier_constant": 0.25}
    assert figures == pytest.approx(expected | {"ece": (0.1 + 0.6 + 0.6 + 0.1) / 4})
    alike = validation_figures(np.array([0.2, 0.3]), np.array([0.0, 0.4]))
    assert not alike.keys() & {"auc", "average_precision", "f1_macro"}
    assert alike["ece"] == pytest.approx((0.2 + 0.1) / 2)
    assert alike["accuracy"] == 1
    assert alike["brier"] == pytest.approx((0.04 + 0.01) / 2)


# --- training


def settings(backbones, kind="llama", **changes):
    return DetectorSettings(**{"model_name_or_path": backbones[kind], "max_length": 24, **changes})


def arguments(folder, **changes):
    given = {
        "output_dir": str(folder),
        "learning_rate": 2e-2,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 16,
        "train_sampling_strategy": "group_by_length",
        "eval_strategy": "epoch",
        "save_strategy": "steps",
        "save_steps": 7,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return Arguments(**given | changes)


def results_but_for_times(folder):
    """What a training says of itself, as text, without how long it took."""

    def timeless(fields):
        return {name: value for name, value in fields.items() if not name.endswith(("runtime", "per_second"))}

    return json.dumps(json.loads((folder / "all_results.json").read_text(), object_hook=timeless), indent=2)


class Kill(TrainerCallback):
    """What a kill is to a training: it ends right after a checkpoint."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="session")
def trained(backbones, tmp_path_factory):
    """The folder of a training of 20 steps, with dropout, that nothing interrupted."""
    folder = tmp_path_factory.mktemp("trained")
    train_detector(settings(backbones, lora_dropout=0.1), arguments(folder), TRAIN, HELD)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_rule_is_learnt(backbones, tmp_path, kind):
    few = arguments(tmp_path, save_strategy="no", num_train_epochs=5)
    classifier = train_detector(settings(backbones, kind), few, TRAIN, [*HELD, ("", 1.0)])
    figures = classifier.config.training["validation"]
    assert figures["n"] == len(HELD)
    assert figures["auc"] > 0.95
    expected = validation_figures(
        classifier.probabilities([text for text, _ in HELD]), np.array([label for _, label in HELD])
    )
    assert figures == pytest.approx(expected, abs=1e-5)
    loaded = ToxicityClassifier.from_pretrained(tmp_path)
    assert loaded.config.training["texts"] == len(TRAIN)
    assert loaded.probabilities([f"t60 {BAD_WORD} t62", "t60 t61 t62"]).round().tolist() == [1, 0]


def test_soft_labels_are_learnt(backbones, tmp_path):
    texts = [("t5 t6", 0.8), ("t7 t8", 0.3)] * 40
    few = arguments(tmp_path, save_strategy="no", num_train_epochs=5)
    classifier = train_detector(settings(backbones), few, texts, texts[:2])
    assert classifier.probabilities(["t5 t6", "t7 t8"]) == pytest.approx([0.8, 0.3], abs=0.05)


def test_several_labels_are_learnt_and_unknown_ones_left_out(backbones, tmp_path):
    unknown = float("nan")
    texts = [("t5 t6", (0.8, 0.1)), ("t7 t8", (0.3, unknown)), ("t9 t4", (unknown, 0.9))] * 40
    few = arguments(tmp_path, save_strategy="no", num_train_epochs=5)
    classifier = train_detector(settings(backbones), few, texts, texts[:3], labels=("toxic", "rude"))
    found = classifier.label_probabilities(["t5 t6", "t7 t8", "t9 t4"])
    assert found[:2, 0] == pytest.approx([0.8, 0.3], abs=0.05)
    assert found[::2, 1] == pytest.approx([0.1, 0.9], abs=0.05)
    assert classifier.config.training["validation"]["rude/n"] == 2
    again = ToxicityClassifier.from_pretrained(tmp_path)
    assert again.label_probabilities(["t5 t6"]) == pytest.approx(found[:1], abs=1e-6)
    assert again.probabilities(["t5 t6", ""]) == pytest.approx([found[0, 0], unknown], abs=1e-6, nan_ok=True)


def test_calibration_bends_the_probabilities_of_its_label(make_classifier):
    classifier = make_classifier(labels=("toxic", "rude", "sly"))
    texts = ["t5 t6", "t7", "t8 t9 t4"]
    before = classifier.label_probabilities(texts)
    knots = [[0.0, 0.0, 0.5, 1.0, 1.0], [0.0, 0.1, 0.2, 0.9, 1.0]]
    classifier.config.calibration |= {"rude": knots, "sly": 2.0}
    after = classifier.label_probabilities(texts)
    assert (after[:, 0] == before[:, 0]).all()
    assert after[:, 1] == pytest.approx(np.interp(before[:, 1], *knots))
    assert after[:, 2] == pytest.approx(1 / (1 + np.exp(-np.log(before[:, 2] / (1 - before[:, 2])) / 2)))
    logits = torch.tensor([[-200.0] * 3, [0.0] * 3, [200.0] * 3, [torch.nan] * 3])
    assert classifier.config.probabilities(logits).numpy() == pytest.approx(
        np.array([[0, 0.1, 0], [0.5, 0.2, 0.5], [1, 1, 1], [np.nan] * 3]), nan_ok=True
    )
    with pytest.raises(InvalidArgumentError, match="calibration of 'toxic' is 0: give a temperature"):
        DetectorConfig("pocket", calibration={"toxic": 0})


def test_prefixes_predict_the_finished_text(backbones, tmp_path):
    few = arguments(tmp_path, save_strategy="no", num_train_epochs=5)
    given = settings(backbones, form="prefix", class_weights="balanced", calibration="temperature")
    rows = [(*row, f"s{index % 3}") for index, row in enumerate(TRAIN[1:])]
    kept = [(*row, f"s{index % 2}") for index, row in enumerate(HELD)]
    classifier = train_detector(given, few, rows, kept)
    loaded = ToxicityClassifier.from_pretrained(tmp_path)
    assert loaded.config.form == "prefix"
    ids, mask = padded([[60, 61, 50, 62], [63, 60, 64, 65]], "right")
    toxic, clean = loaded.config.probabilities(loaded.position_logits(ids, mask))[..., 0].tolist()
    assert min(toxic[2:]) > 0.8
    assert max(clean) < 0.6  # it is still to be seen
    # figures by source, before and after calibration, are those of the loaded probabilities
    record = loaded.config.training
    assert [record["sources"][source]["texts"] for source in ("s0", "s1")] == [53, 53]
    truth, sources = np.array([label for _, label in HELD]), np.array([source for *_, source in kept])
    calibrated = loaded.probabilities([text for text, _ in HELD])
    loaded.config.calibration = {}
    raw = loaded.probabilities([text for text, _ in HELD])
    assert record["calibrated"] == pytest.approx(validation_figures(calibrated, truth), abs=1e-4)
    assert record["validation"] == pytest.approx(validation_figures(raw, truth), abs=1e-4)
    for source in ("s0", "s1"):
        chosen = sources == source
        for name, values in (("validation", raw), ("calibrated", calibrated)):
            found = record["sources"][source][name]
            assert found == pytest.approx(validation_figures(values[chosen], truth[chosen]), abs=1e-4)
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert results["sources"] == record["sources"]
    assert classifier.config == ToxicityClassifier.from_pretrained(tmp_path).config


def test_balanced_classes_count_alike(backbones, tmp_path):
    texts = [("t5", 1.0), ("t5", 0.0), ("t5", 0.0), ("t5", 0.0)] * 20  # nothing can be told
    few = arguments(tmp_path, save_strategy="no", num_train_epochs=8, learning_rate=5e-3)
    classifier = train_detector(settings(backbones, class_weights="balanced"), few, texts, texts[:4])
    assert classifier.probabilities(["t5"]) == pytest.approx([0.5], abs=0.05)


class Unmoved(TrainerCallback):
    """A head of zeros lets no gradient through."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        nn.init.zeros_(model.classifier.model.get_base_model().score.modules_to_save["default"].weight)


def test_a_training_that_moves_no_adapter_is_refused(backbones, tmp_path):
    with pytest.raises(RectifyError, match="no gradient reaches the adapter"):
        train_detector(settings(backbones), arguments(tmp_path), TRAIN, HELD, callbacks=[Unmoved()])


@pytest.mark.parametrize("step", [7, 14])
def test_a_killed_training_goes_on_as_if_nothing_had_happened(backbones, trained, tmp_path, step):
    given = settings(backbones, lora_dropout=0.1)
    with pytest.raises(KeyboardInterrupt):
        train_detector(given, arguments(tmp_path), TRAIN, HELD, callbacks=[Kill(step)])
    saved = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
    assert all("lora_" in name or "score" in name for name in saved)
    train_detector(given, arguments(tmp_path), TRAIN, HELD)
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (trained, tmp_path))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for name in ("detector_config.json", "adapter_config.json"):
        assert (trained / name).read_bytes() == (tmp_path / name).read_bytes()
    results = [results_but_for_times(folder) for folder in (trained, tmp_path)]
    assert results[0] == results[1]


def test_a_finished_folder_and_changed_settings_are_refused(backbones, trained, tmp_path):
    with pytest.raises(InvalidArgumentError, match="finished"):
        train_detector(settings(backbones, lora_dropout=0.1), arguments(trained), TRAIN, HELD)
    with pytest.raises(KeyboardInterrupt):
        train_detector(settings(backbones), arguments(tmp_path), TRAIN, HELD, callbacks=[Kill(7)])
    for name, changed, how, rows in (
        ("lora_r", {"lora_r": 4}, {}, TRAIN),
        ("learning_rate", {}, {"learning_rate": 1e-3}, TRAIN),
        ("texts_sha256", {}, {}, TRAIN[1:]),
        ("texts_sha256", {}, {}, [(*row, "forum") for row in TRAIN]),
        ("form", {"form": "prefix"}, {}, TRAIN),
        ("class_weights", {"class_weights": "balanced"}, {}, TRAIN),
        ("calibration", {"calibration": "temperature"}, {}, TRAIN),
    ):
        with pytest.raises(InvalidArgumentError, match=name):
            train_detector(settings(backbones, **changed), arguments(tmp_path, **how), rows, HELD)


def test_early_stopping_keeps_the_best(backbones, tmp_path):
    stopping = settings(backbones, early_stopping_patience=1)
    with pytest.raises(InvalidArgumentError, match="save_strategy"):
        train_detector(stopping, arguments(tmp_path), TRAIN, HELD)
    with pytest.raises(InvalidArgumentError, match="early_stopping_patience"):
        settings(backbones, early_stopping_patience=0)
    many = {"save_strategy": "epoch", "save_total_limit": 1, "num_train_epochs": 50, "learning_rate": 0.05}
    train_detector(stopping, arguments(tmp_path, **many), TRAIN[:64], HELD)
    states = sorted(tmp_path.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    losses = [entry["eval_loss"] for entry in json.loads(states[-1].read_text())["log_history"] if "eval_loss" in entry]
    assert len(losses) < 50
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(min(losses), rel=1e-4)


def test_bad_rows_are_refused(backbones, tmp_path):
    for train, held, said in (
        ([("t5", 2.0)], HELD, r"train\[0\] has the label 2.0"),
        (TRAIN, [("t5", math.nan)], r"validation\[0\] has the label nan"),
        ([("", 1.0)], HELD, "train has 1 texts"),
        (TRAIN, [], "validation has 0 texts"),
        ([("t5", 1.0), ("t6", 1.0)], HELD, "all 2 training texts have the label 1 of 'toxic': give files with others"),
    ):
        with pytest.raises(InvalidArgumentError, match=said):
            train_detector(settings(backbones), arguments(tmp_path), train, held)


# --- the command


def write(path, rows, text="text", label="label"):
    path.write_text("\n".join(json.dumps({text: row[0], label: row[1]}) for row in rows) + "\n")
    return str(path)


@pytest.fixture
def flags(backbones, tmp_path):
    file = write(tmp_path / "train.jsonl", [*TRAIN, ("", 0), ("  ", 1)])
    given = ["--model_name_or_path", backbones["gpt2"], "--train_files", file, "--output_dir", str(tmp_path / "out")]
    return ["train", "detector", *given, "--max_length", "24", "--num_train_epochs", "1", "--use_cpu"]


def test_the_command(flags, tmp_path, capsys):
    more = ["--learning_rate", "0.02", "--validation_share", "0.25", "--disable_tqdm", "True"]
    assert main([*flags, *more]) == 0
    said = capsys.readouterr().err
    assert "2 blank" in said
    assert "auc" in said
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    names = ("n", "auc", "average_precision", "accuracy", "f1", "brier")
    assert all(f"eval_{name}" in results for name in names)
    classifier = ToxicityClassifier.from_pretrained(tmp_path / "out")
    assert all(classifier.config.training["validation"][name] == results[f"eval_{name}"] for name in names)
    assert 30 < results["eval_n"] < 90
    assert main(flags) == 2
    assert "finished" in capsys.readouterr().err


def test_the_command_with_columns_a_file(flags, tmp_path, capsys):
    held = write(tmp_path / "held.jsonl", HELD, "comment", "toxic")
    columns = ["--text_column", "text", "comment", "--label_column", "label", "toxic"]
    more = ["--label_values", "", "1.0=0,0.0=1", "--sources", "forum", "wiki", "--calibration", "temperature"]
    assert (
        main([*flags, "--validation_files", held, *columns, *more, "--max_steps", "1", "--disable_tqdm", "True"]) == 0
    )
    said = capsys.readouterr().err
    assert f"{len(HELD)} for validation" in said
    assert "; calibrated: ece " in said
    assert (tmp_path / "out" / "training.png").read_bytes()[:4] == b"\x89PNG"
    assert list(json.loads((tmp_path / "out" / "all_results.json").read_text())["sources"]) == ["wiki"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--label_column", "toxic"], "toxic"),
        (["--text_column", "a", "b"], "text_column"),
        (["--train_files", "missing.csv"], "missing.csv"),
        (["--validation_share", "2"], "validation_share"),
        (["--max_length", "0"], "max_length"),
        (["--lora_r", "0"], "lora_r"),
        (["--early_stopping_patience", "0"], "early_stopping_patience"),
        (["--early_stopping_patience", "2", "--save_strategy", "no"], "save_strategy"),
        (["--model_name_or_path", "nowhere"], "nowhere"),
        (["--eval_strategy", "sometimes"], "sometimes"),
        (["--no_such_flag"], "no_such_flag"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_refusals_are_one_line(flags, capsys, more, said):
    try:
        code = main([*flags, *more])
    except SystemExit as error:
        code = error.code
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("texts: ")]
    assert code == 2
    assert len(lines) == 1
    assert said in lines[0]


@pytest.mark.parametrize("argv", [["train"], ["train", "poet"]], ids=str)
def test_another_kind_is_refused_in_one_line(capsys, argv):
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert capsys.readouterr().err.count("\n") == 1


def test_help_names_the_defaults_of_the_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["train", "detector", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "--train_files" in out
    assert "(default: group_by_length)" in out


def test_without_scikit_learn_the_remedy_is_named(backbones, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(RectifyError, match=r"pip install 'rectify-lm\[train\]'"):
        train_detector(settings(backbones), arguments(tmp_path), TRAIN, HELD)
