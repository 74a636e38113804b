"""A further model over any prefixes: its logits are those of whole runs, whatever was asked before or stands between.

The reference runs the model over one row at a time, without padding, mask or cache, and in float64 where it can.
"""

import copy

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from rectify import InvalidArgumentError
from rectify.causal_states import CausalStates, NextTokenLogits
from rectify.prefix_memo import MASKED, PrefixMemo

KINDS = ["gpt2", "llama", "sliding", "recurrent"]
CLOSE = {"rtol": 0, "atol": 2e-4}


@pytest.fixture(scope="module", params=KINDS)
def model(request, make_model):
    return make_model(request.param, seed=3)


@torch.no_grad()
def reference(model, prefixes):
    exact = model if model._is_stateful else copy.deepcopy(model).double()  # Mamba has no float64
    return torch.stack([exact(row[row != MASKED][None]).logits[0, -1] for row in prefixes])


def draw(rows, length, seed=0):
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def agrees(logits, prefixes):
    found = logits(prefixes)
    assert found.dtype == torch.float32
    return torch.allclose(found.double(), reference(logits.model, prefixes).double(), **CLOSE)


def test_padding_on_any_side_and_between_the_tokens_counts_for_nothing(model):
    ids = draw(5, 11)
    ids[1, :4] = ids[2, 3:9] = ids[3, 7:] = ids[4, 1::2] = MASKED
    logits = NextTokenLogits(model)
    assert agrees(logits, ids)
    alone = torch.cat([NextTokenLogits(model)(row[row != MASKED][None]) for row in ids])
    assert torch.allclose(logits(ids), alone, **CLOSE)
    assert torch.allclose(NextTokenLogits(model, use_cache=False)(ids), alone, **CLOSE)


def test_the_answer_never_depends_on_the_history(model):
    ids = draw(4, 12)
    ids[1, 2:5] = ids[3, :3] = MASKED
    logits = NextTokenLogits(model)
    for asked in (
        ids[:, :8],
        ids[:, :9],  # a token more
        ids[[2, 0, 2, 1]][:, :10],  # beams
        ids[:, :9],  # a step back
        ids[1:3, :11],  # fewer rows
        draw(3, 6, seed=1),  # another prompt
        ids,
    ):
        assert agrees(logits, asked)
    logits.clear()
    assert agrees(logits, ids)


def test_only_what_is_new_is_computed(make_model, spy):
    logits = NextTokenLogits(make_model("llama"))
    runs, ids = spy(logits.states), draw(4, 9)
    ids[0, :2] = ids[1, 3:5] = MASKED
    for length in (7, 8, 9):
        logits(ids[:, :length])
    logits(ids[[3, 1, 1, 0]])
    assert runs == [(4, 7), (4, 1), (4, 1)]


def test_a_call_leaves_the_model_as_it_is(model):
    ids = draw(2, 8)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids))
    weights = copy.deepcopy(model.state_dict())
    logits = NextTokenLogits(model)

    def ask(input_ids, scores):
        logits(input_ids)
        return scores

    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    found = model.generate(ids, logits_processor=[ask], **options)
    assert torch.equal(found, expected)
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert not model.get_output_embeddings()._forward_hooks


def test_low_precision_gives_float32(make_model):
    half = make_model("llama", seed=3).to(torch.bfloat16)
    ids = draw(2, 8)
    found = NextTokenLogits(half)(ids)
    assert found.dtype == torch.float32
    with torch.no_grad():
        assert torch.allclose(found, half(ids).logits[:, -1].float(), atol=0.1)


def test_dropout_is_off(make_model):
    model = make_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).train()
    logits, ids = NextTokenLogits(model), draw(2, 6)
    first = logits(ids)
    logits.clear()
    assert torch.equal(first, logits(ids))


# --- what is refused

SIZES = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}


def gemma(cap):
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, **HEADS, head_dim=8, final_logit_softcapping=cap)).eval()


def granite(scale):
    return GraniteForCausalLM(GraniteConfig(**SIZES, **HEADS, logits_scaling=scale)).eval()


def test_a_model_that_changes_its_logits_is_refused():
    # the random model's logits are so small that the cap hardly shows
    for changed in (gemma(30.0), gemma(30.0).to(torch.bfloat16), granite(8.0)):
        with pytest.raises(InvalidArgumentError, match=f"the expert is a {type(changed).__name__} .*scaling"):
            NextTokenLogits(changed, "expert")
        assert not changed.get_output_embeddings()._forward_hooks
    for plain in (gemma(None), granite(1.0)):
        assert agrees(NextTokenLogits(plain), draw(2, 6))


def test_a_model_that_is_no_decoder_is_refused():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    both = T5ForConditionalGeneration(T5Config(vocab_size=97, **sizes))
    encoder = BertModel(BertConfig(**SIZES, num_attention_heads=2))
    for other in (both, encoder):
        with pytest.raises(InvalidArgumentError, match="no decoder"):
            NextTokenLogits(other)


def test_an_output_embedding_of_other_states_is_refused(make_model):
    model = make_model("llama")
    model.lm_head.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    with pytest.raises(InvalidArgumentError, match="last hidden states"):
        NextTokenLogits(model)


def test_a_prefix_beyond_the_context_is_refused(make_model):
    logits = NextTokenLogits(make_model("gpt2", n_positions=12), "expert")
    ids = draw(2, 14)
    ids[0, 1:4] = ids[1, :2] = MASKED
    assert agrees(logits, ids)
    with pytest.raises(InvalidArgumentError, match="expert would read 13 tokens, and its context is 12"):
        logits(torch.cat((ids[1:], draw(1, 1)), 1))
    with pytest.raises(InvalidArgumentError, match="empty"):
        logits(ids[:, :0])


# --- several next tokens of a prefix side by side


def test_which_models_branch(make_model):
    found = {kind: CausalStates(make_model(kind).base_model).branches for kind in KINDS}
    assert found == {"gpt2": True, "llama": True, "sliding": False, "recurrent": False}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@torch.no_grad()
def test_branches_are_the_states_after_each_token(make_model, kind, attention):
    model = make_model(kind, seed=3)
    model.set_attn_implementation(attention)
    states, ids = CausalStates(model.base_model), draw(3, 10)
    ids[1, :4] = MASKED
    memo, exact = PrefixMemo(states), copy.deepcopy(model).double().base_model
    for length, rows in ((7, [0, 1, 2]), (8, [0, 1, 2]), (9, [2, 1, 1]), (7, [0, 1, 2])):
        prefixes, tokens = ids[rows][:, :length], draw(3, 5, seed=length)
        found = memo.branch_states(prefixes, tokens)
        for row, candidates, of_row in zip(prefixes, tokens, found, strict=True):
            text = row[row != MASKED]
            texts = torch.stack([torch.cat((text, token[None])) for token in candidates])
            assert torch.allclose(of_row.double(), exact(texts).last_hidden_state[:, -1], **CLOSE)
        slow = PrefixMemo(states, use_cache=False).last_hidden(prefixes)
        assert torch.allclose(memo.last_hidden(prefixes), slow, **CLOSE)
