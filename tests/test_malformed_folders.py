"""Folders as anybody may write them: whatever is wrong is refused in one line, and nothing of it is run or made up."""

import ast
import builtins
import dataclasses
import json
import os
import re
import shutil
import socket
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from byte_model import save_byte_model
from conftest import build_model, build_q_network, build_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

import rectify
from rectify import DeadEndQNetwork
from rectify.adapter_config import read_adapter_config
from rectify.adapters import save_adapter
from rectify.cli import main
from rectify.detectors import AdapterBlend, GatedDetector, ToxicityClassifier, load_detector
from rectify.detectors.config import DetectorConfig
from rectify.detectors.gate import AdapterGate, GateConfig
from rectify.detectors.gated import GatedConfig
from rectify.detectors.instruction import InstructionConfig, InstructionDetector
from rectify.detectors.moderation import ModerationConfig, QAModeration
from rectify.detectors.spans import SpanConfig, SpanDetector
from rectify.detectors.templates import TEMPLATES
from rectify.errors import CheckpointError, RectifyError
from rectify.generation import command as generate
from rectify.hub import load_language_model
from rectify.methods.expert_pair import ExpertsConfig, load_experts
from rectify.methods.self_detoxifier import DetoxifierConfig, load_detoxifier
from rectify.pretrained import GIVEN
from rectify.published import import_published
from rectify.q_network import QConfig
from rectify.rephrasing.sentences import Sentence
from rectify.rephrasing.substitutions import Substitutions, SubstitutionsConfig
from rectify.saved_weights import all_finite
from rectify.scoring.cascade import CascadeConfig, CascadeScorer
from rectify.scoring.load import allow_flag, load_scorer
from rectify.scoring.pocket import PocketScorer, ScorerConfig
from rectify.sentence_encoder import SentenceEncoder
from rectify.static_risk import StaticRiskConfig, StaticTokenRisk
from rectify.vocabulary import Fingerprint

