"""Tiny random models, Q networks and tokenizers; nothing is fetched, and every draw is seeded."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes run the tests

import numpy as np
import pytest
import torch
from prompt_records import records
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
)

from rectify import DeadEndQNetwork
from rectify.detectors import ToxicityClassifier
from rectify.static_risk import StaticRiskConfig, StaticTokenRisk
from rectify.vocabulary import Fingerprint

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**WIDTHS, "num_key_value_heads": 2, "max_position_embeddings": 160}
KINDS = {
    "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 160}),
    "llama": (LlamaConfig, LLAMA),
    "sliding": (MistralConfig, {**LLAMA, "sliding_window": 4}),
    "recurrent": (MambaConfig, {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
}


def build_model(kind="gpt2", seed=0, **changes):
    config_class, sizes = KINDS[kind]
    torch.manual_seed(seed)
    # wide enough that attention and positions show in the outputs
    settings = {"vocab_size": 97, "initializer_range": 0.3, **SPECIAL, **sizes, **changes}
    return AutoModelForCausalLM.from_config(config_class(**settings)).eval()


def build_q_network(kind="gpt2", seed=1, noise=0.2, tokenizer=None, rank=16, **changes):
    q_network = DeadEndQNetwork.from_trunk(build_model(kind, seed, **changes), tokenizer=tokenizer, rank=rank)
    with torch.no_grad():
        for parameter in q_network.head.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return q_network.eval()


def build_tokenizer(words=97, pad="t0", eos="t2", rename=()):
    names = {index: f"t{index}" for index in range(words)} | dict(rename)
    tokenizer = Tokenizer(WordLevel({name: index for index, name in names.items()}, unk_token=names[3]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="t1", eos_token=eos, pad_token=pad)


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where there is none; CI lets no other skip pass."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def make_model():
    """`make_model(kind, seed, **changes of the configuration)`: a causal model of random weights."""
    return build_model


@pytest.fixture(scope="session")
def make_q_network():
    """`make_q_network(kind, seed, noise, tokenizer, rank, **changes)`: a Q network whose values vary."""
    return build_q_network


@pytest.fixture(scope="session")
def make_tokenizer():
    """`make_tokenizer(words, pad, eos, rename)`: the tokens t0, t1 …, each a word."""
    return build_tokenizer


@pytest.fixture(scope="session")
def model():
    return build_model()


@pytest.fixture(scope="session")
def q_network():
    return build_q_network()


@pytest.fixture(scope="session")
def run_place(tmp_path_factory):
    """A folder with a `model`, a Q network `q`, tables of token risks `static` and `zero`, and `prompts.jsonl`."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = build_tokenizer()
    build_model("llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    build_q_network("llama", tokenizer=tokenizer, noise=0.5).save_pretrained(folder / "q")
    for name, risk in (("static", np.random.default_rng(3).random(97)), ("zero", np.zeros(97))):
        StaticTokenRisk(risk, StaticRiskConfig(97, 0.5, 20.0, Fingerprint.of(tokenizer))).save_pretrained(folder / name)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records()))
    return folder


@pytest.fixture(scope="session")
def backbones(tmp_path_factory):
    """A folder of model and tokenizer of each kind; the padding token is one with which texts may end."""
    folders = {}
    for kind in ("gpt2", "llama", "encoder"):
        folders[kind] = str(tmp_path_factory.mktemp(kind))
        if kind == "encoder":
            # saved without the pooler that a classifier needs
            sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
            torch.manual_seed(0)
            model = BertForMaskedLM(
                BertConfig(vocab_size=97, max_position_embeddings=160, initializer_range=0.3, **sizes)
            )
        else:
            model = build_model(kind, pad_token_id=2)
        model.save_pretrained(folders[kind])
        build_tokenizer(pad="t0" if kind == "encoder" else "t2").save_pretrained(folders[kind])
    return folders


@pytest.fixture(scope="session")
def make_classifier(backbones):
    """`make_classifier(kind, **settings)`: a classifier whose adapter and head do something."""

    def make(kind="llama", **settings):
        torch.manual_seed(1)
        classifier = ToxicityClassifier.from_backbone(backbones[kind], max_length=24, **settings)
        with torch.no_grad():
            for parameter in classifier.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return classifier.eval()

    return make


@pytest.fixture
def spy(monkeypatch):
    """`spy(q_network, method)`: a list that gets the `(rows, tokens)` of every run of its trunk."""

    def watch(q_network, method="encode"):
        runs, encode = [], getattr(q_network, method)

        def encode_and_note(input_ids, *arguments, **named):
            runs.append(tuple(input_ids.shape))
            return encode(input_ids, *arguments, **named)

        monkeypatch.setattr(q_network, method, encode_and_note)
        return runs

    return watch


@pytest.fixture(scope="session")
def models(make_model):
    return {kind: make_model(kind) for kind in ("gpt2", "llama", "sliding")}


@pytest.fixture(scope="session")
def q_networks(make_q_network):
    return {kind: make_q_network(kind) for kind in ("gpt2", "llama", "sliding")}


@pytest.fixture(scope="session")
def make_causal_classifier(tmp_path_factory):
    """`make_causal_classifier(kind, model, **settings)`: a classifier whose scores vary; see `causal_classifiers`."""
    from causal_classifiers import build_classifier

    return lambda kind="llama", **given: build_classifier(tmp_path_factory.mktemp(kind), kind, **given)


@pytest.fixture(scope="session")
def causal_classifiers(make_causal_classifier):
    return {kind: make_causal_classifier(kind) for kind in ("gpt2", "llama", "sliding", "recurrent")}


class StubHead(nn.Module):
    """A head of given values, one row for each row of the batch, or one for all; its states are the rows' numbers."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def forward(self, hidden, actions=None):
        table = self.values.reshape(-1, self.values.shape[-1])
        values = table[hidden[..., 0].long() % len(table)]
        return values if actions is None else values.gather(-1, actions)

    def log_survival(self, hidden, actions=None):
        return self(hidden, actions).log1p()


class StubNetwork(DeadEndQNetwork):
    def encode(self, input_ids, attention_mask=None, cache=None):
        rows = torch.arange(len(input_ids), dtype=torch.float32)
        return rows[:, None, None].expand(-1, input_ids.shape[1], 1)


@pytest.fixture
def with_values(q_network):
    """`with_values(values)`: a Q network of these values after every prefix."""

    def make(values):
        stub = StubNetwork(q_network.config, q_network.trunk)
        stub.head = StubHead(values)
        return stub

    return make
