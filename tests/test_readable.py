"""What no decision can read: risks that are no numbers, tokens that are banned, and scores of any size."""

import math
import warnings

import numpy as np
import pytest
import torch
from decoding import VOCABULARY, decode, prompts
from rule_reference import INF, at_risk, cap_of, policy_of, risk_scores

from rectify import Advantage, Cap, InvalidArgumentError, Mask, RectificationProcessor, Tilt
from rectify.evaluation.decision_fuzz import fuzz
from rectify.readable import readable_scores
from rectify.rule import rectify, rectify_candidates, rectify_support
from rectify.support import candidates_of, support_of

RULES = [Tilt(), Tilt(beta=1.0, epsilon=0.1), Mask(threshold=0.5), Advantage(tau=0.1), Cap(epsilon=0.1)]
NO_SURVIVAL = [math.nan, INF, 1e-3, 5.0]
BANS = [-INF, math.nan, -1e4, -65504.0, -1e9, -1e30, torch.finfo(torch.bfloat16).min, torch.finfo(torch.float32).min]
every_rule = pytest.mark.parametrize("rule", RULES, ids=str)


def test_a_slice_of_the_fuzz():
    found = fuzz(400, seed=7)
    assert found.faults == []
    assert found.counts["compared"] > 100
    assert min(found.counts[name] for name in ("widened", "dead ends", "unread", "banned tokens")) > 10


# --- risks


@every_rule
@pytest.mark.parametrize("value", NO_SURVIVAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_token_of_unknown_risk_counts_as_the_riskiest(rule, value, dtype):
    scores, q = risk_scores((3, 30), 1)
    log_survival = (q * 0.3).log1p().to(dtype)
    scores[1, 4] = 9.0  # nearly all of the policy
    log_survival[1, 4] = value
    result = rectify(scores, log_survival, rule)
    assert result.unread.tolist() == [False, True, False]
    assert not result.dead_end.any()
    policy = policy_of(result)
    assert policy[1, 4] <= 1e-6
    assert policy[1].sum().item() == pytest.approx(1)
    # the other rows are what they were
    assert torch.equal(result.scores[::2], rectify(scores[::2], log_survival[::2], rule).scores)
    if rule.removes:
        # and the other tokens of the row are decided as if it were not there
        others = torch.arange(30) != 4
        alone = rectify(scores[1:2, others], log_survival[1:2, others], rule)
        assert torch.allclose(policy[1:2, others], policy_of(alone), atol=1e-6)


@every_rule
def test_a_state_without_any_known_risk_is_a_counted_dead_end(rule):
    scores, q = risk_scores((3, 30), 2)
    log_survival = q.log1p()
    log_survival[1] = math.nan
    result = rectify(scores, log_survival, rule)
    assert result.unread.tolist() == [False, True, False]
    assert result.dead_end.tolist() == [False, True, False]
    assert torch.allclose(policy_of(result)[1], scores[1].softmax(-1))


@every_rule
def test_what_truncation_left_without_a_known_risk_is_widened(rule):
    whole, q = risk_scores((1, 30), 3)
    log_survival, kept = (q * 0.2).log1p(), whole >= whole.topk(3).values[:, -1:]
    log_survival[kept] = math.nan
    result = rectify(whole.masked_fill(~kept, -INF), log_survival, rule, whole)
    assert (result.unread.item(), result.widened.item(), result.dead_end.item()) == (True, True, False)
    assert policy_of(result)[kept].sum() == 0


@every_rule
def test_certain_harm_and_rounding_are_read(rule):
    scores, q = risk_scores((2, 30), 4)
    log_survival = q.log1p()
    log_survival[0, :5], log_survival[0, 5] = -INF, -745.0
    log_survival[1, :] = 1e-7
    result = rectify(scores, log_survival, rule)
    assert not result.unread.any()
    assert torch.equal(result.scores[1], scores[1])


@pytest.mark.parametrize("way", ["whole", "truncated", "candidates"])
@every_rule
def test_a_processor_warns_once_and_counts(with_values, monkeypatch, rule, way):
    q = torch.full((2, VOCABULARY), -0.2)
    q[1, 5] = math.nan
    processor = RectificationProcessor(with_values(q), rule, top_k=4 if way == "truncated" else None)
    if way == "candidates":
        monkeypatch.setattr(processor, "detector", _Certain())
    scores = torch.zeros(2, VOCABULARY)
    scores[:, :5], scores[:, 5] = 3.0, 9.0
    with pytest.warns(RuntimeWarning, match=r"Q network \(StubNetwork\)") as caught:
        result = processor(prompts(2), scores)
    assert len(caught) == 1
    assert result.softmax(-1)[1, 5] < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor(prompts(2), scores)
    assert (processor.statistics().unread, processor.statistics().dead_ends) == (2, 0)
    if way != "candidates":
        assert processor.log_survival_of(prompts(2), scores, torch.tensor([[5], [5]]))[1, 0] == -INF
    processor.reset()
    assert processor.statistics().unread == 0


@every_rule
@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.5}], ids=str)
def test_a_network_of_nan_is_told_of_at_every_decision(model, with_values, rule, sampling):
    processor = RectificationProcessor(with_values(torch.full((VOCABULARY,), math.nan)), rule, **sampling)
    with pytest.warns(RuntimeWarning, match="riskiest"):
        decode(model, prompts(2), processor, max_new_tokens=3, eos_token_id=None, do_sample=True)
    found = processor.statistics()
    assert (found.decisions, found.unread, found.dead_ends) == (6, 6, 6)


