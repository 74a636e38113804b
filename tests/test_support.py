"""Truncated policies: valuing the tokens that are left gives what valuing all of them gives."""

import math

import pytest
import torch
from decoding import decode, prompts

from rectify import Advantage, Cap, Mask, RectificationProcessor, Tilt, processor
from rectify.rule import rectify, rectify_support
from rectify.support import support_of

RULES = [
    Tilt(beta=4.5),
    Tilt(beta=4.5, epsilon=0.05),
    Cap(epsilon=0.1),
    Cap(epsilon=0.9),
    Mask(threshold=0.4),
    Mask(threshold=0.97),
    Mask(threshold=0.9999),  # dead ends
    Advantage(tau=0.05),
]


def test_a_support_holds_the_tokens_that_are_left():
    scores = torch.full((3, 9), -math.inf)
    scores[0, [1, 5, 8]], scores[1, 0], scores[2, [0, 3]] = 1.0, 2.0, 3.0
    support = support_of(scores, 3)
    assert [row[real].tolist() for row, real in zip(*support, strict=True)] == [[1, 5, 8], [0], [0, 3]]
    assert support_of(scores, 2) is None
    assert support_of(torch.full((2, 9), -math.inf), 9) is None


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_the_support_alone_a_rule_makes_what_it_makes_of_the_whole(rule, dtype):
    draw = torch.Generator().manual_seed(3)
    unwarped = 3 * torch.randn(12, 50, generator=draw, dtype=dtype)
    log_survival = torch.nn.functional.logsigmoid(3 * torch.randn(12, 50, generator=draw, dtype=dtype) + 1)
    kept = torch.randint(1, 9, (12, 1), generator=draw)
    scores = unwarped.masked_fill(unwarped.argsort(descending=True).argsort() >= kept, -math.inf)
    log_survival[:2] = 0  # rows that are left alone
    expected = rectify(scores, log_survival, rule, unwarped)

    def of_some(rows, tokens):
        return log_survival.gather(-1, tokens) if rows is None else log_survival[rows]

    found = rectify_support(scores, support_of(scores, 8), of_some, rule, unwarped)
    for name in ("capped", "widened", "dead_end"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert torch.allclose(found.moved, expected.moved, atol=1e-5)
    assert torch.equal(found.scores == -math.inf, expected.scores == -math.inf)
    assert torch.allclose(found.scores, expected.scores, atol=1e-5)
    if isinstance(rule, Tilt | Advantage) and rule.epsilon is None:
        assert torch.equal(found.scores[:2], scores[:2])


def test_the_rules_meet_dead_ends_and_widened_supports():
    draw = torch.Generator().manual_seed(3)
    unwarped = 3 * torch.randn(12, 50, generator=draw)
    log_survival = torch.nn.functional.logsigmoid(3 * torch.randn(12, 50, generator=draw) + 1)
    scores = unwarped.masked_fill(unwarped.argsort(descending=True).argsort() >= 4, -math.inf)
    results = [rectify(scores, log_survival, rule, unwarped) for rule in RULES]
    assert any(result.dead_end.any() for result in results)
    assert any(result.widened.any() for result in results)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("sampling", [{"top_k": 5}, {"top_p": 0.4}, {"temperature": 0.3, "min_p": 0.1}], ids=repr)
def test_a_processor_generates_alike_either_way(model, q_network, monkeypatch, rule, sampling):
    def run():
        one = RectificationProcessor(q_network, rule, do_sample=True, **sampling)
        return decode(model, prompts(4), one, eos_token_id=None, pad_token_id=0).tolist(), one.statistics()

    sizes = []
    monkeypatch.setattr(processor, "support_of", lambda *given: sizes.append(support_of(*given)) or sizes[-1])
    found, counted = run()
    assert any(size is not None for size in sizes)
    monkeypatch.setattr(processor, "support_of", lambda *given: None)
    expected, counts = run()
    assert found == expected
    assert counted.moved == pytest.approx(counts.moved, abs=1e-3)
    assert (counted.capped, counted.widened, counted.dead_ends) == (counts.capped, counts.widened, counts.dead_ends)


def test_rows_that_pad_a_models_embeddings_stand_for_no_token(make_q_network, make_tokenizer):
    tokenizer = make_tokenizer()
    one = RectificationProcessor(
        make_q_network(tokenizer=tokenizer), Tilt(), tokenizer=tokenizer, do_sample=True, top_k=4
    )
    scores = torch.full((2, 104), -9.0)
    scores[0, [5, 100]], scores[1, [7, 8, 9]] = 3.0, 2.0
    result = one(prompts(2), scores)
    assert result[:, 97:].max() < result[0, 5] - 50
