"""Blends of adapters: equal to what they are defined as, row by row, on encoders, Linear and GPT-2's Conv1D."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from rectify import CheckpointError, InvalidArgumentError
from rectify.detectors import ToxicityClassifier
from rectify.detectors.adapter_blend import AdapterBlend
from rectify.detectors.classifier import pad
from rectify.detectors.routing import route, top_1, top_k

KINDS = ["gpt2", "llama", "encoder"]
# every row another length; none ends with the padding token of the reference
TOKENS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [5, 6, 7], [14, 15]]
GATES = torch.tensor([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0], [0.0, 0.9, 0.1], [0.1, 0.1, 0.8], [0.4, 0.4, 0.2]])
ONE_HOT = torch.eye(3)
LAYERS = {"gpt2": ["c_attn"], "llama": ["q_proj", "down_proj"], "encoder": ["query", "output.dense"]}


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="session")
def adapters(backbones, tmp_path_factory):
    """Of each kind, the folders of three classifiers that differ in rank, scale, its rule, and adapted modules."""
    found = {}
    for kind in KINDS:
        torch.manual_seed(5)
        found[kind] = {}
        for name, settings in (
            ("forum", {"lora_r": 4, "lora_alpha": 8}),
            ("wiki", {"lora_r": 2, "lora_alpha": 6, "target_modules": LAYERS[kind]}),
            ("chat", {"lora_r": 3, "lora_alpha": 2}),
        ):
            classifier = ToxicityClassifier.from_backbone(
                backbones[kind], max_length=24, labels=("toxic", "rude"), **settings
            )
            with torch.no_grad():
                for parameter in classifier.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.1 * torch.randn_like(parameter))
            folder = tmp_path_factory.mktemp(f"{kind}-{name}")
            classifier.save_pretrained(folder)
            found[kind][name] = folder
        change_json(found[kind]["chat"] / "adapter_config.json", use_rslora=True)
    return found


@pytest.fixture(scope="session")
def blends(adapters):
    return {kind: AdapterBlend.from_pretrained(adapters[kind]) for kind in KINDS}


def reference(backbone, folders, gates, tokens):
    """The logits of one row in float64, of a model whose weights are those of the definition."""
    model = AutoModelForSequenceClassification.from_pretrained(
        backbone, num_labels=2, dtype=torch.float64, ignore_mismatched_sizes=True
    )
    gates, fresh = gates.double().tolist(), {}
    for gate, folder in zip(gates, folders, strict=True):
        config = json.loads((folder / "adapter_config.json").read_text())
        scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
        weights = {
            name.removeprefix("base_model.model."): weight.double()
            for name, weight in load_file(folder / "adapter_model.safetensors").items()
        }
        for name, weight in weights.items():
            if "lora_" not in name:
                fresh[name] = fresh.get(name, 0) + gate * weight
            elif "lora_A" in name:
                module = model.get_submodule(name.removesuffix(".lora_A.weight"))
                delta = scale * weights[name.replace("lora_A", "lora_B")] @ weight
                module.weight.data += gate * (delta.T if isinstance(module, Conv1D) else delta)
    for name, weight in fresh.items():
        model.get_parameter(name).data.copy_(weight)
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([tokens])).logits[0]


# --- the two ways to blend


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_blended_weights_are_those_of_their_definition_in_every_row(backbones, adapters, blends, kind):
    found = blends[kind](*pad(TOKENS), GATES)
    assert found.dtype == torch.float32
    folders = list(adapters[kind].values())
    for row, (gates, tokens) in enumerate(zip(GATES, TOKENS, strict=True)):
        expected = reference(backbones[kind], folders, gates, tokens)
        assert torch.allclose(found[row].double(), expected, atol=1e-5, rtol=1e-5)
    # rows 0 and 3 are one text under other gates
    assert not torch.allclose(found[0], found[3], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_blended_logits_are_the_weighted_sum_of_the_adapters_own(adapters, blends, kind):
    ids, mask = pad(TOKENS)
    own = torch.stack([ToxicityClassifier.from_pretrained(place)(ids, mask) for place in adapters[kind].values()], 1)
    expected = (GATES[..., None].double() * own.double()).sum(1)
    found = blends[kind].blended_logits(ids, mask, GATES)
    assert torch.allclose(found.double(), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, blends[kind](ids, mask, GATES), atol=1e-3)
    for place in range(3):
        one = ONE_HOT[place].expand(len(TOKENS), -1)
        for logits in (blends[kind](ids, mask, one), blends[kind].blended_logits(ids, mask, one)):
            assert torch.allclose(logits, own[:, place], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_mixed_batch_gives_what_its_rows_give(blends, kind):
    ids, mask = pad(TOKENS)
    for blend in (blends[kind], blends[kind].blended_logits):
        together = blend(ids, mask, GATES)
        for row, (tokens, gates) in enumerate(zip(TOKENS, GATES, strict=True)):
            assert torch.allclose(together[row], blend(*pad([tokens]), gates[None])[0], atol=1e-5)
        left = [part.flip(-1) for part in pad([tokens[::-1] for tokens in TOKENS])]
        assert torch.equal(blend(*left, GATES), together)


@torch.no_grad()
def test_scales_of_single_modules_are_honoured(adapters, tmp_path):
    changed = tmp_path / "a"
    changed.mkdir()
    for file in adapters["llama"]["forum"].iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    change_json(changed / "adapter_config.json", alpha_pattern={"q_proj": 40})
    blend = AdapterBlend.from_pretrained({"a": changed, "b": adapters["llama"]["wiki"]})
    ids, mask = pad(TOKENS)
    own = ToxicityClassifier.from_pretrained(changed)(ids, mask)
    assert torch.allclose(blend.adapter_logits(ids, mask, 0), own, atol=1e-5)
    assert not torch.allclose(blend.adapter_logits(ids, mask, 0), blend.adapter_logits(ids, mask, 1), atol=1e-3)


@torch.no_grad()
def test_mixing_the_factors_as_published_adds_cross_terms():
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoraConfig(r=2, lora_alpha=4, target_modules=["0"]), "first")
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=2, target_modules=["0"]))
    layer = model.base_model.model[0]
    factors = []
    for name, weight in (("first", 0.7), ("second", 0.3)):
        layer.lora_B[name].weight.copy_(torch.randn(5, 2))
        factors.append((weight * layer.scaling[name], layer.lora_A[name].weight, layer.lora_B[name].weight))
    exact = sum(share * b @ a for share, a, b in factors)
    (share_a, a_a, b_a), (share_b, a_b, b_b) = factors
    cross = math.sqrt(share_a * share_b) * (b_a @ a_b + b_b @ a_a)
    model.base_model.add_weighted_adapter(["first", "second"], [0.7, 0.3], "mixed", combination_type="linear")
    mixed = layer.scaling["mixed"] * layer.lora_B["mixed"].weight @ layer.lora_A["mixed"].weight
    assert torch.allclose(mixed, exact + cross, atol=1e-6)
    assert (mixed - exact).norm() > 0.3 * exact.norm()


@torch.no_grad()
def test_half_precision_is_close(adapters, blends):
    ids, mask = pad(TOKENS)
    half = AdapterBlend.from_pretrained(adapters["llama"], dtype=torch.bfloat16)(ids, mask, GATES)
    assert half.dtype == torch.float32
    assert torch.allclose(half, blends["llama"](ids, mask, GATES), atol=0.1, rtol=0.05)


def test_the_backbone_is_in_memory_once_and_frozen(adapters, blends):
    alone = ToxicityClassifier.from_pretrained(adapters["llama"]["forum"])
    blend = blends["llama"]
    assert not any(parameter.requires_grad for parameter in blend.parameters())
    embeddings = [weight for name, weight in blend.state_dict().items() if "embed_tokens" in name]
    assert len(embeddings) == len([name for name in alone.state_dict() if "embed_tokens" in name])
    assert not [name for name in blend.state_dict() if "lora_" in name or "modules_to_save" in name]


# --- what is refused


def copy_of(folder, place, **changes):
    place.mkdir()
    for file in folder.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    change_json(place / "detector_config.json", **changes)
    return place


def test_adapters_that_do_not_fit_are_refused_in_one_line(backbones, adapters, tmp_path):
    forum, wiki = adapters["llama"]["forum"], adapters["llama"]["wiki"]
    (tmp_path / "cut").mkdir()
    copy_of(wiki, tmp_path / "dora")
    change_json(tmp_path / "dora" / "adapter_config.json", use_dora=True)
    weights = load_file(forum / "adapter_model.safetensors")
    short = copy_of(forum, tmp_path / "short")
    save_file({name: w for name, w in weights.items() if "score" not in name}, short / "adapter_model.safetensors")
    for other, kind, said in (
        (adapters["gpt2"]["wiki"], InvalidArgumentError, "base_fingerprint"),
        (
            copy_of(wiki, tmp_path / "old", base_model="b", base_fingerprint=None),
            InvalidArgumentError,
            "base_model 'b'",
        ),
        (copy_of(wiki, tmp_path / "labels", labels=["toxic", "insult"]), InvalidArgumentError, "labels"),
        (copy_of(wiki, tmp_path / "length", max_length=12), InvalidArgumentError, "max_length"),
        (tmp_path / "dora", InvalidArgumentError, "DoRA"),
        (tmp_path / "cut", CheckpointError, "detector_config.json"),
        (tmp_path / "nowhere", CheckpointError, "nowhere"),
        (short, CheckpointError, "disagree"),
    ):
        with pytest.raises(kind, match=said) as caught:
            AdapterBlend.from_pretrained({"forum": forum, "other": other})
        assert "\n" not in str(caught.value)
    with pytest.raises(InvalidArgumentError, match="adapters is empty"):
        AdapterBlend.from_pretrained({})


def test_one_base_may_be_spelt_in_two_ways(backbones, adapters, tmp_path):
    forum = adapters["llama"]["forum"]
    base = Path(backbones["llama"])
    other = copy_of(forum, tmp_path / "other", base_model=str(base / ".." / base.name))
    assert AdapterBlend.from_pretrained({"a": forum, "b": other}).names == ["a", "b"]


def test_gates_of_another_shape_are_refused(blends):
    for blend in (blends["llama"], blends["llama"].blended_logits):
        for gates in (GATES[:2], GATES[:, :2]):
            with pytest.raises(InvalidArgumentError, match=r"gates has shape .*\(5, 3\)"):
                blend(*pad(TOKENS), gates)


def test_embeddings_that_adapters_change_are_refused(backbones, tmp_path):
    classifier = ToxicityClassifier.from_backbone(backbones["llama"], target_modules=["embed_tokens"], max_length=24)
    classifier.save_pretrained(tmp_path)
    with pytest.raises(InvalidArgumentError, match=r"embed_tokens, which is not linear"):
        AdapterBlend.from_pretrained({"a": tmp_path})


# --- routings


def test_routings():
    gates = torch.tensor([[0.5, 0.2, 0.3], [0.25, 0.5, 0.25], [0.4, 0.2, 0.4]])
    assert route(gates, "blend", 2) is gates
    two = torch.tensor([[0.625, 0.0, 0.375], [1 / 3, 2 / 3, 0.0], [0.5, 0.0, 0.5]])
    assert torch.allclose(route(gates, "top_k", 2), two)
    assert torch.allclose(top_k(gates, 3), gates)
    first = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert torch.equal(route(gates, "top_1", 2), first)
    assert torch.equal(top_k(gates, 1), first)
    assert torch.equal(top_1(gates.flip(0)), first.flip(0))


@pytest.mark.parametrize("k", [0, 4])
def test_bad_routings_are_refused(k):
    gates = torch.full((1, 3), 1 / 3)
    with pytest.raises(InvalidArgumentError, match=f"k is {k}: give a number from 1 to 3"):
        route(gates, "top_k", k)
    with pytest.raises(InvalidArgumentError, match="routing is 'all'"):
        route(gates, "all", 2)