class _Certain:
    """A detector that hides what it is multiplied with: its own risks are known."""

    def candidates_of(self, scores, least):
        return candidates_of(scores, 0.001)

    def log_survival(self, prefixes, candidates):
        return torch.full(candidates.tokens.shape, -0.45)

    def clear(self):
        pass


@pytest.mark.parametrize("combination", ["product", "max"])
def test_one_of_two_risks_does_not_hide_that_the_other_is_none(with_values, monkeypatch, combination):
    q = torch.full((1, VOCABULARY), -0.2)
    q[0, 5] = 0.5  # a survival of 1.5, which times the detector's would look like one
    processor = RectificationProcessor(with_values(q), Mask(threshold=0.1), combination=combination)
    monkeypatch.setattr(processor, "detector", _Certain())
    scores = torch.zeros(1, VOCABULARY)
    with pytest.warns(RuntimeWarning, match="no numbers"):
        assert processor(prompts(1), scores)[0, 5] == -INF
    assert processor.statistics().unread == 1


# --- bans


@every_rule
@pytest.mark.parametrize("ban", BANS)
@pytest.mark.parametrize("way", ["rectify", "rectify_support", "rectify_candidates", "processor"])
def test_a_ban_stays_a_ban(with_values, rule, ban, way):
    unwarped, q = risk_scores((4, VOCABULARY), 5, dtype=torch.float32)
    unwarped[:, :90] = ban
    q[0] = -1.0  # a dead end
    q[1, 90:] *= 0.01
    q[2, 90:], q[:, :90] = -0.95, 0.0  # only banned tokens have room
    best = unwarped.nan_to_num(nan=-INF).argmax(-1, keepdim=True)
    scores = torch.full_like(unwarped, -INF).scatter(-1, best, unwarped.gather(-1, best))
    support, log_survival = support_of(scores, VOCABULARY), q.log1p()
    if way == "rectify":
        found = rectify(scores, log_survival, rule, unwarped).scores
    elif way == "rectify_support":

        def of_some(rows, tokens):
            return log_survival.gather(-1, tokens) if rows is None else log_survival[rows]

        found = rectify_support(scores, support, of_some, rule, unwarped).scores
    elif way == "rectify_candidates":
        found = rectify_candidates(scores, support, log_survival.gather(-1, support.tokens), rule, unwarped).scores
    else:
        found = RectificationProcessor(with_values(q), rule, temperature=3.0, top_k=20)(prompts(4), unwarped)
    assert (found[:, :90] == -INF).all()
    assert torch.isfinite(found.logsumexp(-1)).all()
    assert (found[:, 90:] > -INF).any(-1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_large_scores_are_no_bans(dtype):
    whole, _ = risk_scores((4, 200), 6)
    for scale in (1.0, 1e3, 4e3) if dtype == torch.float16 else (1.0, 1e6, 1e30):
        scores = (whole * scale).to(dtype)
        assert (readable_scores(scores) > -INF).all()
    low = (whole - 2.0**15).to(dtype)  # all of them: not one is a ban
    assert (readable_scores(low) > -INF).all()


def test_a_score_of_plus_infinity_takes_all_and_is_still_capped():
    scores, q = torch.tensor([[0.0, 1.0, INF, -1e9]]), torch.tensor([[-0.9, -0.2, -0.7, 0.0]])
    assert policy_of(at_risk(scores, q * 0, Tilt()))[0].tolist() == [0, 0, 1, 0]
    assert policy_of(at_risk(scores, q, Cap(epsilon=0.0)))[0].tolist() == pytest.approx([0, 0.7, 0.3, 0], abs=0.2)
    assert policy_of(at_risk(scores, q, Cap(epsilon=0.0)))[0, 3] == 0


@pytest.mark.parametrize("value", [-INF, math.nan])
@every_rule
def test_a_row_without_a_token_is_refused(q_network, rule, value):
    scores = torch.zeros(3, VOCABULARY)
    scores[1] = value
    said = "NaN" if math.isnan(value) else "-inf"
    with pytest.raises(InvalidArgumentError, match=f"no token in row 1.*{said}"):
        rectify(scores, torch.zeros_like(scores), rule)
    with pytest.raises(InvalidArgumentError, match=f"no token in row 1.*{said}"):
        RectificationProcessor(q_network, rule, top_p=0.9)(prompts(3), scores)


# --- size


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e6, 1e12, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rule", [Cap(epsilon=0.1), Tilt(beta=1.0, epsilon=0.0)], ids=str)
def test_caps_hold_at_every_scale(rule, dtype, scale):
    scores, q = risk_scores((40, 100), 8)
    scores, q = (scores * scale).to(dtype), q.float()
    scores[:, ::7] = torch.finfo(dtype).min
    result = at_risk(scores, q, rule)
    assert result.scores.dtype == torch.promote_types(dtype, torch.float32)
    assert not result.dead_end.any()
    policy = policy_of(result)
    assert (policy <= cap_of(q, rule.epsilon) + 1e-6).all()
    assert policy.sum(-1).numpy() == pytest.approx(np.ones(40), abs=1e-6)
    assert (policy[:, ::7] == 0).all()


# --- odd batches


@every_rule
@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.5, "temperature": 0.7}], ids=str)
def test_an_empty_batch_and_a_vocabulary_of_one_token(with_values, rule, sampling):
    network = with_values(torch.full((3, VOCABULARY), -0.3))
    processor = RectificationProcessor(network, rule, **sampling)
    assert processor(prompts(3)[:0], torch.zeros(0, VOCABULARY)).shape == (0, VOCABULARY)
    assert rectify(torch.full((2, 1), 7.0), torch.full((2, 1), -0.1), rule).scores.softmax(-1).tolist() == [[1], [1]]
    with pytest.raises(InvalidArgumentError, match="at least one token"):
        rectify(torch.zeros(2, 0), torch.zeros(2, 0), rule)


@every_rule
def test_scores_that_need_a_gradient(with_values, rule):
    leaf = torch.randn(2, VOCABULARY, requires_grad=True)
    processor = RectificationProcessor(with_values(torch.full((2, VOCABULARY), -0.3)), rule, top_k=5)
    assert not processor(prompts(2), leaf * 2).requires_grad
    assert torch.isfinite(rectify(leaf * 2, torch.full((2, VOCABULARY), -0.3), rule).scores).any()
