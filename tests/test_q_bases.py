"""Q networks know their base by all its weights, whatever holds them, and keep what they know."""

import copy
import filecmp
import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from conftest import build_model, build_tokenizer
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PolyConfig,
    PrefixTuningConfig,
    RandLoraConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BartConfig, BartForCausalLM, T5Config, T5ForConditionalGeneration

from rectify import CheckpointError, DeadEndQNetwork, InvalidArgumentError, record_base
from rectify.detectors import ToxicityClassifier
from rectify.static_risk import StaticTokenRisk

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture
def base(tmp_path):
    build_model("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def noisy(network):
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def on(base, shared=False, adapter=None):
    trunk = AutoModelForCausalLM.from_pretrained(base).eval()
    adapter = None if shared else adapter or LoraConfig(r=2)
    return noisy(DeadEndQNetwork.from_trunk(trunk, adapter=adapter, shared=shared, rank=8))


def replace_a_matrix(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.nn.init.normal_(model.model.layers[0].mlp.up_proj.weight, std=0.3)
    model.save_pretrained(base)


def lines(caplog):
    return [record for record in caplog.records if record.name.startswith("rectify")]


def forget(folder):
    """Make of a saved network what older versions saved."""
    path = folder / "q_config.json"
    config = json.loads(path.read_text())
    del config["base_fingerprint"]
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("shared", [False, True])
def test_a_replaced_base_is_refused(base, tmp_path, shared, caplog):
    on(base, shared).save_pretrained(tmp_path / "q")
    DeadEndQNetwork.from_pretrained(tmp_path / "q")
    DeadEndQNetwork.from_pretrained(tmp_path / "q", dtype=torch.bfloat16)
    assert not lines(caplog)
    replace_a_matrix(base)
    with pytest.raises(CheckpointError, match=r"other weights of '.*base'.*1 of 20 differ, such as 'layers.0.mlp.up"):
        DeadEndQNetwork.from_pretrained(tmp_path / "q")


@pytest.mark.parametrize("shared", [False, True])
def test_of_an_older_folder_one_line_says_that_nothing_is_checked(base, tmp_path, shared, caplog):
    on(base, shared).save_pretrained(tmp_path / "q")
    forget(tmp_path / "q")
    replace_a_matrix(base)
    network = DeadEndQNetwork.from_pretrained(tmp_path / "q")
    assert [record.levelno for record in lines(caplog)] == [logging.WARNING]
    assert "records no digest of the weights of" in caplog.text
    assert network.config.base_fingerprint is None


def test_the_signature_of_an_older_folder_is_still_compared(base, tmp_path, caplog):
    on(base, shared=True).save_pretrained(tmp_path / "q")
    forget(tmp_path / "q")
    path = tmp_path / "q" / "q_config.json"
    config = json.loads(path.read_text())
    weight = AutoModelForCausalLM.from_pretrained(base).model.layers[1].mlp.down_proj.weight.flatten()
    places = torch.linspace(0, weight.numel() - 1, 32, dtype=torch.float64).long()
    config["signature"] = [float(f"{value:.3g}") for value in weight[places].tolist()]
    path.write_text(json.dumps(config))
    DeadEndQNetwork.from_pretrained(tmp_path / "q")
    assert len(lines(caplog)) == 1
    config["signature"][3] += 1
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="other weights"):
        DeadEndQNetwork.from_pretrained(tmp_path / "q")


def test_a_head_on_model_and_adapter_needs_both(base, tmp_path):
    def model():
        return AutoModelForCausalLM.from_pretrained(base).eval()

    torch.manual_seed(0)
    adapted = get_peft_model(model(), LoraConfig(r=2, init_lora_weights=False)).eval()
    network = noisy(DeadEndQNetwork.from_trunk(adapted, shared=True, rank=8))
    assert network.trunk is adapted.get_base_model().model
    expected = network(IDS)
    network.save_pretrained(tmp_path / "q")
    for given in (model(), None):
        with pytest.raises(CheckpointError, match="differ"):
            DeadEndQNetwork.from_pretrained(tmp_path / "q", model=given)
    for given in (adapted, copy.deepcopy(adapted).merge_and_unload()):
        assert torch.allclose(DeadEndQNetwork.from_pretrained(tmp_path / "q", model=given)(IDS), expected, atol=1e-5)


def test_what_is_no_trunk_is_refused_with_the_reason(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    for trunk, reason in (
        (get_peft_model(model, LoraConfig(r=2)), "merge_and_unload"),
        (
            T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1)),
            "encoder-decoder",
        ),
        (BartForCausalLM(BartConfig(vocab_size=9, d_model=16, decoder_layers=1)), "by itself"),
    ):
        with pytest.raises(InvalidArgumentError, match=reason):
            DeadEndQNetwork.from_trunk(trunk)


