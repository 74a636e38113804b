"""Continuing batches of prompts with a language model, as it is or rectified."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import (
    BatchEncoding,
    DynamicCache,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from rectify.causal_body import causal_body
from rectify.chat_template import chat_prompt
from rectify.context import context_length
from rectify.errors import InvalidArgumentError
from rectify.generation.prompts import Prompt
from rectify.keyed_noise import KeyedSampling, row_keys
from rectify.methods.method import Decoder, MethodProcessor
from rectify.processor import RectificationProcessor
from rectify.sampling import Sampling
from rectify.trunk_probe import abilities_of, own_cache_of
from rectify.trunk_states import input_device, position_arguments


@dataclass(frozen=True)
class Continuation:
    """What was generated for a prompt.

    Attributes:
        text: the continuation alone, without special tokens.
        token_ids: its ids, up to and with the end token.
        chain: what was written before it and is no part of it; `None` where nothing was.
        failure: why there is no continuation; `None` where there is one, be it empty.
    """

    text: str
    token_ids: tuple[int, ...]
    chain: str | None = None
    failure: str | None = None

    @property
    def extra(self) -> dict[str, str]:
        """`chain` and `failure`, where they are known."""
        return {name: value for name in ("chain", "failure") if (value := getattr(self, name)) is not None}


@dataclass
class Generator:
    """Continues prompts with one model.

    Attributes:
        model: the language model.
        tokenizer: pads on the left.
        sampling: how tokens are chosen, with and without rectification.
        max_new_tokens, min_new_tokens, num_return_sequences: as in `generate`.
        seed: with a prompt's key it determines its samples.
        first_sample: the number of the first sample of each prompt, by which its noise is keyed.
        chat: prompts are a user's questions, put into the tokenizer's chat template.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    max_new_tokens: int
    min_new_tokens: int = 0
    num_return_sequences: int = 1
    seed: int = 0
    first_sample: int = 0
    chat: bool = False

    def encode(self, prompts: Sequence[Prompt], **how: Any) -> BatchEncoding:
        """The tokens of prompts, as the model reads them.

        Raises:
            InvalidArgumentError: the tokenizer has no chat template where one is needed.
        """
        texts = [chat_prompt(self.tokenizer, prompt.text) if self.chat else prompt.text for prompt in prompts]
        # a chat template holds its special tokens itself
        return self.tokenizer(texts, add_special_tokens=not self.chat, **how)

    def unusable(self, prompts: list[Prompt], context: int | None) -> dict[int, str]:
        """The prompts that make no token, or leave no room for the new ones: their indices and what is wrong."""
        found = {}
        for index, prompt in enumerate(prompts):
            length = len(self.encode([prompt])["input_ids"][0])
            if not length:
                found[index] = "the model's tokenizer makes no token of it: give other words"
            elif context is not None and length + self.max_new_tokens > context:
                found[index] = (
                    f"it has {length} tokens, and with {self.max_new_tokens} new ones it exceeds the context of "
                    f"{context}: shorten it, or generate fewer tokens"
                )
        return found

    @property
    def sampled(self) -> bool:
        """Whether tokens are drawn with keyed noise, and not by greedy or beam search."""
        return self.sampling.do_sample is not False and self.sampling.num_beams == 1

    def keys(self, prompts: Sequence[Prompt]) -> Tensor | None:
        """What the noise of each continuation is keyed by, `[prompts × num_return_sequences]`; `None` without any."""
        if not self.sampled:
            return None
        samples = range(self.first_sample, self.first_sample + self.num_return_sequences)
        return row_keys(self.seed, [prompt.key for prompt in prompts], samples)

    @torch.no_grad()
    def continue_batch(
        self, prompts: list[Prompt], number: int = 0, processor: MethodProcessor | None = None
    ) -> list[list[Continuation]]:
        """Continuations of each prompt of a batch; the same whatever ran before.

        Sampled ones depend on the prompt's key and the seed alone, up to floating-point sums, which depend on the
        shape of the batch.

        Args:
            prompts: the batch.
            number: the batch's number, which keys the random numbers of beam sampling.
            processor: a method's; `None` for the model as it is.
        """
        inputs = self.encode(prompts, return_tensors="pt", padding=True)
        ids, mask = (inputs[name].to(input_device(self.model)) for name in ("input_ids", "attention_mask"))
        n = self.num_return_sequences
        new = self.new_tokens(ids, mask, self.keys(prompts), processor, copies=n, number=number).tolist()
        continuations = [self._continuation(ids) for ids in new]
        return [continuations[start : start + n] for start in range(0, len(continuations), n)]

    @torch.no_grad()
    def new_tokens(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        keys: Tensor | None,
        processor: MethodProcessor | None = None,
        *,
        copies: int = 1,
        number: int = 0,
        max_new_tokens: int | None = None,
        before: Sequence[LogitsProcessor] = (),
        stopping: Sequence[StoppingCriteria] = (),
    ) -> Tensor:
        """The tokens that follow left-padded ones.

        Args:
            input_ids, attention_mask: `[P, T]` int64.
            keys: `[P × copies]`, of the noise; `None` for a search without.
            processor: a method's; `None` for the model as it is.
            copies: continuations of each row, one after the other.
            number: keys the random numbers of beam sampling.
            max_new_tokens: another limit than the generator's.
            before: processors that are applied before all else.
            stopping: what ends rows early.

        Returns:
            `[P × copies, N]` int64, with padding after an end.
        """
        length = input_ids.shape[1]
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if processor is not None:
            processor.set_attention_mask(attention_mask)
        if keys is not None:
            first = [processor] if processor is not None else self.sampling.warpers(input_device(self.model))
            how: dict[str, Any] = self.sampling.generate_kwargs() | {
                "do_sample": False,
                "logits_processor": [*before, *first, KeyedSampling(keys, length)],
            }
            if copies > 1:
                how["past_key_values"] = read_once(self.model, **inputs, copies=copies)
                inputs = {name: rows.repeat_interleave(copies, 0) for name, rows in inputs.items()}
        else:
            how = {"num_return_sequences": copies, "num_beams": self.sampling.num_beams}
            how |= self.sampling.plain_kwargs() if processor is None else self.sampling.generate_kwargs()
            how |= {"logits_processor": [*before, *([processor] if processor is not None else [])]}
            digest = hashlib.sha256(f"{self.seed}:{number}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:8]))
        output = cast(Any, self.model).generate(
            **inputs,
            **how,
            max_new_tokens=max_new_tokens or self.max_new_tokens,
            min_new_tokens=self.min_new_tokens or None,
            pad_token_id=self.tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList(stopping),
        )
        return output[:, length:]

    def _continuation(self, ids: list[int]) -> Continuation:
        ends = self.ends
        length = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
        return Continuation(self.decode(ids[:length]), tuple(ids[:length]))

    @property
    def ends(self) -> set[int]:
        """The model's end tokens."""
        end = self.model.generation_config.eos_token_id
        return {end} if isinstance(end, int) else set(end or ())

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def risks(self, processor: RectificationProcessor, prompt: Prompt, continuation: Continuation) -> list[float]:
        """The risk of each token of a continuation, from 0 to 1."""
        prefix = self.encode([prompt])["input_ids"][0]
        ids = torch.tensor([[*prefix, *continuation.token_ids]])
        risks = processor.token_risks(ids)
        return risks[0, len(prefix) :].tolist()


def continue_with(
    generator: Generator, prompts: list[Prompt], decoder: Decoder, number: int = 0
) -> list[list[Continuation]]:
    """Continuations of each prompt of a batch by a method; where it draws several for each, the least toxic of them.

    Args:
        generator: made for the model that the method is bound to.
        prompts, number: see `Generator.continue_batch`.
        decoder: the method. One that draws several needs a generator that samples, or all would be equal.
    """
    if decoder.write is not None:
        return decoder.write(generator, prompts)
    n = generator.num_return_sequences
    drawn = [
        replace(generator, first_sample=generator.first_sample + draw * n).continue_batch(
            prompts, number, decoder.processor
        )
        for draw in range(decoder.draws)
    ]
    return drawn[0] if decoder.toxicity is None else _least_toxic(drawn, decoder.toxicity)


def _least_toxic(
    drawn: Sequence[list[list[Continuation]]], toxicity: Callable[[Sequence[str]], np.ndarray]
) -> list[list[Continuation]]:
    """Of the draws of each continuation the least toxic one, the first of equals."""
    prompts, n = len(drawn[0]), len(drawn[0][0])
    texts = [
        drawn[draw][row][sample].text for row in range(prompts) for sample in range(n) for draw in range(len(drawn))
    ]
    values = np.asarray(toxicity(texts), dtype=np.float64).reshape(prompts, n, len(drawn))
    best = np.where(np.isnan(values), np.inf, values).argmin(-1)
    return [[drawn[best[row, sample]][row][sample] for sample in range(n)] for row in range(prompts)]


def read_once(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, copies: int) -> DynamicCache | None:
    """The states of left-padded prompts but for their last tokens, for several continuations of each.

    Args:
        model: a causal language model in evaluation mode.
        input_ids, attention_mask: `[P, T]` int64.
        copies: of each row, one after the other.

    Returns:
        A cache of `P × copies` rows and T − 1 positions; `None` where there is nothing to read, or the model was not
        seen to keep what can be read several times.
    """
    if input_ids.shape[1] < 2 or getattr(model, "_is_stateful", False) or not _reads_on(model):
        return None
    ids, mask = input_ids[:, :-1], attention_mask[:, :-1].clone()
    mask[:, -1] |= mask.sum(-1) == 0  # a row of nothing but padding would be a row of NaN
    arguments: dict[str, Any] = position_arguments(model, mask, ids.shape[1])
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1, **arguments)
    if not all(hasattr(layer, "batch_repeat_interleave") for layer in cache.layers):
        return None
    cache.batch_repeat_interleave(copies)
    return cache


def _reads_on(model: PreTrainedModel) -> bool:
    """Whether what was read of a text stays right, whatever follows."""
    try:
        body = causal_body(model)
        own = own_cache_of(body)
        return own.steps and own.pads and own.reorders and abilities_of(body).rotation is None
    except InvalidArgumentError:
        return False


def shared_context(model: PreTrainedModel, reads: Iterable[object] = ()) -> int | None:
    """Longest prefix in tokens that the model and all that reads along was made for, or `None` for no limit.

    Args:
        model: the language model.
        reads: other language models, or what has a `context`, such as a Q network; others set no limit.
    """
    contexts = [
        context_length(each.config) if isinstance(each, PreTrainedModel) else getattr(each, "context", None)
        for each in (model, *reads)
    ]
    return min((context for context in contexts if isinstance(context, int)), default=None)
