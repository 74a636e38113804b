"""The processor by itself: padding, single calls, statistics, vocabularies, and what it refuses."""

import copy
import math
import pickle

import pytest
import torch
from decoding import (
    CLOSE,
    RULE,
    VOCABULARY,
    Compared,
    decode,
    expected_policy,
    log_survival_of,
    new_tokens,
    padded,
    prompts,
)

from rectify import Cap, DeadEndQNetwork, InvalidArgumentError, RectificationProcessor, Tilt, VocabularyMismatchError

# --- padding


PADDED_BATCHES = {
    "text": [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14]],
    # every text begins with the token that ends a text
    "all-begin-with-eos": [[2, 6, 7, 8, 9, 10], [2, 12, 13], [2, 14]],
    "some-begin-with-eos": [[5, 6, 7, 8, 9, 10], [2, 12, 13], [2, 2, 14]],
    "some-begin-with-pad": [[0, 6, 7, 8, 9, 10], [0, 0, 12, 13], [14]],
    "only-eos": [[2], [2, 12, 13], [2, 2]],
    "all-begin-with-bos": [[1, 6, 7, 8, 9, 10], [1, 12, 13], [1, 14]],
}
WAYS_TO_TELL = [
    # texts, pad token, padding of the longest text, told by the tokenizer, the model, the mask or a mask set later
    ("text", "t0", 0, "tokenizer"),
    ("text", "t0", 2, "tokenizer"),
    ("text", "t2", 0, "tokenizer"),
    ("text", "t1", 0, "tokenizer"),
    ("text", "t0", 0, "model"),
    ("text", "t0", 2, "model"),
    ("text", "t0", 2, "mask"),
    ("text", "t2", 2, "mask"),
    ("all-begin-with-eos", "t2", 0, "tokenizer"),
    ("all-begin-with-eos", "t0", 2, "tokenizer"),
    ("all-begin-with-bos", "t1", 0, "tokenizer"),
    ("some-begin-with-eos", "t0", 0, "tokenizer"),
    ("some-begin-with-eos", "t2", 0, "mask"),
    ("some-begin-with-eos", "t2", 2, "later"),
    ("some-begin-with-pad", "t0", 0, "mask"),
    ("some-begin-with-pad", "t0", 2, "later"),
    ("only-eos", "t2", 0, "mask"),
]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(("texts", "pad", "more", "told"), WAYS_TO_TELL, ids=str)
def test_padding_changes_nothing(models, q_networks, make_tokenizer, kind, texts, pad, more, told):
    model, q_network, rows = models[kind], q_networks[kind], PADDED_BATCHES[texts]
    tokenizer = make_tokenizer(pad=pad)
    ids, mask = padded(rows, tokenizer.pad_token_id, more)
    processor = Compared(
        q_network,
        tokenizer=tokenizer if told == "tokenizer" else None,
        model=model if told == "model" else None,
        attention_mask={"mask": mask, "later": torch.ones(1, 3)}.get(told),
        do_sample=False,
    )
    if told == "later":
        processor.set_attention_mask(mask)
    found = processor.cached.next_token_log_survival(ids)
    for row, text in enumerate(rows):
        assert torch.allclose(found[row], log_survival_of(q_network, torch.tensor(text)), atol=CLOSE)
    # no end, so that no row is padded on the right
    output = decode(model, ids, processor, attention_mask=mask, eos_token_id=None, pad_token_id=tokenizer.pad_token_id)
    assert processor.worst < CLOSE
    for row, text in enumerate(rows):
        alone = RectificationProcessor(q_network, RULE, do_sample=False)
        expected = decode(model, torch.tensor([text]), alone, eos_token_id=None, pad_token_id=0)
        assert new_tokens(output, ids)[row] == new_tokens(expected, torch.tensor([text]))[0]


def test_a_text_of_padding_alone_has_values(q_network, make_tokenizer):
    ids = torch.tensor([[0, 0, 0], [5, 6, 7]])
    found = RectificationProcessor(q_network, tokenizer=make_tokenizer()).next_token_log_survival(ids)
    assert torch.allclose(found[0], log_survival_of(q_network, ids[0, -1:]), atol=CLOSE)
    assert torch.allclose(found[1], log_survival_of(q_network, ids[1]), atol=CLOSE)
    nothing = RectificationProcessor(q_network, attention_mask=torch.zeros(2, 3)).next_token_log_survival(ids)
    assert torch.isfinite(nothing).all()


