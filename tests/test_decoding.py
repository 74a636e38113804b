"""Every kind of decoding: cached and uncached agree at every call, and what is sampled is the rectified policy.

Expected policies are computed here in float64, from whole unpadded forward passes.
"""

import copy

import pytest
import torch
from decoding import (
    CLOSE,
    RULE,
    VOCABULARY,
    Compared,
    assistant_of,
    caps_under,
    decode,
    expected_policy,
    log_survival_of,
    new_tokens,
    padded,
    prompts,
)
from transformers import LogitsProcessor
from transformers.generation import TopPLogitsWarper

from rectify import Cap, RectificationProcessor, Tilt
from rectify.rule import rectify
from rectify.sampling import Sampling

# --- cached and uncached


MANY_ENDS = {"eos_token_id": list(range(2, 20)), "pad_token_id": 0}
DECODING = {
    "greedy": ({"do_sample": False}, {}),
    "sampling": ({"do_sample": True, "temperature": 1.3, "top_k": 40}, {"num_return_sequences": 3}),
    "beam": ({"do_sample": False}, {"num_beams": 4, "num_return_sequences": 2}),
    "beam-sampling": ({"do_sample": True, "top_k": 20, "num_beams": 3}, {"num_beams": 3}),
    "finished-rows": ({"do_sample": True}, {"num_return_sequences": 4, **MANY_ENDS}),
    "finished-beams": ({"do_sample": False}, {"num_beams": 4, "length_penalty": 0.0, **MANY_ENDS}),
}


@pytest.mark.parametrize("kind", ["gpt2", "llama", "sliding"])
@pytest.mark.parametrize("way", DECODING)
def test_cached_equals_uncached(models, q_networks, kind, way):
    sampling, options = DECODING[way]
    ids, mask = padded([[5, 6, 7, 8, 9, 10], [11, 12, 13]], 0)
    processor = Compared(q_networks[kind], attention_mask=mask, **sampling)
    output = decode(models[kind], ids, processor, attention_mask=mask, **options)
    assert len(processor.differences) >= 3
    assert processor.worst < CLOSE
    if way == "finished-rows":
        ends = [next((step for step, token in enumerate(row) if token < 20), 99) for row in new_tokens(output, ids)]
        assert len(set(ends)) > 2


@pytest.mark.parametrize("trunk", ["llama", "sliding", "recurrent"])
@pytest.mark.parametrize("way", ["greedy", "beam"])
def test_model_and_q_network_may_be_of_different_kinds(model, make_q_network, trunk, way):
    sampling, options = DECODING[way]
    q_network, (ids, mask) = make_q_network(trunk), padded([[5, 6, 7, 8, 9, 10], [11, 12, 13]], 0)
    processor = Compared(q_network, attention_mask=mask, **sampling)
    output = decode(model, ids, processor, attention_mask=mask, **options)
    assert processor.worst < CLOSE
    found = processor.cached.next_token_log_survival(ids)
    for row, text in enumerate([[5, 6, 7, 8, 9, 10], [11, 12, 13]]):
        assert torch.allclose(found[row], log_survival_of(q_network, torch.tensor(text)), atol=CLOSE)
    assert output.shape[1] > ids.shape[1]


@pytest.mark.parametrize(
    ("model_dtype", "q_dtype", "close"),
    [(torch.bfloat16, torch.float32, CLOSE), (torch.float32, torch.bfloat16, 0.3)],
    ids=["model-bfloat16", "q-bfloat16"],
)
@pytest.mark.parametrize("way", ["greedy", "beam"])
def test_half_precision(model, q_network, model_dtype, q_dtype, close, way):
    sampling, options = DECODING[way]
    ids, mask = padded([[5, 6, 7, 8, 9, 10], [11, 12, 13]], 0)
    rough = copy.deepcopy(q_network).to(q_dtype)
    processor = Compared(rough, attention_mask=mask, **sampling)
    decode(copy.deepcopy(model).to(model_dtype), ids, processor, attention_mask=mask, **options)
    assert processor.worst < close
    scores = torch.randn(2, VOCABULARY, dtype=model_dtype)
    assert processor.cached(ids, scores).dtype == torch.float32
    exact = RectificationProcessor(q_network, RULE, attention_mask=mask)
    found, expected = processor.cached.next_token_log_survival(ids), exact.next_token_log_survival(ids)
    assert found.dtype == torch.float32
    assert (found.exp() - expected.exp()).abs().max() < 0.1