@pytest.mark.parametrize("broken", ["missing", "extra"])
def test_an_adapter_of_other_tensors_is_refused(base, tmp_path, broken):
    on(base).save_pretrained(tmp_path / "q")
    path = tmp_path / "q" / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    if broken == "missing":
        del weights[min(weights)]
    else:
        weights["base_model.model.layers.9.mlp.up_proj.lora_A.weight"] = torch.zeros(2, 32)
    save_file(weights, path)
    with pytest.raises(CheckpointError, match="disagree"):
        DeadEndQNetwork.from_pretrained(tmp_path / "q")


ADAPTERS = {
    "lora of a causal model": LoraConfig(r=2, task_type="CAUSAL_LM"),
    "lora of a classifier": LoraConfig(r=2, task_type="SEQ_CLS", modules_to_save=["norm"], bias="all"),
    "dora": LoraConfig(r=2, use_dora=True, task_type="FEATURE_EXTRACTION"),
    "rslora": LoraConfig(r=4, use_rslora=True, target_modules="all-linear"),
    "ia3": IA3Config(task_type="CAUSAL_LM"),
    "vera": VeraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "randlora, whose layers share tensors": RandLoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "norms, which change places when merged": LNTuningConfig(target_modules=["norm"]),
}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_adapters_of_every_kind_are_saved_and_loaded_again_and_again(base, tmp_path, name):
    given = copy.deepcopy(ADAPTERS[name])
    task = given.task_type
    network = on(base, adapter=given)
    assert given.task_type == task
    expected = network(IDS)
    network.save_pretrained(tmp_path / "0")
    for number, trainable in enumerate((False, True, False)):
        network = DeadEndQNetwork.from_pretrained(tmp_path / str(number), is_trainable=trainable)
        assert torch.allclose(network(IDS), expected, atol=1e-5)
        network.save_pretrained(tmp_path / str(number + 1))
        for folder in ("", "adapter"):
            files = sorted(path.name for path in (tmp_path / "0" / folder).iterdir() if path.is_file())
            same = filecmp.cmpfiles(tmp_path / "0" / folder, tmp_path / str(number + 1) / folder, files, shallow=False)
            assert same == (files, [], [])


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        (PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "PREFIX_TUNING.*not into the layers"),
        (LoraConfig(target_modules=["nowhere"]), "LORA cannot be put into a LlamaModel"),
        (PolyConfig(target_modules=["q_proj"], r=2), "POLY cannot be put into a LlamaModel"),
    ],
)
def test_adapters_that_cannot_work_are_refused_with_the_reason(base, adapter, reason):
    with pytest.raises(InvalidArgumentError, match=reason) as caught:
        on(base, adapter=adapter)
    assert "\n" not in str(caught.value)


def test_name_and_revision_are_kept(base, tmp_path):
    network = on(base, adapter=LoraConfig(r=2, base_model_name_or_path=str(base), revision="v1"))
    network.save_pretrained(tmp_path / "0")
    DeadEndQNetwork.from_pretrained(tmp_path / "0").save_pretrained(tmp_path / "1")
    for folder in ("0", "1"):
        config = json.loads((tmp_path / folder / "q_config.json").read_text())
        assert (config["base_model"], config["base_revision"]) == (str(base), "v1")
        adapter = json.loads((tmp_path / folder / "adapter" / "adapter_config.json").read_text())
        assert (adapter["base_model_name_or_path"], adapter["revision"]) == (str(base), "v1")


