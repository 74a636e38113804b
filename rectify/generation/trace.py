"""How each token of a continuation came to be: its probability before and after the method, and the model's own choice.

It is found in a replay: the same batch is generated again, with the tokens of before forced. So everything that
`generate` does before the method (forbidding an early end, say) is done again, and nothing is noted while generating.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from rectify.errors import InvalidArgumentError
from rectify.generation.generator import Continuation, Generator
from rectify.generation.prompts import Prompt
from rectify.keyed_noise import KeyedSampling
from rectify.methods.method import Decoder, MethodProcessor
from rectify.processor import RectificationProcessor, Statistics
from rectify.trunk_states import input_device

_UNFINISHED = "\ufffd"
_AT_CAP = 1e-5


@dataclass(frozen=True)
class Candidate:
    """A token that could come next.

    Attributes:
        id: its number in the vocabulary.
        token: its name there.
        text: what it adds to the text; nothing where it is special, or ends within a character.
        risk: −Q, from 0 to 1; `None` where the method has no risk model, or the token is no candidate of a detector.
        base_probability: the model's own, after temperature, top-k and top-p.
        probability: the method's.
        cap: the greatest probability that the rule allows; `None` where it caps nothing, and without a risk.
        capped: whether the cap holds it down; `None` where there is none.
    """

    id: int
    token: str
    text: str
    risk: float | None
    base_probability: float
    probability: float
    cap: float | None
    capped: bool | None


@dataclass(frozen=True)
class TokenTrace(Candidate):
    """A token that was generated, and the state in which it was.

    Attributes:
        base_choice: what the model alone would have chosen here, from the same prefix and with the same noise; `None`
            where it is the same token.
        moved: total variation distance of the method's distribution to the model's own, from 0 to 1.
        widened: the tokens that truncation left were infeasible, and the rule let others in.
        dead_end: no distribution is feasible, and no cap was kept.
    """

    base_choice: Candidate | None
    moved: float
    widened: bool
    dead_end: bool


@dataclass(frozen=True)
class ContinuationTrace:
    """A continuation and its tokens, the end token included."""

    text: str
    tokens: tuple[TokenTrace, ...]


@dataclass(frozen=True)
class PromptTrace:
    """A prompt and its continuations."""

    prompt: str
    continuations: tuple[ContinuationTrace, ...]

    @property
    def tokens(self) -> Iterator[TokenTrace]:
        """Those of all continuations."""
        return (token for one in self.continuations for token in one.tokens)


def check_traceable(num_beams: int, draws: int) -> None:
    """Refuse what has no distribution that each token was chosen from.

    Args:
        num_beams: of the search.
        draws: continuations that the method draws for each one that it keeps.

    Raises:
        InvalidArgumentError: it is a beam search, or the method chooses between whole continuations.
    """
    if num_beams > 1:
        raise InvalidArgumentError(
            f"num_beams is {num_beams}: beams are chosen as wholes, and no token of them can be traced by itself: "
            "leave --num_beams out, or --trace"
        )
    if draws > 1:
        raise InvalidArgumentError(
            f"the method keeps one of {draws} whole continuations and changes no token, so there is nothing to trace: "
            "trace --method base, or leave --trace out"
        )


def trace_of(
    generator: Generator, prompts: list[Prompt], continuations: list[list[Continuation]], decoder: Decoder
) -> list[PromptTrace]:
    """How the tokens of continuations came to be, sampled with keyed noise or chosen greedily.

    Args:
        generator: what continued the prompts.
        prompts: a batch of it; with the same ones together, sums are rounded in the same way.
        continuations: of each prompt, `num_return_sequences` many.
        decoder: the method that continued them; its statistics are left alone.

    Raises:
        InvalidArgumentError: there is nothing to trace; see `check_traceable`.
    """
    check_traceable(generator.sampling.num_beams, decoder.draws)
    rows = [one.token_ids for ones in continuations for one in ones]
    forced = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)  # nothing is noted of what follows an end
    for row, ids in enumerate(rows):
        forced[row, : len(ids)] = torch.tensor(ids)
    device = input_device(generator.model)
    warpers = generator.sampling.warpers(device)
    replay = _Replay(decoder.processor, warpers, forced.to(device), generator.keys(prompts))
    replace(generator, max_new_tokens=forced.shape[1]).continue_batch(prompts, processor=replay)
    traced = iter([_tokens(generator, ids, row, replay.steps) for row, ids in enumerate(rows)])
    return [
        PromptTrace(prompt.text, tuple(ContinuationTrace(one.text, next(traced)) for one in ones))
        for prompt, ones in zip(prompts, continuations, strict=True)
    ]


def counts(traces: Sequence[PromptTrace]) -> str:
    """What happened to the tokens, in one line."""
    tokens = [token for trace in traces for token in trace.tokens]
    changed = sum(token.base_choice is not None for token in tokens)
    held, widened, dead_ends = (
        sum(bool(getattr(token, name)) for token in tokens) for name in ("capped", "widened", "dead_end")
    )
    moved = sum(token.moved for token in tokens) / max(1, len(tokens))
    return (
        f"{len(tokens)} tokens, {changed} of which the base model would have chosen otherwise; {moved:.3f} of the "
        f"probability moved on average, {held} tokens held at their cap, {widened} widenings, {dead_ends} dead ends"
    )


class _Step(NamedTuple):
    """What a step of a replay found, all on the CPU: of `[B]` states, and of two candidates in each.

    Attributes:
        ids: `[B, 2]` int64, the token that was generated and the one that the model alone would have chosen.
        base, policy: `[B, 2]` float64 probabilities.
        risk: `[B, 2]` float64, NaN where it is not known, or `None`.
        cap: `[B, 2]` float64, NaN where the risk is not known, or `None`.
        moved: `[B]` float64.
        widened, dead_end: `[B]` bool.
    """

    ids: Tensor
    base: Tensor
    policy: Tensor
    risk: Tensor | None
    cap: Tensor | None
    moved: Tensor
    widened: Tensor
    dead_end: Tensor


class _Replay(LogitsProcessor):
    """Stands in for a method's processor: notes what it would do, and forces the tokens that are given.

    Args:
        processor: the method's.
        warpers: of the model alone.
        forced: `[B, T]` ids.
        keys: of the noise; `None` where the likeliest token is chosen.
    """

    supports_continuous_batching = False

    def __init__(
        self, processor: MethodProcessor, warpers: LogitsProcessorList, forced: Tensor, keys: Tensor | None
    ) -> None:
        self.processor, self.warpers, self.forced, self.keys = processor, warpers, forced, keys
        self.steps: list[_Step] = []

    def set_attention_mask(self, attention_mask: Tensor | None) -> None:
        self.processor.set_attention_mask(attention_mask)

    def reset(self) -> None:
        self.processor.reset()

    def statistics(self) -> Statistics | None:
        return self.processor.statistics()

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`[B, V]` scores that leave the forced token alone."""
        generated, processor = self.forced[:, len(self.steps)], self.processor
        whole = scores.to(torch.promote_types(scores.dtype, torch.float32))
        base = self.warpers(cast(LongTensor, input_ids), cast(FloatTensor, whole))
        result = risk_model = None
        if isinstance(processor, RectificationProcessor):
            result, risk_model = processor.decide(input_ids, scores), processor
        policy = processor(input_ids, scores) if result is None else result.scores
        by_base, by_method = self._chosen(input_ids, base), self._chosen(input_ids, policy)
        # where both choose alike nothing was changed, also if rounding has them choose another token than before
        ids = torch.stack((generated, torch.where(by_base == by_method, generated, by_base)), -1)
        before, after = (each.cpu().double().softmax(-1) for each in (base, policy))
        risk = cap = None
        if risk_model is not None:
            survival = risk_model.log_survival_of(input_ids, scores, ids.to(input_ids.device)).cpu().double()
            risk, cap = 1 - survival.exp(), risk_model.rule.caps(survival)
        no = torch.zeros(len(ids), dtype=torch.bool)
        self.steps.append(
            _Step(
                ids.cpu(),
                before.gather(-1, ids.cpu()),
                after.gather(-1, ids.cpu()),
                risk,
                cap,
                (before - after).abs().sum(-1) / 2,
                no if result is None else result.widened.cpu(),
                no if result is None else result.dead_end.cpu(),
            )
        )
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(-1, generated[:, None], 0)

    def _chosen(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """What generation takes: `[B, V]` scores to `[B]` ids."""
        if self.keys is not None:
            sampling = KeyedSampling(self.keys, input_ids.shape[1] - len(self.steps))
            scores = sampling(cast(LongTensor, input_ids), cast(FloatTensor, scores))
        return scores.argmax(-1)


def _tokens(generator: Generator, ids: Sequence[int], row: int, steps: Sequence[_Step]) -> tuple[TokenTrace, ...]:
    """The trace of one row of the replay."""

    def candidate(step: _Step, place: int, before: Sequence[int]) -> Candidate:
        token = int(step.ids[row, place])
        risk, cap = (_known(each, row, place) for each in (step.risk, step.cap))
        probability = float(step.policy[row, place])
        return Candidate(
            token,
            str(generator.tokenizer.convert_ids_to_tokens(token)),
            _added(generator.decode, before, token),
            risk,
            float(step.base[row, place]),
            probability,
            cap,
            None if cap is None else probability >= cap * (1 - _AT_CAP) and cap < 1 and not bool(step.dead_end[row]),
        )

    traced = []
    for place, token in enumerate(ids):
        step, before = steps[place], ids[:place]
        traced.append(
            TokenTrace(
                **vars(candidate(step, 0, before)),
                base_choice=None if int(step.ids[row, 1]) == token else candidate(step, 1, before),
                moved=float(step.moved[row]),
                widened=bool(step.widened[row]),
                dead_end=bool(step.dead_end[row]),
            )
        )
    return tuple(traced)


def _known(table: Tensor | None, row: int, place: int) -> float | None:
    value = math.nan if table is None else float(table[row, place])
    return None if math.isnan(value) else value


def _added(decode: Callable[[Sequence[int]], str], before: Sequence[int], token: int) -> str:
    """What a token adds to a text; a character of several tokens is added by its last."""
    shown = decode(before).rstrip(_UNFINISHED)
    return decode([*before, token]).rstrip(_UNFINISHED)[len(shown) :]