def test_the_mask_is_repeated_for_beams_and_samples(model, q_network):
    ids, mask = padded([[2, 6, 7, 8], [5], [2, 9]], 2)
    processor = RectificationProcessor(q_network, RULE, attention_mask=mask)
    repeated = torch.cat([ids.repeat_interleave(2, 0), torch.full((6, 1), 30)], 1)
    found = processor.next_token_log_survival(repeated)
    for row, text in enumerate([[2, 6, 7, 8], [5], [2, 9]]):
        expected = log_survival_of(q_network, torch.tensor([*text, 30]))
        assert torch.allclose(found[2 * row], expected, atol=CLOSE)
        assert torch.allclose(found[2 * row + 1], expected, atol=CLOSE)


@pytest.mark.parametrize("shape", [(2, 9), (2, 4), (4, 7), (3, 6)])
def test_the_mask_of_other_prompts_is_refused(q_network, shape):
    processor = RectificationProcessor(q_network, attention_mask=torch.ones(shape))
    ids = prompts(3, 5)
    with pytest.raises(InvalidArgumentError, match="attention_mask") as caught:
        processor(ids, torch.zeros(3, VOCABULARY))
    assert str(shape) in str(caught.value)
    assert "(3, 5)" in str(caught.value)
    processor.set_attention_mask(None)
    assert processor(ids, torch.zeros(3, VOCABULARY)).shape == (3, VOCABULARY)


@pytest.mark.parametrize("shape", [(5,), (1, 5, 1)])
def test_a_mask_that_is_no_table_is_refused(q_network, shape):
    with pytest.raises(InvalidArgumentError, match="attention_mask"):
        RectificationProcessor(q_network, attention_mask=torch.ones(shape)).next_token_log_survival(prompts(1, 5))


def test_padding_ids_outside_the_vocabulary_do_no_harm(make_model, make_q_network, make_tokenizer):
    # the model's embeddings are padded to 104 rows, and texts are padded with one of those
    tokenizer, rows = make_tokenizer(), [[5, 6, 7], [8]]
    model, q_network = make_model(vocab_size=104), make_q_network(tokenizer=tokenizer)
    ids, mask = padded(rows, 100)
    processor = Compared(q_network, tokenizer=tokenizer, attention_mask=mask)
    found = processor.cached.next_token_log_survival(ids)
    for row, text in enumerate(rows):
        assert torch.allclose(found[row], log_survival_of(q_network, torch.tensor(text)), atol=CLOSE)
    ends = {"eos_token_id": list(range(2, 60)), "pad_token_id": 100}
    output = decode(model, ids, processor, attention_mask=mask, do_sample=True, num_return_sequences=4, **ends)
    assert (output[:, 3:] == 100).any(), "no row ended early"
    assert processor.worst < CLOSE


# --- one call


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_call(q_network, dtype):
    ids, scores = prompts(3), torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(1)).to(dtype)
    kept = scores.clone()
    result = RectificationProcessor(q_network, RULE, top_k=9)(ids, scores)
    assert result.dtype == torch.promote_types(dtype, torch.float32)
    assert not result.requires_grad
    assert torch.equal(scores, kept)
    assert ((result > -math.inf).sum(-1) == 9).all()
    wide = scores.to(result.dtype)
    for row in range(3):
        expected = expected_policy(wide[row], log_survival_of(q_network, ids[row]), RULE, top_k=9)
        assert torch.allclose(result[row].double().softmax(-1), expected, atol=1e-5)


def test_removed_tokens_stay_removed(q_network):
    scores = torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(1))
    scores[:, 10:] = -math.inf
    for rule in (RULE, Cap(epsilon=0.9)):
        result = RectificationProcessor(q_network, rule, top_p=0.5)(prompts(2), scores)
        assert (result[:, 10:] == -math.inf).all()
        assert torch.isfinite(result.logsumexp(-1)).all()


# --- statistics


