"""What a trunk is seen to do, and what is made of it; trying it changes nothing."""

import copy

import accelerate
import pytest
import torch
from decoding import RULE, decode, prompts
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM

from rectify import CheckpointError, DeadEndQNetwork, InvalidArgumentError, RectificationProcessor
from rectify.causal_body import causal_body
from rectify.causal_states import CausalStates, NextTokenLogits
from rectify.prefix_memo import MASKED, PrefixMemo
from rectify.trunk_probe import abilities_of, own_cache_of
from rectify.trunk_states import Abilities, Rotation, input_device, rotation_of
from rectify.weights_digest import weights_digest

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CLOSE = {"rtol": 0, "atol": 1e-4}


def encoder(**changes):
    torch.manual_seed(0)
    return BertLMHeadModel(BertConfig(vocab_size=97, initializer_range=0.3, **SIZES, **changes)).eval()


def rotated(kind, limit=12):
    """A Llama whose longer texts are rotated in another way."""
    parameters = {
        "longrope": {
            "short_factor": [1.0] * 4,
            "long_factor": [3.0] * 4,
            "original_max_position_embeddings": limit,
            "factor": 4.0,
        },
        "dynamic": {"factor": 4.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": limit},
    }
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        initializer_range=0.3,
        max_position_embeddings=limit if kind == "dynamic" else 4 * limit,
        rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **parameters[kind]},
        **SIZES,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def alone(fresh, prefixes):
    """The last states of texts, each by a copy of a model that has read nothing yet."""
    return torch.stack(
        [copy.deepcopy(fresh).model(row[row != MASKED][None]).last_hidden_state[0, -1] for row in prefixes]
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama", "sliding"])
def test_common_trunks_can_do_everything(make_model, kind):
    trunk = make_model(kind).base_model
    assert abilities_of(trunk) == Abilities(caches=True)
    own = own_cache_of(trunk)
    assert own.steps
    assert own.reorders
    assert own.pads


def test_a_trial_changes_nothing_and_is_made_once(make_model):
    model = make_model("gpt2", resid_pdrop=0.3).train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    weights, runs = copy.deepcopy(model.state_dict()), []
    model.transformer.register_forward_pre_hook(lambda module, args: runs.append(module.training))
    for _ in range(2):
        DeadEndQNetwork.from_trunk(model)
    assert 0 < len(runs) <= 8
    assert not any(runs)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    state = torch.get_rng_state()
    own_cache_of(model.transformer)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_trunk_is_tried_in_its_own_precision(make_model):
    expected = abilities_of(DeadEndQNetwork.from_trunk(make_model("llama"), rank=4).trunk)
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(make_model("llama"), lora)
    digest = weights_digest(causal_body(adapted))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert abilities_of(DeadEndQNetwork.from_trunk(make_model("llama"), rank=4).trunk) == expected
        NextTokenLogits(make_model("gpt2"))
        assert weights_digest(causal_body(adapted)) == digest


def test_an_encoder_is_refused(tmp_path):
    with pytest.raises(InvalidArgumentError, match="is_decoder=False"):
        DeadEndQNetwork.from_trunk(encoder())
    with pytest.raises(InvalidArgumentError, match="is not causal"):
        PrefixMemo(CausalStates(encoder().base_model))
    network = DeadEndQNetwork.from_trunk(encoder(is_decoder=True))
    network.trunk.config.is_decoder = False
    network.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is not causal"):
        DeadEndQNetwork.from_pretrained(tmp_path)


def test_a_cache_that_does_not_grow_is_noticed(q_network, monkeypatch):
    memo, encode = PrefixMemo(q_network), q_network.encode
    monkeypatch.setattr(q_network, "encode", lambda ids, mask=None, cache=None: encode(ids, mask, None))
    ids = prompts(3, 9)
    for length in (6, 7, 9):
        assert torch.allclose(memo.last_hidden(ids[:, :length]), encode(ids[:, :length])[:, -1], **CLOSE)
    assert not memo.use_cache


# --- rotations that depend on the length of the text


def test_which_rotations_depend_on_the_length():
    assert rotation_of(rotated("longrope").config) == Rotation(12, True)
    assert rotation_of(rotated("dynamic").config) == Rotation(11, False)
    assert rotation_of(rotated("yarn").config) is None
    nested = LlamaConfig(max_position_embeddings=20)
    nested.rope_parameters = {"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {"rope_type": "default"}}
    assert rotation_of(nested) == Rotation(19, False)


@pytest.mark.parametrize("kind", ["longrope", "dynamic", "yarn"])
def test_a_memo_is_not_used_across_rotations(kind):
    model, fresh = rotated(kind), rotated(kind)
    network = DeadEndQNetwork.from_trunk(model)
    memo, ids = PrefixMemo(network), prompts(3, 20)
    for length in (9, 11, 12, 13, 14, 18, 10, 12, 13, 5):
        assert torch.allclose(memo.last_hidden(ids[:, :length]), alone(fresh, ids[:, :length]), **CLOSE)
    ids[0, :8] = ids[1, :3] = MASKED  # some are longer than the limit, and others are not
    for length in (14, 15, 16, 20, 12):
        assert torch.allclose(memo.last_hidden(ids[:, :length]), alone(fresh, ids[:, :length]), **CLOSE)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_the_states_of_a_text_are_those_of_its_beginnings(kind):
    model, fresh = rotated(kind), rotated(kind)
    network, ids = DeadEndQNetwork.from_trunk(model), prompts(2, 15)
    mask = torch.ones_like(ids)
    mask[0, 13:] = 0
    with torch.no_grad():
        states = network.encode(ids, mask)
        model(prompts(1, 15))  # what the model has read itself stays as it is
        before = model.model.rotary_emb.inv_freq.clone()
        network.encode(ids[:, :13])
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    for length in (1, 11, 12, 13, 15):
        rows = [1] if length > 13 else [0, 1]
        assert torch.allclose(states[rows, length - 1], alone(fresh, ids[rows, :length]), **CLOSE)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_shared_trunk_beyond_the_limit_is_run_anew(kind):
    model, fresh = rotated(kind), rotated(kind)
    network = DeadEndQNetwork.from_trunk(model, shared=True)
    processor = RectificationProcessor(network, RULE, model=model, do_sample=False)
    found = []

    def ask(input_ids, scores):
        found.append((input_ids, processor._q.memo.last_hidden(input_ids)))
        return scores

    model.generate(prompts(2, 10), logits_processor=[ask], max_new_tokens=6, min_new_tokens=6, pad_token_id=0)
    assert len(found) == 6
    for prefixes, states in found:
        assert torch.allclose(states, alone(fresh, prefixes), **CLOSE)


# --- where the weights are


def test_token_ids_go_where_the_embedding_takes_them(make_model, make_q_network, tmp_path):
    make_q_network("llama").save_pretrained(tmp_path / "q")
    whole, ids = make_model("llama"), prompts(2, 6)
    offloaded = accelerate.cpu_offload(make_model("llama"), execution_device="cpu")
    assert offloaded.device.type == "meta"
    assert input_device(offloaded).type == input_device(offloaded.model).type == "cpu"
    expected = decode(whole, ids, RectificationProcessor.from_pretrained(tmp_path / "q", RULE, model=whole))
    processor = RectificationProcessor.from_pretrained(tmp_path / "q", RULE, model=offloaded)
    assert processor.q_network.device.type == "cpu"
    assert torch.equal(decode(offloaded, ids, processor), expected)
    heads = [DeadEndQNetwork.from_trunk(each, shared=True, rank=8) for each in (whole, offloaded)]
    assert torch.equal(heads[0].head.tokens.weight, heads[1].head.tokens.weight)
    outputs = [
        decode(each, ids, RectificationProcessor(head, RULE, model=each))
        for each, head in zip((whole, offloaded), heads, strict=True)
    ]
    assert torch.equal(*outputs)
