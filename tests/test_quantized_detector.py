"""QLoRA: a 4-bit backbone trains on a CPU, also after an evaluation, and is loaded as it was."""

import json
import sys

import pytest
import torch
from transformers import TrainingArguments

from rectify import MissingExtraError
from rectify.detectors import ToxicityClassifier
from rectify.training.detector import DetectorSettings, train_detector

ROWS = [("t5 t6", 1.0), ("t7 t8", 0.0)] * 16


@pytest.fixture(scope="module")
def place(make_model, make_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    make_model("llama", pad_token_id=2).save_pretrained(folder)
    make_tokenizer(pad="t2").save_pretrained(folder)
    return str(folder)


def gradients(classifier):
    classifier.zero_grad()
    classifier.train()(torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.int64)).sum().backward()
    return sum(float(p.grad.abs().sum()) for name, p in classifier.named_parameters() if "lora_B" in name)


def test_evaluation_leaves_a_4_bit_backbone_trainable(place):
    pytest.importorskip("bitsandbytes")
    classifier = ToxicityClassifier.from_backbone(place, quantization="nf4", max_length=24)
    kinds = {type(module).__name__ for module in classifier.model.get_base_model().base_model.modules()}
    assert "Linear4bit" in kinds
    before = gradients(classifier)
    classifier.probabilities(["t5 t6", "t7"])
    assert gradients(classifier) == before > 0


def test_a_4_bit_backbone_trains_and_is_loaded_again(place, tmp_path):
    pytest.importorskip("bitsandbytes")
    how = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    arguments = TrainingArguments(
        str(tmp_path), learning_rate=2e-2, num_train_epochs=4, eval_strategy="epoch", logging_steps=1, **how
    )
    settings = DetectorSettings(place, quantization="nf4", max_length=24)
    classifier = train_detector(settings, arguments, ROWS, ROWS[:2])
    history = json.loads((tmp_path / "all_results.json").read_text())["history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    texts = ["t5 t6", "t7 t8", "t9"]
    loaded = ToxicityClassifier.from_pretrained(tmp_path)
    assert loaded.config.quantization == "nf4"
    assert loaded.probabilities(texts) == pytest.approx(classifier.probabilities(texts), abs=1e-6)
    loaded.save_pretrained(tmp_path / "again")
    for name in ("adapter_model.safetensors", "detector_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_without_bitsandbytes_the_remedy_is_named(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'rectify-lm\[quant\]'"):
        ToxicityClassifier.from_backbone(place, quantization="nf4")
