"""Bodies of causal models: looked through what is around them, and refused with the reason where there is none."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BartModel,
    BertConfig,
    BertLMHeadModel,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from rectify.causal_body import causal_body, is_body_of
from rectify.errors import InvalidArgumentError

SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
BART = BartConfig(
    vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2
)
BART_SIZES = BART.to_dict()
T5 = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2))


def llava():
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SMALL), image_token_index=39)
    )


def test_plain_models_and_bodies_have_the_body_that_transformers_names():
    model = gpt2()
    assert causal_body(model) is causal_body(model.transformer) is model.transformer
    assert is_body_of(model.transformer, model)
    assert not is_body_of(gpt2().transformer, model)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_peft_and_compiled_models_are_looked_through():
    model = gpt2()
    peft = get_peft_model(model, LoraConfig(target_modules=["c_attn"]))
    assert causal_body(peft) is causal_body(torch.compile(peft)) is causal_body(torch.compile(model))
    assert causal_body(peft) is model.transformer


def test_a_model_that_is_its_own_base_model_is_not_its_own_body():
    model = Llama4ForCausalLM(Llama4TextConfig(**SMALL, num_local_experts=2, head_dim=8, intermediate_size_mlp=32))
    assert model.base_model is model
    assert causal_body(model) is model.model


def test_the_body_of_a_decoder_taken_from_an_encoder_decoder_is_what_its_forward_runs():
    model = BartForCausalLM(BART)
    assert causal_body(model) is model.model.decoder


def test_a_vision_language_model_is_the_body_of_its_text():
    model = llava()
    body = causal_body(model)
    assert body is model.model
    assert body(input_ids=torch.tensor([[1, 2, 3]])).last_hidden_state.shape == (1, 3, 16)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: T5ForConditionalGeneration(T5), "T5ForConditionalGeneration, an encoder-decoder"),
        (lambda: BartForConditionalGeneration(BART).model, "BartModel, an encoder-decoder"),
        # its configuration after BartForCausalLM.save_pretrained
        (lambda: BartModel(BartConfig(**BART_SIZES | {"is_encoder_decoder": False})), "BartModel, an encoder-decoder"),
        (lambda: BertLMHeadModel(BertConfig(**SMALL)), "is_decoder=False"),
        (
            lambda: get_peft_model(gpt2(), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")),
            "PROMPT_TUNING adapter",
        ),
        (lambda: torch.nn.Linear(2, 2), "trunk is a Linear"),
    ],
)
def test_what_has_no_causal_body_is_refused_with_the_reason(make, reason):
    with pytest.raises(InvalidArgumentError, match=reason):
        causal_body(make(), "trunk")