@pytest.fixture
def loops(model):
    """A prompt that repeats itself, as prompt look-up needs it."""
    return torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("helper", ["near", "far", "lookup"])
def test_assisted_decoding_gives_the_ids_of_plain_decoding(models, q_networks, loops, kind, helper):
    model = models[kind]
    noise = {"near": 0.01, "far": 1.0}
    options = {"assistant_model": assistant_of(model, noise[helper])} if helper in noise else {}
    options = options or {"prompt_lookup_num_tokens": 3}
    processor = Compared(q_networks[kind], do_sample=False)
    output = decode(model, loops, processor, max_new_tokens=20, **options)
    assert processor.worst < CLOSE
    steps = zip(processor.lengths, processor.lengths[1:], strict=False)
    assert any(later <= earlier for earlier, later in steps), "nothing was taken back"
    plain = decode(model, loops, RectificationProcessor(q_networks[kind], RULE, do_sample=False), max_new_tokens=20)
    assert torch.equal(output, plain)


def test_assisted_sampling(model, q_network, loops):
    processor = Compared(q_network, do_sample=True, top_k=10)
    decode(model, loops, processor, assistant_model=assistant_of(model, 0.01))
    assert processor.worst < CLOSE


def test_one_processor_serves_call_after_call(model, q_network):
    shared = Compared(q_network)
    batches = [
        (prompts(3, 6, seed=1), {}),
        (prompts(1, 9, seed=2), {"num_beams": 3}),
        (prompts(3, 6, seed=1)[:, :4], {"do_sample": True}),
        (prompts(3, 6, seed=1), {"num_beams": 2, "num_return_sequences": 2}),
        (prompts(3, 6, seed=1)[1:], {}),
        (prompts(1, 6, seed=1), {"do_sample": True, "num_return_sequences": 5}),
        (prompts(1, 6, seed=1).repeat(4, 1), {"max_new_tokens": 1}),
        (prompts(2, 20, seed=3), {}),
    ]
    for ids, options in batches:
        again = decode(model, ids, shared, **options)
        assert torch.equal(again, decode(model, ids, RectificationProcessor(q_network, RULE), **options))
    assert shared.worst < CLOSE


def test_rows_whose_number_changes_between_calls(model, q_network):
    processor = Compared(q_network)
    # the same beginning, in more rows and in fewer
    for rows in (2, 5, 1, 3):
        decode(model, prompts(1, 6).repeat(rows, 1), processor, max_new_tokens=3)
    assert processor.worst < CLOSE


@pytest.mark.parametrize("modes", [(True, False), (False, True), (True, False, True)])
def test_calls_may_be_in_inference_mode_or_not(model, q_network, modes):
    processor, ids = Compared(q_network, do_sample=False), prompts(2)
    expected = decode(model, ids, RectificationProcessor(q_network, RULE, do_sample=False))
    for mode in modes:
        with torch.inference_mode(mode):
            # one token first, so that the next call goes on from the states of this one
            decode(model, ids, processor, max_new_tokens=1)
        assert torch.equal(decode(model, ids, processor), expected)
        with torch.inference_mode(mode):
            assert torch.equal(decode(model, ids, processor), expected)
    assert processor.worst < CLOSE


def test_reset_makes_changed_weights_count(q_network):
    changing = copy.deepcopy(q_network)
    processor, ids = RectificationProcessor(changing, RULE), prompts(2)
    before = processor.next_token_log_survival(ids)
    with torch.no_grad():
        for parameter in changing.parameters():
            parameter.add_(0.1)
    processor.reset()
    after = processor.next_token_log_survival(ids)
    assert not torch.allclose(before, after)
    assert torch.allclose(after, RectificationProcessor(changing, RULE).next_token_log_survival(ids), atol=CLOSE)


# --- the cost


@pytest.mark.parametrize(
    ("options", "rows"),
    [({}, 2), ({"num_beams": 3}, 6), ({"do_sample": True, "num_return_sequences": 4, **MANY_ENDS}, 8)],
    ids=["greedy", "beam", "finished-rows"],
)
@pytest.mark.parametrize("left_padded", [False, True])
def test_each_step_encodes_one_token_per_row(model, q_network, spy, options, rows, left_padded):
    ids, mask = prompts(2, 6), torch.ones(2, 6, dtype=torch.int64)
    if left_padded:
        ids, mask = padded([[5, 6, 7, 8, 9, 10], [11, 12, 13]], 0)
    runs = spy(q_network)
    processor = RectificationProcessor(q_network, RULE, attention_mask=mask)
    output = decode(model, ids, processor, attention_mask=mask, **options)
    assert runs[0] == (2, 6)  # samples and beams of a prompt begin alike, so each prompt is read once
    assert len(runs) > 3
    assert runs[1:] == [(rows, 1)] * (len(runs) - 1)
    if "num_beams" not in options:
        assert len(runs) == output.shape[1] - 6


