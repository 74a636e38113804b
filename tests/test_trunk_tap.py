"""A head on the generating model's own states: the same scores as its trunk run apart, and no second run of it."""

import copy
import gc
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from decoding import CLOSE, RULE, VOCABULARY, assistant_of, decode, new_tokens, padded, prompts
from transformers import DynamicCache, LogitsProcessor

from rectify import CheckpointError, DeadEndQNetwork, InvalidArgumentError, RectificationProcessor
from rectify.generation.generator import read_once
from rectify.q_network import QConfig

KINDS = ["gpt2", "llama", "sliding", "recurrent"]
TEXTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
MANY_ENDS = {"eos_token_id": list(range(2, 20)), "pad_token_id": 0}
DECODING = {
    "greedy": ({"do_sample": False}, {}),
    "without-cache": ({"do_sample": False}, {"use_cache": False}),
    "sampling": ({"do_sample": True, "temperature": 1.3, "top_k": 40}, {"num_return_sequences": 3}),
    "truncated": ({"do_sample": True, "top_k": 5}, {}),
    "beam": ({"do_sample": False}, {"num_beams": 4, "num_return_sequences": 2}),
    "beam-sampling": ({"do_sample": True, "top_k": 20, "num_beams": 3}, {"num_beams": 3}),
    "finished-rows": ({"do_sample": True}, {"num_return_sequences": 4, **MANY_ENDS}),
    "finished-beams": ({"do_sample": False}, {"num_beams": 4, "length_penalty": 0.0, **MANY_ENDS}),
}


def shared_network(model, noise=0.2, **options):
    torch.manual_seed(3)
    network = DeadEndQNetwork.from_trunk(model, shared=True, rank=16, mlp_size=24, **options)
    with torch.no_grad():
        for parameter in network.head.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return network.eval()


class Both(LogitsProcessor):
    """A processor that reads the model's states, and how far it is from one that runs the trunk apart."""

    def __init__(self, network, model, rule=RULE, **options):
        self.shared = RectificationProcessor(network, rule, model=model, **options)
        self.apart = RectificationProcessor(network, rule, **options)
        self.worst, self.calls = 0.0, 0

    def generate_kwargs(self):
        return self.shared.generate_kwargs()

    def __call__(self, input_ids, scores):
        result = self.shared(input_ids, scores.clone())
        expected = self.apart(input_ids, scores.clone())
        removed = result == -torch.inf
        assert torch.equal(removed, expected == -torch.inf)
        self.worst = max(self.worst, (result - expected).masked_fill(removed, 0).abs().max().item())
        self.calls += 1
        return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", DECODING)
def test_the_models_own_states_give_the_scores_of_a_trunk_apart(make_model, kind, way):
    model, (sampling, options) = make_model(kind), DECODING[way]
    ids, mask = padded(TEXTS, 0)
    # a recurrent model treats padding as its own code does, which is not to leave it out
    if kind == "recurrent":
        ids, mask = prompts(2, 5), torch.ones(2, 5, dtype=torch.long)
    processor = Both(shared_network(model), model, attention_mask=mask, **sampling)
    output = decode(model, ids, processor, attention_mask=mask, **options)
    assert processor.calls >= 3
    assert processor.worst < CLOSE
    assert output.shape[1] > ids.shape[1]


def test_texts_that_end_in_padding_have_the_states_of_their_last_tokens(make_model):
    model = make_model("llama")
    ids, mask = prompts(2, 5), torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 0]])
    processor = Both(shared_network(model), model, attention_mask=mask)
    decode(model, ids, processor, attention_mask=mask, do_sample=False)
    assert processor.worst < CLOSE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["greedy", "truncated", "beam", "finished-rows"])
def test_the_trunk_is_run_by_the_model_alone(make_model, spy, kind, way):
    model, (sampling, options) = make_model(kind), DECODING[way]
    network = shared_network(model)
    runs = spy(network)
    processor = RectificationProcessor(network, RULE, model=model, **sampling)
    for seed in (0, 1):
        decode(model, prompts(2, 5, seed), processor, **options)
    assert runs == []
    assert processor.statistics().decisions > 10


class Watched(RectificationProcessor):
    """Counts the calls whose scores come back untouched."""

    alone = 0

    def __call__(self, input_ids, scores):
        result = super().__call__(input_ids, scores)
        self.alone += result is scores
        return result


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("helper", ["near", "far", "lookup"])
def test_in_assisted_decoding_drafts_are_left_alone(make_model, spy, kind, helper):
    model = make_model(kind)
    loops = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    noise = {"near": 0.01, "far": 1.0}
    network = shared_network(model)
    plain = decode(model, loops, RectificationProcessor(network, RULE, model=model, do_sample=False), max_new_tokens=20)
    # look-up has no scores of its own, and asks with made-up ones
    options = {"assistant_model": assistant_of(model, noise[helper])} if helper in noise else {}
    options = options or {"prompt_lookup_num_tokens": 3}
    runs = spy(network)
    processor = Watched(network, RULE, model=model, do_sample=False)
    output = decode(model, loops, processor, max_new_tokens=20, **options)
    assert torch.equal(output, plain)
    assert runs == []
    assert processor.alone > 10


