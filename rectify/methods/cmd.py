"""Self-detoxification: an adapter of the model writes a chain about the prompt, and then a continuation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
)

from rectify.causal_body import is_body_of
from rectify.chain import CLOSE, GENERATION, Malformed, Steps, closed_length, frame, read_steps
from rectify.errors import InvalidArgumentError
from rectify.generation.generator import Continuation, Generator, shared_context
from rectify.generation.prompts import Prompt
from rectify.keyed_noise import row_keys
from rectify.methods.base import Base, WarpingProcessor
from rectify.methods.method import Decoder, Method, MethodProcessor
from rectify.methods.self_detoxifier import load_detoxifier
from rectify.padding import pad_left
from rectify.sampling import Sampling
from rectify.trunk_states import input_device

_TAIL = 24  # tokens that hold the marker, whatever the tokenizer


class _Reached(StoppingCriteria):
    """Ends a row when its text ends with the marker that a continuation follows; says how long each is then."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_length: int) -> None:
        self.tokenizer, self.prompt_length = tokenizer, prompt_length
        self.lengths: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        new = input_ids[:, self.prompt_length :]
        texts = self.tokenizer.batch_decode(new[:, -_TAIL:], skip_special_tokens=True)
        for row, text in enumerate(texts):
            if row not in self.lengths and text.rstrip().endswith(GENERATION):
                self.lengths[row] = new.shape[1]
        return torch.tensor([row in self.lengths for row in range(len(new))], device=input_ids.device)


class SafePrefix:
    """Shows a method's processor the safe text and its continuation, in place of the chain that was written.

    Args:
        processor: the method's, of the same vocabulary.
    """

    def __init__(self, processor: MethodProcessor) -> None:
        self.processor = processor
        self._safe: Tensor | None = None
        self._length = 0

    def follow(self, safe: Sequence[Sequence[int]], length: int, device: torch.device) -> None:
        """Say what the next rows continue.

        Args:
            safe: the token ids of each row's safe text.
            length: tokens of the chains, padding included.
            device: of the ids.
        """
        self._safe, mask = pad_left(safe, device)
        self._length = length
        self.processor.set_attention_mask(mask)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """See `MethodProcessor`; the prefixes are whole chains.

        Raises:
            InvalidArgumentError: there are other rows than `follow` was told of.
        """
        if self._safe is None or len(self._safe) != len(input_ids):
            raise InvalidArgumentError(f"prefixes are {len(input_ids)}: call follow with the safe texts of these rows")
        return self.processor(torch.cat((self._safe, input_ids[:, self._length :]), 1), scores)

    def set_attention_mask(self, attention_mask: Tensor | None) -> None:
        """That of the chains says nothing here."""

    def reset(self) -> None:
        """Forget what the processor keeps."""
        self.processor.reset()

    def statistics(self) -> Any:
        """What the processor counted."""
        return self.processor.statistics()


