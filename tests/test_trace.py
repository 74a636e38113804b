"""The trace of a continuation: a replay against whole forward passes in float64, and the files that show it."""

import copy
import json
import math
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from causal_classifiers import toxicity_of
from decoding import expected_policy, log_survival_of, warped

from rectify import (
    Cap,
    DeadEndQNetwork,
    DetectorValue,
    InvalidArgumentError,
    RectificationProcessor,
    Tilt,
    load_language_model,
)
from rectify.generation.generator import Continuation, Generator, continue_with
from rectify.generation.prompts import Prompt, numbered
from rectify.generation.trace import trace_of
from rectify.generation.trace_file import trace_path, write_trace
from rectify.generation.trace_page import trace_page
from rectify.keyed_noise import gumbel
from rectify.methods.base import Base
from rectify.methods.method import Decoder
from rectify.methods.self_debias import SelfDebias
from rectify.sampling import Sampling

TEXTS = ("t5 t6 t7 t8", "t9", "t10 t11 <b>", "t9")
PROMPTS = numbered(map(Prompt.of, TEXTS))
SAMPLING = {"do_sample": True, "top_p": 0.9, "temperature": 0.8}
WARPED = {"top_p": 0.9, "temperature": 0.8}
END = 2
LEAST = 3
CLOSE = 2e-5


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    return tokenizer


@pytest.fixture(scope="module")
def lm(make_model):
    model = make_model("llama", seed=3)
    model.lm_head.weight.data[END] *= 4  # often the likeliest token, or the least likely
    return model


@pytest.fixture(scope="module")
def networks(lm, make_q_network):
    shared = DeadEndQNetwork.from_trunk(lm, shared=True, rank=16)
    torch.manual_seed(5)
    for parameter in shared.head.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return {"own": make_q_network("llama", noise=0.4), "shared": shared.eval()}


def generator_of(model, tokenizer, n=3, **sampling):
    return Generator(model, tokenizer, Sampling(**SAMPLING | sampling), 8, LEAST, n, seed=3)


def decoder_of(generator, network, rule, **options):
    sampling = {name: value for name, value in vars(generator.sampling).items() if value is not None}
    model, tokenizer = generator.model, generator.tokenizer
    processor = RectificationProcessor(network, rule, model=model, tokenizer=tokenizer, **sampling, **options)
    return Decoder(processor, reads=(network,))


def traced(generator, decoder):
    return trace_of(generator, PROMPTS, continue_with(generator, PROMPTS, decoder), decoder)


def rows_of(traces):
    return [(prompt, sample, one.tokens) for prompt, trace in enumerate(traces) for sample, one in
            enumerate(trace.continuations)]  # fmt: skip


@pytest.fixture(scope="module")
def precise(lm):
    return copy.deepcopy(lm).double()


@torch.no_grad()
def logits_of(model, tokenizer, prompt, before):
    """In float64, from the whole text alone; an early end is forbidden, as in generation."""
    ids = torch.tensor([[*tokenizer(TEXTS[prompt])["input_ids"], *before]])
    logits = model(ids, use_cache=False).logits[0, -1]
    if len(before) < LEAST:
        logits[END] = -math.inf
    return ids, logits


@pytest.mark.parametrize("which", ["own", "shared"])
@pytest.mark.parametrize("rule", [Tilt(beta=4.0), Cap(epsilon=0.4)], ids=["tilt", "cap"])
def test_the_replay_is_what_was_generated(lm, precise, tokenizer, networks, which, rule):
    generator = generator_of(lm, tokenizer)
    decoder = decoder_of(generator, networks[which], rule)
    generated = continue_with(generator, PROMPTS, decoder)
    before = decoder.processor.statistics()
    traces = trace_of(generator, PROMPTS, generated, decoder)
    assert decoder.processor.statistics() == before
    keys = generator.keys(PROMPTS)
    changed = held = 0
    for prompt, sample, tokens in rows_of(traces):
        assert tuple(token.id for token in tokens) == generated[prompt][sample].token_ids
        for place, token in enumerate(tokens):
            ids, logits = logits_of(precise, tokenizer, prompt, [each.id for each in tokens[:place]])
            survival = log_survival_of(networks[which], ids)
            policy, base = expected_policy(logits, survival, rule, **WARPED), warped(logits, **WARPED)
            noise = gumbel(keys[prompt * 3 + sample], place, torch.arange(97))
            # what was sampled is the highest of log-probability and noise
            assert int((policy.log() + noise).argmax()) == token.id
            alone = int((base.log() + noise).argmax())
            assert alone == (token if token.base_choice is None else token.base_choice).id
            assert token.moved == pytest.approx(float((policy - base).abs().sum() / 2), abs=CLOSE)
            for one in filter(None, (token, token.base_choice)):
                assert one.base_probability == pytest.approx(float(base[one.id]), abs=CLOSE)
                assert one.probability == pytest.approx(float(policy[one.id]), abs=CLOSE)
                assert one.risk == pytest.approx(1 - float(survival[one.id].exp()), abs=CLOSE)
                assert one.token == f"t{one.id}"
                if rule.epsilon is None:
                    assert one.cap is one.capped is None
                    continue
                assert one.cap == pytest.approx(max(1 - one.risk - min(one.risk, rule.epsilon), rule.p_min), abs=CLOSE)
                if not token.dead_end:
                    assert one.probability <= one.cap * (1 + 1e-5)
                    assert one.capped == (one.probability >= one.cap * (1 - 1e-4))
                    held += one.capped
            changed += token.base_choice is not None
    assert changed
    assert held or rule.epsilon is None
    lengths = {len(tokens) for _, _, tokens in rows_of(traces)}
    assert len(lengths) > 1  # some ended early, and none too early
    assert min(lengths) > LEAST


