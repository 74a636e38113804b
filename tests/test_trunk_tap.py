"""A head on the generating model's own states: the same scores as its trunk run apart, and no second run of it."""

import copy
import gc
import json

import pytest
import torch
from decoding import CLOSE, RULE, VOCABULARY, assistant_of, decode, new_tokens, padded, prompts
from transformers import LogitsProcessor

from rectify import CheckpointError, DeadEndQNetwork, InvalidArgumentError, RectificationProcessor
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
