"""What a detector says of next tokens: one run over the candidates against whole passes of each text."""

import copy
import math

import numpy as np
import pytest
import torch
from causal_classifiers import HEADS, KINDS, SIZES, toxicity_of
from transformers import BertConfig, BertForMaskedLM

from rectify import DetectorValue, InvalidArgumentError, VocabularyMismatchError, causal_states, token_risks
from rectify.causal_states import CausalStates
from rectify.evaluation.candidate_cost import Way, candidate_costs, walk
from rectify.prefix_memo import MASKED
from rectify.sampling import Sampling
from rectify.support import Support, candidates_of

CLOSE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    return make_tokenizer()


@pytest.fixture
def classifiers(causal_classifiers):
    return causal_classifiers


@pytest.fixture(params=KINDS)
def classifier(request, classifiers):
    return classifiers[request.param]


@pytest.fixture
def value(classifier, tokenizer):
    return DetectorValue(classifier, tokenizer)


def draw(rows, length, seed=0):
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


# --- the scores of candidates


def test_candidates_are_scored_as_by_whole_passes_whatever_was_asked_before(classifier, value):
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
        found.append(value.toxicity(prefixes, tokens))
        assert found[-1].dtype == torch.float32
        assert torch.allclose(found[-1].double(), toxicity_of(classifier, prefixes, tokens), **CLOSE)
    assert torch.cat([scores.flatten() for scores in found]).std() > 0.1  # they do vary
    value.clear()
    assert torch.allclose(value.toxicity(prefixes, tokens), found[-1], **CLOSE)


def test_another_prompt_may_follow_and_candidates_may_be_many(classifier, value):
    for rows, length, count, seed in ((3, 6, 1, 1), (1, 3, 60, 2), (2, 9, 97, 3)):
        prefixes, tokens = draw(rows, length, seed), draw(rows, count, seed)
        assert torch.allclose(
            value.toxicity(prefixes, tokens).double(), toxicity_of(classifier, prefixes, tokens), **CLOSE
        )


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_nothing_of_the_candidates_is_kept_and_the_prefixes_are(classifiers, tokenizer, spy, kind):
    ids = draw(3, 9)
    answers = []
    for seed in (1, 2):  # other candidates
        value = DetectorValue(classifiers[kind], tokenizer)
        read, branched = spy(value.states), spy(value.states, "encode_branches")
        for length in (6, 7, 8):
            value.toxicity(ids[:, :length], draw(3, 4, seed))
        answers.append(value.toxicity(ids[[2, 2, 0]], draw(3, 4, 5)))
        assert read == [(3, 6)]
        assert branched == [(3, 4), (3, 5), (3, 5), (3, 5)]  # with the new token of each prefix
    assert torch.equal(*answers)


@pytest.mark.parametrize("stage", ["encode", "encode_branches"])
def test_an_interrupted_run_is_not_remembered(classifiers, tokenizer, monkeypatch, stage):
    value = DetectorValue(classifiers["llama"], tokenizer)
    ids, tokens = draw(2, 9), draw(2, 4)
    value.toxicity(ids[:, :6], tokens)
    complete = getattr(value.states, stage)

    def interrupted(*arguments):
        complete(*arguments)  # the cache has grown
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(value.states, stage, interrupted)
        with pytest.raises(KeyboardInterrupt):
            value.toxicity(ids[:, :8], tokens)
    for length in (7, 6, 9):
        expected = toxicity_of(classifiers["llama"], ids[:, :length], tokens)
        assert torch.allclose(value.toxicity(ids[:, :length], tokens).double(), expected, **CLOSE)


def test_without_branches_whole_texts_are_read_with_the_same_scores(classifiers, tokenizer, monkeypatch):
    ids, tokens = draw(3, 8), draw(3, 6)
    ids[1, :3] = MASKED
    branched = DetectorValue(classifiers["llama"], tokenizer).toxicity(ids, tokens)
    monkeypatch.setattr(CausalStates, "branches", False)
    assert torch.allclose(DetectorValue(classifiers["llama"], tokenizer).toxicity(ids, tokens), branched, **CLOSE)