def test_events_are_counted_apart(with_values):
    base = torch.full((4, VOCABULARY), -20.0)
    base[:, :4] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    q = torch.zeros(4, VOCABULARY)
    q[1, :4] = torch.tensor([-0.7, -0.5, 0, 0])  # 0.4 is held at 0.3
    q[2, :3] = -0.8  # the first three hold no more than 0.6 of the mass, the fourth has room
    q[3] = -1.0  # nothing is allowed
    processor = RectificationProcessor(with_values(q), Cap(epsilon=0.0), top_k=3)
    assert processor.statistics().decisions == 0
    result = processor(prompts(4), base)
    policy = result.softmax(-1)
    assert policy[0, :4].tolist() == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0], abs=1e-5)
    assert policy[1, :4].tolist() == pytest.approx([0.3, 0.42, 0.28, 0], abs=1e-5)
    assert policy[2, :4].tolist() == pytest.approx([0.2, 0.2, 0.2, 0.4], abs=1e-4)
    assert policy[3, :4].tolist() == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=1e-4)
    found = processor.statistics()
    assert (found.decisions, found.widened, found.dead_ends, found.capped) == (4, 1, 1, 4)
    distance = (base[:, :3].softmax(-1) - policy[:, :3]).clamp_min(0).sum().item()
    assert found.moved == pytest.approx(distance, abs=1e-4)
    processor(prompts(4), base)
    assert processor.statistics().decisions == 8
    assert processor.statistics().capped == 2 * found.capped
    processor.reset()
    cleared = processor.statistics()
    assert (cleared.decisions, cleared.capped, cleared.moved, cleared.widened, cleared.dead_ends) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("options", "decisions"),
    [({}, 2 * 5), ({"num_beams": 3}, 2 * 3 * 5), ({"do_sample": True, "num_return_sequences": 4}, 2 * 4 * 5)],
    ids=["greedy", "beam", "samples"],
)
def test_a_decision_is_a_row_of_a_call(model, q_network, options, decisions):
    processor = RectificationProcessor(q_network, RULE)
    decode(model, prompts(2), processor, max_new_tokens=5, eos_token_id=None, **options)
    assert processor.statistics().decisions == decisions
    assert 0 < processor.statistics().moved <= decisions


# --- vocabularies


def test_a_model_with_padded_embeddings(make_model, make_q_network, make_tokenizer):
    tokenizer = make_tokenizer()
    q_network = make_q_network(tokenizer=tokenizer)
    model = make_model(vocab_size=104)
    for arguments in ({"model": model}, {}):
        with pytest.raises(VocabularyMismatchError, match=r"104 .* 97"):
            RectificationProcessor(q_network, RULE, **arguments)(prompts(), torch.zeros(1, 104))
    processor = Compared(q_network, model=model, tokenizer=tokenizer)
    decode(model, prompts(2), processor)
    assert processor.worst < CLOSE
    # rows without a token count as certainly toxic
    processor = RectificationProcessor(q_network, Tilt(), model=model, tokenizer=tokenizer)
    assert processor.next_token_log_survival(prompts(), 104)[0, VOCABULARY:].tolist() == [-math.inf] * 7
    assert processor(prompts(), torch.zeros(1, 104)).softmax(-1)[0, VOCABULARY:].sum() < 1e-20
    # the other way about: a Q network of padded embeddings
    wide = make_q_network(tokenizer=tokenizer, vocab_size=104)
    narrow = RectificationProcessor(wide, RULE, model=make_model(), tokenizer=tokenizer)
    assert torch.equal(
        narrow.next_token_log_survival(prompts(), VOCABULARY), narrow.next_token_log_survival(prompts())[:, :VOCABULARY]
    )


def test_an_unknown_vocabulary_of_the_q_network_proves_nothing(q_network, make_tokenizer):
    assert q_network.config.vocabulary is None
    with pytest.raises(VocabularyMismatchError, match="104"):
        RectificationProcessor(q_network, tokenizer=make_tokenizer())(prompts(), torch.zeros(1, 104))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"words": 99}, "99 tokens, not 97"),
        ({"words": 90}, "90 tokens, not 97"),
        ({"rename": [(0, "zero")], "pad": "zero"}, "token 0 is 'zero', not 't0'"),
        ({"rename": [(6, "t7"), (7, "t6")]}, "token 6 is 't7', not 't6'"),
        # neither is among the samples
        ({"rename": [(7, "t8"), (8, "t7")]}, "some of its tokens differ"),
    ],
    ids=["larger", "smaller", "renamed", "swapped", "swapped-unsampled"],
)
def test_another_vocabulary_is_refused(make_q_network, make_tokenizer, changes, said):
    q_network = make_q_network(tokenizer=make_tokenizer())
    RectificationProcessor(q_network, tokenizer=make_tokenizer(pad="t1", eos="t5"))
    with pytest.raises(VocabularyMismatchError, match="not the one this Q network was trained with") as caught:
        RectificationProcessor(q_network, tokenizer=make_tokenizer(**changes))
    assert said in str(caught.value)


def test_an_added_padding_token_is_refused(make_q_network, make_tokenizer):
    q_network, tokenizer = make_q_network(tokenizer=make_tokenizer()), make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    with pytest.raises(VocabularyMismatchError, match=r"98 tokens, not 97.*reuse an existing token"):
        RectificationProcessor(q_network, tokenizer=tokenizer)


# --- what is refused