class ChainWriter:
    """Writes chains, and then their continuations, with one model.

    The reasoning of each sample is written until the marker that a continuation follows; what is no chain (`Malformed`)
    is a failure. Then the continuation is written, at most `max_new_tokens` of the generator, until it is closed.

    Args:
        model: the model with its adapter.
        tokenizer: the model's, padding on the left.
        processor: of the reasoning: the warpers.
        final: of the continuation.
        chain_tokens: of a chain before its continuation, at most.
        greedy: write one chain for each prompt, of the likeliest tokens, in place of one for each sample.
        tries: how often a sampled chain is written at most, with other noise each time, until it is one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        processor: MethodProcessor,
        final: SafePrefix,
        chain_tokens: int,
        greedy: bool,
        tries: int = 1,
    ) -> None:
        self.model, self.tokenizer, self.processor, self.final = model, tokenizer, processor, final
        self.chain_tokens, self.greedy, self.tries = chain_tokens, greedy, tries
        self._close = cast(list[int], tokenizer(CLOSE, add_special_tokens=False)["input_ids"])

    def __call__(self, generator: Generator, prompts: list[Prompt]) -> list[list[Continuation]]:
        """`num_return_sequences` continuations of each prompt, each with its chain; see `Decoder.write`."""
        own = replace(generator, model=self.model)
        n = own.num_return_sequences
        frames = [cast(list[int], self.tokenizer(frame(prompt.text))["input_ids"]) for prompt in prompts]
        context = shared_context(self.model)
        # those with less room than others are written by themselves, so that they shorten no other chain
        groups: dict[int, list[int]] = defaultdict(list)
        for place, ids in enumerate(frames):
            room = self.chain_tokens if context is None else context - len(ids) - own.max_new_tokens
            groups[min(self.chain_tokens, room)].append(place)
        found = [[Continuation("", (), failure=str(Malformed.TOO_LONG))] * n for _ in prompts]
        for limit, places in groups.items():
            if limit > 0:
                some, given = [prompts[place] for place in places], [frames[place] for place in places]
                made = self._continue(own, some, given, self._reason(own, some, given, limit))
                for place, start in zip(places, range(0, len(made), n), strict=True):
                    found[place] = made[start : start + n]
        return found

    def _reason(
        self, own: Generator, prompts: list[Prompt], frames: Sequence[list[int]], limit: int
    ) -> list[list[int]]:
        """The tokens of each sample's reasoning; what is no chain is written again, with other noise."""
        own, n = replace(own, min_new_tokens=0), own.num_return_sequences
        if self.greedy:
            own = replace(own, sampling=Sampling(do_sample=False))
        if not own.sampled:
            return [row for row in self._write(own, frames, None, 1, limit) for _ in range(n)]
        keys = self._keys(own, prompts, "chain")
        rows = self._write(own, frames, keys, n, limit)
        for attempt in range(1, self.tries):
            bad = [place for place, row in enumerate(rows) if not isinstance(read_steps(own.decode(row)), Steps)]
            if not bad:
                break
            keys = self._keys(own, prompts, f"chain {attempt}")[bad]
            again = self._write(own, [frames[place // n] for place in bad], keys, 1, limit)
            for place, row in zip(bad, again, strict=True):
                rows[place] = row
        return rows

    def _keys(self, own: Generator, prompts: list[Prompt], what: str) -> Tensor:
        samples = range(own.first_sample, own.first_sample + own.num_return_sequences)
        return row_keys(own.seed, [f"{what}:{prompt.key}" for prompt in prompts], samples)

    def _write(
        self, own: Generator, frames: Sequence[list[int]], keys: Tensor | None, copies: int, limit: int
    ) -> list[list[int]]:
        """What is written after each frame, `copies` times, as far as the marker that a continuation follows."""
        ids, mask = pad_left(frames, input_device(self.model))
        reached = _Reached(self.tokenizer, ids.shape[1])
        new = own.new_tokens(
            ids,
            mask,
            keys,
            None if self.greedy else self.processor,
            copies=copies,
            max_new_tokens=limit,
            stopping=[reached],
        ).tolist()
        return [row[: reached.lengths.get(place, closed_length(row, (), own.ends))] for place, row in enumerate(new)]

    def _continue(
        self, own: Generator, prompts: list[Prompt], frames: Sequence[list[int]], rows: Sequence[list[int]]
    ) -> list[Continuation]:
        """A continuation after each sample's reasoning."""
        n = own.num_return_sequences
        chains = [own.decode(row) for row in rows]
        steps = [read_steps(chain) for chain in chains]
        found = [
            Continuation("", (), chain, None if isinstance(one, Steps) else str(one))
            for chain, one in zip(chains, steps, strict=True)
        ]
        good = [place for place, one in enumerate(steps) if isinstance(one, Steps)]
        if not good:
            return found
        ids, mask = pad_left([[*frames[place // n], *rows[place]] for place in good], input_device(self.model))
        texts = [cast(Steps, steps[place]).safe_text(prompts[place // n].text) for place in good]
        safe = [cast(list[int], self.tokenizer(text)["input_ids"]) for text in texts]
        self.final.follow(safe, ids.shape[1], input_device(self.model))
        keys = own.keys(prompts)
        # the marker that closes a continuation is an end too
        least = MinNewTokensLengthLogitsProcessor(
            ids.shape[1], own.min_new_tokens, [self._close[0]], device=str(input_device(self.model))
        )
        new = own.new_tokens(
            ids,
            mask,
            None if keys is None else keys[good],
            self.final,
            before=[least] if own.min_new_tokens else [],
        ).tolist()
        for place, row in zip(good, new, strict=True):
            row = row[: closed_length(row, self._close, own.ends)]
            found[place] = replace(found[place], text=own.decode(row), token_ids=tuple(row))
        return found


@dataclass(frozen=True)
class Cmd(Method):
    """Self-detoxification by the adapter of `path` (`rectify train cmd`), a model of its own beside the base.

    Attributes:
        chain: `sample`, a chain of its own for each continuation, as published; or `greedy`, one for each prompt.
        chain_tokens: of a chain before its continuation, at most; `max_new_tokens` counts the continuation alone.
        tries: how often a sampled chain is written at most, until it is none that is malformed.
    """

    name: ClassVar[str] = "cmd"
    source: ClassVar[str] = (
        "Tang et al., CMD, EMNLP 2024 (arXiv 2308.08295); the frame holds the first marker, a malformed chain is a "
        "failure"
    )

    chain: str = "sample"
    chain_tokens: int = 192
    tries: int = 3

    def __post_init__(self) -> None:
        if self.path is None:
            raise InvalidArgumentError("cmd names no adapter: give cmd:FOLDER, as `rectify train cmd` writes it")
        if self.chain not in ("sample", "greedy"):
            raise InvalidArgumentError(f"chain is {self.chain!r}: give sample or greedy")
        for name in ("chain_tokens", "tries"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"{name} is {getattr(self, name)}: give 1 or more")

    def bind(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Mapping[str, Any]) -> Decoder:
        """See `Method.bind`."""
        return self.bind_with(Base(), model, tokenizer, sampling)

    def bind_with(
        self,
        final: Method,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Mapping[str, Any],
    ) -> Decoder:
        """As `bind`; the continuation, not the chain before it, is written under another method.

        Raises:
            InvalidArgumentError: the other method is no change of next-token scores, or reads the states of the model
                that it is bound to.
        """
        other = final.bind(model, tokenizer, sampling)
        if other.draws > 1 or other.write is not None:
            raise InvalidArgumentError(f"{final.name} is no change of next-token scores: combine cmd with another")
        if any(is_body_of(getattr(each, "trunk", None), model) for each in other.reads):
            raise InvalidArgumentError(
                f"{final.label} reads the states of the base model, and cmd writes with another: give a Q network with "
                "a trunk of its own"
            )
        adapted = load_detoxifier(cast(str, self.path), tokenizer, model.dtype, input_device(model))
        chains = WarpingProcessor(adapted, tokenizer, sampling)
        safe = SafePrefix(other.processor)
        writer = ChainWriter(adapted, tokenizer, chains, safe, self.chain_tokens, self.chain == "greedy", self.tries)
        return Decoder(safe, reads=(adapted, *other.reads), revision=other.revision, write=writer)

    def combined_with(self, other: Method) -> Method:
        """With any method that changes next-token scores: see `CmdWith`."""
        return CmdWith(self, other)


@dataclass(frozen=True)
class CmdWith(Method):
    """Self-detoxification whose continuations, not the chains before them, are written under another method.

    That reads the safe text and the continuation as far as it goes, and nothing of the chain.

    Attributes:
        cmd: what writes the chains.
        final: the other method.
    """

    name: ClassVar[str] = "cmd+"
    source: ClassVar[str] = "CMD's chains, with the continuation under a method that reads the safe text"

    cmd: Cmd
    final: Method

    def bind(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Mapping[str, Any]) -> Decoder:
        """See `Cmd.bind_with`."""
        return self.cmd.bind_with(self.final, model, tokenizer, sampling)

    @property
    def strength(self) -> str | None:
        """That of the other method."""
        return self.final.strength

    @property
    def value(self) -> float | None:
        """The other method's."""
        return self.final.value

    @property
    def label(self) -> str:
        """The two labels."""
        return f"{self.cmd.label}+{self.final.label}"

    @property
    def family(self) -> str:
        """The two families."""
        return f"{self.cmd.family}+{self.final.family}"