def test_tokens_beyond_the_classifiers_embeddings_harm_no_others(classifier, value):
    """Models of one vocabulary pad their embeddings to several widths."""
    prefixes, tokens = draw(2, 5), draw(2, 4)
    tokens[0, 1] = tokens[1, 3] = 99
    found, told = value.toxicity(prefixes, tokens), tokens < 97
    expected = toxicity_of(classifier, prefixes, tokens.clamp_max(96))
    assert torch.allclose(found[told].double(), expected[told], **CLOSE)
    assert found.isfinite().all()


def test_the_calibration_of_the_first_label_is_applied(make_causal_classifier, tokenizer):
    classifier = make_causal_classifier(labels=("TOXICITY", "INSULT"))
    prefixes, tokens = draw(3, 5), draw(3, 8)
    prefixes[0], tokens[0] = torch.arange(40, 45), torch.arange(50, 58)  # words in which no special token is found
    plain = DetectorValue(classifier, tokenizer).toxicity(prefixes, tokens)
    assert torch.allclose(plain.double(), toxicity_of(classifier, prefixes, tokens), **CLOSE)
    classifier.config.calibration = {"INSULT": [[0.0, 1.0], [0.0, 0.0]]}
    assert torch.equal(DetectorValue(classifier, tokenizer).toxicity(prefixes, tokens), plain)
    knots = [[0.1, 0.5, 0.9], [0.0, 0.8, 0.9]]
    classifier.config.calibration |= {"TOXICITY": knots}
    found = DetectorValue(classifier, tokenizer).toxicity(prefixes, tokens)
    assert torch.allclose(found, torch.from_numpy(np.interp(plain, *knots)).float(), **CLOSE)
    texts = [" ".join(f"t{token}" for token in (*prefixes[0].tolist(), last)) for last in tokens[0].tolist()]
    assert found[0].tolist() == pytest.approx(classifier.probabilities(texts), abs=1e-4)


# --- rows with few candidates and rows with many


def ragged(rows, most, seed=0):
    """Candidates of which each row has another number, one at least."""
    tokens = draw(rows, most, seed)
    counts = torch.randint(1, most + 1, (rows, 1), generator=torch.Generator().manual_seed(seed))
    return Support(tokens, torch.arange(most) < counts)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("precise", [False, True], ids=["float32", "float64"])
def test_rows_of_several_sizes_are_scored_as_by_whole_passes(classifiers, tokenizer, kind, precise):
    classifier = copy.deepcopy(classifiers[kind])
    value = DetectorValue(classifier.double() if precise else classifier, tokenizer)
    ids = draw(4, 14)
    ids[1, :4] = ids[2, :1] = MASKED
    for rows, length in (([0, 1, 2, 3], 7), ([0, 1, 2, 3], 8), ([2, 0, 2, 1], 9), ([2, 0, 2, 1], 8), ([1], 12)):
        prefixes, candidates = ids[rows][:, :length], ragged(len(rows), 6, seed=length)
        hidden = value._memo.branch_states(prefixes, *candidates)
        assert hidden.dtype == (torch.float64 if precise else torch.float32)
        found = classifier.model.get_base_model().score(hidden)[..., 0].double().sigmoid()
        expected = toxicity_of(classifier, prefixes, candidates.tokens)
        assert (found - expected)[candidates.real].abs().max() < (1e-12 if precise else 1e-5)
        survival = value.log_survival(prefixes, candidates)
        assert torch.allclose(survival[candidates.real].double().exp(), 1 - expected[candidates.real], **CLOSE)
        assert (survival[~candidates.real] == -math.inf).all()