def test_what_is_there_is_recorded_in_an_older_folder(base, tmp_path, caplog, capsys):
    build_tokenizer(pad="t2").save_pretrained(base)
    torch.manual_seed(0)
    ToxicityClassifier.from_backbone(str(base), max_length=24, lora_r=2).save_pretrained(tmp_path / "detector")
    on(base).save_pretrained(tmp_path / "q")
    on(base, shared=True).save_pretrained(tmp_path / "head")
    folders = {
        "q": (DeadEndQNetwork, "q_config.json"),
        "head": (DeadEndQNetwork, "q_config.json"),
        "detector": (ToxicityClassifier, "detector_config.json"),
    }
    written = {name: (tmp_path / name / file).read_text() for name, (_, file) in folders.items()}
    for name, (kind, file) in folders.items():
        config = json.loads(written[name])
        (tmp_path / name / file).write_text(json.dumps(config | {"base_fingerprint": None}))
        caplog.clear()
        kind.from_pretrained(tmp_path / name)
        assert ["no digest" in record.getMessage() for record in lines(caplog)] == [True]
    assert record_base.main([str(tmp_path / name) for name in folders]) == 0
    for name, (_, file) in folders.items():
        assert json.loads((tmp_path / name / file).read_text()).items() <= json.loads(written[name]).items()
        assert json.loads((tmp_path / name / file).read_text())["base_fingerprint"].startswith("w1:")
    assert record_base.main([str(base)]) != 0
    assert "q_config.json" in capsys.readouterr().err


def test_a_detector_refuses_a_base_with_scrambled_layers_and_takes_it_in_other_files(base, tmp_path):
    build_tokenizer(pad="t2").save_pretrained(base)
    ToxicityClassifier.from_backbone(str(base), max_length=24, lora_r=2).save_pretrained(tmp_path / "d")
    model = AutoModelForCausalLM.from_pretrained(base)
    for path in base.glob("*.safetensors"):
        path.unlink()
    model.half().save_pretrained(base, max_shard_size="20KB")
    ToxicityClassifier.from_pretrained(tmp_path / "d")
    model.model.layers[0], model.model.layers[1] = model.model.layers[1], model.model.layers[0]
    model.save_pretrained(base, max_shard_size="20KB")
    with pytest.raises(CheckpointError, match="other weights"):
        ToxicityClassifier.from_pretrained(tmp_path / "d")


def test_a_table_without_a_vocabulary_says_so(tmp_path, caplog):
    table = StaticTokenRisk.fit([[1, 2]], [0], [-0.5], 9)
    table.save_pretrained(tmp_path)
    StaticTokenRisk.from_pretrained(tmp_path)
    assert ["records no vocabulary" in record.getMessage() for record in lines(caplog)] == [True]


SAVE = """
import sys, torch
from peft import IA3Config, LoraConfig
from transformers import AutoModelForCausalLM
from rectify import DeadEndQNetwork
for number, adapter in enumerate((
    LoraConfig(r=2, target_modules="all-linear", modules_to_save=["norm", "input_layernorm"]),
    IA3Config(),
)):
    torch.manual_seed(0)
    trunk = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    DeadEndQNetwork.from_trunk(trunk, adapter=adapter, rank=8).save_pretrained(f"{sys.argv[2]}/{number}")
"""


def test_two_processes_write_the_same_bytes(base, tmp_path):
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", SAVE, str(base), str(tmp_path / seed)], env=environment, check=True)
    files = sorted(str(path.relative_to(tmp_path / "1")) for path in (tmp_path / "1").rglob("*") if path.is_file())
    assert len(files) == 8
    assert filecmp.cmpfiles(tmp_path / "1", tmp_path / "2", files, shallow=False) == (files, [], [])