def test_the_other_choice_is_what_the_model_alone_generates(lm, tokenizer, networks):
    generator = generator_of(lm, tokenizer)
    decoder = decoder_of(generator, networks["own"], Tilt(beta=4.0))
    alone = continue_with(generator, PROMPTS, Base().bind(lm, tokenizer, SAMPLING))
    compared = parted = 0
    for prompt, sample, tokens in rows_of(traced(generator, decoder)):
        for token, other in zip(tokens, alone[prompt][sample].token_ids, strict=False):
            compared += 1
            assert (token if token.base_choice is None else token.base_choice).id == other
            if token.id != other:
                parted += 1
                break
    assert compared > len(TEXTS) * 3
    assert parted


def test_greedy(lm, precise, tokenizer, networks):
    generator = generator_of(lm, tokenizer, n=1, do_sample=False, top_p=None, temperature=None)
    decoder = decoder_of(generator, networks["own"], Tilt(beta=6.0))
    changed = 0
    for prompt, _, tokens in rows_of(traced(generator, decoder)):
        for place, token in enumerate(tokens):
            _, logits = logits_of(precise, tokenizer, prompt, [each.id for each in tokens[:place]])
            other = token.base_choice or token
            assert other.id == int(logits.argmax())
            assert other.base_probability == pytest.approx(float(logits.softmax(-1).max()), abs=CLOSE)
            assert token.probability >= other.probability
            changed += token is not other
    assert changed


def test_the_base_changes_nothing(lm, tokenizer):
    generator = generator_of(lm, tokenizer)
    for _, _, tokens in rows_of(traced(generator, Base().bind(lm, tokenizer, SAMPLING))):
        for token in tokens:
            assert (token.risk, token.cap, token.capped, token.base_choice) == (None,) * 4
            assert token.base_probability == token.probability > 0
            assert token.moved == 0
            assert token.widened is token.dead_end is False


def test_a_method_without_risk(lm, tokenizer):
    generator = generator_of(lm, tokenizer)
    traces = traced(generator, SelfDebias(attributes="toxicity").bind(lm, tokenizer, SAMPLING))
    alone = trace_of(
        generator,
        PROMPTS,
        [[Continuation(one.text, tuple(token.id for token in one.tokens)) for one in trace.continuations] for trace in
         traces],
        Base().bind(lm, tokenizer, SAMPLING),
    )  # fmt: skip
    moved = 0
    for (_, _, tokens), (_, _, others) in zip(rows_of(traces), rows_of(alone), strict=True):
        for token, other in zip(tokens, others, strict=True):
            assert token.risk is token.cap is None
            assert token.base_probability == pytest.approx(other.probability, abs=CLOSE)
            moved += token.moved > 0.01
    assert moved


@pytest.mark.parametrize(("value", "event"), [(-0.5, "widened"), (-1.0, "dead_end")])
def test_widenings_and_dead_ends(lm, tokenizer, with_values, value, event):
    generator = generator_of(lm, tokenizer, top_k=1)
    network = with_values(torch.full((97,), value))
    decoder = decoder_of(generator, network, Cap(epsilon=0.1), use_cache=False)
    traces = traced(generator, decoder)
    tokens = [token for trace in traces for token in trace.tokens]
    assert all(getattr(token, event) for token in tokens)
    assert sum(token.widened + token.dead_end for token in tokens) == len(tokens)
    assert not any(token.capped for token in tokens if token.dead_end)
    sign = {"widened": "⇔", "dead_end": "⊗"}[event]
    assert trace_page({}, traces).count(f"<sup>{sign}</sup>") == len(tokens) + 1  # and one in the legend