def test_packed_rows_change_nothing_and_leave_the_attention_as_it_was(classifiers, tokenizer, monkeypatch):
    prefixes, candidates = draw(5, 9), ragged(5, 7)
    for kind in ("gpt2", "llama"):
        trunk = classifiers[kind].model.get_base_model().base_model
        values = [DetectorValue(classifiers[kind], tokenizer) for _ in range(2)]
        run = []
        handle = trunk.register_forward_pre_hook(
            lambda module, args, kwargs, run=run: run.append(kwargs["input_ids"].shape), with_kwargs=True
        )
        packed = values[0].log_survival(prefixes, candidates)
        assert trunk.config._attn_implementation == "sdpa"
        with monkeypatch.context() as patched:
            patched.setattr(causal_states, "can_pack", lambda trunk: False)
            padded = values[1].log_survival(prefixes, candidates)
        handle.remove()
        assert run == [(5, 9), (1, int(candidates.real.sum())), (5, 9), (5, 7)]
        assert torch.allclose(packed, padded, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_cache_whole_texts_are_read_with_the_same_values(classifiers, tokenizer, kind):
    cached, plain = (DetectorValue(classifiers[kind], tokenizer, use_cache=use) for use in (True, False))
    ids = draw(3, 9)
    ids[1, :4] = MASKED
    for length in (6, 7, 9, 8):
        candidates = ragged(3, 5, seed=length)
        values = [each.log_survival(ids[:, :length], candidates) for each in (cached, plain)]
        assert torch.allclose(*values, **CLOSE)


# --- which tokens are candidates


def test_candidates_are_the_tokens_of_enough_probability():
    policy = torch.tensor([[0.5, 0.3, 0.15, 0.05, 0.0], [0.2, 0.2, 0.2, 0.2, 0.2], [0.0, 0.0, 1.0, 0.0, 0.0]])

    def chosen(*given):
        return [set(row[real].tolist()) for row, real in zip(*candidates_of(policy.log(), *given), strict=True)]

    assert chosen(0.15) == [{0, 1, 2}, {0, 1, 2, 3, 4}, {2}]
    assert [chosen(0.6)[row] for row in (0, 2)] == [{0}, {2}]  # the likeliest whatever its probability
    assert len(chosen(0.6)[1]) == 1
    assert chosen(0.9, None, 2)[0] == {0, 1}
    assert chosen(0.9, None, 2)[2] == {2}  # what was removed is no candidate
    assert [len(row) for row in chosen(None, 3)] == [3, 3, 1]
    assert [len(row) for row in chosen(None, 50)] == [4, 5, 1]
    assert candidates_of(policy.log() + 7, 0.15).tokens.equal(candidates_of(policy.log(), 0.15).tokens)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"candidates": 0.0}, "candidates is 0.0"),
        ({"candidates": 1.5}, "candidates is 1.5"),
        ({"candidates": math.nan}, "candidates is nan"),
        ({"k": 0}, "k is 0"),
        ({"k": 5, "candidates": 0.1}, "candidates is 0.1, and k is 5: give one"),
    ],
)
def test_what_chooses_no_candidates_is_refused(classifiers, tokenizer, given, said):
    with pytest.raises(InvalidArgumentError, match=said):
        DetectorValue(classifiers["llama"], tokenizer, **given)


# --- risks


def test_certain_risk_keeps_its_digits(make_causal_classifier, tokenizer):
    classifier = make_causal_classifier(labels=("toxic", "rude"))
    classifier.model.get_base_model().score.weight.data.mul_(100)
    classifier.config.calibration = {"toxic": 2.0}
    value = DetectorValue(classifier, tokenizer)
    prefixes, candidates = draw(8, 5), ragged(8, 6)
    logits = classifier.position_logits(torch.cat((prefixes, candidates.tokens[:, :1]), 1), torch.ones(8, 6))[:, -1, 0]
    assert logits.max() > 60
    survival = value.log_survival(prefixes, candidates)[:, 0].double()
    assert torch.allclose(survival, -torch.nn.functional.softplus(logits.double() / 2), rtol=1e-4, atol=1e-3)
    classifier.config.calibration = {"toxic": [[0.0, 1.0], [0.25, 0.75]]}
    survival = value.log_survival(prefixes, candidates)[:, 0].double().exp()
    assert torch.allclose(survival, 1 - (0.25 + 0.5 * logits.double().sigmoid()), **CLOSE)


