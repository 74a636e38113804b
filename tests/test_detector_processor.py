"""Rectification by a detector, alone and with a Q network, against a slow reference in float64."""

import math

import pytest
import torch
from causal_classifiers import toxicity_of
from decoding import assistant_of, capped, caps_under, decode, log_survival_of, new_tokens, padded, prompts, warped
from prompt_records import run_settings

from rectify import (
    Advantage,
    Cap,
    DeadEndQNetwork,
    DetectorValue,
    InvalidArgumentError,
    Mask,
    RectificationProcessor,
    Tilt,
)
from rectify.evaluation.fluency import FLOOR
from rectify.evaluation.prompted_run import PromptedRun
from rectify.evaluation.run_metrics import measured
from rectify.evaluation.strength_choice import Target, choose
from rectify.evaluation.teacher_forcing import forced_nll
from rectify.q_network import token_risks

ROWS = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15, 16], [17]]
SAMPLING = {"temperature": 0.8, "top_p": 0.9}
RULES = [
    Tilt(beta=3.0),
    Tilt(beta=2.0, epsilon=0.2),
    Cap(epsilon=0.1),
    Cap(epsilon=0.9),
    Mask(threshold=0.45),
    Mask(threshold=0.9),
]


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    return make_tokenizer()


@pytest.fixture(scope="module")
def lm(make_model):
    return make_model("llama", seed=6)


@pytest.fixture(scope="module")
def classifier(causal_classifiers):
    return causal_classifiers["llama"]


@pytest.fixture(scope="module")
def network(make_q_network):
    return make_q_network("gpt2", noise=0.4)


@pytest.fixture(scope="module")
def make(lm, classifier, tokenizer):
    """`make(network, rule, combination, cached, candidates, k, **sampling)`: a processor."""

    def of(network=None, rule=None, combination="product", cached=True, candidates=0.01, k=None, **sampling):
        detector = DetectorValue(classifier, tokenizer, candidates, k, cached)
        arguments = {"model": lm, "tokenizer": tokenizer, "use_cache": cached, "combination": combination}
        return RectificationProcessor(network, rule or Tilt(beta=3.0), detector=detector, **arguments, **sampling)

    return of


@torch.no_grad()
def scores_of(lm, rows):
    """Left-padded ids and the model's scores of each text by itself."""
    return padded(rows, 0, 1)[0], torch.stack([lm(torch.tensor([row])).logits[0, -1] for row in rows])


def reference(logits, text, classifier, network, rule, combination, candidates=0.01, k=None, **sampling):
    """Base and rectified policy and the survival of the candidates after one text, `[V]` float64, and what happened.

    Survival is NaN and the policy 0 where a token is no candidate.
    """
    base, unwarped = warped(logits, **sampling), warped(logits, sampling.get("temperature", 1.0))
    ordered = base.argsort(descending=True)
    chosen = ordered[:k] if k else ordered[: max(1, int((base >= candidates).sum()))]
    chosen = chosen[base[chosen] > 0]
    survival = 1 - toxicity_of(classifier, torch.tensor([text]), chosen[None])[0]
    if network is not None:
        other = log_survival_of(network, torch.tensor(text)).double().exp()[chosen]
        survival = survival * other if combination == "product" else torch.minimum(survival, other)
    dead_end = False
    policy = base[chosen] / base[chosen].sum()
    if isinstance(rule, Tilt):
        policy = policy * survival**rule.beta
        policy = policy / policy.sum()
    elif isinstance(rule, Mask):
        policy = policy * (survival >= rule.threshold)
        dead_end = not policy.sum() > 0
    if rule.epsilon is not None:
        found = capped(policy, caps_under(survival, rule))
        dead_end, policy = found is None, found
    if dead_end:
        policy = unwarped[chosen] * survival
    whole, known = torch.zeros_like(base), torch.full_like(base, math.nan)
    whole[chosen], known[chosen] = policy / policy.sum(), survival
    return base, whole, known, dead_end


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("combination", ["alone", "product", "max"])
@pytest.mark.parametrize("options", [SAMPLING, {"candidates": 0.05}, {"k": 4}], ids=str)
def test_the_policy_is_the_rules_on_the_candidates(lm, classifier, network, make, rule, combination, options):
    network = None if combination == "alone" else network
    how = "product" if network is None else combination
    ids, scores = scores_of(lm, ROWS)
    processor = make(network, rule, how, **options)
    found = processor(ids, scores).double().softmax(-1)
    moved, dead_ends = 0.0, 0
    for row, (text, policy) in enumerate(zip(ROWS, found, strict=True)):
        expected = reference(scores[row], text, classifier, network, rule, how, **options)
        assert torch.allclose(policy, expected[1], rtol=0, atol=1e-4)
        assert (policy[expected[2].isnan()] == 0).all()
        if rule.epsilon is not None and not expected[3]:
            caps = caps_under(expected[2], rule)
            assert (policy <= caps.nan_to_num(0) * (1 + 1e-4) + 1e-6).all()
        moved += float((expected[0] - expected[1]).abs().sum() / 2)
        dead_ends += expected[3]
        asked = torch.arange(97)[None].expand(len(ROWS), -1)
        survival = processor.log_survival_of(ids, scores, asked)[row].exp().double()
        assert torch.allclose(survival, expected[2], rtol=0, atol=1e-4, equal_nan=True)
    statistics = processor.statistics()
    assert (statistics.decisions, statistics.dead_ends) == (len(ROWS), dead_ends)
    assert statistics.moved == pytest.approx(moved, abs=1e-3)