def test_assisted_sampling_reads_the_target_alone(model, spy):
    network = shared_network(model)
    runs = spy(network)
    processor = Watched(network, RULE, model=model, do_sample=True, top_k=10)
    loops = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    decode(model, loops, processor, max_new_tokens=20, assistant_model=assistant_of(model, 0.01))
    assert runs == []
    assert processor.alone > 10


def test_a_call_is_a_function_of_the_prefix_whatever_the_model_has_read(make_model):
    model = make_model("llama")
    network = shared_network(model)
    shared = RectificationProcessor(network, RULE, model=model)
    apart = RectificationProcessor(network, RULE)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for step in range(12):
            ids = prompts(1 + step % 3, 3 + step % 5, seed=step)
            if step % 2:
                model(prompts(2, 6, seed=step))  # another text
            if step % 4 == 2:
                model(ids)
            scores = torch.randn(len(ids), VOCABULARY, generator=draw)
            assert torch.allclose(shared(ids, scores), apart(ids, scores), atol=CLOSE)


def test_a_text_that_ends_alike_is_another(make_model):
    model = make_model("llama")
    network = shared_network(model)
    shared, apart = RectificationProcessor(network, RULE, model=model), RectificationProcessor(network, RULE)
    ids, scores = prompts(2, 6), torch.randn(2, VOCABULARY)
    output = decode(model, ids, shared, eos_token_id=None, pad_token_id=0)[:, :-1]  # the last token was not read
    other = output.clone()
    other[:, 2] = 50
    for prefixes in (output, output.flip(0), other, output):
        assert torch.allclose(shared(prefixes, scores), apart(prefixes, scores), atol=CLOSE)


def test_a_prompt_of_embeddings_is_followed(make_model):
    model = make_model("llama")
    processor = RectificationProcessor(shared_network(model), RULE, model=model, do_sample=False)
    ids = prompts(2, 6)
    options = {"max_new_tokens": 8, **processor.generate_kwargs()}
    embeddings = model.get_input_embeddings()(ids)
    output = model.generate(inputs_embeds=embeddings, logits_processor=[processor], **options)
    assert output.tolist() == new_tokens(decode(model, ids, processor, max_new_tokens=8), ids)


def test_chunks_of_a_prompt_are_followed(make_model, spy):
    model = make_model("llama")
    network = shared_network(model)
    processor = RectificationProcessor(network, RULE, model=model, do_sample=False)
    ids = prompts(2, 11)
    expected = decode(model, ids, processor)
    runs = spy(network)
    assert torch.equal(decode(model, ids, processor, prefill_chunk_size=4), expected)
    assert runs == []


def test_another_models_generate_is_refused(make_model):
    model, other = make_model("llama"), make_model("llama", seed=9)
    processor = RectificationProcessor(shared_network(model), RULE, model=model, do_sample=False)
    with pytest.raises(InvalidArgumentError, match="bound to another"):
        decode(other, prompts(), processor)


# --- whose states they are


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("caching", [True, False])
def test_guidance_runs_another_text_on_the_same_model(make_model, kind, caching):
    model = make_model(kind)
    processor = Both(shared_network(model), model, do_sample=False)
    options = {"guidance_scale": 2.0, "negative_prompt_ids": prompts(2, 4, seed=9), "use_cache": caching}
    decode(model, prompts(2, 4), processor, **options)
    assert processor.calls == 12
    assert processor.worst < CLOSE


def test_a_prompt_of_the_same_length_is_run_inside_a_processor(make_model, spy):
    model = make_model("llama")
    network = shared_network(model)
    runs = spy(network)
    shared = RectificationProcessor(network, RULE, model=model, do_sample=False)
    expected = decode(model, prompts(2, 6), shared, max_new_tokens=6)

    def generating(input_ids, scores):
        model.generate(prompts(*input_ids.shape, seed=5), max_new_tokens=2, do_sample=False, pad_token_id=0)
        return scores

    options = {"max_new_tokens": 6, **shared.generate_kwargs()}
    assert torch.equal(model.generate(prompts(2, 6), logits_processor=[generating, shared], **options), expected)
    assert runs == []


