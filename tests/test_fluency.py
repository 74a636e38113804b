"""Perplexities against slow float64 loops over single texts, and distinct n-grams against counts by hand."""

import copy
import math

import numpy as np
import pytest
import torch
from rule_reference import specified

from rectify import Advantage, Cap, InvalidArgumentError, Mask, RectificationProcessor, Tilt
from rectify.evaluation.fluency import (
    continuation_nll,
    distinct_n,
    prompted_nll,
    text_batch,
    token_log_probabilities,
)
from rectify.evaluation.teacher_forcing import forced_nll
from rectify.evaluation.trunk_kinds import build
from rectify.static_risk import StaticRiskConfig, StaticTokenRisk

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [2, 14]]
CONTINUATIONS = [[20, 21, 22, 23], [24, 25], [], [26, 27, 28, 29, 30, 31]]
RULES = [Tilt(beta=3.0), Mask(threshold=0.65), Advantage(tau=0.02), Cap(epsilon=0.3), Tilt(beta=1.0, epsilon=0.1)]
UNWARPED = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
KINDS = ["gpt2", "llama", "sliding"]


@torch.no_grad()
def slow_logits(model, prompt, continuation):
    """Float64 logits before each token of the continuation, each from a run over its own prefix."""
    model = copy.deepcopy(model).double()
    text = [*prompt, *continuation]
    return [model(torch.tensor([text[:end]])).logits[0, -1].numpy() for end in range(len(prompt), len(text))]


def normalised(scores):
    return scores - np.logaddexp.reduce(scores)


@pytest.fixture(params=KINDS)
def pair(request, models, q_networks):
    return models[request.param], q_networks[request.param]


