"""Bits per byte against a slow loop over single tokens, how documents are read, and the samples."""

import copy
import json
import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rectify import InvalidArgumentError, PromptError
from rectify.errors import TrajectoryError
from rectify.evaluation.language_model import (
    CodeLength,
    begin_token,
    code_length,
    model_context,
    read_documents,
    read_lines,
    sample,
    windows,
)
from rectify.generation.prompts import Prompt

SCRIPT = Path(__file__).parent.parent / "eval" / "bits_per_byte.py"


def words(count, first=30):
    # not t10 to t29, in which the tokenizer finds the special tokens t1 and t2
    return " ".join(f"t{30 + (first + 7 * place) % 67}" for place in range(count))


DOCUMENTS = [words(30), "", words(1, 5), words(7, 9), words(8, 2), words(9, 4), "é ü t31"]


@pytest.mark.parametrize("context", [2, 3, 8, 9])
def test_windows_cover_each_token_once_with_half_a_context_of_past(context):
    for length in range(40):
        ids = list(range(length))
        found = list(windows(ids, context))
        assert [token for _, new in found for token in new] == ids[1:]
        for past, new in found:
            assert ids[past[0] : past[0] + len(past) + len(new)] == [*past, *new]
            assert len(past) + len(new) <= context
            assert past[0] == 0 or len(past) >= context / 2


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("context", [8, None])
@torch.no_grad()
def test_the_code_length_is_that_of_a_loop(models, make_tokenizer, kind, context):
    exact, tokenizer = copy.deepcopy(models[kind]).double(), make_tokenizer()
    nats = tokens = 0
    for text in DOCUMENTS:
        ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
        for place in range(1, len(ids)):
            start = 0
            while context and place - start >= context:
                start += context // 2
            logits = exact(torch.tensor([ids[start:place]])).logits[0, -1]
            nats -= logits.log_softmax(-1)[ids[place]].item()
            tokens += 1
    found = code_length(models[kind], tokenizer, DOCUMENTS, context, batch_size=3)
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert (found.tokens, found.documents) == (tokens, 6)
    assert found.bytes == len("".join(DOCUMENTS)) + 2
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / found.bytes, rel=1e-5)


def test_a_uniform_model_needs_the_logarithm_of_its_vocabulary(model, make_tokenizer):
    uniform = copy.deepcopy(model)
    for parameter in uniform.parameters():
        parameter.data.zero_()
    found = code_length(uniform, make_tokenizer(), DOCUMENTS, 8)
    assert found.nats_per_token == pytest.approx(math.log(97))
    both = found + found
    assert both == CodeLength(2 * found.nats, 2 * found.tokens, 2 * found.bytes, 12)
    assert both.bits_per_byte == found.bits_per_byte


def test_without_a_document_there_is_no_figure(model, make_tokenizer):
    found = code_length(model, make_tokenizer(), [])
    assert found == CodeLength(0.0, 0, 0, 0)
    assert math.isnan(found.bits_per_byte)
    assert math.isnan(found.nats_per_token)


def test_the_token_before_the_first():
    tokens = {"bos_token_id": 0, "eos_token_id": 7, "name_or_path": "x"}
    assert begin_token(SimpleNamespace(**tokens)) == 0
    assert begin_token(SimpleNamespace(**tokens | {"bos_token_id": None})) == 7
    with pytest.raises(InvalidArgumentError, match="'x' has no begin and no end token"):
        begin_token(SimpleNamespace(**tokens | {"bos_token_id": None, "eos_token_id": None}))


def test_contexts_and_batches_out_of_range_are_refused(models, make_model, make_tokenizer):
    assert model_context(models["llama"]) == 160
    assert model_context(make_model("recurrent")) == 1024
    for context in (1, 161):
        with pytest.raises(InvalidArgumentError, match=f"context is {context}: give a number from 2 to 160"):
            code_length(models["llama"], make_tokenizer(), DOCUMENTS, context)
    with pytest.raises(InvalidArgumentError, match="batch_size is 0"):
        code_length(models["llama"], make_tokenizer(), DOCUMENTS, batch_size=0)
    with pytest.raises(InvalidArgumentError, match="context is 1"):
        list(windows([1, 2], 1))


