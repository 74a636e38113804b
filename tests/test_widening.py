"""How far a truncated policy is widened, and at which temperature; margins of small risks; what `generate` is given."""

import pytest
import torch
from decoding import VOCABULARY, decode, prompts
from rule_reference import at_risk, both_dtypes, policy_of, risk_scores
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList

from rectify import Advantage, Cap, InvalidArgumentError, Mask, RectificationProcessor, Tilt

INF = float("inf")


def base(*probabilities):
    """Scores of these probabilities, and next to none of all other tokens."""
    scores = torch.full((1, VOCABULARY), -200.0)
    scores[0, : len(probabilities)] = torch.tensor(probabilities).log()
    return scores


# --- the temperature


@pytest.mark.parametrize("truncation", [{"top_k": 2}, {"top_p": 0.8}, {"min_p": 0.5}], ids=str)
def test_a_widened_policy_keeps_its_temperature(with_values, truncation):
    q = torch.zeros(1, VOCABULARY)
    q[0, :2] = torch.tensor([-0.75, -0.5])  # these hold three quarters
    processor = RectificationProcessor(with_values(q), Cap(epsilon=0.0), temperature=0.5, **truncation)
    policy = processor(prompts(1), base(0.4, 0.3, 0.2, 0.1)).softmax(-1)[0]
    # 0.2 and 0.1 squared are as 4 to 1
    assert policy[:4].tolist() == pytest.approx([0.25, 0.5, 0.2, 0.05], abs=1e-5)
    assert processor.statistics().widened == 1


def test_a_mask_that_removes_the_nucleus_keeps_the_temperature(with_values):
    q = torch.zeros(1, VOCABULARY)
    q[0, 0] = -1.0
    processor = RectificationProcessor(with_values(q), Mask(), temperature=0.5, top_p=0.3)
    policy = processor(prompts(1), base(0.4, 0.3, 0.2, 0.1)).softmax(-1)[0]
    assert policy[:4].tolist() == pytest.approx([0, 9 / 14, 4 / 14, 1 / 14], abs=1e-5)


def test_a_dead_end_keeps_the_temperature(with_values):
    processor = RectificationProcessor(
        with_values(torch.full((1, VOCABULARY), -1.0)), Mask(), temperature=0.5, top_p=0.3
    )
    policy = processor(prompts(1), base(0.4, 0.3, 0.2, 0.1)).softmax(-1)[0]
    assert policy[:4].tolist() == pytest.approx([16 / 30, 9 / 30, 4 / 30, 1 / 30], abs=1e-5)
    assert processor.statistics().dead_ends == 1


# --- margins


@pytest.mark.parametrize(
    "rule", [Cap(epsilon=0.1), Cap(epsilon=1.0), Tilt(epsilon=0.4), Advantage(epsilon=0.1)], ids=str
)
@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.9}], ids=str)
def test_a_confident_policy_without_risk_is_left_alone(with_values, rule, sampling):
    processor = RectificationProcessor(with_values(torch.zeros(1, VOCABULARY)), rule, **sampling)
    scores, found = base(0.95, 0.04, 0.01), processor(prompts(1), base(0.95, 0.04, 0.01))
    kept = found > -INF
    assert torch.equal(found[kept], scores[kept])
    statistics = processor.statistics()
    assert (statistics.widened, statistics.dead_ends, statistics.capped, statistics.moved) == (0, 0, 0, 0.0)


def test_a_small_risk_lets_in_as_much_as_twice_it(with_values):
    processor = RectificationProcessor(with_values(torch.full((1, VOCABULARY), -0.01)), Cap(epsilon=0.1), top_p=0.9)
    policy = processor(prompts(1), base(0.95, 0.04, 0.01)).softmax(-1)[0]
    assert policy[:3].tolist() == pytest.approx([0.98, 0.016, 0.004], abs=1e-6)
    assert processor.statistics().widened == 1


@both_dtypes
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.4, 1.0])
def test_the_margin_is_the_smaller_of_the_risk_and_epsilon(epsilon, dtype):
    risk = torch.tensor([0.0, 1e-3, 0.05, 0.1, 0.25, 0.4, 0.7, 1.0], dtype=dtype)
    caps = Cap(epsilon=epsilon).caps((-risk).log1p())
    published, without = (1 - risk - epsilon).clamp(1e-7, 1), (1 - risk).clamp(1e-7, 1)
    assert torch.allclose(caps[risk >= epsilon], published[risk >= epsilon], atol=1e-6)
    assert (caps >= published - 1e-6).all()
    assert (caps <= without + 1e-6).all()
    assert (caps.diff() <= 1e-6).all()
    assert caps[0] == 1


@both_dtypes
def test_a_widened_support_stands_at_its_caps(dtype):
    whole, q = risk_scores((20, 40), 3, dtype=dtype)
    q[:, ::3] = -0.1
    kept = whole >= whole.topk(2).values[:, -1:]
    q[kept] = -0.7
    policy = policy_of(result := at_risk(whole.masked_fill(~kept, -INF), q, Cap(epsilon=0.0), whole))
    assert result.widened.all()
    assert torch.allclose(policy[kept], torch.tensor(0.3, dtype=torch.float64), atol=1e-6)
    # the others are as likely as they were, one to another, where no cap holds them
    free = ~kept & (policy < 1 + q.double() - 1e-6)
    ratio = policy.log() - whole.double()
    for row in range(20):
        assert ratio[row][free[row]].std() < 1e-5


# --- what generate is given


def test_further_arguments_of_generate(model, q_network):
    processor = RectificationProcessor(q_network, top_k=9)
    given = processor.generate_kwargs(do_sample=True, max_new_tokens=3, top_p=None)
    assert given == {"do_sample": True, "max_new_tokens": 3} | processor.generate_kwargs()
    ids = prompts(2)
    torch.manual_seed(7)
    found = model.generate(ids, logits_processor=[processor], attention_mask=torch.ones_like(ids), **given)
    assert torch.equal(found, decode(model, ids, processor, do_sample=True, max_new_tokens=3))
    settled = RectificationProcessor(q_network, do_sample=True)
    assert settled.generate_kwargs(do_sample=True) == settled.generate_kwargs()


@pytest.mark.parametrize(
    ("made", "asked", "said"),
    [
        ({}, {"temperature": 0.7}, "temperature is 0.7.*give temperature to the processor"),
        ({"top_p": 0.9}, {"top_p": 0.9}, "top_p is 0.9.*give top_p to the processor"),
        ({}, {"min_p": 0.0}, "min_p is 0.0"),
        ({"do_sample": False}, {"do_sample": True}, "do_sample is True.*give do_sample to the processor"),
        ({"do_sample": True}, {"do_sample": False}, "do_sample is False"),
        ({}, {"cache_implementation": "paged"}, "drops the processor"),
    ],
)
def test_arguments_that_undo_the_rule_are_refused(q_network, made, asked, said):
    with pytest.raises(InvalidArgumentError, match=said):
        RectificationProcessor(q_network, **made).generate_kwargs(**asked)


def test_continuous_batching_is_warned_of(q_network):
    with pytest.warns(RuntimeWarning, match="nothing is rectified"):
        kept = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([RectificationProcessor(q_network)]))
    assert not kept.logits_processor
