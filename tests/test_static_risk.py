"""The table of token risks: its values against a loop, decoding with it, and what is saved, loaded and refused."""

import json
import math

import numpy as np
import pytest
import torch
from decoding import decode, new_tokens, padded, prompts

from rectify import (
    Advantage,
    Cap,
    CheckpointError,
    InvalidArgumentError,
    Mask,
    RectificationProcessor,
    Tilt,
    VocabularyMismatchError,
    token_risks,
)
from rectify.rule import rectify
from rectify.static_risk import StaticRiskConfig, StaticTokenRisk
from rectify.training.static_command import main as static_main
from rectify.vocabulary import Fingerprint

V = 97
RULES = [Tilt(beta=3.0), Mask(threshold=0.6), Advantage(tau=0.05), Cap(epsilon=0.2), Tilt(beta=2.0, epsilon=0.1)]


def trajectories(seed=0, count=60):
    random = np.random.default_rng(seed)
    ids = [random.integers(0, V - 7, random.integers(3, 12)).tolist() for _ in range(count)]
    starts = [int(random.integers(0, len(row) + 1)) for row in ids]
    return ids, starts, (-random.random(count)).tolist()


def table(seed=0, **named):
    risk = np.random.default_rng(seed).random(V) * 0.9
    return StaticTokenRisk(risk, StaticRiskConfig(V, 0.5, 20.0, **named))


@pytest.mark.parametrize("prior", [0.5, 20])
def test_risks_are_those_of_a_loop(prior):
    ids, starts, rewards = trajectories()
    taken = [
        (row[place], -reward)
        for row, start, reward in zip(ids, starts, rewards, strict=True)
        for place in range(start, len(row))
    ]
    base_rate = sum(risk for _, risk in taken) / len(taken)
    found = StaticTokenRisk.fit(ids, starts, rewards, V, prior=prior)
    assert found.config.base_rate == pytest.approx(base_rate)
    for token in range(V):
        own = [risk for other, risk in taken if other == token]
        expected = (sum(own) + prior * base_rate) / (len(own) + prior)
        assert found.risk[token].item() == pytest.approx(expected, rel=1e-6)
    assert found.risk[V - 1].item() == pytest.approx(base_rate)
    assert found.config.training["tokens"] == len(taken)


def test_certain_tokens_are_certain():
    assert (StaticTokenRisk.fit([[1, 2]], [0], [-1.0], V).risk == 1).all()
    assert (StaticTokenRisk.fit([[1, 2]], [0], [0.0], V).risk == 0).all()
    near = StaticTokenRisk(np.array([1e-12, 1 - 1e-12]), StaticRiskConfig(2, 0.5, 1.0))
    survival = near.head.log_survival(near.encode(torch.zeros(1, 1, dtype=torch.long))).double()
    assert survival.flatten().tolist() == pytest.approx([-1e-12, math.log(1e-12)], rel=1e-4)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_decoding_is_rectified_by_the_table(model, rule):
    static = table()
    ids, mask = padded([[5, 6, 7, 8], [9]], 0)
    processor = RectificationProcessor(static, rule, model=model, do_sample=True, top_p=0.9, attention_mask=mask)
    scores = torch.randn(2, V)
    warped = processor.sampling.warpers()(ids, scores.clone())
    expected = rectify(warped, static.risk.neg().log1p().expand(2, -1), rule, unwarped=scores).scores
    assert torch.allclose(processor(ids, scores.clone()).softmax(-1), expected.softmax(-1), atol=1e-6)
    # a text decoded alone and in a batch
    greedy = RectificationProcessor(static, rule, do_sample=False, attention_mask=mask)
    output = decode(model, ids, greedy, attention_mask=mask, eos_token_id=None, pad_token_id=0)
    alone = RectificationProcessor(static, rule, do_sample=False)
    single = decode(model, ids[:1], alone, eos_token_id=None, pad_token_id=0)
    assert new_tokens(output, ids)[0] == new_tokens(single, ids[:1])[0]
    assert alone.statistics().decisions > 0


def test_beams_and_samples(model):
    processor = RectificationProcessor(table(), Tilt(beta=3.0), model=model, do_sample=False, num_beams=3)
    ids = prompts(2)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        logits_processor=[processor],
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=5,
        **processor.generate_kwargs(),
    )
    assert output.shape[0] == 6


