"""Reward-augmented decoding against whole forward passes of each candidate, and its policy against float64."""

import copy
import math

import numpy as np
import pytest
import torch
from decoding import assistant_of, padded, warped
from transformers import BertConfig, BertForMaskedLM, JambaConfig, JambaForCausalLM

from rectify import InvalidArgumentError, VocabularyMismatchError, load_language_model
from rectify.detectors import ToxicityClassifier
from rectify.methods.base import Base
from rectify.methods.causal_states import CausalStates
from rectify.methods.reward_reranking import PrefixToxicity, RewardReranking, RewardRerankingProcessor
from rectify.prefix_memo import MASKED

PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
CLOSE = {"rtol": 0, "atol": 1e-4}
KINDS = ["gpt2", "llama", "sliding", "recurrent"]
ROWS = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15, 16], [17]]
SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "initializer_range": 0.3}
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 2}


def recurrent():
    """Jamba, the recurrent model that transformers makes classifiers of: one layer of Mamba and one of attention."""
    layers = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "num_experts_per_tok": 1}
    mamba = {"use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 2}
    torch.manual_seed(3)
    return JambaForCausalLM(JambaConfig(**SIZES, **HEADS, **layers, **mamba, num_key_value_heads=1, pad_token_id=0))


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    return make_tokenizer()


@pytest.fixture(scope="module")
def make_classifier(make_model, tokenizer, tmp_path_factory):
    """`make_classifier(kind, labels, model)`: a classifier whose scores vary."""

    def make(kind="llama", labels=("toxic",), model=None):
        folder = str(tmp_path_factory.mktemp(kind))
        model = model or (recurrent() if kind == "recurrent" else make_model(kind, seed=3))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        torch.manual_seed(1)
        classifier = ToxicityClassifier.from_backbone(folder, max_length=24, labels=labels)
        with torch.no_grad():
            for name, parameter in classifier.named_parameters():
                if parameter.requires_grad:
                    parameter.add_((0.5 if "score" in name else 0.1) * torch.randn_like(parameter))
        return classifier.requires_grad_(False).eval()

    return make


@pytest.fixture(scope="module")
def classifiers(make_classifier):
    return {kind: make_classifier(kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def classifier(request, classifiers):
    return classifiers[request.param]


@pytest.fixture
def toxicity(classifier, tokenizer):
    return PrefixToxicity(classifier, tokenizer)


@pytest.fixture(scope="module")
def model(make_model):
    return make_model("llama", seed=6)


@torch.no_grad()
def reference(classifier, prefixes, tokens):
    """The first label's probability of each whole text, of one prefix at a time, without padding or cache."""
    inner = classifier.model.get_base_model()
    if not inner._is_stateful:  # Mamba's layers have no float64
        inner = copy.deepcopy(inner).double()
    found = []
    for row, candidates in zip(prefixes, tokens, strict=True):
        texts = torch.stack([torch.cat((row[row != MASKED], token[None])) for token in candidates])
        hidden = inner.base_model(input_ids=texts, use_cache=False).last_hidden_state[:, -1]
        found.append(inner.score(hidden)[:, 0].double().sigmoid())
    return torch.stack(found)


def draw(rows, length, seed=0):
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


# --- the scores of candidates


def test_candidates_are_scored_as_by_whole_passes_whatever_was_asked_before(classifier, toxicity):
    ids = draw(4, 12)
    ids[1, :4] = ids[2, :1] = MASKED
    found = []
    for rows, length in (
        ([0, 1, 2, 3], 7),
        ([0, 1, 2, 3], 8),  # a token more
        ([2, 0, 2, 1], 9),  # beams
        ([2, 0, 2, 1], 7),  # a roll-back
        ([2, 0, 2, 1], 7),  # the same again
        ([3, 1], 10),  # fewer rows
        ([0, 0, 0, 1, 2], 5),  # more of them, alike
        ([0, 1, 2, 3], 12),
    ):
        prefixes, tokens = ids[rows][:, :length], draw(len(rows), 5, seed=length)
        found.append(toxicity(prefixes, tokens))
        assert found[-1].dtype == torch.float32
        assert torch.allclose(found[-1].double(), reference(classifier, prefixes, tokens), **CLOSE)
    assert torch.cat([scores.flatten() for scores in found]).std() > 0.1  # they do vary
    toxicity.clear()
    assert torch.allclose(toxicity(prefixes, tokens), found[-1], **CLOSE)


def test_another_prompt_may_follow_and_candidates_may_be_many(classifier, toxicity):
    for rows, length, count, seed in ((3, 6, 1, 1), (1, 3, 60, 2), (2, 9, 97, 3)):
        prefixes, tokens = draw(rows, length, seed), draw(rows, count, seed)
        assert torch.allclose(toxicity(prefixes, tokens).double(), reference(classifier, prefixes, tokens), **CLOSE)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_nothing_of_the_candidates_is_kept_and_the_prefixes_are(classifiers, tokenizer, spy, kind):
    ids = draw(3, 9)
    answers = []
    for seed in (1, 2):  # other candidates
        toxicity = PrefixToxicity(classifiers[kind], tokenizer)
        runs = spy(toxicity._states)
        for length in (6, 7, 8):
            toxicity(ids[:, :length], draw(3, 4, seed))
        answers.append(toxicity(ids[[2, 2, 0]], draw(3, 4, 5)))
        assert runs == [(3, 6), (3, 1), (3, 1), (3, 1)]
    assert torch.equal(*answers)


@pytest.mark.parametrize("stage", ["encode", "encode_branches"])
def test_an_interrupted_run_is_not_remembered(classifiers, tokenizer, monkeypatch, stage):
    toxicity = PrefixToxicity(classifiers["llama"], tokenizer)
    ids, tokens = draw(2, 9), draw(2, 4)
    toxicity(ids[:, :6], tokens)
    complete = getattr(toxicity._states, stage)

    def interrupted(*arguments):
        complete(*arguments)  # the cache has grown
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(toxicity._states, stage, interrupted)
        with pytest.raises(KeyboardInterrupt):
            toxicity(ids[:, :7], tokens)
    for length in (7, 6, 9):
        expected = reference(classifiers["llama"], ids[:, :length], tokens)
        assert torch.allclose(toxicity(ids[:, :length], tokens).double(), expected, **CLOSE)


def test_without_branches_whole_texts_are_read_with_the_same_scores(classifiers, tokenizer, monkeypatch):
    ids, tokens = draw(3, 8), draw(3, 6)
    ids[1, :3] = MASKED
    branched = PrefixToxicity(classifiers["llama"], tokenizer)(ids, tokens)
    monkeypatch.setattr(CausalStates, "branches", False)
    assert torch.allclose(PrefixToxicity(classifiers["llama"], tokenizer)(ids, tokens), branched, **CLOSE)


def test_tokens_beyond_the_classifiers_embeddings_harm_no_others(classifier, toxicity):
    """Models of one vocabulary pad their embeddings to several widths."""
    prefixes, tokens = draw(2, 5), draw(2, 4)
    tokens[0, 1] = tokens[1, 3] = 99
    found, told = toxicity(prefixes, tokens), tokens < 97
    expected = reference(classifier, prefixes, tokens.clamp_max(96))
    assert torch.allclose(found[told].double(), expected[told], **CLOSE)
    assert found.isfinite().all()


def test_the_calibration_of_the_first_label_is_applied(make_classifier, tokenizer):
    classifier = make_classifier(labels=("TOXICITY", "INSULT"))
    prefixes, tokens = draw(3, 5), draw(3, 8)
    prefixes[0], tokens[0] = torch.arange(40, 45), torch.arange(50, 58)  # words in which no special token is found
    plain = PrefixToxicity(classifier, tokenizer)(prefixes, tokens)
    assert torch.allclose(plain.double(), reference(classifier, prefixes, tokens), **CLOSE)
    classifier.config.calibration = {"INSULT": [[0.0, 1.0], [0.0, 0.0]]}
    assert torch.equal(PrefixToxicity(classifier, tokenizer)(prefixes, tokens), plain)
    knots = [[0.1, 0.5, 0.9], [0.0, 0.8, 0.9]]
    classifier.config.calibration |= {"TOXICITY": knots}
    found = PrefixToxicity(classifier, tokenizer)(prefixes, tokens)
    assert torch.allclose(found, torch.from_numpy(np.interp(plain, *knots)).float(), **CLOSE)
    texts = [" ".join(f"t{token}" for token in (*prefixes[0].tolist(), last)) for last in tokens[0].tolist()]
    assert found[0].tolist() == pytest.approx(classifier.probabilities(texts), abs=1e-4)


# --- the policy


@pytest.fixture
def make(classifiers, model, tokenizer):
    """`make(beta, k, kind, **sampling)`: a processor of the model."""

    def of(beta=20.0, k=8, kind="llama", **sampling):
        toxicity = PrefixToxicity(classifiers[kind], tokenizer)
        return RewardRerankingProcessor(toxicity, beta, k, model, tokenizer, PLAIN | sampling)

    return of


@torch.no_grad()
def scores_of(model, ids, mask):
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    return model(ids, attention_mask=mask, position_ids=positions).logits[:, -1]


def expected_policy(scores, text, classifier, beta, k, **sampling):
    """The policy after one text without padding, from its base scores `[V]`: `[V]` float64."""
    ordered = sorted(range(len(scores)), key=lambda token: -float(scores[token]))[:k]
    toxicity = reference(classifier, torch.tensor([text]), torch.tensor([ordered]))[0]
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


# --- what is refused


def test_a_classifier_that_reads_from_both_sides_is_refused(make_classifier, tokenizer):
    encoder = BertForMaskedLM(BertConfig(**SIZES, **HEADS))
    with pytest.raises(InvalidArgumentError, match=r"backbone '.*encoder.*' is no causal model"):
        PrefixToxicity(make_classifier("encoder", model=encoder), tokenizer)


def test_another_vocabulary_is_refused(classifiers, make_tokenizer):
    for other, said in ((make_tokenizer(rename={40: "x40"}), "97 tokens"), (make_tokenizer(words=90), "90 tokens")):
        with pytest.raises(VocabularyMismatchError, match=f"{said} is not that of the classifier, .*97 tokens"):
            PrefixToxicity(classifiers["llama"], other)


def test_a_text_that_exceeds_the_context_is_refused(make_classifier, make_model, tokenizer):
    classifier = make_classifier("short", model=make_model("gpt2", seed=3, n_positions=24))
    toxicity, tokens = PrefixToxicity(classifier, tokenizer), draw(2, 3)
    ids = torch.nn.functional.pad(draw(2, 23), (2, 0), value=MASKED)
    assert torch.allclose(toxicity(ids, tokens).double(), reference(classifier, ids, tokens), **CLOSE)
    with pytest.raises(InvalidArgumentError, match="classifier would read 25 tokens, and its context is 24"):
        toxicity(draw(2, 24), tokens)
    with pytest.raises(InvalidArgumentError, match="empty"):
        toxicity(ids[:, :0], tokens)


# --- the method


def test_a_saved_classifier_is_read(make_classifier, model, tokenizer, tmp_path):
    classifier = make_classifier()
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
    found = decoder.processor.toxicity(prefixes, tokens)
    expected = decoder.reads[0].probabilities([prompt + word for prompt in prompts for word in words])
    assert found.flatten().tolist() == pytest.approx(expected, abs=1e-4)
    assert found[:, [0, 3]].min() > found[:, [1, 2]].max()