def test_without_risk_the_base_is_left_on_the_candidates(lm, make, with_values, monkeypatch):
    ids, scores = scores_of(lm, ROWS)
    monkeypatch.setattr(DetectorValue, "log_survival", lambda value, prefixes, candidates: 0.0 * candidates.tokens)
    base = scores.softmax(-1)
    for rule in (Tilt(), Cap(epsilon=0.0), Mask()):
        for network in (None, with_values(torch.zeros(97))):
            processor = make(network, rule)
            found = processor(ids, scores)
            kept = base >= 0.01
            assert torch.equal(found, scores.masked_fill(~kept, -math.inf))
            removed = 1 - (base * kept).sum(-1)
            statistics = processor.statistics()
            assert statistics.moved == pytest.approx(float(removed.sum()), abs=1e-4)
            assert (statistics.capped, statistics.widened, statistics.dead_ends) == (0, 0, 0)


def test_a_dead_end_is_answered_within_the_candidates(lm, make, with_values):
    ids, scores = scores_of(lm, ROWS)
    processor = make(with_values(torch.full((97,), -1.0)), Cap(epsilon=0.0), top_k=3)
    found = processor(ids, scores)
    assert ((found > -math.inf).sum(-1) <= 3).all()
    assert torch.isfinite(found.logsumexp(-1)).all()
    assert processor.statistics().dead_ends == len(ROWS)


def test_what_the_temperature_made_infeasible_stays_at_that_temperature(make, monkeypatch):
    scores = torch.full((1, 97), -30.0)
    scores[0, :3] = torch.tensor([0.34, 0.33, 0.33]).log()
    survival = torch.tensor([[0.9, 0.5, 0.5]])
    monkeypatch.setattr(DetectorValue, "log_survival", lambda value, prefixes, candidates: survival.log())
    # the low temperature has the first token stand for the state, and leaves it alone below its cap
    processor = make(None, Advantage(tau=0.2, epsilon=0.0), temperature=0.01)
    policy = processor(prompts(1), scores).softmax(-1)[0]
    odds = 0.9 / 0.5 * (0.34 / 0.33) ** 100
    assert policy[:3].tolist() == pytest.approx([odds / (odds + 2), 1 / (odds + 2), 1 / (odds + 2)], abs=1e-4)
    assert (processor.statistics().widened, processor.statistics().dead_ends) == (0, 1)


# --- decoding


@pytest.mark.parametrize("combination", ["alone", "max"])
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 2},
        {"assistant_model": True},
    ],
    ids=str,
)
def test_generation_is_the_same_with_and_without_caches(lm, make, network, combination, options):
    rows = [ROWS[0]] if "assistant_model" in options else ROWS[:3]
    ids, mask = padded(rows, 0)
    if "assistant_model" in options:
        options = options | {"assistant_model": assistant_of(lm, 0.02)}
    made = {"rule": Tilt(beta=8.0), "num_beams": options.get("num_beams", 1)}
    if combination == "max":
        made |= {"network": network, "combination": "max"}
    found, slow = (
        decode(lm, ids, make(**made, cached=cached), attention_mask=mask, max_new_tokens=8, **options)
        for cached in (True, False)
    )
    assert torch.equal(found, slow)


