"""The processor in `generate`: cached and uncached agree at every call, padding changes nothing, and what is sampled is
the rectified policy.

Expected policies are computed here in float64, from whole unpadded forward passes.
"""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import LogitsProcessor

from rectify import Cap, DeadEndQNetwork, InvalidArgumentError, RectificationProcessor, Tilt, VocabularyMismatchError
from rectify.rule import rectify

VOCABULARY = 97
RULE = Tilt(beta=2.0)
CLOSE = 1e-4


@pytest.fixture(scope="module")
def models(make_model):
    return {kind: make_model(kind) for kind in ("gpt2", "llama", "sliding")}


@pytest.fixture(scope="module")
def q_networks(make_q_network):
    return {kind: make_q_network(kind) for kind in ("gpt2", "llama", "sliding")}


def prompts(rows=1, length=7, seed=0):
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(rows, pad, more=0):
    """Left-padded ids and their mask; `more` also pads the longest row."""
    longest = max(len(row) for row in rows) + more
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])


@torch.no_grad()
def log_survival_of(q_network, prefix):
    """`log(1 + Q)` after one prefix, without padding or cache: `[V]`."""
    return q_network.head.log_survival(q_network.encode(prefix.reshape(1, -1)))[0, -1]


class Compared(LogitsProcessor):
    """A cached processor, and how far it is from an uncached one at every call."""

    def __init__(self, q_network, rule=RULE, **options):
        self.cached = RectificationProcessor(q_network, rule, **options)
        self.uncached = RectificationProcessor(q_network, rule, use_cache=False, **options)
        self.differences, self.lengths = [], []

    def generate_kwargs(self):
        return self.cached.generate_kwargs()

    def set_attention_mask(self, mask):
        self.cached.set_attention_mask(mask)
        self.uncached.set_attention_mask(mask)

    def __call__(self, input_ids, scores):
        expected = self.uncached(input_ids.clone(), scores.clone())
        result = self.cached(input_ids, scores)
        self.lengths.append(input_ids.shape[1])
        removed = result == -math.inf
        same = torch.equal(removed, expected == -math.inf)
        gap = (result - expected).masked_fill(removed, 0).abs().max()
        self.differences.append(gap.item() if same else math.inf)
        return result

    @property
    def worst(self):
        return max(self.differences)


def decode(model, ids, processor, **options):
    options = {"max_new_tokens": 12, "attention_mask": torch.ones_like(ids)} | processor.generate_kwargs() | options
    torch.manual_seed(7)
    return model.generate(ids, logits_processor=[processor], **options)


def new_tokens(output, ids):
    return output[:, ids.shape[1] :].tolist()


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


def assistant_of(model, noise):
    assistant = copy.deepcopy(model)
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return assistant


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
    assert runs[0] == (rows, 6)
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
    # texts, pad token, padding of the longest text, told by the tokenizer, the constructor's mask or a mask set later
    ("text", "t0", 0, "tokenizer"),
    ("text", "t0", 2, "tokenizer"),
    ("text", "t2", 0, "tokenizer"),
    ("text", "t1", 0, "tokenizer"),
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


def warped(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Temperature, top-k and top-p one after the other, as probabilities in float64."""
    policy = (logits.double() / temperature).softmax(-1)
    if top_k:
        policy = torch.where(policy >= policy.sort(descending=True).values[top_k - 1], policy, 0)
        policy = policy / policy.sum()
    if top_p < 1:
        ordered, tokens = policy.sort(descending=True)
        kept = tokens[ordered.cumsum(0) - ordered < top_p]
        policy = torch.zeros_like(policy).scatter(0, kept, policy[kept])
        policy = policy / policy.sum()
    return policy


def capped(policy, caps):
    """`min(c, t·π)` with t by bisection; `None` where no policy is under the caps."""
    if caps[policy > 0].sum() < 1:
        return None
    low, high = 0.0, 1e12
    for _ in range(300):
        middle = (low + high) / 2
        low, high = (middle, high) if torch.minimum(caps, middle * policy).sum() < 1 else (low, middle)
    return torch.minimum(caps, high * policy)


def expected_policy(logits, log_survival, rule, **sampling):
    policy, survival = warped(logits, **sampling), log_survival.double().exp()
    if isinstance(rule, Tilt):
        tilted = policy * survival.clamp(rule.p_min, 1) ** rule.beta
        return tilted / tilted.sum()
    caps = (survival - rule.epsilon).clamp(rule.p_min, 1)
    unwarped = logits.double().softmax(-1)
    for candidate in (capped(policy, caps), capped(unwarped, caps)):
        if candidate is not None:
            return candidate
    return unwarped * survival / (unwarped * survival).sum()


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
                caps = (log_survival[at].double().exp() - rule.epsilon).clamp(1e-7, 1)
                caps_hold += (policy <= caps + 1e-5).all().item()
    if isinstance(rule, Cap):
        assert caps_hold == 12 - processor.statistics().dead_ends
        assert caps_hold > 6
        assert processor.statistics().capped > 0


class StubHead(nn.Module):
    """A head of given values, one row for each row of the batch, or one for all."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def forward(self, hidden, actions=None):
        return self.values.expand(*hidden.shape[:-1], -1)

    def log_survival(self, hidden, actions=None):
        return self(hidden).log1p()


@pytest.fixture
def with_values(q_network):
    """`with_values(values)`: a Q network of these values after every prefix."""

    def make(values):
        stub = DeadEndQNetwork(q_network.config, q_network.trunk)
        stub.head = StubHead(values)
        return stub

    return make


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
    with pytest.raises(VocabularyMismatchError):
        RectificationProcessor.from_pretrained(tmp_path, tokenizer=make_tokenizer(words=50))
