"""The effect of rectification, on tiny random models and with a judge written here."""

import json
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rectify import InvalidArgumentError, Mask, PromptError, Tilt
from rectify.errors import JudgeError
from rectify.evaluation.arms import Arm, parse_arms
from rectify.evaluation.effect import Effect, EffectSettings
from rectify.evaluation.effect_display import curves, markdown_table, plot_curves
from rectify.evaluation.fluency import continuation_nll, distinct_n, rectified_nll
from rectify.evaluation.judging import ProcessJudge, toxicity
from rectify.evaluation.toxicity_prompts import choose, clean_texts, read_scored
from rectify.splits import split_of
from rectify.static_risk import StaticRiskConfig, StaticTokenRisk
from rectify.vocabulary import Fingerprint

EVAL = Path(__file__).parent.parent / "eval"
SPECS = ["tilt:beta=3", "static/mask:threshold=0.6", "static/tilt"]
SPLITS = {1: "test", 2: "validation"}


class CountingJudge:
    """A text with a 7 in it is toxic, and one that begins with a word ending in 1 cannot be judged."""

    name = "counting 1"

    def __init__(self):
        self.asked = 0

    def __call__(self, texts):
        self.asked += len(texts)
        return [None if text.partition(" ")[0].endswith("1") else self.score(text) for text in texts]

    def score(self, text):
        return 0.9 if "7" in text else 0.1


def record(number, text, toxicity_, continuation=" t30 t31", continuation_toxicity=0.1):
    return {
        "filename": f"{number}.txt",
        "begin": 0,
        "end": 9,
        "prompt": {"text": text, "toxicity": toxicity_},
        "continuation": {"text": continuation, "toxicity": continuation_toxicity},
    }


def records():
    """Prompts of 1 to 4 words; every third is toxic, every fifth not scored; every fourth continuation not clean."""
    random = np.random.default_rng(0)
    for number in range(90):
        # not t10 to t29, in which the tokenizer finds the special tokens t1 and t2
        words = " ".join(f"t{word}" for word in random.integers(30, 97, 1 + number % 4))
        toxicity_ = None if number % 5 == 0 else 0.7 if number % 3 == 0 else 0.3
        yield record(number, words, toxicity_, continuation_toxicity=0.6 if number % 4 == 0 else 0.1)


def split_records(split="validation"):
    chosen = (one for one in records() if split_of(f"{one['filename']}:0:9") == split)
    return [one for one in chosen if one["prompt"]["toxicity"] is not None]


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_model, make_q_network, make_tokenizer):
    folder = tmp_path_factory.mktemp("effect")
    tokenizer = make_tokenizer()
    make_model("llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    make_q_network("llama", tokenizer=tokenizer, noise=0.5).save_pretrained(folder / "q")
    risk = np.random.default_rng(3).random(97)
    risk[30] = 0.9
    StaticTokenRisk(risk, StaticRiskConfig(97, 0.5, 20.0, Fingerprint.of(tokenizer))).save_pretrained(folder / "static")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records()))
    return folder


def settings(place, output, specs=SPECS, **changes):
    given = {"num_return_sequences": 3, "max_new_tokens": 4, "batch_size": 2, "prompt_set": "all"} | changes
    names = {name: str(place / name) for name in ("model", "q", "static")}
    prompts = str(place / "prompts.jsonl")
    return EffectSettings(**names, arms=tuple(parse_arms(specs)), prompts=prompts, output_dir=str(output), **given)


@pytest.fixture(scope="module")
def done(place, tmp_path_factory):
    """One run of all arms: the experiment, its report and its folder."""
    output = tmp_path_factory.mktemp("done")
    effect = Effect(settings(place, output), CountingJudge())
    return effect, effect.report(), output


# --- arms


def test_arms():
    assert Arm.parse("tilt:beta=6") == Arm.parse("q/tilt") == Arm("q", Tilt(beta=6))
    assert Arm.parse("static/mask:threshold=0.6,epsilon=0.1") == Arm("static", Mask(threshold=0.6, epsilon=0.1))
    labels = [arm.label for arm in parse_arms(["static/tilt:epsilon=0.25,beta=3", "cap", "advantage:tau=0.05"])]
    assert labels == ["base", "static/tilt:beta=3,epsilon=0.25", "cap:epsilon=0.1", "advantage:tau=0.05"]
    for label in labels[1:]:
        assert Arm.parse(label).label == label
    assert Arm.parse("static/tilt:beta=3,epsilon=0.25").file_name == "static-tilt-beta=3-epsilon=0.25"
    families = {arm.family for arm in parse_arms(["tilt:beta=1", "tilt:beta=2", "static/tilt", "tilt:epsilon=0.1"])}
    assert families == {"base", "tilt, Q network", "tilt, token risks", "tilt + cap 0.1, Q network"}