def test_values_of_finished_texts():
    static = table()
    ids, mask = padded([[5, 6, 7, 8], [9, 10]], 200)
    risks = token_risks(static, ids, mask)
    expected = [[math.nan, *static.risk[[6, 7, 8]].tolist()], [math.nan, math.nan, math.nan, static.risk[10].item()]]
    assert torch.allclose(risks, torch.tensor(expected), equal_nan=True)
    whole = token_risks(static, ids[:1])
    assert torch.allclose(whole, risks[:1], equal_nan=True)
    assert torch.allclose(static(ids[:1])[0, 2], -static.risk)


def test_saved_and_loaded(tmp_path, make_tokenizer):
    ids, starts, rewards = trajectories()
    tokenizer = make_tokenizer()
    static = StaticTokenRisk.fit(ids, starts, rewards, V, Fingerprint.of(tokenizer))
    static.save_pretrained(tmp_path / "a" / "static")
    loaded = StaticTokenRisk.from_pretrained(str(tmp_path / "a" / "static"))
    assert loaded.config == static.config
    assert torch.equal(loaded.risk, static.risk)
    RectificationProcessor(loaded, tokenizer=tokenizer)
    with pytest.raises(VocabularyMismatchError, match="token 3 is"):
        RectificationProcessor(loaded, tokenizer=make_tokenizer(rename=[(3, "other")]))
    with pytest.raises(VocabularyMismatchError, match="98 tokens"):
        RectificationProcessor(loaded)(torch.tensor([[5]]), torch.zeros(1, 98))


def test_broken_folders_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no static_risk\.json"):
        StaticTokenRisk.from_pretrained(tmp_path)
    table().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "static_risk.json").read_text())
    (tmp_path / "static_risk.json").write_text(json.dumps(config | {"vocab_size": 96}))
    with pytest.raises(CheckpointError, match="could not be loaded"):
        StaticTokenRisk.from_pretrained(tmp_path)
    (tmp_path / "static_risk.json").write_text(json.dumps(config))
    (tmp_path / "static_risk.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="could not be loaded"):
        StaticTokenRisk.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1]], [0, 0], [0.0], V), "ids hold 1 trajectories, starts 2"),
        (([[1]], [0], [0.1], V), r"rewards hold 0\.1"),
        (([[1]], [0], [math.nan], V), "rewards hold nan"),
        (([[1]], [-1], [0.0], V), "starts hold -1"),
        (([[1]], [1], [0.0], V), "no token"),
        (([], [], [], V), "no token"),
        (([[V]], [0], [0.0], V), "ids hold 97, vocab_size is 97"),
        (([[-1]], [0], [0.0], V), "ids hold -1"),
        (([[1]], [0], [0.0], V, None, 0), "prior is 0"),
    ],
)
def test_unusable_trajectories_are_refused(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        StaticTokenRisk.fit(*arguments)


def test_unusable_tables_are_refused():
    with pytest.raises(InvalidArgumentError, match=r"shape \(3,\)"):
        StaticTokenRisk(np.zeros(3), StaticRiskConfig(4, 0.5, 1.0))
    with pytest.raises(InvalidArgumentError, match=r"to 1\.5"):
        StaticTokenRisk(np.array([0, 1.5]), StaticRiskConfig(2, 0.5, 1.0))


def test_the_command_fits_what_train_q_learns_from(tmp_path, make_model, make_tokenizer):
    make_model("gpt2").save_pretrained(tmp_path / "lm")
    make_tokenizer().save_pretrained(tmp_path / "lm")
    (tmp_path / "t.jsonl").write_text(
        '{"prompt": "t5", "continuation": "t6 t7", "reward": [-1]}\n{"text": "t7 t8 t6", "reward": 0}\n'
    )
    files = f"--model_name_or_path {tmp_path}/lm --train_file {tmp_path}/t.jsonl --output_dir {tmp_path}/s"
    assert static_main([*files.split(), "--prior", "1"]) == 0
    risk = StaticTokenRisk.from_pretrained(tmp_path / "s").risk
    assert risk.shape == (97,)
    # of six actions three were toxic; the prompt's t5 was none of them
    base = 3 / 6
    expected = {5: base, 6: (1 + base) / 3, 7: (1 + base) / 2, 8: base / 2, 2: (1 + base) / 3}
    assert {token: risk[token].item() for token in expected} == pytest.approx(expected)
