"""Conversations in the form of a model's own chat template."""

from __future__ import annotations

from typing import NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rectify.errors import InvalidArgumentError, first_line

# stand-ins that no template has a text of its own like
_QUESTION, _ANSWER = "⟨the question⟩", "⟨the answer⟩"


class PairForm(NamedTuple):
    """What a template puts around a question and its answer."""

    before: str
    between: str
    after: str


def chat_prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """A user's question as far as the point where the assistant's answer begins.

    The template's special tokens are in it: tokenise it with `add_special_tokens=False`.

    Raises:
        InvalidArgumentError: the tokenizer has no chat template, or it fails.
    """
    return _rendered(tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True)


def chat_pair_form(tokenizer: PreTrainedTokenizerBase) -> PairForm:
    """What the chat template puts around a user's question and an assistant's answer.

    Raises:
        InvalidArgumentError: the tokenizer has no chat template, or it fails, or it leaves one of the two out.
    """
    messages = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    text = _rendered(tokenizer, messages, add_generation_prompt=False)
    before, question, rest = text.partition(_QUESTION)
    between, answer, after = rest.partition(_ANSWER)
    if not question or not answer:
        raise InvalidArgumentError(
            f"the chat template of {tokenizer.name_or_path!r} shows no question with its answer after it: give a model "
            "whose template does"
        )
    return PairForm(before, between, after)


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    if tokenizer.chat_template is None:
        raise InvalidArgumentError(
            f"chat needs a template, and the tokenizer of {tokenizer.name_or_path!r} has none: give a model that was "
            "made for chat, or go without"
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (TemplateError, ValueError) as error:
        raise InvalidArgumentError(
            f"the chat template of {tokenizer.name_or_path!r} fails ({first_line(error)}): give another model"
        ) from error
    return str(text)