@pytest.mark.parametrize("both", [False, True], ids=["alone", "with-q"])
def test_candidates_of_a_detector_have_risks(lm, precise, tokenizer, networks, causal_classifiers, both):
    generator, rule = generator_of(lm, tokenizer), Tilt(beta=8.0, epsilon=0.2)
    classifier = causal_classifiers["llama"]
    detector, network = DetectorValue(classifier, tokenizer, candidates=0.05), networks["own"] if both else None
    decoder = decoder_of(generator, network, rule, detector=detector)
    unknown = 0
    for prompt, _, tokens in rows_of(traced(generator, decoder)):
        for place, token in enumerate(tokens):
            ids, logits = logits_of(precise, tokenizer, prompt, [each.id for each in tokens[:place]])
            base = warped(logits, **WARPED)
            for one in filter(None, (token, token.base_choice)):
                if base[one.id] < 0.05 and one.id != int(base.argmax()):
                    assert (one.risk, one.cap, one.capped, one.probability) == (None, None, None, 0)
                    unknown += 1
                    continue
                survival = 1 - float(toxicity_of(classifier, ids, torch.tensor([[one.id]])))
                survival *= math.exp(log_survival_of(network, ids)[one.id]) if both else 1
                assert one.risk == pytest.approx(1 - survival, abs=CLOSE)
                assert one.cap == pytest.approx(max(survival - min(1 - survival, 0.2), rule.p_min), abs=CLOSE)
    assert unknown
    page = trace_page({}, traced(generator, decoder))
    assert "nan" not in page.lower()


def test_characters_of_several_tokens():
    model, tokenizer = load_language_model("pocket")
    generator = Generator(model, tokenizer, Sampling(do_sample=True), 30)
    text = " ok 😀 né\n<i>"
    ids = (*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
    (trace,) = trace_of(generator, PROMPTS[:1], [[Continuation(text, ids)]], Base().bind(model, tokenizer, {}))
    tokens = trace.continuations[0].tokens
    assert "".join(token.text for token in tokens) == text
    assert (tokens[-1].text, tokens[-1].token) == ("", tokenizer.eos_token)
    assert sum(token.text == "" for token in tokens) > 1
    assert "⏎" in trace_page({}, [trace])


@pytest.mark.parametrize(("beams", "draws", "said"), [(2, 1, "num_beams is 2"), (1, 4, "one of 4 whole")])
def test_what_has_no_distribution_of_single_tokens_is_refused(lm, tokenizer, beams, draws, said):
    generator = generator_of(lm, tokenizer, num_beams=beams)
    decoder = replace(Base().bind(lm, tokenizer, SAMPLING), draws=draws)
    with pytest.raises(InvalidArgumentError, match=said):
        trace_of(generator, PROMPTS, [], decoder)


# --- files


class Balanced(HTMLParser):
    """Checks that every element is closed where it was opened."""

    def __init__(self):
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def traces(lm, tokenizer, networks):
    generator = generator_of(lm, tokenizer)
    return traced(generator, decoder_of(generator, networks["own"], Tilt(beta=4.0, epsilon=0.3)))


def test_json_holds_all_of_it(traces, tmp_path):
    path = trace_path(tmp_path / "new" / "trace.json")
    write_trace(path, {"seed": 3, "rule": None}, traces)
    found = json.loads(path.read_text())
    assert found == json.loads(
        json.dumps({"settings": {"seed": 3, "rule": None}, "prompts": list(map(asdict, traces))})
    )
    token = found["prompts"][0]["continuations"][0]["tokens"][0]
    assert token["id"] == traces[0].continuations[0].tokens[0].id
    assert [file.name for file in path.parent.iterdir()] == ["trace.json"]


def test_the_page_stands_alone_and_escapes(traces, tmp_path):
    evil = '</p><script>alert("&")</script>\x00'
    named = [replace(traces[0], prompt=evil), *traces[1:]]
    path = trace_path(tmp_path / "trace.HTML")
    write_trace(path, {"method": evil, "seed": 3}, named)
    page = path.read_text(encoding="utf-8")
    assert "<script" not in page
    assert "\x00" not in page
    assert "&lt;script&gt;alert(&quot;&amp;&quot;)" in page
    assert not re.search(r"https?:|//|@import|url\(|src=", page)
    reader = Balanced()
    reader.feed(page)
    assert reader.open == []
    assert any(evil.replace("\x00", "␀") in text for text in reader.text)
    changed = sum(token.base_choice is not None for trace in traces for token in trace.tokens)
    assert page.count("<del ") == page.count("<ins ") == changed > 0
    assert page.count('title="') == sum(len(list(trace.tokens)) for trace in traces)


def test_colours_can_be_read_on(traces):
    def luminance(colour):
        values = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
        linear = np.where(values <= 0.03928, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    def contrast(one, other):
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    page = trace_page({}, traces)
    schemes = [dict(re.findall(r"--(\w+): (#\w+);", part)) for part in page.split("@media")]
    assert [len(scheme) for scheme in schemes] == [14, 14]
    for scheme in schemes:
        assert all(contrast(scheme[f"r{step}"], scheme[f"i{step}"]) >= 4.5 for step in range(1, 6))
        assert min(contrast(scheme["paper"], scheme[name]) for name in ("ink", "faint")) >= 4.5
        # lightness alone orders the colours, away from the paper
        away = [contrast(scheme["paper"], scheme[name]) for name in ("paper", "r1", "r2", "r3", "r4", "r5")]
        assert away == sorted(away)


@pytest.mark.parametrize("name", ["trace.txt", "trace", "folder.html", "file/trace.html"])
def test_paths_that_cannot_be_used(tmp_path, name):
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgumentError, match="trace"):
        trace_path(tmp_path / name)
