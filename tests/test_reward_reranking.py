"""The policy of reward-augmented decoding against float64; the scores of candidates are in `test_detector_value`."""

import math

import pytest
import torch
from causal_classifiers import toxicity_of
from decoding import assistant_of, padded, warped

from rectify import load_language_model
from rectify.causal_states import CausalStates
from rectify.detector_value import DetectorValue
from rectify.methods.base import Base
from rectify.methods.reward_reranking import RewardReranking, RewardRerankingProcessor
from rectify.prefix_memo import MASKED

PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
ROWS = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15, 16], [17]]


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    return make_tokenizer()


@pytest.fixture(scope="module")
def classifiers(causal_classifiers):
    return causal_classifiers


@pytest.fixture(scope="module")
def model(make_model):
    return make_model("llama", seed=6)


def draw(rows, length, seed=0):
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


# --- the policy


@pytest.fixture
def make(classifiers, model, tokenizer):
    """`make(beta, k, kind, **sampling)`: a processor of the model."""

    def of(beta=20.0, k=8, kind="llama", **sampling):
        value = DetectorValue(classifiers[kind], tokenizer)
        return RewardRerankingProcessor(value, beta, k, model, tokenizer, PLAIN | sampling)

    return of


@torch.no_grad()
def scores_of(model, ids, mask):
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    return model(ids, attention_mask=mask, position_ids=positions).logits[:, -1]


def expected_policy(scores, text, classifier, beta, k, **sampling):
    """The policy after one text without padding, from its base scores `[V]`: `[V]` float64."""
    ordered = sorted(range(len(scores)), key=lambda token: -float(scores[token]))[:k]
    toxicity = toxicity_of(classifier, torch.tensor([text]), torch.tensor([ordered]))[0]
    logits = torch.full((len(scores),), -math.inf, dtype=torch.float64)
    for token, value in zip(ordered, toxicity, strict=True):
        logits[token] = scores[token].double() + beta * (1 - value)
    return warped(logits, **sampling)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "sliding"])
@pytest.mark.parametrize(("beta", "k"), [(3.0, 12), (20.0, 6), (2.0, 500)])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.8}], ids=str)
def test_the_policy_is_that_of_the_paper(model, make, classifiers, kind, beta, k, sampling):
    ids, mask = padded(ROWS, pad=0, more=1)
    scores = scores_of(model, ids, mask)
    found = make(beta, k, kind, **sampling)(ids, scores)
    for row, base, policy in zip(ROWS, scores, found.softmax(-1), strict=True):
        expected = expected_policy(base, row, classifiers[kind], beta, k, **sampling)
        assert torch.allclose(policy.double(), expected, rtol=0, atol=1e-4)
    assert (found.softmax(-1) - scores.softmax(-1)).abs().sum(-1).min() > 0.02


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.8}], ids=str)
def test_no_weight_keeps_the_likeliest_tokens_of_the_base(model, make, tokenizer, sampling):
    ids, mask = padded(ROWS, pad=0)
    scores = scores_of(model, ids, mask)
    least = scores.topk(8).values[:, -1:]
    base = Base().bind(model, tokenizer, PLAIN | sampling).processor
    expected = base(ids, scores.masked_fill(scores < least, -math.inf))
    assert torch.equal(make(0.0, **sampling)(ids, scores), expected)


def test_what_was_forbidden_stays_forbidden(model, make):
    scores = torch.full((1, 97), -math.inf)
    scores[0, [5, 6, 7]] = torch.tensor([1.0, 2.0, 3.0])
    found = make(k=20)(torch.tensor([ROWS[0]]), scores)
    assert found.isfinite().nonzero()[:, 1].tolist() == [5, 6, 7]


def test_low_precision_gives_float32_and_float64_is_kept(make):
    ids, scores = torch.tensor([ROWS[0]]), torch.randn(1, 97)
    assert make()(ids, scores.bfloat16()).dtype == torch.float32
    assert make()(ids, scores.double()).dtype == torch.float64


def test_padding_that_may_be_text_is_told_apart_by_the_mask(model, make):
    ids, mask = padded(ROWS, pad=0, more=2)
    scores = scores_of(model, ids, mask)
    processor = make()
    processor.set_attention_mask(mask)
    found = processor(ids.masked_fill(mask == 0, 7), scores)
    assert torch.allclose(found, make()(ids, scores), rtol=0, atol=1e-3)


def write(model, ids, processor, **options):
    torch.manual_seed(7)
    options = processor.sampling.generate_kwargs() | {"attention_mask": torch.ones_like(ids)} | options
    return model.generate(ids, logits_processor=[processor], max_new_tokens=10, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": False, "assistant_model": True},
    ],
    ids=str,
)
def test_generation_is_the_same_with_and_without_a_memo(model, make, monkeypatch, options):
    ids = draw(1 if "assistant_model" in options else 2, 6, seed=2)
    if "assistant_model" in options:
        options = options | {"assistant_model": assistant_of(model, 0.02)}
    found = write(model, ids, make(beta=5.0), **options)
    assert not torch.equal(found, write(model, ids, make(beta=0.0), **options))
    monkeypatch.setattr(CausalStates, "branches", False)
    assert torch.equal(found, write(model, ids, make(beta=5.0), **options))


def test_one_processor_serves_many_prompts(model, make):
    processor = make()
    for rows, length, seed in ((2, 7, 0), (3, 4, 1), (1, 9, 2), (2, 7, 0)):
        ids = draw(rows, length, seed)
        assert torch.equal(write(model, ids, processor, do_sample=False), write(model, ids, make(), do_sample=False))
    processor.reset()
    assert torch.equal(write(model, ids, processor, do_sample=False), write(model, ids, make(), do_sample=False))
    assert processor.statistics() is None


# --- the method


def test_a_saved_classifier_is_read(make_causal_classifier, model, tokenizer, tmp_path):
    classifier = make_causal_classifier()
    classifier.save_pretrained(tmp_path)
    decoder = RewardReranking(5.0, 8, path=str(tmp_path)).bind(model, tokenizer, PLAIN)
    assert (decoder.draws, decoder.toxicity) == (1, None)
    (read,) = decoder.reads
    assert not read.training
    assert not any(parameter.requires_grad for parameter in read.parameters())
    ids, mask = padded(ROWS, pad=0)
    scores = scores_of(model, ids, mask)
    for row, base, policy in zip(ROWS, scores, decoder.processor(ids, scores).softmax(-1), strict=True):
        expected = expected_policy(base, row, classifier, 5.0, 8)
        assert torch.allclose(policy.double(), expected, rtol=0, atol=1e-4)


def test_the_pocket_classifier_sees_in_ids_what_it_sees_in_texts():
    model, tokenizer = load_language_model("pocket")
    decoder = RewardReranking().bind(model, tokenizer, PLAIN)
    prompts, words = ["You are such an", "The weather is"], [" idiot", " honest", " nice", " stupid"]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    prefixes = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, MASKED)
    tokens = torch.tensor([[tokenizer(word)["input_ids"][0] for word in words]]).expand(2, -1)
    found = decoder.processor.value.toxicity(prefixes, tokens)
    expected = decoder.reads[0].probabilities([prompt + word for prompt in prompts for word in words])
    assert found.flatten().tolist() == pytest.approx(expected, abs=1e-4)
    assert found[:, [0, 3]].min() > found[:, [1, 2]].max()
