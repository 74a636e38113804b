"""`generate.py --chat`: prompts in the tokenizer's chat template."""

import json

import pytest
from moderation_records import TEMPLATE, bare_tokenizer

from rectify import InvalidArgumentError
from rectify.chat_template import chat_pair_form, chat_prompt
from rectify.cli import main
from rectify.generation.generator import Generator
from rectify.generation.prompts import Prompt
from rectify.sampling import Sampling


@pytest.fixture(scope="module")
def tokenizer():
    made = bare_tokenizer(additional_special_tokens=["<|user|>", "<|assistant|>"], bos_token="<s>", eos_token="</s>")
    made.pad_token, made.padding_side, made.chat_template = "</s>", "left", "<s>" + TEMPLATE
    return made


def test_a_question_in_its_template(tokenizer):
    assert chat_prompt(tokenizer, "How?") == "<s><|user|>How?\n<|assistant|>"
    assert chat_pair_form(tokenizer) == ("<s><|user|>", "\n<|assistant|>", "\n")
    with pytest.raises(InvalidArgumentError, match="chat needs a template"):
        chat_prompt(bare_tokenizer(), "How?")
    deaf = bare_tokenizer()
    deaf.chat_template = "nothing"
    with pytest.raises(InvalidArgumentError, match="shows no question"):
        chat_pair_form(deaf)
    deaf.chat_template = "{{ raise_exception('no users') }}"
    with pytest.raises(InvalidArgumentError, match=r"fails .*no users"):
        chat_prompt(deaf, "How?")


def test_the_model_reads_the_template(tokenizer, make_model):
    model = make_model("llama", vocab_size=8196)
    plain = Generator(model, tokenizer, Sampling(do_sample=False), 5)
    chat = Generator(model, tokenizer, Sampling(do_sample=False), 5, chat=True)
    rendered = "<s><|user|>How?\n<|assistant|>"
    (ids,) = chat.encode([Prompt.of("How?")])["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[:2] == ["<s>", "<|user|>"]  # begun once
    assert tokenizer.decode(ids) == rendered
    assert chat.continue_batch([Prompt.of("How?")]) == plain.continue_batch([Prompt.of(rendered)])
    assert f"it has {len(ids)} tokens" in chat.unusable([Prompt.of("How?")], 6)[0]


def test_the_command(tokenizer, make_model, tmp_path, capsys):
    make_model("llama", vocab_size=8196).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = ["generate", "--model", str(tmp_path / "model"), "--prompt", "How?", "--max_new_tokens", "4", "--chat"]
    assert main([*flags, "--output", str(tmp_path / "out.jsonl")]) == 0
    (line,) = (tmp_path / "out.jsonl").read_text().splitlines()
    assert json.loads(line)["prompt"] == {"text": "How?"}  # the record keeps the question
    assert main([*flags[:-1], "--output", str(tmp_path / "out.jsonl")]) == 2
    assert "begun with chat True" in capsys.readouterr().err
    assert main(["generate", "--prompt", "How?", "--chat"]) == 2
    assert "chat needs a template" in capsys.readouterr().err