def test_roll_backs_cost_nothing(model, q_network, spy, loops):
    runs, calls = spy(q_network), []
    processor = RectificationProcessor(q_network, RULE, do_sample=False)

    class Counted(LogitsProcessor):
        def __call__(self, input_ids, scores):
            calls.append(input_ids.shape[1])
            return processor(input_ids, scores)

    torch.manual_seed(7)
    options = {"assistant_model": assistant_of(model, 0.01), "max_new_tokens": 20, "do_sample": False}
    output = model.generate(loops, attention_mask=torch.ones_like(loops), logits_processor=[Counted()], **options)
    prefill, *steps = runs
    assert prefill == (1, loops.shape[1])
    assert set(steps) == {(1, 1)}
    # the same prefixes are asked by the assistant and by the model
    assert len(calls) > len(runs)
    made = output.shape[1] - loops.shape[1]
    assert len(runs) <= 2 * made


def test_a_shared_prompt_is_encoded_once(model, q_network, spy):
    runs, ids = spy(q_network), prompts(2, 8)
    processor = RectificationProcessor(q_network, RULE)
    decode(model, ids, processor, max_new_tokens=3)
    runs.clear()
    decode(model, ids, processor, max_new_tokens=3)
    assert sum(tokens for _, tokens in runs) <= 3
    runs.clear()
    decode(model, torch.cat([ids, prompts(2, 2, seed=5)], 1), processor, max_new_tokens=1)
    assert runs == [(2, 2)]


# --- beam search


@torch.no_grad()
def brute_force_beams(model, q_network, rule, ids, beams, steps):
    """The best sequence and its log-probability, from whole forward passes over every beam."""
    running = [(ids.tolist(), 0.0)]
    for _ in range(steps):
        grown = []
        for prefix, total in running:
            prefix_ids = torch.tensor([prefix])
            log_policy = model(prefix_ids).logits[:, -1].double().log_softmax(-1)
            rectified = rectify(log_policy, log_survival_of(q_network, prefix_ids)[None].double(), rule).scores[0]
            grown += [([*prefix, token], total + rectified[token].item()) for token in range(len(rectified))]
        running = sorted(grown, key=lambda beam: -beam[1])[:beams]
    return running


@pytest.mark.parametrize("rule", [Tilt(), Cap(epsilon=0.2), Tilt(beta=1.0, epsilon=0.1)], ids=str)
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0])
def test_beam_search_maximises_the_rectified_probability(make_model, q_network, rule, length_penalty):
    model = make_model(eos_token_id=None)
    ids = prompts(1, 4, seed=8)
    options = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": length_penalty, "max_new_tokens": 5}
    processor = RectificationProcessor(q_network, rule, do_sample=False)
    output = decode(model, ids, processor, return_dict_in_generate=True, output_scores=True, **options)
    expected = brute_force_beams(model, q_network, rule, ids[0], beams=3, steps=5)
    assert output.sequences.tolist() == [prefix for prefix, _ in expected]
    totals = output.sequences_scores * 5**length_penalty
    assert totals.tolist() == pytest.approx([total for _, total in expected], abs=1e-3)
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
    assert not torch.equal(plain, output.sequences)


# --- the distribution that is sampled


SAMPLING = [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 0.5, "top_k": 5, "top_p": 0.8}]


