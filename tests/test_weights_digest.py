"""Digests of weights: the same weights in whatever they are kept pass, others do not."""

import copy
import logging

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from conftest import build_model
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from rectify.causal_body import causal_body
from rectify.errors import CheckpointError
from rectify.weights_digest import check_base, check_digest, weights_digest

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def perturbed(body, share):
    with torch.no_grad():
        for parameter in body.parameters():
            parameter.mul_(1 + share * torch.randn_like(parameter))


def swap_layers(body):
    body.layers[0], body.layers[1] = body.layers[1], body.layers[0]


def scramble_all_but_the_last(body):
    for layer in list(body.layers)[:-1]:
        for parameter in layer.parameters():
            parameter.data = parameter.data.flatten()[torch.randperm(parameter.numel())].view_as(parameter)


def permute_blocks_of_one_matrix(body):
    weight = body.layers[0].mlp.up_proj.weight
    weight.data = torch.cat(weight.data.chunk(4)[::-1])


def change(place, how):
    def changed(body):
        parameter = body.get_parameter(place)
        parameter.data = how(parameter.data)

    return changed


CHANGES = {
    "layers swapped": swap_layers,
    "all layers but the last scrambled": scramble_all_but_the_last,
    "blocks of a matrix permuted": permute_blocks_of_one_matrix,
    "a matrix replaced": change("layers.1.self_attn.k_proj.weight", torch.randn_like),
    "a matrix transposed": change("layers.1.self_attn.q_proj.weight", lambda w: w.T.contiguous()),
    "embeddings shuffled": change("embed_tokens.weight", lambda w: w.flip(0)),
    "a row of the embeddings": change("embed_tokens.weight", lambda w: torch.cat([w[:-1], -w[-1:]])),
    "a norm scaled": change("layers.0.input_layernorm.weight", lambda w: 1.02 * w),
    "one value": change(
        "layers.0.self_attn.v_proj.weight", lambda w: w.index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(4.0))
    ),
    "another model": lambda body: body.load_state_dict(build_model("llama", seed=9).base_model.state_dict()),
    "a layer less": lambda body: body.layers.__delitem__(1),
    "trained on a little": lambda body: perturbed(body, 1e-3),
}


@pytest.fixture(scope="module")
def body():
    body = build_model("llama").base_model
    perturbed(body, 0.01)  # norms of ones are alike in every model
    return body


@pytest.fixture(scope="module")
def digest(body):
    return weights_digest(body)


@pytest.mark.parametrize("trained", DTYPES)
@pytest.mark.parametrize("now", DTYPES)
def test_the_same_weights_pass_in_every_precision(body, trained, now, caplog):
    check_digest(copy.deepcopy(body).to(now), weights_digest(copy.deepcopy(body).to(trained)), "m")
    check_digest(copy.deepcopy(body).half().to(now), weights_digest(copy.deepcopy(body)), "m")
    assert not caplog.records


def test_so_do_values_that_float16_hardly_holds(body):
    small = copy.deepcopy(body)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.mul_(1e-4)
    halves = [copy.deepcopy(small).to(dtype) for dtype in DTYPES]
    for trained in halves:
        digest = weights_digest(trained)
        for now in halves:
            check_digest(now, digest, "m")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CHANGES)
def test_other_weights_are_refused_in_every_precision(body, digest, name, dtype):
    torch.manual_seed(0)
    other = copy.deepcopy(body)
    CHANGES[name](other)
    with pytest.raises(CheckpointError, match="trained on other weights of 'm'"):
        check_digest(other.to(dtype), digest, "m")


def test_in_one_precision_a_single_value_that_was_rounded_otherwise_is_seen(body, digest):
    other = copy.deepcopy(body)
    other.layers[1].mlp.down_proj.weight.data[7, 9] += 1e-3
    with pytest.raises(CheckpointError, match=r"1 of \d+ differ, such as 'layers.1.mlp.down_proj.weight'"):
        check_digest(other, digest, "m")


def test_rows_that_pad_the_embeddings_do_not_count(digest):
    model = build_model("llama")
    digest = weights_digest(model.base_model)
    model.resize_token_embeddings(128)
    check_digest(model.base_model, digest, "m")
    model.resize_token_embeddings(90)
    with pytest.raises(CheckpointError, match="embed_tokens"):
        check_digest(model.base_model, digest, "m")


@pytest.mark.parametrize("settings", [{}, {"max_shard_size": "20KB"}, {"variant": "other"}])
def test_weights_that_were_written_anew_are_the_same(body, digest, settings, tmp_path):
    model = build_model("llama")
    model.model.load_state_dict(body.state_dict())
    model.save_pretrained(tmp_path, **settings)
    check_digest(
        AutoModelForCausalLM.from_pretrained(tmp_path, variant=settings.get("variant")).base_model, digest, "m"
    )


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_offloaded_weights_are_brought_here(body, digest, offload, tmp_path, caplog):
    for change in (lambda body: None, swap_layers):
        moved = copy.deepcopy(body)
        change(moved)
        offload(moved, *([str(tmp_path / str(change))] if offload is disk_offload else []), execution_device="cpu")
        assert any(parameter.is_meta for parameter in moved.parameters())
        if change is swap_layers:
            with pytest.raises(CheckpointError, match=r"layers\.0"):
                check_digest(moved, digest, "m")
        else:
            check_digest(moved, digest, "m")
    assert not caplog.records


