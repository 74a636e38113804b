"""How well a causal language model predicts texts: bits per byte, which compares models of any tokenizers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rectify.context import context_length
from rectify.errors import InvalidArgumentError, PromptError
from rectify.evaluation.fluency import continuation_nll
from rectify.generation.generator import Continuation, Generator
from rectify.generation.prompts import Prompt
from rectify.sampling import Sampling
from rectify.text_files import TEXT_COLUMN, read_texts
from rectify.text_lines import TextFile

_WINDOW = 1024  # tokens, where a model names no context


@dataclass(frozen=True)
class CodeLength:
    """What a model needs to write texts down.

    Attributes:
        nats: negative log-likelihood of all tokens.
        tokens: how many; those that begin documents for the model are not among them.
        bytes: of the texts in UTF-8.
        documents: how many have a token.
    """

    nats: float
    tokens: int
    bytes: int
    documents: int

    @property
    def bits_per_byte(self) -> float:
        """`nats / ln 2 / bytes`; NaN without a byte."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def nats_per_token(self) -> float:
        """The logarithm of the perplexity; NaN without a token."""
        return self.nats / self.tokens if self.tokens else math.nan

    def __add__(self, other: CodeLength) -> CodeLength:
        return CodeLength(
            self.nats + other.nats,
            self.tokens + other.tokens,
            self.bytes + other.bytes,
            self.documents + other.documents,
        )


def read_documents(path: str | Path, column: str = TEXT_COLUMN) -> list[str]:
    """A `.txt` file as one document, and other files as one a row (see `text_files.read_texts`).

    Raises:
        TrajectoryError: the file cannot be read or holds no text, or a line, named by its number, cannot be used.
    """
    file = TextFile(Path(path))
    if file.kind != ".txt":
        return read_texts([path], [column])
    text = file.content()  # with its line ends as they are, as every byte counts
    if not text.strip():
        raise file.refusal("holds no text: give another file")
    return [text]


def windows(ids: Sequence[int], context: int) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """The tokens of a document, but the first, in windows of the context that move on by half of it.

    Each token is in one window's second part and has at least half a context of past before it, or all there is.

    Args:
        ids: of the document, with the token that begins it.
        context: 2 tokens or more.

    Yields:
        Past and predicted tokens, together no longer than the context.

    Raises:
        InvalidArgumentError: the context is shorter.
    """
    if context < 2:
        raise InvalidArgumentError(f"context is {context}: give 2 tokens or more")
    start, done = 0, 1
    while done < len(ids):
        end = min(start + context, len(ids))
        yield ids[start:done], ids[done:end]
        start, done = start + context // 2, end


def model_context(model: PreTrainedModel, context: int | None = None) -> int:
    """Tokens that a window holds: what is given, else the model's own context, else 1024.

    Raises:
        InvalidArgumentError: more is given than the model was made for, or fewer than 2.
    """
    longest = context_length(model.config)
    if context is None:
        return longest or _WINDOW
    if context < 2 or (longest is not None and context > longest):
        limit = f"to {longest}, the context of the model" if longest is not None else "on"
        raise InvalidArgumentError(f"context is {context}: give a number from 2 {limit}")
    return context


def begin_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that a document's first one is predicted after: the begin token, else the end token.

    Raises:
        InvalidArgumentError: the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return cast(int, token)
    raise InvalidArgumentError(
        f"tokenizer {tokenizer.name_or_path!r} has no begin and no end token to predict a first token after: "
        "set its bos_token"
    )


def code_length(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    context: int | None = None,
    batch_size: int = 8,
) -> CodeLength:
    """The code length of documents under the model as it is, every byte of theirs paid for.

    The first token of each is predicted after the tokenizer's begin token (else its end token); that a document ends
    is not predicted. The windows are those of `windows`.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: the model's.
        documents: blank ones count too; empty ones have no token.
        context: tokens of a window; `None` for the model's own context.
        batch_size: windows at a time; the logits of whole windows are held for so many.

    Raises:
        InvalidArgumentError: the context or the batch size is out of range, or the tokenizer has no begin or end token.
    """
    if batch_size < 1:
        raise InvalidArgumentError(f"batch_size is {batch_size}: give 1 or more")
    length, begin = model_context(model, context), begin_token(tokenizer)
    rows: list[list[int]] = []
    if documents:
        rows = cast(list[list[int]], tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"])
    parts = [part for ids in rows for part in windows([begin, *ids], length)]
    parts.sort(key=lambda part: -len(part[0]) - len(part[1]))  # batches of similar length
    nats, tokens = 0.0, 0
    with tqdm(total=len(parts), unit="window", disable=None) as progress:
        for start in range(0, len(parts), batch_size):
            batch = parts[start : start + batch_size]
            found = continuation_nll(model, [past for past, _ in batch], [new for _, new in batch], batch_size)
            nats += float(found.nll.sum())
            tokens += int(found.tokens.sum())
            progress.update(len(batch))
    return CodeLength(nats, tokens, sum(len(text.encode()) for text in documents), sum(bool(ids) for ids in rows))


# ---------------------------------------------------------------------------------------------------------------------
# Samples


def read_lines(path: str | Path) -> list[Prompt]:
    """A prompt a line; blank lines are passed over.

    Raises:
        PromptError: the file cannot be read or holds no prompt.
    """
    file = TextFile(Path(path), "samples", PromptError)
    prompts = [Prompt.of(line) for _, line in file.texts()]
    if not prompts:
        raise file.refusal("holds no prompt: give one a line")
    return prompts


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    seed: int = 0,
    max_new_tokens: int = 40,
) -> Iterator[Continuation]:
    """One continuation of each prompt, the first that is drawn: temperature 1, top-p 0.9.

    A continuation depends on the seed, its prompt, and the prompt's place in the list.

    Raises:
        PromptError: a prompt has no token, or does not fit the model's context.
        InvalidArgumentError: `max_new_tokens` is below 1.
    """
    if max_new_tokens < 1:
        raise InvalidArgumentError(f"max_new_tokens is {max_new_tokens}: give 1 or more")
    sampling = Sampling(do_sample=True, temperature=1.0, top_k=0, top_p=0.9)
    generator = Generator(model, tokenizer, sampling, max_new_tokens, seed=seed)
    longest = context_length(model.config)
    for place, reason in generator.unusable(list(prompts), longest).items():
        raise PromptError(f"samples hold {prompts[place].text[:60]!r}: {reason}")
    for number, prompt in enumerate(prompts):
        yield generator.continue_batch([prompt], number)[0][0]