LOADERS = {
    "model": load_language_model,
    "q": DeadEndQNetwork.from_pretrained,
    "q_adapter": DeadEndQNetwork.from_pretrained,
    "q_shared": DeadEndQNetwork.from_pretrained,
    "static": StaticTokenRisk.from_pretrained,
    "detector": load_detector,
    "moderation": QAModeration.from_pretrained,
    "gated": load_detector,
    "gate": AdapterGate.from_pretrained,
    "spans": SpanDetector.from_pretrained,
    "spans_adapter": SpanDetector.from_pretrained,
    "instruction": InstructionDetector.from_pretrained,
    "experts": lambda folder: load_experts(folder, build_tokenizer()),
    "chains": lambda folder: load_detoxifier(folder, build_tokenizer()),
    "scorer": PocketScorer.from_pretrained,
    "cascade": CascadeScorer,
    "hf": lambda folder: load_scorer(f"hf:{folder}", device="cpu").score(["t5 t6"]),
    "encoder": lambda folder: SentenceEncoder.from_pretrained(str(folder), max_length=24),
    "substitutions": Substitutions.from_pretrained,
    "published": import_published,
}
CONFIGS = {
    "q": ("q_config.json", QConfig),
    "static": ("static_risk.json", StaticRiskConfig),
    "detector": ("detector_config.json", DetectorConfig),
    "moderation": ("detector_config.json", ModerationConfig),
    "gated": ("gated_config.json", GatedConfig),
    "gate": ("gate_config.json", GateConfig),
    "spans": ("span_config.json", SpanConfig),
    "instruction": ("instruction_config.json", InstructionConfig),
    "experts": ("experts_config.json", ExpertsConfig),
    "chains": ("cmd_config.json", DetoxifierConfig),
    "scorer": ("scorer_config.json", ScorerConfig),
    "cascade": ("cascade_config.json", CascadeConfig),
    "substitutions": ("substitutions.json", SubstitutionsConfig),
}
WEIGHTS = {
    "model": "model.safetensors",
    "q": "head.safetensors",
    "q_adapter": "adapter/adapter_model.safetensors",
    "q_shared": "head.safetensors",
    "static": "static_risk.safetensors",
    "detector": "adapter_model.safetensors",
    "moderation": "model.safetensors",
    "gate": "gate.safetensors",
    "spans": "head.safetensors",
    "spans_adapter": "adapter_model.safetensors",
    "instruction": "adapter_model.safetensors",
    "experts": "expert/adapter_model.safetensors",
    "chains": "adapter_model.safetensors",
    "scorer": "model.safetensors",
    "hf": "model.safetensors",
    "published": "model.safetensors",
}
ENCODER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def write_adapter(base, folder):
    model, tokenizer = load_language_model(str(base))
    adapter = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    save_adapter(get_peft_model(model, adapter), folder, str(base))
    return tokenizer


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with one good folder of each kind, of the same random models."""
    place = tmp_path_factory.mktemp("good")
    tokenizer = build_tokenizer()
    build_model("llama", num_hidden_layers=1).save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    base = str(place / "model")
    torch.manual_seed(0)
    encoder = BertConfig(vocab_size=97, max_position_embeddings=64, pad_token_id=0, **ENCODER)
    BertForMaskedLM(encoder).save_pretrained(place / "encoder")
    tokenizer.save_pretrained(place / "encoder")
    save_byte_model(place / "bytes")

    build_q_network("llama", tokenizer=tokenizer, num_hidden_layers=1).save_pretrained(place / "q")
    trunk, _ = load_language_model(base)
    adapter = LoraConfig(r=2, target_modules="all-linear", base_model_name_or_path=base)
    DeadEndQNetwork.from_trunk(trunk, adapter=adapter, tokenizer=tokenizer).save_pretrained(place / "q_adapter")
    trunk, _ = load_language_model(base)
    DeadEndQNetwork.from_trunk(trunk, shared=True, name=base, tokenizer=tokenizer).save_pretrained(place / "q_shared")
    config = StaticRiskConfig(97, 0.5, 20.0, Fingerprint.of(tokenizer))
    StaticTokenRisk(torch.linspace(0, 1, 97).numpy(), config).save_pretrained(place / "static")

    detector = ToxicityClassifier.from_backbone(base, max_length=24)
    detector.config.calibration = {"toxic": 2.0}
    detector.save_pretrained(place / "detector")
    moderation = QAModeration.from_backbone(str(place / "bytes"), labels=["a", "b"], max_length=200, lora_r=0)
    moderation.save_pretrained(place / "moderation")
    sentences = SentenceEncoder.from_pretrained(str(place / "encoder"), max_length=24)
    gate = AdapterGate(GateConfig(str(place / "encoder"), ["x", "y"], 32, max_length=24), sentences)
    gate.save_pretrained(place / "gate")
    blend = AdapterBlend.from_pretrained({"x": place / "detector", "y": place / "detector"})
    GatedDetector(GatedConfig(["x", "y"]), gate, blend).save_pretrained(place / "gated")
    SpanDetector.from_backbone(base, max_length=24, overlap=4).save_pretrained(place / "spans")
    SpanDetector.from_backbone(base, max_length=24, overlap=4, lora_r=2).save_pretrained(place / "spans_adapter")

    write_adapter(place / "bytes", place / "instruction")
    (place / "instruction" / "instruction_config.json").write_text(
        json.dumps(dataclasses.asdict(InstructionConfig(str(place / "bytes"), TEMPLATES["toxic"])))
    )
    for side in ("expert", "anti_expert"):
        write_adapter(base, place / "experts" / side)
    ExpertsConfig(base, Fingerprint.of(tokenizer)).save_pretrained(place / "experts")
    write_adapter(base, place / "chains")
    DetoxifierConfig(base, Fingerprint.of(tokenizer)).save_pretrained(place / "chains")

    scorer = BertForSequenceClassification(BertConfig(**encoder.to_dict() | {"num_labels": 2}))
    settings = ScorerConfig(["TOXICITY", "INSULT"], max_length=16, calibration={"TOXICITY": [[0.0, 1.0], [0.1, 0.9]]})
    PocketScorer(settings, scorer, tokenizer).save_pretrained(place / "scorer")
    shutil.copytree(place / "scorer", place / "hf")
    (place / "hf" / "scorer_config.json").unlink()
    names = {"id2label": {"0": "clean", "1": "toxic"}, "label2id": {"clean": 0, "toxic": 1}}
    change(place / "hf" / "config.json", **names)
    spec = f"pocket:{place / 'scorer'}"
    CascadeConfig(spec, spec, 0.8).save_pretrained(place / "cascade")
    sentence = Sentence("nobody here really gives a damn about it", ("nobody here really cares about it",))
    Substitutions.learn([sentence]).save_pretrained(place / "substitutions")

    model = build_model("gpt2", n_layer=1)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layer, shape in (("0", (64, 32)), ("3", (97, 64))):
        state[f"ilql_heads.q_heads.0.{layer}.weight"] = torch.randn(shape)
        state[f"ilql_heads.q_heads.0.{layer}.bias"] = torch.randn(shape[0])
    model.config.save_pretrained(place / "published")
    save_file(state, place / "published" / "model.safetensors")
    return place


@pytest.fixture
def damaged(good, tmp_path):
    """`damaged(kind)`: a copy of the good folder, to be spoilt."""

    def copy(kind):
        return shutil.copytree(good / kind, tmp_path / kind)

    return copy


@pytest.fixture(autouse=True)
def ran(monkeypatch):
    """What was run, asked or called, which is nothing at the end of any test."""
    found = []

    def refuse(name):
        def caught(*arguments, **_):
            found.append((name, arguments))
            raise AssertionError(f"{name} was called")

        return caught

    for module, name in (
        (subprocess, "Popen"),
        (os, "system"),
        (os, "popen"),
        (os, "posix_spawn"),
        (builtins, "input"),
        (socket.socket, "connect"),
    ):
        monkeypatch.setattr(module, name, refuse(name))
    yield found
    assert not found


def refused(load, *arguments):
    """The one line in which a folder is refused."""
    with pytest.raises(RectifyError) as caught:
        load(*arguments)
    said = str(caught.value)
    assert said
    assert "\n" not in said
    assert "\r" not in said
    assert len(said) < 2000
    return said


def test_the_good_folders_load(good):
    for kind, load in LOADERS.items():
        load(good / kind)


# ---------------------------------------------------------------------------------------------------------------------
# Configurations

WRONG = {"str": 5, "int": "64", "bool": 1, "float": "0.5", "list": {"0": 1}, "dict": [], "tuple": "ab", "Any": 5}
OF_THE_RIGHT_TYPE = {
    "int": [True, 1.5, 10**30, -1],
    "float": [True, float("nan"), float("inf"), float("-inf"), 10**400, -1],
    "str": ["\ud800", "a\0b", ""],
}


def kind_of(field):
    """The outermost type that a field is declared to have."""
    declared = str(field.type).partition("|")[0].strip()
    name = declared.partition("[")[0]
    return {"Literal": "str", "Template": "dict", "Fingerprint": "dict"}.get(name, name if name in WRONG else "str")


def field_cases():
    for kind, (file, config) in CONFIGS.items():
        for field in dataclasses.fields(config):
            yield kind, file, field.name, WRONG[kind_of(field)]


FIELDS = list(field_cases())


@pytest.mark.parametrize(("kind", "file", "name", "value"), FIELDS, ids=[f"{case[0]}-{case[2]}" for case in FIELDS])
def test_a_field_of_another_type_is_named(damaged, kind, file, name, value):
    folder = damaged(kind)
    change(folder / file, **{name: value})
    said = refused(LOADERS[kind], folder)
    assert name in said
    assert file in said


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


RANGES = [
    ("q", "vocab_size", 0),
    ("q", "hidden_size", 2**31 - 1),
    ("q", "hidden_size", 64),
    ("q", "rank", -1),
    ("q", "rank", True),
    ("q", "mlp_size", 10**30),
    ("q", "base_rate", 1.5),
    ("q", "base_rate", float("nan")),
    ("q", "head", "other"),
    ("q", "vocabulary", {"size": 97, "sha256": "zz", "samples": {}}),
    ("q", "vocabulary", {"size": 97, "sha256": "0" * 64, "samples": {"x": "t"}}),
    ("q", "vocabulary", {"size": 97, "sha256": "0" * 64}),
    ("q_adapter", "base_model", ""),
    ("q_adapter", "base_model", "/dev/zero"),
    ("q_adapter", "base_model", "~nobody_at_all/x"),
    ("q_adapter", "base_model", "x" * 5000),
    ("q_adapter", "base_model", "https://example.org/model"),
    ("q_shared", "base_fingerprint", "0" * 12),
    ("q_shared", "base_fingerprint", ""),
    ("q_adapter", "base_fingerprint", "0" * 12),
    ("q_shared", "signature", [float("inf")] * 32),
    ("static", "vocab_size", 2**31 - 1),
    ("static", "base_rate", 7),
    ("static", "prior", 0),
    ("detector", "max_length", 10**9),
    ("detector", "labels", []),
    ("detector", "labels", ["a", 5]),
    ("detector", "labels", ["a", "b"]),
    ("detector", "form", "other"),
    ("detector", "quantization", "exec"),
    ("detector", "calibration", {"toxic": 0}),
    ("detector", "calibration", {"toxic": 1e-300}),
    ("detector", "calibration", {"toxic": float("nan")}),
    ("detector", "calibration", {"toxic": [[0, 1], [0, 5]]}),
    ("detector", "calibration", {"toxic": [[0, 1]]}),
    ("detector", "calibration", {"toxic": [[1, 0], [0, 1]]}),
    ("detector", "calibration", {"toxic": [[], []]}),
    ("detector", "calibration", {"other": 2.0}),
    ("detector", "format_version", 99),
    ("moderation", "thresholds", {"prediction": 5}),
    ("moderation", "thresholds", {"prediction": {"a": 0.5}}),
    ("moderation", "template", "other"),
    ("gate", "input_size", 10**9),
    ("gate", "hidden_size", 10**9),
    ("gate", "names", ["x", "x"]),
    ("gate", "encoder", "/dev/null"),
    ("gated", "adapters", ["../../model", "y"]),
    ("gated", "adapters", ["/etc", "y"]),
    ("gated", "calibration", {"toxic": [[0, 1], [0, -4.38]]}),
    ("gated", "k", 0),
    ("gated", "routing", "other"),
    ("spans", "threshold", float("nan")),
    ("spans", "threshold", 2),
    ("spans", "overlap", 10**6),
    ("spans", "head", "other"),
    ("instruction", "temperature", 0),
    ("instruction", "template", {"prompt": "no place", "lead": "x", "labels": ["a", "b"], "toxic": ["a"]}),
    ("instruction", "template", {"prompt": "{text}", "lead": "x", "labels": ["a", "b"]}),
    ("instruction", "template", {"prompt": "{text}", "lead": "x", "labels": ["a", 1], "toxic": ["a"]}),
    ("instruction", "chat", True),
    ("scorer", "attributes", ["TOXICITY"]),
    ("scorer", "max_length", 2**31),
    ("scorer", "max_length", 4000),
    ("scorer", "calibration", {"TOXICITY": [[0, 1], [6.05, -4.38]]}),
    ("scorer", "calibration", {"TOXICITY": [[0, 1], [0, float("nan")]]}),
    ("scorer", "calibration", {"OTHER": [[0, 1], [0, 1]]}),
    ("scorer", "calibration", {"TOXICITY": 0.5}),
    ("cascade", "threshold", float("nan")),
    ("cascade", "threshold", float("inf")),
    ("cascade", "threshold", 10**30),
    ("cascade", "threshold", 10**400),
    ("cascade", "small_temperature", 0),
    ("cascade", "large_temperature", float("inf")),
    ("cascade", "small", "nothing:of:the:kind"),
    ("cascade", "small", ""),
    ("cascade", "small", "keywords:/dev/zero"),
    ("cascade", "small", "pocket:/nowhere/at/all"),
    ("substitutions", "prior", 0),
    ("substitutions", "min_ratio", 2),
]


@pytest.mark.parametrize(("kind", "name", "value"), RANGES, ids=[f"{case[0]}-{case[1]}" for case in RANGES])
def test_a_field_out_of_range_is_refused(damaged, kind, name, value):
    folder = damaged(kind)
    change(folder / CONFIGS.get(kind, CONFIGS["q"])[0], **{name: value})
    refused(LOADERS[kind], folder)


@pytest.mark.parametrize("signature", [[], [0.5], [0.5] * 31, [0.5] * 32, [10**400] * 32])
def test_the_signature_of_an_older_folder_is_checked(damaged, signature):
    folder = damaged("q_shared")
    change(folder / "q_config.json", base_fingerprint=None, signature=signature)
    refused(LOADERS["q_shared"], folder)


def nested(depth):
    return '{"training": ' + '{"a": ' * depth + "1" + "}" * depth + "}"


FILES = {
    "empty": b"",
    "a list": b"[]",
    "a word": b"nul",
    "cut": b'{"base_model": "x',
    "unicode": b'{"training": {"\xff": 1}}',
    "deep": nested(100_000).encode(),
    "deep enough": nested(400).encode(),
    "brackets": b"[" * 100_000,
    "digits": b'{"format_version": ' + b"9" * 5000 + b"}",
    "twice": b'{"training": {}, "training": {}}',
    "unknown": b'{"unheard_of": 1}',
    "nothing in it": b"{}",
    "utf-16": '{"training": {}}'.encode("utf-16"),
}


@pytest.mark.parametrize("damage", FILES)
@pytest.mark.parametrize("kind", ["q", "detector", "instruction", "scorer", "cascade", "substitutions"])
def test_a_file_that_is_no_configuration_is_refused(damaged, kind, damage):
    if (kind, damage) == ("substitutions", "nothing in it"):
        return  # all of its fields have a default
    folder, file = damaged(kind), CONFIGS[kind][0]
    (folder / file).write_bytes(FILES[damage])
    assert file in refused(LOADERS[kind], folder)


def folder_instead(path):
    path.unlink()
    path.mkdir()


def pipe_instead(path):
    path.unlink()
    os.mkfifo(path)


def device_instead(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def loop_instead(path):
    path.unlink()
    path.symlink_to(path)


def gone(path):
    path.unlink()


@pytest.mark.parametrize("damage", [gone, folder_instead, pipe_instead, device_instead, loop_instead])
@pytest.mark.parametrize("kind", ["q", "gated", "scorer", "cascade", "chains"])
def test_a_configuration_that_is_no_file_is_refused(damaged, kind, damage):
    folder = damaged(kind)
    damage(folder / CONFIGS[kind][0])
    refused(LOADERS[kind], folder)


def test_a_byte_order_mark_is_no_fault(damaged):
    folder = damaged("cascade")
    path = folder / "cascade_config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    CascadeConfig.from_pretrained(folder)


COUNTS = [b"", b"[]", b"{", b'{"count": 1}', b'{"before": "", "removed": "a", "after": "", "put": "b", "count": true}']


@pytest.mark.parametrize("text", [*COUNTS, b"[" * 100_000, b"\xff", b'{"removed": "a", "count": 1, "x": 2}'])
def test_counts_that_are_none_are_refused(damaged, text):
    folder = damaged("substitutions")
    (folder / "substitutions.jsonl").write_bytes(text)
    refused(LOADERS["substitutions"], folder)


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def with_weights(spoil):
    def damage(path):
        weights = load_file(path)
        # the last that is trained: transformers takes some buffers of old releases for nothing
        spoil(weights, sorted(name for name in weights if weights[name].is_floating_point())[-1])
        path.unlink()
        save_file(weights, path)

    return damage


def one_of(value):
    def spoil(weights, name):
        weights[name] = weights[name].clone()
        weights[name].view(-1)[-1] = value

    return with_weights(spoil)


def header(size, text=b""):
    return lambda path: path.write_bytes(struct.pack("<Q", size) + text)


def drop(weights, name):
    del weights[name]


def reshape(weights, name):
    weights[name] = torch.zeros(*weights[name].shape, 3)


def to_int(weights, name):
    weights[name] = weights[name].long()


def add(weights, name):
    weights["surplus"] = torch.zeros(3)


ANY_WEIGHTS = {
    "gone": gone,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "no header": lambda path: path.write_bytes(b"\x00" * 64),
    "header too long": header(2**62, b"{}"),
    "header of another kind": header(2, b"[]"),
    "no tensor": header(2, b"{}"),
    "folder": folder_instead,
    "device": device_instead,
    "NaN": one_of(float("nan")),
    "infinity": one_of(float("inf")),
    "one missing": with_weights(drop),
    "another shape": with_weights(reshape),
}
OWN_WEIGHTS = {"pipe": pipe_instead, "integers": with_weights(to_int), "one too many": with_weights(add)}
DAMAGES = [(kind, damage) for kind in WEIGHTS for damage in ANY_WEIGHTS]
DAMAGES += [(kind, damage) for kind in ("q", "q_adapter", "static", "detector", "gate") for damage in OWN_WEIGHTS]
DAMAGES += [(kind, damage) for kind in ("scorer", "moderation", "spans") for damage in OWN_WEIGHTS]


@pytest.mark.parametrize(("kind", "damage"), DAMAGES, ids=[f"{kind}-{damage}" for kind, damage in DAMAGES])
def test_weights_that_are_not_those_are_refused(damaged, kind, damage):
    folder = damaged(kind)
    (ANY_WEIGHTS | OWN_WEIGHTS)[damage](folder / WEIGHTS[kind])
    refused(LOADERS[kind], folder)


@pytest.mark.parametrize("damage", ["gone", "empty", "no tensor", "NaN", "one missing", "one too many"])
@pytest.mark.parametrize("kind", ["q", "spans"])
def test_trunks_that_are_not_those_are_refused(damaged, kind, damage):
    folder = damaged(kind)
    (ANY_WEIGHTS | OWN_WEIGHTS)[damage](folder / "trunk" / "model.safetensors")
    refused(LOADERS[kind], folder)


@pytest.mark.parametrize("value", [5.0, 0.1, float("nan"), float("inf")])
def test_a_table_of_no_probabilities_is_refused(damaged, value):
    folder = damaged("static")
    one_of(value)(folder / "static_risk.safetensors")
    refused(StaticTokenRisk.from_pretrained, folder)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "adapter_model.bin", "head.bin", "model.pt"])
@pytest.mark.parametrize("kind", ["q", "q_adapter", "scorer", "detector"])
def test_pickles_are_not_read(damaged, tmp_path, kind, file):
    marker, folder = tmp_path / "marker", damaged(kind)

    class Code:
        def __reduce__(self):
            return (marker.write_text, ("ran",))

    for path in [path for path in folder.rglob("*.safetensors") if path.parent.name != "y"]:
        path.unlink()
        torch.save({"weights": Code()}, path.parent / file)
    refused(LOADERS[kind], folder)
    assert not marker.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Models and adapters

SIZES = [
    {"num_hidden_layers": 10**9},
    {"vocab_size": 10**12},
    {"hidden_size": 10**9},
    {"hidden_size": "32"},
    {"num_attention_heads": 0},
    {"num_hidden_layers": -1},
    {"model_type": "nothing"},
    {"model_type": 5},
    {"model_type": None},
    {"attn_implementation": "someone/kernel"},
    {"_attn_implementation": "someone/kernel"},
    {"rope_parameters": 5},
]


@pytest.mark.parametrize("values", SIZES, ids=[f"{next(iter(case.items()))}" for case in SIZES])
@pytest.mark.parametrize("kind", ["model", "q"])
def test_a_model_whose_configuration_is_not_its_own_is_refused(damaged, kind, values):
    folder = damaged(kind)
    path = folder / "config.json" if kind == "model" else folder / "trunk" / "config.json"
    change(path, **values)
    refused(LOADERS[kind], folder)


@pytest.mark.parametrize(
    "values",
    [
        {"peft_type": "NOTHING"},
        {"peft_type": 5},
        {"r": 10**9},
        {"r": "8"},
        {"r": 0},
        {"lora_alpha": float("nan")},
        {"lora_alpha": 10**400},
        {"lora_alpha": "x"},
        {"target_modules": 5},
        {"target_modules": ["nowhere"]},
        {"rank_pattern": {"q_proj": 10**9}},
        {"megatron_config": {"a": 1}, "megatron_core": "marker_module"},
        {"auto_mapping": 5, "r": -1},
        {"lora_dropout": 2},
        {"unheard_of": 1, "r": None},
    ],
    ids=str,
)
def test_the_configuration_of_an_adapter_is_checked(damaged, tmp_path, monkeypatch, values):
    (tmp_path / "marker_module.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = damaged("detector")
    change(folder / "adapter_config.json", **values)
    refused(LOADERS["detector"], folder)
    assert not (tmp_path / "marker").exists()


def test_an_adapter_without_a_head_is_refused(damaged):
    # else the head would be the one that transformers has drawn
    folder = damaged("detector")
    change(folder / "adapter_config.json", modules_to_save=None)
    with_weights(lambda weights, _: [weights.pop(name) for name in list(weights) if "score" in name])(
        folder / "adapter_model.safetensors"
    )
    assert "score" in refused(LOADERS["detector"], folder)


TOKENIZERS = {
    "empty": lambda path: path.write_text(""),
    "a list": lambda path: path.write_text("[]"),
    "no model": lambda path: path.write_text("{}"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:200]),
    "pipe": pipe_instead,
    "gone": gone,
}


@pytest.mark.parametrize("damage", TOKENIZERS)
@pytest.mark.parametrize("kind", ["model", "scorer"])
def test_a_tokenizer_that_is_none_is_refused(damaged, kind, damage):
    folder = damaged(kind)
    TOKENIZERS[damage](folder / "tokenizer.json")
    refused(LOADERS[kind], folder)


def test_a_tokenizer_over_which_its_library_panics_is_refused(tmp_path):
    folder = save_byte_model(tmp_path, merges=(("s", "o"),))
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["model"]["continuing_subword_prefix"] = "##"  # of which the merges know nothing
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    assert "panicked" in refused(load_language_model, folder)


@pytest.mark.parametrize("value", [0, -1, "64", [], None, True, float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["hf", "encoder", "model"])
def test_a_longest_length_that_is_none_is_refused(damaged, kind, value):
    folder = damaged(kind)
    change(folder / "tokenizer_config.json", model_max_length=value)
    if value is None:  # as if nothing were said
        LOADERS[kind](folder)
    else:
        refused(LOADERS[kind], folder)


@pytest.mark.parametrize("kind", ["hf", "encoder", "scorer"])
def test_special_tokens_without_embeddings_are_refused(damaged, kind):
    folder = damaged(kind)
    change(folder / "tokenizer_config.json", pad_token="[beyond]")
    refused(LOADERS[kind], folder)


@pytest.mark.parametrize("value", [{"0": 5, "1": "toxic"}, {"0": None, "1": "toxic"}, [], "x", {"x": "toxic"}])
def test_labels_that_are_no_names_are_refused(damaged, value):
    folder = damaged("hf")
    change(folder / "config.json", id2label=value)
    refused(LOADERS["hf"], folder)


def test_products_that_are_not_finite_give_no_score(damaged):
    folder = damaged("scorer")
    with_weights(lambda weights, _: [weights.update({name: weights[name] * 0 + 3e38}) for name in list(weights)])(
        folder / "model.safetensors"
    )
    refused(lambda: PocketScorer.from_pretrained(folder).score(["t5 t6"]))


def test_a_pipe_beside_the_weights_is_not_read(damaged):
    folder = damaged("detector")
    os.mkfifo(folder / "notes.txt")
    refused(load_scorer, f"detector:{folder}")


def sharded(folder, place):
    """The folder with an index, by which its weights are in another place."""
    weights = folder / "model.safetensors"
    names = list(load_file(weights))
    weights.rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, place)})
    )
    return folder


@pytest.mark.parametrize("place", ["/dev/zero", "../x.safetensors", "..", "", "a\\b", None, 5, []])
@pytest.mark.parametrize("kind", ["model", "hf"])
def test_an_index_that_leads_out_of_its_folder_is_refused(damaged, kind, place):
    assert "index.json" in refused(LOADERS[kind], sharded(damaged(kind), place))


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": {}}', "[" * 100_000, '{"weight_map": []}'])
def test_an_index_that_is_none_is_refused(damaged, text):
    folder = sharded(damaged("model"), "part.safetensors")
    load_language_model(str(folder))
    (folder / "model.safetensors.index.json").write_text(text)
    refused(load_language_model, str(folder))


def test_a_pipe_among_chat_templates_is_not_read(damaged):
    folder = damaged("model")
    (folder / "additional_chat_templates").mkdir()
    os.mkfifo(folder / "additional_chat_templates" / "other.jinja")
    assert "is no file" in refused(load_language_model, str(folder))


def test_nobody_is_told_to_run_what_comes_with_weights(damaged):
    folder = damaged("model")
    (folder / "model.safetensors").unlink()
    torch.save({"x": Fingerprint}, folder / "pytorch_model.bin")
    assert "of which nothing is run" in refused(load_language_model, str(folder))
    change(folder / "config.json", model_type="other", auto_map={"AutoConfig": "other.Config"})
    assert "of which nothing is run" in refused(load_language_model, str(folder))


def test_published_weights_that_are_no_floats_are_refused(damaged):
    folder = damaged("published")
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight.to(torch.int8) for name, weight in weights.items()}, folder / "model.safetensors")
    assert "int8" in refused(import_published, folder)


def test_a_padding_token_without_an_embedding_is_not_used(damaged):
    folder = damaged("model")
    change(folder / "tokenizer_config.json", pad_token="[ADDED LATER]")
    model, tokenizer = load_language_model(str(folder))
    assert tokenizer.pad_token == tokenizer.eos_token
    model(**tokenizer(["t5", "t5 t6"], return_tensors="pt", padding=True))


def test_how_an_adapter_began_is_no_fault(good, damaged, tmp_path):
    write_adapter(good / "model", tmp_path / "adapter")
    change(tmp_path / "adapter" / "adapter_config.json", init_lora_weights="eva", eva_config={"rho": 2.0}, unheard_of=1)
    read_adapter_config(tmp_path / "adapter")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16])
def test_weights_of_every_float_type_are_told_finite(dtype):
    assert all_finite(torch.ones(2).to(dtype))
    assert not all_finite(torch.tensor([1, float("nan")]).to(dtype))


def test_a_tokenizer_of_more_tokens_than_its_model_is_refused(damaged):
    folder = damaged("scorer")
    build_tokenizer(words=200).save_pretrained(folder)
    assert "200" in refused(LOADERS["scorer"], folder)


# ---------------------------------------------------------------------------------------------------------------------
# Code and commands

CODE = "open({marker!r}, 'w')\nfrom transformers import PreTrainedConfig as C, PreTrainedModel as M\n"
PLACES = {"model": "", "q": "trunk", "spans": "trunk", "scorer": "", "moderation": "", "published": ""}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("kind", PLACES)
def test_code_beside_weights_is_never_run(damaged, tmp_path, kind, known):
    marker, folder = tmp_path / "marker", damaged(kind)
    place = folder / PLACES[kind]
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoTokenizer")
    own = {name: ["code.C", "code.C"] if name == "AutoTokenizer" else "code.C" for name in names}
    (place / "code.py").write_text(CODE.format(marker=str(marker)))
    change(place / "config.json", auto_map=own, **({} if known else {"model_type": "code"}))
    if (place / "tokenizer_config.json").exists():
        change(place / "tokenizer_config.json", auto_map=own)
    if known or kind == "published":  # transformers has code of its own for it, which is taken
        LOADERS[kind](folder)
    else:
        refused(LOADERS[kind], folder)
    assert not marker.exists()


def test_every_call_refuses_code():
    assert GIVEN == {"trust_remote_code": False}
    for path in Path(rectify.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert not imported & {"pickle", "dill", "joblib", "marshal", "shelve"}, path
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name, given = ast.unparse(call.func), ast.unparse(call)
            if re.fullmatch(r"(auto|Auto\w+)\.from_pretrained", name):
                assert "**GIVEN" in given, f"{path}:{call.lineno}"
            assert name != "torch.load" or "weights_only=True" in given, f"{path}:{call.lineno}"
            assert name not in ("eval", "exec", "os.system", "os.popen"), f"{path}:{call.lineno}"
            assert "shell=True" not in given, f"{path}:{call.lineno}"
            assert "allow_pickle=True" not in given, f"{path}:{call.lineno}"


COMMANDS = [
    "process:touch {marker}",
    "process:sh -c 'touch {marker}'",
    "process:",
    "perspective",
    "detoxify:original",
]


@pytest.mark.parametrize("part", ["small", "large"])
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_a_cascade_may_not_name_a_command_or_a_service(good, tmp_path, ran, part, command, depth):
    marker = tmp_path / "marker"
    good_part = f"pocket:{good / 'scorer'}"
    given = {"small": good_part, "large": good_part, part: command.format(marker=marker)}
    folder = tmp_path / "cascade0"
    CascadeConfig(**given, threshold=1.0).save_pretrained(folder)
    for number in range(depth):
        within = {"small": good_part, "large": good_part, part: f"cascade:{folder}"}
        folder = tmp_path / f"cascade{number + 1}"
        CascadeConfig(**within, threshold=1.0).save_pretrained(folder)
    for load in (load_scorer, lambda spec: load_scorer(spec, device="cpu")):
        said = refused(load, f"cascade:{folder}")
        assert "cascade_config.json" in said
    assert part in refused(CascadeConfig.from_pretrained, folder)
    assert not marker.exists()
    assert not ran


def test_what_the_user_names_as_well_is_allowed(good, tmp_path, monkeypatch):
    CascadeConfig(f"pocket:{good / 'scorer'}", "process:cat", 1.0).save_pretrained(tmp_path / "inner")
    CascadeConfig(f"cascade:{tmp_path / 'inner'}", "stub", 1.0).save_pretrained(tmp_path / "outer")
    made = []
    monkeypatch.setattr("rectify.scoring.process_scorer.ProcessScorer.__init__", lambda self, it, **_: made.append(it))
    monkeypatch.setattr("rectify.scoring.process_scorer.ProcessScorer.revision", "1", raising=False)
    refused(load_scorer, f"cascade:{tmp_path / 'outer'}")
    with pytest.raises(CheckpointError, match="process:cat"):
        CascadeScorer(tmp_path / "outer", allow=["process:cat "])  # letter for letter
    CascadeScorer(tmp_path / "outer", allow=["process:cat"])
    assert made == ["cat"]


@pytest.mark.parametrize("length", [1, 2, 30])
def test_cascades_of_themselves_end(tmp_path, length):
    for number in range(length):
        part = f"cascade:{tmp_path / str((number + 1) % length)}"
        CascadeConfig("stub", part, 1.0).save_pretrained(tmp_path / str(number))
    refused(load_scorer, f"cascade:{tmp_path / '0'}")


# ---------------------------------------------------------------------------------------------------------------------
# From the command line


def said_by(capsys, run, *arguments):
    """The one line on standard error of a command that refuses."""
    assert run([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert "error:" in line
    assert not captured.out
    return line


@pytest.mark.parametrize("command", [["score", "--text", "x", "--scorer"], ["detect", "--text", "x", "--detector"]])
def test_commands_refuse_a_command_in_a_folder(tmp_path, capsys, command):
    marker = tmp_path / "marker"
    CascadeConfig(f"process:touch {marker}", "stub", 1.0).save_pretrained(tmp_path / "cascade")
    line = said_by(capsys, main, *command, f"cascade:{tmp_path / 'cascade'}")
    assert line.endswith(f"--allow 'process:touch {marker}'")
    assert allow_flag(f"pocket:{tmp_path}") == ""
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["scorer", "detector", "moderation", "gated", "instruction"])
@pytest.mark.parametrize("command", ["score", "detect"])
def test_commands_refuse_damaged_folders(damaged, capsys, kind, command):
    folder = damaged(kind)
    for path in folder.rglob("*.safetensors"):
        path.write_bytes(b"")
    spec = f"{ {'scorer': 'pocket', 'gated': 'detector'}.get(kind, kind) }:{folder}"
    said_by(capsys, main, command, "--text", "x", "--scorer" if command == "score" else "--detector", spec)


@pytest.mark.parametrize("damage", ["NaN", "empty", "one missing"])
@pytest.mark.parametrize("kind", ["q", "q_adapter", "q_shared"])
def test_generation_refuses_damaged_q_networks(good, damaged, capsys, kind, damage):
    folder = damaged(kind)
    ANY_WEIGHTS[damage](folder / WEIGHTS[kind])
    how = ("--model", good / "model", "--prompt", "t5 t6", "--rectify", "--device", "cpu", "--q", folder)
    said_by(capsys, generate.main, *how)


def test_the_cases_are_many():
    cases = len(FIELDS) + len(RANGES) + len(FILES) * 6 + len(DAMAGES) + len(SIZES) * 2 + len(COMMANDS) * 6
    print(f"{cases} malformed folders")
    assert cases >= 400