def test_base_likelihood_is_that_of_a_loop(pair):
    model, _ = pair
    found = continuation_nll(model, PROMPTS, CONTINUATIONS, batch_size=3)
    for row, (prompt, continuation) in enumerate(zip(PROMPTS, CONTINUATIONS, strict=True)):
        steps = zip(slow_logits(model, prompt, continuation), continuation, strict=True)
        assert found.nll[row].item() == pytest.approx(-sum(normalised(s)[token] for s, token in steps), abs=1e-4)
    assert found.tokens.tolist() == [4, 2, 0, 6]
    assert found.perplexity == pytest.approx(math.exp(found.nll.sum().item() / 12))
    alone = [continuation_nll(model, [p], [c]).nll for p, c in zip(PROMPTS, CONTINUATIONS, strict=True)]
    assert torch.allclose(torch.cat(alone), found.nll, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(pair, side):
    model, _ = pair
    batch = text_batch(PROMPTS, CONTINUATIONS, side)
    found = token_log_probabilities(model, batch)
    for row, (prompt, continuation) in enumerate(zip(PROMPTS, CONTINUATIONS, strict=True)):
        alone = token_log_probabilities(model, text_batch([prompt], [continuation]))[0, len(prompt) :]
        assert torch.allclose(found[row, batch.counted[row]], alone, atol=1e-4)
    assert (found[~batch.counted] == 0).all()


def slow_rectified(model, values_after, rule):
    """Sums over a loop of single tokens; `values_after(prefix)` gives Q."""
    nll = base_nll = 0.0
    tokens = cut = removed = 0
    for prompt, continuation in zip(PROMPTS, CONTINUATIONS, strict=True):
        for place, scores in enumerate(slow_logits(model, prompt, continuation)):
            token = continuation[place]
            policy = specified(rule, scores, values_after([*prompt, *continuation[:place]]))[0]
            base, after = math.exp(normalised(scores)[token]), policy[token]
            removed += after == 0
            cut += after < base / 10
            nll -= math.log(after or base / 1000)
            base_nll -= math.log(base)
            tokens += 1
    return nll, base_nll, tokens, cut, removed


def forced(model, risk_model, rule, prompts, continuations, **given):
    processor = RectificationProcessor(risk_model, rule, model=model, **UNWARPED)
    return forced_nll(model, processor, prompts, continuations, **given)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_rectified_nll_is_that_of_a_loop(pair, rule):
    model, q_network = pair
    precise = copy.deepcopy(q_network).double()

    @torch.no_grad()
    def values_after(prefix):
        return precise(torch.tensor([prefix]))[0, -1].double().numpy()

    expected = slow_rectified(model, values_after, rule)
    found = forced(model, q_network, rule, PROMPTS, CONTINUATIONS, batch_size=3)
    assert (found.nll, found.base_nll) == pytest.approx(expected[:2], abs=1e-3)
    assert (found.tokens, found.cut, found.removed) == expected[2:]
    assert found.perplexity == pytest.approx(math.exp(expected[0] / 12), rel=1e-4)
    assert found.base_perplexity == pytest.approx(continuation_nll(model, PROMPTS, CONTINUATIONS).perplexity)
    assert found.cut_share == expected[3] / 12


def test_a_table_of_risks_removes_and_cuts(model):
    risk = np.full(97, 0.1)
    risk[[20, 26]] = 0.9, 0.7
    static = StaticTokenRisk(risk, StaticRiskConfig(97, 0.1, 20.0))
    expected = slow_rectified(model, lambda prefix: -risk, Mask(threshold=0.5))
    assert expected[4] == 2
    found = forced(model, static, Mask(threshold=0.5), PROMPTS, CONTINUATIONS)
    assert (found.nll, found.base_nll) == pytest.approx(expected[:2], abs=1e-3)
    assert (found.tokens, found.cut, found.removed) == expected[2:]
    tilted = forced(model, static, Tilt(beta=3.0), PROMPTS, CONTINUATIONS)
    assert (tilted.cut, tilted.removed) == (2, 0)


def test_a_rule_that_does_nothing_changes_nothing(model, q_network):
    found = forced(model, q_network, Tilt(beta=0.0), PROMPTS, CONTINUATIONS)
    assert found.nll == found.base_nll
    assert (found.cut, found.removed) == (0, 0)


def test_nothing_to_measure(model, q_network):
    assert math.isnan(continuation_nll(model, [[5]], [[]]).perplexity)
    assert math.isnan(continuation_nll(model, [], []).perplexity)
    nothing = forced(model, q_network, Tilt(), [], [])
    assert math.isnan(nothing.perplexity)
    assert math.isnan(nothing.cut_share)


def test_unusable_texts_are_refused(model):
    with pytest.raises(InvalidArgumentError, match="prompts are 2, continuations 1"):
        continuation_nll(model, [[5], [6]], [[7]])
    with pytest.raises(InvalidArgumentError, match="prompts hold no token at place 1"):
        continuation_nll(model, [[5], []], [[7], [8]])
    with pytest.raises(InvalidArgumentError, match="batch_size is 0"):
        continuation_nll(model, [[5]], [[7]], batch_size=0)


def test_distinct_n():
    continuations = [["a b a b", " a  b\nc"], ["x"], ["", " "]]
    assert distinct_n(continuations, 1) == pytest.approx((3 / 7 + 1) / 2)
    assert distinct_n(continuations, 2) == pytest.approx((3 / 7 + 0) / 2)  # a-b, b-a, b-c
    assert distinct_n(continuations, 3) == pytest.approx((3 / 7 + 0) / 2)  # a-b-a, b-a-b, a-b-c
    assert math.isnan(distinct_n([["", " "]], 1))
    assert math.isnan(distinct_n([], 1))
    with pytest.raises(InvalidArgumentError, match="n is 0"):
        distinct_n(continuations, 0)


# the last two take no cache, and keep convolutions' states
@pytest.mark.parametrize("kind", ["gpt2", "llama", "sliding", "recurrent", "openai-gpt", "lfm2"])
def test_a_prompt_that_is_read_once_gives_the_same_likelihood(make_model, kind):
    model = build(kind) if kind in ("openai-gpt", "lfm2") else make_model(kind)
    prompts = [[5], [6, 7, 8, 9, 10, 11], [12, 13], [14]]
    texts = [[[20, 21, 22], [23]], [[24, 25], []], [[26, 27, 28, 29], [30, 31]], [[32], [33, 34]]]
    flat = [text for ones in texts for text in ones]
    expected = continuation_nll(model, [prompt for prompt in prompts for _ in range(2)], flat)
    for size in (1, 4, 100):
        found = prompted_nll(model, prompts, texts, size)
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.allclose(found.nll, expected.nll, rtol=0, atol=1e-4)