def test_a_batch_is_its_rows_and_one_processor_serves_many(lm, make, network):
    processor = make(network, Tilt(beta=8.0))
    for rows in (ROWS[:3], ROWS[1:3], [ROWS[3]]):
        ids, mask = padded(rows, 0)
        options = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
        found = new_tokens(decode(lm, ids, processor, attention_mask=mask, **options), ids)
        for row, text in enumerate(rows):
            alone = torch.tensor([text])
            expected = decode(lm, alone, make(network, Tilt(beta=8.0)), **options)
            assert found[row] == new_tokens(expected, alone)[0]


def test_an_assistant_is_left_alone_where_a_shared_trunk_leaves_it(lm, make):
    shared = DeadEndQNetwork.from_trunk(lm, shared=True, rank=8).eval()
    torch.manual_seed(5)
    for parameter in shared.head.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    ids = prompts(1, 6, seed=2)
    plain = decode(lm, ids, make(shared, Tilt(beta=8.0)))
    processor = make(shared, Tilt(beta=8.0))
    assert torch.equal(decode(lm, ids, processor, assistant_model=assistant_of(lm, 0.02)), plain)
    assert processor.statistics().decisions >= 12


# --- other uses


@torch.no_grad()
def test_human_text_beyond_the_candidates_counts_as_removed(lm, make):
    texts, prompt = [[20, 30, 40], [50, 60]], [[5, 6, 7], [11, 12]]
    processor = make(None, Tilt(beta=0.0))
    found = forced_nll(lm, processor, prompt, texts)
    nll = removed = 0
    for before, text in zip(prompt, texts, strict=True):
        for place, token in enumerate(text):
            logits = lm(torch.tensor([[*before, *text[:place]]])).logits[0, -1].double()
            base = logits.softmax(-1)
            gone = base[token] < 0.01
            left = math.log(base[token]) - FLOOR if gone else math.log(base[token] / base[base >= 0.01].sum())
            nll, removed = nll - left, removed + int(gone)
    assert 0 < found.removed == removed < 5
    assert found.nll == pytest.approx(nll, abs=1e-3)
    assert math.isfinite(found.perplexity)


def test_a_run_has_the_figures_of_detectors(run_place, classifier, tmp_path):
    classifier.save_pretrained(tmp_path / "d+d")
    detector, place = f"detector:{tmp_path / 'd+d'}", run_place / "q"
    methods = (f"rectify:{place},beta=4+{detector}", f"{detector},k=3", f"{detector},beta=8,k=3")
    run = PromptedRun(run_settings(run_place, tmp_path / "run", methods=methods, num_prompts=6))
    run.run(("generate", "score", "measure"))
    assert len({run.folder_of(method) for method in run.methods}) == 4
    figures = measured(run)
    _, both, alone, other = figures["methods"]
    assert both["label"] == methods[0]
    assert (both["strength"], both["value"]) == ("beta", 4)
    assert alone["family"] == other["family"] != both["family"]
    assert both["reads_parameters"] > alone["reads_parameters"] > 0
    for each in (both, alone, other):
        assert each["clean"]["removed"] > 0
        assert each["clean"]["ratio"] > 1
        assert each["decisions"]["moved"] > 0
    chosen, _ = choose(figures, Target(share=1.0))
    assert methods[0] in chosen
    assert len(chosen) == 3


def test_the_risks_of_finished_texts(make, network, classifier, tokenizer):
    ids = prompts(2, 7)
    risks = [token_risks(each, ids) for each in (network, DetectorValue(classifier, tokenizer))]
    alone, product, most = (make(*given).token_risks(ids) for given in ((), (network,), (network, None, "max")))
    assert torch.equal(alone[:, 1:], risks[1][:, 1:])
    assert torch.allclose(product[:, 1:], (1 - (1 - risks[0]) * (1 - risks[1]))[:, 1:])
    assert torch.equal(most[:, 1:], torch.maximum(*risks)[:, 1:])
    assert product[:, 0].isnan().all()


def test_what_cannot_be_used_is_refused(lm, make, network):
    with pytest.raises(InvalidArgumentError, match="q_network is None, and there is no detector"):
        RectificationProcessor(None)
    with pytest.raises(InvalidArgumentError, match="combination is 'sum': give one of product, max"):
        make(network, combination="sum")
    with pytest.raises(InvalidArgumentError, match="no other tokens than its candidates"):
        make(network).next_token_log_survival(prompts())
    with pytest.raises(InvalidArgumentError, match="inputs_embeds"):
        make()(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, 97))