def test_documents(tmp_path):
    (tmp_path / "a.txt").write_bytes("one é\r\n\n two\n".encode())
    assert read_documents(tmp_path / "a.txt") == ["one é\r\n\n two\n"]
    (tmp_path / "a.jsonl").write_text('{"body": "one\\ntwo"}\n\n{"body": "three"}\n')
    assert read_documents(tmp_path / "a.jsonl", "body") == ["one\ntwo", "three"]
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "broken.txt").write_bytes(b"\xff")
    for name, message in (("blank", "holds no text"), ("broken", "cannot be read"), ("none", "cannot be read")):
        with pytest.raises(TrajectoryError, match=message):
            read_documents(tmp_path / f"{name}.txt")


# --- samples


def test_samples_depend_on_the_seed_and_their_place(model, make_tokenizer):
    tokenizer = make_tokenizer()
    prompts = [Prompt.of(words(3)), Prompt.of(words(5))]
    found = list(sample(model, tokenizer, prompts, max_new_tokens=6))
    assert found == list(sample(model, tokenizer, prompts, max_new_tokens=6))
    assert found[0] == next(sample(model, tokenizer, prompts[:1], max_new_tokens=6))
    assert found != list(sample(model, tokenizer, prompts, seed=1, max_new_tokens=6))
    with pytest.raises(PromptError, match="exceeds the context of 160"):
        list(sample(model, tokenizer, [Prompt.of(words(150))]))
    with pytest.raises(InvalidArgumentError, match="max_new_tokens is 0"):
        list(sample(model, tokenizer, prompts, max_new_tokens=0))


def test_prompts_a_line(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"one\r\n\n two \n")
    assert [prompt.text for prompt in read_lines(tmp_path / "prompts.txt")] == ["one", " two "]
    (tmp_path / "blank.txt").write_text("\n")
    for name, message in (("blank.txt", "holds no prompt"), ("none.txt", "cannot be read")):
        with pytest.raises(PromptError, match=message):
            read_lines(tmp_path / name)


# --- the script


def test_the_script(tmp_path, capsys, model, make_tokenizer):
    tokenizer = make_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text(DOCUMENTS[0])
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(text) + "\n" for text in DOCUMENTS))
    (tmp_path / "prompts.txt").write_text(words(4) + "\n" + words(2))
    main = runpy.run_path(str(SCRIPT))["main"]
    texts = [str(tmp_path / name) for name in ("a.txt", "b.jsonl")]
    flags = ["--model", str(tmp_path / "model"), "--context", "8", "--threads", str(torch.get_num_threads())]
    prompts = ["--samples", str(tmp_path / "prompts.txt"), "--max_new_tokens", "5"]
    assert main([*flags, "--texts", *texts, *prompts]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("windows of 8 tokens, stride 4, each document after t1")
    one, two = (code_length(model, tokenizer, group, 8) for group in (DOCUMENTS[:1], DOCUMENTS))
    for line, found, name in zip(lines[2:5], (one, two, one + two), (*texts, "all"), strict=True):
        figures = [f"{found.bits_per_byte:.4f}", f"{found.nats_per_token:.4f}"]
        assert line.split() == [*figures, str(found.tokens), str(found.bytes), str(found.documents), name]
    drawn = sample(model, tokenizer, [Prompt.of(words(4)), Prompt.of(words(2))], max_new_tokens=5)
    assert [text for text in lines[5:] if text and not text.startswith("> ")] == [one.text for one in drawn]
    assert main(flags) == 2
    assert "texts and samples are not given" in capsys.readouterr().err