REFUSED = {
    "soft": "rule is 'soft'",
    "tilt:tau=1": "tau is not a parameter",
    "tilt:beta": "'beta' is no parameter",
    "tilt:beta=x": "'beta=x' is no parameter",
    "tilt:beta=-1": "beta is -1.0",
    "tilt:beta=nan": "beta is nan",
    "tilt:beta=1,beta=2": "beta is given twice",
    "other/tilt": "'other' is no risk model",
    "": "rule is ''",
}


@pytest.mark.parametrize("spec", REFUSED)
def test_bad_specs_are_refused_in_one_line(spec, capsys, place, tmp_path):
    main = runpy.run_path(str(EVAL / "effect.py"))["main"]
    flags = ["--prompts", str(place / "prompts.jsonl"), "--judge_python", "none", "--output_dir", str(tmp_path)]
    assert main([*flags, "--arms", spec]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert REFUSED[spec] in said
    assert repr(spec) in said


def test_an_arm_given_twice_is_refused():
    with pytest.raises(InvalidArgumentError, match=r"'q/tilt' twice \(tilt:beta=6\)"):
        parse_arms(["tilt:beta=6", "q/tilt"])


# --- prompts


def test_scored_records_of_a_split(place):
    scored = read_scored(place / "prompts.jsonl", "validation")
    assert [prompt.record for prompt in scored] == split_records()
    toxic = choose(scored, "toxic")
    assert [prompt.record for prompt in toxic] == [one for one in split_records() if one["prompt"]["toxicity"] == 0.7]
    some = choose(scored, "all", 4, seed=1)
    assert len(some) == 4
    assert some == choose(scored, "all", 4, seed=1) != choose(scored, "all", 4, seed=2)
    with pytest.raises(InvalidArgumentError, match=f"num_prompts is 99: give 1 to {len(scored)}"):
        choose(scored, "all", 99)
    clean = [one for one in split_records() if one["continuation"]["toxicity"] == 0.1]
    assert clean_texts(scored) == [(one["prompt"]["text"], " t30 t31") for one in clean]


def test_other_records_are_refused(tmp_path):
    (tmp_path / "a").write_text(json.dumps({"prompt": "hello"}) + "\n")
    with pytest.raises(PromptError, match="record 1: 'filename' is missing"):
        read_scored(tmp_path / "a", "test")
    (tmp_path / "b").write_text(json.dumps(record(0, "t5", None)) + "\n")
    with pytest.raises(PromptError, match="no scored record of the test split"):
        read_scored(tmp_path / "b", "test")


# --- judging


def test_toxicity_counts_no_failure_as_zero():
    found = toxicity([[0.9, None, 0.1], [0.2, 0.3, 0.5], [None, None, None], [0.1, 0.1, 0.4]])
    assert (found.prompts, found.continuations, found.failures) == (3, 12, 4)
    assert found.toxic_share == 2 / 8
    assert found.expected_maximum == pytest.approx((0.9 + 0.5 + 0.4) / 3)
    assert found.any_toxic == pytest.approx(2 / 3)
    nothing = toxicity([[None]])
    assert (nothing.failures, math.isnan(nothing.toxic_share)) == (1, True)


def test_the_standard_error_is_that_of_prompts():
    random = np.random.default_rng(0)
    shares = random.beta(1, 4, (400, 200))  # 400 experiments of 200 prompts with 10 texts each
    hits = random.binomial(10, shares)
    found = [toxicity([[1.0] * h + [0.0] * (10 - h) for h in row]) for row in hits[:20]]
    spread = (hits.sum(-1) / 2000).std()
    assert np.mean([one.toxic_share_error for one in found]) == pytest.approx(spread, rel=0.1)


PROGRAM = """
import json, sys
if sys.argv[1:] == ["--version"]:
    print("length 2")
else:
    for line in sys.stdin:
        text = json.loads(line)
        print(min(1, len(text) / 10) if text.strip() else "null")
"""


def test_a_judge_in_its_own_process():
    judge = ProcessJudge([sys.executable, "-S", "-c", PROGRAM])
    assert judge.name == "length 2"
    assert judge(["hello", "", "two\nlines", "\ud83d", "\u2028x"]) == [0.5, None, 0.9, 0.1, 0.2]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["/no/such/python"], "cannot be run"),
        ([sys.executable, "-S", "-c", "import no_such_package"], "No module named 'no_such_package'"),
    ],
)
def test_a_judge_that_cannot_run_is_refused(command, message):
    with pytest.raises(JudgeError, match=message):
        ProcessJudge(command)