def test_two_texts_in_turn_are_told_apart(make_model, spy):
    model = make_model("llama")
    network = shared_network(model)
    shared, apart = RectificationProcessor(network, RULE, model=model), RectificationProcessor(network, RULE)
    texts, scores = [prompts(2, 5, seed) for seed in (0, 1)], torch.randn(2, VOCABULARY)
    expected = [[apart(torch.cat((text, text[:, :more]), 1), scores) for more in range(5)] for text in texts]
    caches, runs = [DynamicCache(config=model.config) for _ in texts], spy(network)
    with torch.no_grad():
        for more in range(5):
            for text, cache in zip(texts, caches, strict=True):
                model(text[:, more - 1 : more] if more else text, past_key_values=cache)
            for text, of_text in zip(texts, expected, strict=True):
                found = shared(torch.cat((text, text[:, :more]), 1), scores)
                assert torch.allclose(found, of_text[more], atol=CLOSE)
    assert runs == []


@pytest.mark.parametrize("layers", [1, 2])
@torch.no_grad()
def test_rows_with_the_same_last_token_are_told_apart(make_model, spy, layers):
    model = make_model("llama", num_hidden_layers=layers)
    network = shared_network(model)
    shared, apart = RectificationProcessor(network, RULE, model=model), RectificationProcessor(network, RULE)
    scores, ids = torch.randn(2, VOCABULARY), prompts(2, 6)
    ids[:, -1] = 7
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    assert torch.allclose(shared(ids.flip(0), scores), apart(ids.flip(0), scores), atol=CLOSE)
    cache.reorder_cache(torch.tensor([1, 0]))  # as beam search does
    more = torch.full((2, 1), 7)
    model(more, past_key_values=cache)
    swapped, straight = torch.cat((ids.flip(0), more), 1), torch.cat((ids, more), 1)
    expected = [apart(each, scores) for each in (swapped, straight)]
    runs = spy(network)
    assert torch.allclose(shared(swapped, scores), expected[0], atol=CLOSE)
    assert runs == []
    assert torch.allclose(shared(straight, scores), expected[1], atol=CLOSE)
    assert len(runs) == 1


@torch.no_grad()
def test_what_the_model_was_told_to_read_otherwise_is_run_anew(make_model, spy):
    model = make_model("gpt2")
    network = shared_network(model)
    ids, scores = prompts(2, 6), torch.randn(2, VOCABULARY)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    expected = RectificationProcessor(network, RULE)(ids, scores)
    expected_padded = RectificationProcessor(network, RULE, attention_mask=mask)(ids, scores)
    shared, runs = RectificationProcessor(network, RULE, model=model), spy(network)
    for options in ({"attention_mask": mask}, {"position_ids": torch.arange(6)[None] + 3}):
        model(ids, **options)  # with padding where there is none, and at other places
        assert torch.allclose(shared(ids, scores), expected, atol=CLOSE)
        shared.reset()
    assert len(runs) == 2
    shared.set_attention_mask(mask)
    for options in ({}, {"attention_mask": mask}):  # without the padding, and without the places
        model(ids, **options)
        assert torch.allclose(shared(ids, scores), expected_padded, atol=CLOSE)
        shared.reset()
    before = len(runs)
    model(ids, attention_mask=mask, position_ids=positions)
    assert torch.allclose(shared(ids, scores), expected_padded, atol=CLOSE)
    assert len(runs) == before


def test_drafts_of_the_models_own_first_layers_are_no_states_of_it(make_model):
    model = make_model("llama", num_hidden_layers=3)
    network = shared_network(model)
    plain = decode(model, prompts(1, 6), RectificationProcessor(network, RULE, do_sample=False))
    processor = RectificationProcessor(network, RULE, model=model, do_sample=False)
    assert torch.equal(decode(model, prompts(1, 6), processor, assistant_early_exit=1), plain)


def test_a_static_cache_and_a_compiled_model_are_followed(make_model, spy):
    model = make_model("llama")
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    network = shared_network(model)
    apart = RectificationProcessor(network, RULE, attention_mask=mask, do_sample=False)
    expected = decode(model, prompts(2, 6), apart, attention_mask=mask)
    runs = spy(network)
    processor = RectificationProcessor(network, RULE, model=model, attention_mask=mask, do_sample=False)
    options = {"attention_mask": mask, "cache_implementation": "static"}
    assert torch.equal(decode(model, prompts(2, 6), processor, **options), expected)
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    assert torch.equal(decode(model, prompts(2, 6), processor, **options), expected)
    assert runs == []