@pytest.mark.parametrize("rule", [Cap(epsilon=0.2), RULE], ids=["cap", "tilt"])
@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
@pytest.mark.parametrize("source", ["processor", "generation_config"])
def test_what_is_sampled(make_model, q_network, rule, sampling, source):
    model = make_model(initializer_range=0.2)
    if source == "processor":
        processor = RectificationProcessor(q_network, rule, do_sample=True, **sampling)
    else:
        model.generation_config.update(do_sample=True, **sampling)
        processor = RectificationProcessor(q_network, rule, model=model)
    ids = prompts(2, 5, seed=3)
    output = decode(
        model, ids, processor, max_new_tokens=6, eos_token_id=None, return_dict_in_generate=True, output_scores=True
    )
    with torch.no_grad():
        logits = model(output.sequences).logits
        log_survival = q_network.head.log_survival(q_network.encode(output.sequences))
    caps_hold = 0
    for step, scores in enumerate(output.scores):
        for row in range(2):
            at = (row, ids.shape[1] - 1 + step)
            policy = scores[row].double().softmax(-1)
            assert torch.allclose(policy, expected_policy(logits[at], log_survival[at], rule, **sampling), atol=1e-5)
            if isinstance(rule, Cap):
                caps = caps_under(log_survival[at].double().exp(), rule)
                caps_hold += (policy <= caps + 1e-5).all().item()
    if isinstance(rule, Cap):
        assert caps_hold == 12 - processor.statistics().dead_ends
        assert caps_hold > 6
        assert processor.statistics().capped > 0


WARPERS = [
    {},
    {"temperature": 0.7},
    {"top_k": 4},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"top_h": 0.4},
    {"typical_p": 0.5},
    {"epsilon_cutoff": 0.05},
    {"eta_cutoff": 0.3},
    {"temperature": 1.5, "top_k": 9, "top_p": 0.7, "min_p": 0.05, "typical_p": 0.9, "epsilon_cutoff": 0.01},
]


@pytest.mark.parametrize("settings", WARPERS, ids=str)
@pytest.mark.parametrize("source", ["processor", "generation_config"])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_without_risk_generation_is_that_of_the_base_model(make_model, with_values, settings, source, num_beams):
    model = make_model(initializer_range=0.2)
    ids, mask = padded([[5, 6, 7, 8, 9, 10], [11, 12, 13]], 0)
    common = {"attention_mask": mask, "return_dict_in_generate": True, "output_scores": True, "num_beams": num_beams}
    torch.manual_seed(7)
    # the library's own top_k of 50 is not a setting of the model
    base = model.generate(ids, do_sample=True, max_new_tokens=12, **{"top_k": 0, **settings}, **common)
    risk_free = with_values(torch.zeros(VOCABULARY))
    given = {"do_sample": True, **settings}
    if source == "generation_config":
        model.generation_config.update(**given)
        given = {"model": model}
    processor = RectificationProcessor(risk_free, Cap(epsilon=0.0), attention_mask=mask, num_beams=num_beams, **given)
    output = decode(model, ids, processor, **common)
    assert torch.equal(output.sequences, base.sequences)
    assert len(output.scores) == len(base.scores)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(output.scores, base.scores, strict=True))
    assert processor.statistics().moved == 0
    plain = dict(common, max_new_tokens=12, **processor.sampling.plain_kwargs())
    torch.manual_seed(7)
    assert torch.equal(model.generate(ids, **plain).sequences, base.sequences)


@pytest.mark.parametrize("shift", [0.0, 3e3, -1e6, 1e9])
def test_the_nucleus_is_that_of_generate_however_large_the_scores(shift):
    scores = 3 * torch.randn(3, 4000, generator=torch.Generator().manual_seed(0)) + shift
    (ours,) = Sampling(top_p=0.7).truncating()
    assert torch.equal(ours(None, scores), TopPLogitsWarper(top_p=0.7)(None, scores))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_without_sampling_nothing_is_warped(make_model, q_network, num_beams):
    model, ids = make_model(), prompts(2)
    plain = decode(model, ids, RectificationProcessor(q_network, RULE, do_sample=False), num_beams=num_beams)
    model.generation_config.update(do_sample=True, temperature=3.0, top_k=2, top_p=0.3)
    processor = RectificationProcessor(q_network, RULE, model=model, do_sample=False)
    scores = torch.randn(2, VOCABULARY)
    expected = rectify(scores, processor.next_token_log_survival(ids), RULE).scores
    assert torch.equal(processor(ids, scores), expected)
    assert torch.equal(decode(model, ids, processor, num_beams=num_beams), plain)


def test_given_settings_precede_those_of_the_model(make_model, q_network):
    model = make_model()
    model.generation_config.update(do_sample=True, temperature=0.5, top_k=5)
    processor = RectificationProcessor(q_network, model=model, temperature=2.0, top_p=0.9)
    sampling = processor.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (2.0, 5, 0.9)
    # whether to sample is left to `generate`, which asks the model
    assert sampling.do_sample is None
    assert "do_sample" not in processor.generate_kwargs()
    assert RectificationProcessor(q_network, model=make_model()).sampling.top_k is None