@pytest.mark.parametrize("answer", ["nan", "2.0", "x", "0.5\\n0.5"])
def test_unusable_answers_are_refused(answer):
    judge = ProcessJudge([sys.executable, "-S", "-c", f"print('{answer}')"])
    with pytest.raises(JudgeError, match="answered"):
        judge(["a"])


# --- the run


def test_generations_have_exactly_the_tokens(done):
    effect, _, output = done
    for arm in effect.settings.arms:
        lines = [json.loads(line) for line in (output / f"{arm.file_name}.jsonl").read_text().splitlines()]
        assert len(lines) == len(split_records())
        lengths = [len(line["prompt"]["text"].split()) for line in lines]
        assert lengths == sorted(lengths)
        for line in lines:
            assert len(line["generations"]) == 3
            for one in line["generations"]:
                assert len(one["token_ids"]) == 4
                assert 2 not in one["token_ids"]  # the end of text
                words = [f"t{token}" for token in one["token_ids"] if token not in (0, 1, 2)]
                assert one["text"].split() == words


def test_the_report_is_what_the_files_say(done, place):
    effect, report, output = done
    assert json.loads((output / "report.json").read_text()) == report
    model = effect.model
    assert [arm["label"] for arm in report["arms"]] == ["base", *SPECS[:2], "static/tilt:beta=6"]
    scored = read_scored(place / "prompts.jsonl", "validation")
    clean = [([int(word[1:]) for word in prompt.split()], [30, 31]) for prompt, _ in clean_texts(scored)]
    base = report["arms"][0]
    for arm, figures in zip(effect.settings.arms, report["arms"], strict=True):
        lines = [json.loads(line) for line in (output / f"{arm.file_name}.jsonl").read_text().splitlines()]
        for name, chosen in (("all", lines), ("toxic", [x for x in lines if x["prompt"]["toxicity"] >= 0.5])):
            scores = [CountingJudge()([one["text"] for one in line["generations"]]) for line in chosen]
            expected = toxicity(scores)
            assert figures[name]["toxic_share"] == expected.toxic_share
            assert figures[name]["failures"] == expected.failures
            assert figures[name]["continuations"] == 3 * len(chosen)
            assert figures[name]["expected_maximum"] == expected.expected_maximum
            own = [
                ([int(word[1:]) for word in line["prompt"]["text"].split()], one["token_ids"])
                for line in chosen
                for one in line["generations"]
            ]
            perplexity = continuation_nll(model, *zip(*own, strict=True)).perplexity
            assert figures[name]["own_perplexity"] == pytest.approx(perplexity, rel=1e-5)
            assert figures[name]["own_ratio"] == pytest.approx(perplexity / base[name]["own_perplexity"], rel=1e-5)
        texts = [[one["text"] for one in line["generations"]] for line in lines]
        assert figures["distinct"] == {str(n): distinct_n(texts, n) for n in (1, 2, 3)}
        if arm.rule is not None:
            found = rectified_nll(model, effect.risk_models[arm.risk], arm.rule, *zip(*clean, strict=True))
            assert figures["clean"]["perplexity"] == pytest.approx(found.perplexity, rel=1e-5)
            assert figures["clean"]["ratio"] == pytest.approx(found.perplexity / found.base_perplexity, rel=1e-5)
            assert figures["clean"]["cut"] == found.cut
            assert figures["clean"]["removed"] == found.removed
    assert (base["clean"]["ratio"], base["clean"]["cut"], base["all"]["own_ratio"]) == (1, 0, 1)
    assert report["arms"][2]["clean"]["removed"] == len(clean)  # each has the token 30
    assert 0 < base["all"]["toxic_share"] < 1
    assert base["all"]["failures"] > 0
    described = report["settings"]
    assert described["chosen_prompts"] == len(split_records())
    assert described["judge"] == "counting 1"
    assert described["left_out"] == {"prompts": 0, "clean_texts": 0}
    for name in ("model", "q", "static"):
        assert described[name].startswith(f"{place / name} (")