def test_what_is_not_here_is_said_in_one_line(body, digest, caplog):
    moved = copy.deepcopy(body)
    moved.layers[1].to("meta")
    check_digest(moved, digest, "m")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "'m': 9 of its 20 weights" in caplog.text
    assert weights_digest(copy.deepcopy(body).to("meta")) is None


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_weights_are_told_from_others(kind, tmp_path, caplog):
    pytest.importorskip("bitsandbytes")
    model = build_model("llama")
    digest = weights_digest(model.base_model)
    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if kind == "nf4" else {"load_in_8bit": True}
    for number, change in enumerate((lambda body: None, scramble_all_but_the_last, CHANGES["a matrix replaced"])):
        torch.manual_seed(0)
        other = copy.deepcopy(model)
        change(other.base_model)
        other.save_pretrained(tmp_path / str(number))
        small = AutoModelForCausalLM.from_pretrained(
            tmp_path / str(number), quantization_config=BitsAndBytesConfig(**how), dtype=torch.float32
        )
        assert small.model.layers[0].mlp.up_proj.weight.dtype in (torch.uint8, torch.int8)
        if number:
            with pytest.raises(CheckpointError, match="other weights"):
                check_digest(small.base_model, digest, "m")
        else:
            check_digest(small.base_model, digest, "m")
    assert not [record for record in caplog.records if record.name.startswith("rectify")]


@pytest.mark.parametrize(
    "adapter",
    [
        LoraConfig(init_lora_weights=False),
        LoraConfig(init_lora_weights=False, use_dora=True, modules_to_save=["norm"]),
        IA3Config(init_ia3_weights=False),
    ],
)
def test_an_active_adapter_is_a_part_of_the_weights(adapter):
    model = build_model("llama")
    plain = weights_digest(causal_body(model))
    peft = get_peft_model(model, adapter)
    adapted = weights_digest(causal_body(peft))
    with pytest.raises(CheckpointError, match="differ"):
        check_digest(causal_body(peft), plain, "m")
    with peft.disable_adapter():
        check_digest(causal_body(peft), plain, "m")
        with pytest.raises(CheckpointError, match="differ"):
            check_digest(causal_body(peft), adapted, "m")
    peft.merge_adapter()
    check_digest(causal_body(peft), adapted, "m")
    peft.unmerge_adapter()
    check_digest(causal_body(peft), adapted, "m")
    check_digest(causal_body(peft.merge_and_unload()), adapted, "m")


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_an_adapter_in_half_precision_is_the_same(dtype):
    model = build_model("llama")
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    peft = get_peft_model(copy.deepcopy(model), lora)
    adapted = weights_digest(causal_body(peft))
    half = get_peft_model(model.to(dtype), lora)  # base and sum are rounded each
    half.load_state_dict(peft.state_dict())
    check_digest(causal_body(half), adapted, "m")
    check_digest(causal_body(peft), weights_digest(causal_body(half)), "m")
    check_digest(causal_body(copy.deepcopy(half).merge_and_unload()), adapted, "m")
    with torch.no_grad():
        for name, parameter in half.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1.2)
    with pytest.raises(CheckpointError, match="differ"):
        check_digest(causal_body(half), adapted, "m")


def test_an_adapter_of_quantised_layers_counts_by_its_parts(tmp_path):
    pytest.importorskip("bitsandbytes")
    build_model("llama").save_pretrained(tmp_path)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=how, dtype=torch.float32)
    plain = weights_digest(model.base_model)
    adapted = get_peft_model(model, LoraConfig(init_lora_weights=False))
    both = weights_digest(causal_body(adapted))
    check_digest(causal_body(adapted), both, "m")
    with pytest.raises(CheckpointError, match="an adapter that is not folded in"):
        check_digest(causal_body(adapted), plain, "m")
    with adapted.disable_adapter():
        check_digest(causal_body(adapted), plain, "m")
        with pytest.raises(CheckpointError, match="an adapter that is not folded in"):
            check_digest(causal_body(adapted), both, "m")


def test_the_digest_is_a_function_of_the_weights(body, digest):
    assert weights_digest(copy.deepcopy(body)) == digest
    assert len(digest) < 4000


@pytest.mark.parametrize(
    "damaged", ["w1:", "w1:97:9:####", "w1:97:9:AAAA", "w1:97:999999999999:AAAA", "w2:1:2:AAAA", "", "ab12"]
)
def test_a_damaged_digest_is_refused(body, damaged):
    with pytest.raises(CheckpointError, match="base_fingerprint is no digest"):
        check_base(body, damaged, "m", "what was trained")
