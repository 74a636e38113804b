"""How many tokens a model reads, whatever its configuration and its tokenizer say."""

from types import SimpleNamespace

import pytest
from transformers import (
    BartConfig,
    BertConfig,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    PretrainedConfig,
    RobertaConfig,
    T5Config,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from rectify.cli import main
from rectify.context import context_length, longest_input


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (GPT2Config(n_positions=32), 32),
        (LlamaConfig(max_position_embeddings=48), 48),
        (BartConfig(max_position_embeddings=40), 40),
        (Gemma3Config(text_config={"max_position_embeddings": 64}), 64),
        (RobertaConfig(max_position_embeddings=514), 512),
        (RobertaConfig(max_position_embeddings=66, pad_token_id=0), 65),
        (XLNetConfig(), None),
        (T5Config(), None),
        (MambaConfig(), None),
    ],
)
def test_the_context_of_a_configuration(config, tokens):
    assert context_length(config) == tokens


@pytest.mark.parametrize(
    ("value", "tokens"),
    [(None, None), (0, None), (-1, None), (True, None), ("512", None), (float("nan"), None), (1e30, None), (96.0, 96)],
)
def test_values_that_are_no_limit(value, tokens):
    config = PretrainedConfig()  # others are strict by themselves, in this version of transformers
    config.max_position_embeddings = value
    assert context_length(config) == tokens
    assert longest_input(BertConfig(max_position_embeddings=128), SimpleNamespace(model_max_length=value)) == (
        tokens or 128
    )
    assert longest_input(config, SimpleNamespace(model_max_length=64)) == 64
    assert longest_input(XLNetConfig(), SimpleNamespace(model_max_length=value)) == tokens


def test_a_classifier_without_a_limit_scores(tmp_path, make_tokenizer, capsys):
    tokenizer = make_tokenizer()
    labels = {"id2label": {0: "fine", 1: "toxic"}, "label2id": {"fine": 0, "toxic": 1}}
    config = XLNetConfig(vocab_size=len(tokenizer), d_model=8, n_layer=1, n_head=2, d_inner=8, **labels)
    XLNetForSequenceClassification(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text("t1 t2\n" + "t3 " * 700 + "\n")
    assert main(["score", str(tmp_path / "a.txt"), "--scorer", f"hf:{tmp_path / 'model'}"]) == 0
    assert "texts: 2, 2 scored" in capsys.readouterr().err