def test_the_risks_of_a_text_are_those_that_its_tokens_had(classifiers, tokenizer):
    value = DetectorValue(classifiers["llama"], tokenizer)
    ids, mask = draw(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[1, :3] = 0
    found = value.action_values(ids, mask)
    assert found.isnan().tolist() == [[True] + 7 * [False], 4 * [True] + 4 * [False]]
    for place in range(4, 8):
        prefixes = ids[:, :place].masked_fill(mask[:, :place] == 0, MASKED)
        assert torch.allclose(-found[:, place], value.toxicity(prefixes, ids[:, place, None])[:, 0], **CLOSE)
    assert torch.allclose(token_risks(value, ids[:1]), -value.action_values(ids[:1]), **CLOSE, equal_nan=True)


def test_ids_without_a_token_are_certainly_toxic(classifiers, tokenizer):
    tokens = torch.tensor([[5, 99, 6]])
    found = DetectorValue(classifiers["llama"], tokenizer).log_survival(
        draw(1, 5), Support(tokens, torch.ones_like(tokens, dtype=torch.bool))
    )
    assert (found == -math.inf).tolist() == [[False, True, False]]


# --- what it costs


def test_the_cost_of_candidates_is_measured_along_a_models_own_texts(make_model, classifiers, tokenizer):
    model = make_model("llama", seed=6)
    texts = walk(model, tokenizer, ["t5 t6 t7", "t9"], 4, Sampling(do_sample=True, top_k=9))
    assert texts.ids.shape == (2, 7)
    assert (texts.ids == MASKED).tolist() == [[False] * 7, [True, True] + [False] * 5]
    for step, policy in enumerate(texts.policies):
        prefix = texts.prefixes(step)
        assert prefix.shape[1] == 3 + step
        assert (policy.gather(-1, texts.ids[:, 3 + step, None]) > -math.inf).all()
    trunk = classifiers["llama"].model.get_base_model().base_model
    few, most = candidate_costs(trunk, texts, [Way("few", 0.05), Way("k", None, 3, padded=True)], repetitions=2)
    assert (most.candidates, most.largest) == (3, 3)
    assert 1 <= few.candidates <= few.largest <= 9
    assert few.ratio.ratio > 0
    assert len(few.ratio.ratios) == 3 * 2


# --- what is refused


def test_a_classifier_that_reads_from_both_sides_is_refused(make_causal_classifier, tokenizer):
    encoder = BertForMaskedLM(BertConfig(**SIZES, **HEADS))
    with pytest.raises(InvalidArgumentError, match=r"backbone '.*encoder.*' is no causal model"):
        DetectorValue(make_causal_classifier("encoder", model=encoder), tokenizer)


def test_another_vocabulary_is_refused(classifiers, make_tokenizer):
    for other, said in ((make_tokenizer(rename={40: "x40"}), "97 tokens"), (make_tokenizer(words=90), "90 tokens")):
        with pytest.raises(VocabularyMismatchError, match=f"{said} is not that of the classifier, .*97 tokens"):
            DetectorValue(classifiers["llama"], other)


def test_a_text_that_exceeds_the_context_is_refused(make_causal_classifier, make_model, tokenizer):
    classifier = make_causal_classifier("short", model=make_model("gpt2", seed=3, n_positions=24))
    value, tokens = DetectorValue(classifier, tokenizer), draw(2, 3)
    ids = torch.nn.functional.pad(draw(2, 23), (2, 0), value=MASKED)
    assert torch.allclose(value.toxicity(ids, tokens).double(), toxicity_of(classifier, ids, tokens), **CLOSE)
    with pytest.raises(InvalidArgumentError, match="classifier would read 25 tokens, and its context is 24"):
        value.toxicity(draw(2, 24), tokens)
    with pytest.raises(InvalidArgumentError, match="empty"):
        value.toxicity(ids[:, :0], tokens)
