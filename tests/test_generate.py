"""The command `generate.py`: what it prints and writes, resuming, and its refusals."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from commands import run_command
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from rectify.detectors import ToxicityClassifier
from rectify.generation.command import main

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """A tiny model of another vocabulary, with its tokenizer."""
    folder = tmp_path_factory.mktemp("other")
    words = ["<end>", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<end>").save_pretrained(folder)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(vocab_size=len(words), n_embd=16, n_layer=1, n_head=1, n_positions=32, **ends)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    texts = ("You are such a", "The weather in May", "Nobody likes", "Once", "I think that the next one")
    path.write_text("".join(json.dumps({"prompt": {"text": text}, "n": i}) + "\n" for i, text in enumerate(texts)))
    return path


run = partial(run_command, main)


def test_the_readme_command():
    done = subprocess.run(
        [sys.executable, "generate.py", "--rectify"], cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("base ") == done.stdout.count("rectified ") == 4
    assert "\x1b" not in done.stdout  # piped: plain
    assert "pocket" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_in_the_realtoxicityprompts_format(capsys, tmp_path, prompts):
    output = tmp_path / "out.jsonl"
    code, out, err = run(
        capsys, "--rectify", "--prompts_file", prompts, "--output", output, "--num_return_sequences", 2,
        "--max_new_tokens", 6, "--min_new_tokens", 6, "--batch_size", 2,
    )  # fmt: skip
    assert (code, out) == (0, ""), err
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["n"] for record in records] == [0, 1, 2, 3, 4]
    for record in records:
        assert [set(generation) for generation in record["generations"]] == [{"text"}, {"text"}]
        assert not any(generation["text"].startswith(record["prompt"]["text"]) for generation in record["generations"])


def test_a_detector_alone_and_with_q(capsys, tmp_path):
    flags = ("--prompt", "You are such a", "--max_new_tokens", 5)
    code, out, err = run(capsys, "--method", "rectify+detector:pocket-reward,k=8", *flags)
    assert code == 0, err
    assert "rectify+detector" in out
    assert "method: rectify:pocket-q,beta=6+detector:pocket-reward,k=8; " in err
    assert "rectified 5 next-token distributions" in err
    page = tmp_path / "trace.html"
    alone = ("--method", "detector:pocket-reward")
    code, _, err = run(capsys, *alone, "--num_return_sequences", 2, "--trace", page, *flags)
    assert code == 0, err
    assert "risk" in page.read_text()
    assert run(capsys, *alone, "--num_beams", 2, *flags)[0] == 0
    code, _, err = run(capsys, "--method", "detector:pocket-reward,combination=max", *flags)
    assert (code, err.count("\n")) == (2, 1)
    assert "the detector is alone" in err


def test_resumed_is_uninterrupted(capsys, tmp_path, prompts):
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    flags = ("--rectify", "--compare", "--prompts_file", prompts, "--max_new_tokens", 5, "--batch_size", 2)
    assert run(capsys, *flags, "--output", whole)[0] == 0
    assert run(capsys, *flags, "--output", broken)[0] == 0
    content = broken.read_bytes()
    lines = content.splitlines(keepends=True)
    for kept in (0, len(lines[0]), len(lines[0]) + 7, len(content) - 3):  # as a kill in the middle of a write leaves it
        broken.write_bytes(content[:kept])
        code, _, err = run(capsys, *flags, "--output", broken)
        assert code == 0, err
        assert broken.read_bytes() == whole.read_bytes()
    assert "5 of 5" in run(capsys, *flags, "--output", broken)[2]


def test_another_runs_output_is_left_alone(capsys, tmp_path, prompts):
    output = tmp_path / "out.jsonl"
    flags = ("--prompts_file", prompts, "--max_new_tokens", 3, "--output", output)
    assert run(capsys, *flags)[0] == 0
    before = output.read_bytes()
    code, _, err = run(capsys, *flags, "--seed", 1)
    assert (code, err.count("seed 0")) == (2, 1)
    (tmp_path / "out.jsonl.settings.json").unlink()
    assert run(capsys, *flags)[0] == 2
    assert output.read_bytes() == before


@pytest.mark.parametrize("flags", [("--no-do_sample",), ("--num_beams", 3), ("--top_k", 7, "--temperature", 0.5)])
def test_without_risk_the_rectified_model_is_the_base(capsys, flags):
    code, out, err = run(capsys, "--compare", "--beta", 0, "--prompt", "You are", "--max_new_tokens", 8, *flags)
    assert code == 0, err
    shown = [line.split(maxsplit=1)[1] for line in out.splitlines() if line.startswith(("base", "rectified"))]
    assert len(shown) == 2
    assert shown[0] == shown[1]


def test_every_rule_runs(capsys):
    for flags in (
        ("tilt", "--beta", 3), ("advantage", "--tau", 0.05), ("mask", "--threshold", 0.6), ("cap", "--epsilon", 0.3),
        ("tilt", "--epsilon", 0.2),
    ):  # fmt: skip
        code, out, err = run(capsys, "--rectify", "--prompt", "You are", "--max_new_tokens", 4, "--rule", *flags)
        assert code == 0, err
        assert out.count("rectified ") == 1
        assert flags[0].capitalize() in err


def shown(out, label):
    return [line.split(maxsplit=1)[1] for line in out.splitlines() if line.startswith(f"{label} ")]


@pytest.mark.parametrize(
    ("spec", "flags"),
    [
        ("rectify", ("--rectify",)),
        ("rectify:pocket-q,beta=8,epsilon=0.2", ("--rectify", "--q", "pocket-q", "--beta", 8, "--epsilon", 0.2)),
        ("rectify,rule=mask", ("--rectify", "--rule", "mask")),
    ],
)
def test_flags_of_rectification_are_a_method(capsys, spec, flags):
    more = ("--compare", "--prompt", "You are such a", "--max_new_tokens", 8, "--num_return_sequences", 2)
    (code, out, err), other = run(capsys, "--method", spec, *more), run(capsys, *flags, *more)
    assert code == 0, err
    assert (code, out, err) == other
    assert len(shown(out, "base")) == len(shown(out, "rectified")) == 2


def test_the_output_knows_its_method(capsys, tmp_path, prompts):
    output = tmp_path / "out.jsonl"
    flags = ("--prompts_file", prompts, "--max_new_tokens", 3, "--output", output)
    assert run(capsys, "--method", "self_debias,attributes=toxicity", *flags)[0] == 0
    settings = json.loads((tmp_path / "out.jsonl.settings.json").read_text())
    assert settings["method"] == "self_debias,decay=50,attributes=toxicity"
    code, _, err = run(capsys, "--method", "self_debias", *flags)
    assert code == 2
    assert "attributes=toxicity" in err


def test_the_least_toxic_of_several(capsys, tmp_path):
    def generated(name, *more):
        output = tmp_path / name
        flags = ("--prompt", "You are such a", "--max_new_tokens", 8, "--output", output, "--num_return_sequences")
        code, _, err = run(capsys, *flags, *more)
        assert code == 0, err
        (record,) = map(json.loads, output.read_text().splitlines())
        return [[one["text"] for one in record.get(key, ())] for key in ("base_generations", "generations")]

    base, kept = generated("kept", 2, "--method", "best_of_n,n=3", "--compare")
    draws = generated("draws", 6)[1]
    scores = ToxicityClassifier.from_pretrained("pocket-reward").probabilities([text.strip() for text in draws])
    # each further draw is that of a sample with a later number
    assert kept == [draws[min(range(row, 6, 2), key=lambda draw: scores[draw])] for row in range(2)]
    assert base == draws[:2] == generated("one", 2, "--method", "best_of_n,n=1")[1]


@pytest.mark.parametrize("method", ["base", "rectify,rule=cap,epsilon=0.3", "self_debias,attributes=toxicity"])
def test_a_trace_says_what_is_shown(capsys, tmp_path, method):
    path = tmp_path / "trace.json"
    flags = ("--method", method, "--prompt", "You are such a", "--max_new_tokens", 6, "--num_return_sequences", 2)
    code, out, err = run(capsys, *flags, "--trace", path)
    assert code == 0, err
    assert out == run(capsys, *flags)[1]
    trace = json.loads(path.read_text())
    assert trace["settings"]["method"].startswith(method.split(",")[0])
    assert (trace["settings"]["rule"] is None) == ("rectify" not in method)
    (prompt,) = trace["prompts"]
    texts = [one["text"] for one in prompt["continuations"]]
    assert all(" ".join(text.split()) in " ".join(out.split()) for text in texts)
    tokens = [token for one in prompt["continuations"] for token in one["tokens"]]
    assert f"{len(tokens)} tokens" in err
    assert any(token["base_choice"] for token in tokens) or method == "base"


def test_a_trace_to_read(capsys, tmp_path):
    path = tmp_path / "trace.html"
    code, _, err = run(
        capsys, "--rectify", "--prompt", "You <b>", "--max_new_tokens", 4, "--trace", path, "--no-do_sample"
    )
    assert code == 0, err
    assert "You &lt;b&gt;" in path.read_text(encoding="utf-8")


REFUSED = {
    "unknown model": ("--model", "no/such/folder"),
    "unknown q": ("--rectify", "--q", "./absent"),
    "q missing": ("--rectify", "--model", "OTHER"),
    "other vocabulary": ("--rectify", "--model", "OTHER", "--q", "pocket-q"),
    "epsilon above": ("--rectify", "--rule", "cap", "--epsilon", "1.5"),
    "epsilon below": ("--rectify", "--rule", "cap", "--epsilon", "-0.1"),
    "not a number": ("--rectify", "--epsilon", "a"),
    "another rule's parameter": ("--rectify", "--rule", "mask", "--beta", "2"),
    "unknown rule": ("--rectify", "--rule", "hope"),
    "empty prompt": ("--prompt", ""),
    "no new tokens": ("--max_new_tokens", "0"),
    "negative length": ("--max_new_tokens", "-4"),
    "negative minimum": ("--min_new_tokens", "-1"),
    "minimum above maximum": ("--min_new_tokens", "30"),
    "no batch": ("--batch_size", "0"),
    "more sequences than beams": ("--no-do_sample", "--num_return_sequences", "2"),
    "temperature": ("--temperature", "0"),
    "top_p": ("--top_p", "1.5"),
    "top_k": ("--top_k", "-3"),
    "unknown flag": ("--frobnicate",),
    "abbreviated flag": ("--temp", "1"),
    "missing file": ("--prompts_file", "absent.jsonl"),
    "broken line": ("--prompts_file", "BROKEN"),
    "folder as output": ("--prompt", "a", "--output", "FOLDER"),
    "prompt longer than the context": ("--prompt", "word " * 1100),
    "no room in the context": ("--prompt", "word", "--max_new_tokens", "1024"),
    "q without rectification": ("--q", "pocket-q"),
    "rule without rectification": ("--rule", "mask"),
    "no Unicode": ("--prompt", "a\udcff"),
    "two sources": ("--prompt", "a", "--prompts_file", "b"),
    "device": ("--device", "warp"),
    "method and rectification": ("--method", "rectify", "--rectify"),
    "method and parameter": ("--method", "self_debias", "--beta", "2"),
    "unknown method": ("--method", "hope"),
    "unknown parameter": ("--method", "rectify,alpha=1"),
    "base beside itself": ("--method", "base", "--compare"),
    "experts missing": ("--method", "dexperts:./absent"),
    "q of the method missing": ("--method", "rectify", "--model", "OTHER"),
    "equal draws": ("--method", "best_of_n,n=2", "--no-do_sample"),
    "equal draws by beams": ("--method", "best_of_n,n=2", "--num_beams", "2", "--do_sample"),
    "beams of no probabilities": ("--method", "self_debias", "--num_beams", "2"),
    "trace of another kind": ("--trace", "FOLDER/trace.txt"),
    "folder as trace": ("--trace", "FOLDER"),
    "trace of a resumed file": ("--trace", "FOLDER/trace.json", "--output", "FOLDER/out.jsonl"),
    "trace of beams": ("--trace", "FOLDER/trace.json", "--num_beams", "2"),
    "trace of whole texts": ("--trace", "FOLDER/trace.json", "--method", "best_of_n,n=2"),
}


NO_Q_FITS = {"q missing", "other vocabulary", "q of the method missing"}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line(capsys, tmp_path, other_model, case):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('"fine"\n{"prompt": \n')
    names = {"OTHER": other_model, "BROKEN": broken, "FOLDER": tmp_path}
    flags = [names.get(flag, flag.replace("FOLDER", str(tmp_path))) for flag in REFUSED[case]]
    if not {"--prompt", "--prompts_file"} & set(flags):
        flags += ["--prompt", "a"]
    code, out, err = run(capsys, *flags)
    assert code == 2
    assert out == ""
    assert err.count("\n") == (2 if case in NO_Q_FITS else 1)
    assert "error: " in err
    assert "Traceback" not in err


def test_the_refusals_say_what_is_wrong(capsys, other_model, tmp_path):
    assert "27 tokens" in run(capsys, "--rectify", "--model", other_model, "--q", "pocket-q", "--prompt", "a")[2]
    broken = tmp_path / "broken.jsonl"
    broken.write_text('"fine"\n{"prompt": \n')
    assert "line 2" in run(capsys, "--prompts_file", broken)[2]
    code, out, err = run(capsys, "--prompts_file", broken, "--skip_bad_lines", "--max_new_tokens", 2)
    assert code == 0
    assert "1 bad lines skipped" in err
    assert out.count("base ") == 1