def test_done_work_is_not_done_again(done, place, monkeypatch):
    _, report, output = done
    judge = CountingJudge()
    again = Effect(settings(place, output, SPECS[:1]), judge)
    for module in (again.model, again.risk_models["q"]):
        monkeypatch.setattr(module, "forward", None)
    assert again.report()["arms"] == report["arms"][:2]
    assert judge.asked == 0


@pytest.mark.parametrize("kept", [0, 150, -20])
def test_resumed_is_uninterrupted(done, place, tmp_path, kept):
    _, report, output = done
    for name in ("base.jsonl", "tilt-beta=3.jsonl"):
        content = (output / name).read_bytes()
        (tmp_path / name).write_bytes(content[:kept] if name == "base.jsonl" else content)
        (tmp_path / f"{name}.settings.json").write_bytes((output / f"{name}.settings.json").read_bytes())
    found = Effect(settings(place, tmp_path, SPECS[:1]), CountingJudge()).report()
    assert found["arms"] == report["arms"][:2]
    assert (tmp_path / "base.jsonl").read_bytes() == (output / "base.jsonl").read_bytes()


def test_another_judge_and_other_weights_are_noticed(done, place, tmp_path, make_q_network, make_tokenizer):
    _, _, output = done
    judge = CountingJudge()
    judge.name = "counting 2"
    Effect(settings(place, output, []), judge).report()
    assert judge.asked == 3 * len(split_records())
    make_q_network("llama", seed=5, tokenizer=make_tokenizer()).save_pretrained(tmp_path / "q")
    other = settings(place, output, SPECS[:1])
    other = EffectSettings(**{**vars(other), "q": str(tmp_path / "q")})
    with pytest.raises(InvalidArgumentError, match="was begun with risk"):
        Effect(other, CountingJudge()).report()


def test_a_set_without_toxic_prompts_has_no_figures_of_them(done, place, tmp_path):
    mild = [one for one in split_records() if one["prompt"]["toxicity"] < 0.5][:3]
    mild[0]["prompt"]["text"] = " ".join(["t9"] * 158)  # with four new tokens too long for the context
    (tmp_path / "mild.jsonl").write_text("".join(json.dumps(one) + "\n" for one in mild))
    changed = {**vars(settings(place, tmp_path / "out", SPECS[:1])), "prompts": str(tmp_path / "mild.jsonl")}
    report = Effect(EffectSettings(**changed), CountingJudge()).report()
    assert report["arms"][1]["toxic"]["toxic_share"] is None
    assert report["arms"][1]["toxic"]["own_ratio"] is None
    assert report["arms"][1]["all"]["prompts"] <= 2
    assert report["settings"]["left_out"]["prompts"] == 1
    assert "–" in markdown_table(report)
    with pytest.raises(InvalidArgumentError, match="leave none of the toxic set"):
        Effect(EffectSettings(**changed | {"prompt_set": "toxic"}), CountingJudge())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": None}, "q is not given"),
        ({"static": None}, "static is not given"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"top_p": 0}, "top_p is 0"),
    ],
)
def test_bad_settings_are_refused(place, tmp_path, changes, message):
    with pytest.raises(InvalidArgumentError, match=message):
        Effect(EffectSettings(**{**vars(settings(place, tmp_path)), **changes}), CountingJudge())


# --- the script and its outputs


def test_the_script(done, place, capsys, tmp_path, monkeypatch):
    _, report, _ = done
    script = runpy.run_path(str(EVAL / "effect.py"))
    monkeypatch.setitem(script["run"].__globals__, "ProcessJudge", lambda command: CountingJudge())
    flags = ["--prompts", str(place / "prompts.jsonl"), "--output_dir", str(tmp_path), "--judge_python", "none"]
    for name in ("model", "q"):
        flags += [f"--{name}", str(place / name)]
    sizes = ["--num_return_sequences", "3", "--max_new_tokens", "4", "--batch_size", "2", "--prompt_set", "all"]
    threads = torch.get_num_threads()
    assert script["main"]([*flags, *sizes, "--arms", SPECS[0], "--threads", str(threads)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[3].startswith("| `tilt:beta=3` | ")
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["arms"] == report["arms"][:2]


def test_curves_and_their_plot(done, tmp_path):
    _, report, _ = done
    found = curves(report)
    assert set(found) == {"base", "tilt, Q network", "mask, token risks", "tilt, token risks"}
    base = report["arms"][0]["toxic"]["toxic_share"]
    assert found["base"] == [(0.0, base, 1.0, 1.0)]
    plot_curves(report, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InvalidArgumentError, match=r"'curves\.xyz'"):
        plot_curves(report, "curves.xyz")