@pytest.mark.parametrize("shared", [True, False])
def test_one_processor_serves_several_threads(make_model, make_q_network, shared):
    model = make_model("llama")
    network = shared_network(model) if shared else make_q_network("llama")
    texts = [prompts(1 + number % 2, 4 + number % 3, seed=number) for number in range(6)]
    masks = [torch.ones_like(text) for text in texts]
    masks[1][0, :2] = 0
    options = {"max_new_tokens": 8, "pad_token_id": 0}
    expected = []
    for text, mask in zip(texts, masks, strict=True):
        alone = RectificationProcessor(network, RULE, use_cache=False, do_sample=False, attention_mask=mask)
        expected.append(decode(model, text, alone, attention_mask=mask, **options))
    processor = RectificationProcessor(network, RULE, model=model, do_sample=False)
    options |= processor.generate_kwargs()

    def work(number):
        outputs = []
        processor.set_attention_mask(masks[number])
        for _ in range(3):
            given = {"attention_mask": masks[number], "logits_processor": [processor]}
            outputs.append(model.generate(texts[number], **given, **options))
        return all(torch.equal(output, expected[number]) for output in outputs)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))
    rows = sum(len(output) * (output.shape[1] - len(text[0])) for text, output in zip(texts, expected, strict=True))
    assert processor.statistics().decisions == 3 * rows


def test_a_model_keeps_nothing_of_a_processor_that_is_gone(make_model):
    model = make_model("llama")
    before = len(model.model._forward_pre_hooks), len(model.model._forward_hooks)
    processor = RectificationProcessor(shared_network(model), RULE, model=model)
    model(prompts())
    assert len(model.model._forward_hooks) == before[1] + 1
    del processor
    gc.collect()
    assert (len(model.model._forward_pre_hooks), len(model.model._forward_hooks)) == before


# --- making, saving, loading


def test_a_shared_trunk_is_borrowed(make_model):
    model = make_model("llama").train()
    network = shared_network(model).to(torch.bfloat16)
    assert model.training
    assert model.dtype == torch.float32
    assert all(name.startswith("head.") for name, _ in network.named_parameters())
    assert network(prompts()).shape == (1, 7, VOCABULARY)
    with pytest.raises(InvalidArgumentError, match="shared"):
        DeadEndQNetwork.from_trunk(model, shared=True, adapter=object())


@pytest.fixture
def saved(make_model, tmp_path):
    """A model and a head on it, in their folders."""
    model = make_model("llama")
    model.save_pretrained(tmp_path / "model")
    network = shared_network(model, name=str(tmp_path / "model"))
    network.save_pretrained(tmp_path / "head")
    return model, network, tmp_path


def test_the_head_alone_is_saved_and_read_with_the_model_or_without(saved):
    model, network, folder = saved
    assert {path.name for path in (folder / "head").iterdir()} == {"q_config.json", "head.safetensors"}
    config = QConfig(**json.loads((folder / "head" / "q_config.json").read_text()))
    assert config.shared
    assert config.base_model == str(folder / "model")
    ids, scores = prompts(2, 5), torch.randn(2, VOCABULARY)
    expected = RectificationProcessor(network, RULE)(ids, scores)
    with_model = RectificationProcessor.from_pretrained(folder / "head", RULE, model=model)
    assert with_model.q_network.trunk is model.base_model
    without = RectificationProcessor.from_pretrained(folder / "head", RULE)
    for processor in (with_model, without):
        assert torch.allclose(processor(ids, scores), expected, atol=1e-5)


def test_the_head_of_another_model_is_refused(saved, make_model):
    model, _, folder = saved
    DeadEndQNetwork.from_pretrained(folder / "head", model=copy.deepcopy(model).to(torch.bfloat16))
    for other in (make_model("llama", seed=4), make_model("gpt2")):
        with pytest.raises(CheckpointError, match="other weights"):
            DeadEndQNetwork.from_pretrained(folder / "head", model=other)


def test_a_head_of_a_nameless_model_needs_it(make_model, tmp_path):
    model = make_model("llama")
    shared_network(model).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="pass model="):
        DeadEndQNetwork.from_pretrained(tmp_path)
    assert DeadEndQNetwork.from_pretrained(tmp_path, model=model).config.shared


def test_a_prompt_that_was_read_once_is_continued_several_times(make_model, spy):
    model = make_model("llama")
    network = shared_network(model)
    for rows in (1, 2):
        ids = prompts(rows, 6)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        processor = Both(network, model, do_sample=False)
        cache = read_once(model, **inputs, copies=3)
        runs = spy(network)
        decode(model, ids.repeat_interleave(3, 0), processor.shared, past_key_values=cache, max_new_tokens=5)
        assert runs == []
        cache = read_once(model, **inputs, copies=3)
        decode(model, ids.repeat_interleave(3, 0), processor, past_key_values=cache, max_new_tokens=5)
        assert processor.worst < CLOSE