def test_a_text_longer_than_the_context_is_refused(model, make_q_network):
    short = make_q_network(n_positions=16)
    processor = RectificationProcessor(short, RULE)
    with pytest.raises(InvalidArgumentError, match=r"17 tokens long.*context is 16"):
        processor(prompts(2, 17), torch.zeros(2, VOCABULARY))
    # the last token needs no state of its own
    assert decode(model, prompts(1, 10), processor, max_new_tokens=7, eos_token_id=None).shape == (1, 17)
    with pytest.raises(InvalidArgumentError, match=r"17 tokens long.*context is 16"):
        decode(model, prompts(1, 10), processor, max_new_tokens=8, eos_token_id=None)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temprature", 1.0), ("repetition_penalty", 1.2), ("temperature", 0.0), ("temperature", -1), ("top_k", -1)]
    + [("temperature", math.nan), ("temperature", math.inf), ("top_k", 2.5), ("num_beams", 0), ("top_p", 0.0)]
    + [("top_k", math.nan), ("top_k", math.inf), ("top_h", 0.0), ("typical_p", 0.0)]
    + [(name, value) for name in ("top_p", "min_p", "typical_p") for value in (-0.1, 1.1, math.nan)],
)
def test_unknown_settings_and_values_out_of_range_are_refused(q_network, name, value):
    with pytest.raises(InvalidArgumentError, match=name) as caught:
        RectificationProcessor(q_network, **{name: value})
    assert "\n" not in str(caught.value)


def test_from_pretrained(make_q_network, make_tokenizer, model, tmp_path):
    tokenizer = make_tokenizer()
    q_network = make_q_network(tokenizer=tokenizer)
    q_network.save_pretrained(tmp_path)
    processor = RectificationProcessor.from_pretrained(tmp_path, Cap(), model=model, tokenizer=tokenizer, top_k=7)
    assert processor.rule == Cap()
    assert processor.sampling.top_k == 7
    assert processor.q_network.device == model.device
    assert torch.allclose(
        processor.next_token_log_survival(prompts()), log_survival_of(q_network, prompts()), atol=CLOSE
    )
    half = RectificationProcessor.from_pretrained(tmp_path, model=model, dtype=torch.bfloat16)
    values = half.next_token_log_survival(prompts())
    assert half.q_network.head.tokens.weight.dtype == torch.bfloat16
    assert values.dtype == torch.float32
    assert torch.allclose(values, log_survival_of(q_network, prompts()), atol=0.1)
    with pytest.raises(VocabularyMismatchError):
        RectificationProcessor.from_pretrained(tmp_path, tokenizer=make_tokenizer(words=50))


def test_padding_does_not_count_towards_the_context(make_q_network, make_tokenizer):
    q_network = make_q_network(n_positions=8)
    processor = RectificationProcessor(q_network, tokenizer=make_tokenizer())
    ids = torch.tensor([[0, 0, 0, 0, 5, 6, 7, 8, 9, 10]])
    expected = log_survival_of(q_network, ids[0, 4:])
    assert torch.allclose(processor.next_token_log_survival(ids)[0], expected, atol=CLOSE)


def test_no_ids_are_refused(q_network):
    with pytest.raises(InvalidArgumentError, match="inputs_embeds"):
        RectificationProcessor(q_network)(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, VOCABULARY))


def test_the_q_network_is_put_in_evaluation_mode(make_q_network):
    q_network = make_q_network().train()
    assert not RectificationProcessor(q_network).q_network.training


@pytest.mark.parametrize("cutoff", ["epsilon_cutoff", "eta_cutoff"])
def test_a_cutoff_of_one_warps_nothing_as_in_generate(q_network, cutoff):
    scores = torch.randn(1, VOCABULARY)
    plain, processor = RectificationProcessor(q_network), RectificationProcessor(q_network, **{cutoff: 1.0})
    assert torch.equal(processor(prompts(), scores), plain(prompts(), scores))


def test_beam_sampling_keeps_one_token_more_than_there_are_ends(make_model, q_network):
    model = make_model()
    model.generation_config.eos_token_id = [2, 3]
    processor = RectificationProcessor(q_network, model=model, do_sample=True, top_k=1, num_beams=2)
    kept = processor(prompts(), torch.randn(1, VOCABULARY)) > -math.inf
    assert kept.sum() == 3


def test_a_processor_may_be_copied_and_sent_to_another_process(model, q_network):
    ids = prompts(2, 5)
    processor = RectificationProcessor(q_network, RULE, do_sample=False)
    expected = decode(model, ids, processor)
    for other in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert torch.equal(decode(model, ids, other), expected)
    network = DeadEndQNetwork.from_trunk(model, shared=True, rank=8)
    shared = RectificationProcessor(network, RULE, model=model, do_sample=False)
    expected = decode(model, ids, shared)
    assert torch.equal(decode(model, ids, RectificationProcessor(network, RULE, do_sample=False)), expected)
    copy.deepcopy(shared)
