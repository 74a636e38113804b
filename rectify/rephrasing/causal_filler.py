"""Filling by a causal language model: gap by gap, under a method that keeps it from being toxic."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rectify.builders.masking import MASK
from rectify.builders.trajectories import Score
from rectify.errors import InvalidArgumentError
from rectify.evaluation.fluency import continuation_nll
from rectify.evaluation.language_model import begin_token
from rectify.generation.generator import Generator, continue_with
from rectify.generation.prompts import Prompt
from rectify.methods.method import Decoder
from rectify.sampling import Sampling

_WORD = re.compile(r"\s*\S+")
_HEAD, _TAIL = 64, 16  # tokens around a gap that rank its candidates
_ROWS = 192


@dataclass(frozen=True)
class _Gap:
    """The text before a gap, filled already, and the text after it, as far as the next one."""

    head: str
    tail: str

    def filled(self, words: str) -> str:
        """The text with words, given with the blank that the model wrote before them, or with none."""
        if not words.strip():
            return self.head.rstrip() + self.tail if self.head.strip() else self.tail.lstrip()
        if self.head[-1:].isspace():
            return self.head.rstrip() + words + self.tail
        return self.head + words.lstrip() + self.tail


class CausalFiller:
    """Fills gaps from left to right with what a causal language model writes there.

    Of each gap it draws continuations of the text before it, with keyed noise and under a method; every beginning of
    one that ends with a word, and nothing at all where text follows, is a candidate. The best one has the highest
    `log p(text after the gap, as far as the next | text before it, candidate) + reward_weight · log(1 − toxicity)`.
    The draws weigh candidates by the first factor of Bayes' rule, the model's probability of the words themselves.

    Args:
        model, tokenizer: the language model; the tokenizer pads on the left.
        decoder: the method, bound to the model.
        toxicity: of candidates with the text around them, by a reward model.
        name: of all of these.
        draws: continuations of each gap.
        max_words: the greatest number of words in a gap.
        reward_weight: of the reward, 0 or more.
        seed: of the noise.

    Raises:
        InvalidArgumentError: a number is out of range, or the tokenizer has no token to begin a text with.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        decoder: Decoder,
        toxicity: Score,
        name: str,
        draws: int = 8,
        max_words: int = 3,
        reward_weight: float = 2.0,
        seed: int = 0,
    ) -> None:
        for setting, value in (("draws", draws), ("max_words", max_words)):
            if value < 1:
                raise InvalidArgumentError(f"{setting} is {value}: give 1 or more")
        self.model, self.tokenizer, self.decoder, self.toxicity = model, tokenizer, decoder, toxicity
        self.max_words, self.reward_weight = max_words, reward_weight
        self._begin = str(tokenizer.convert_ids_to_tokens(begin_token(tokenizer)))
        self.name = f"{name},draws={draws},max_words={max_words},reward_weight={reward_weight:g},seed={seed}"
        # a token or two a word, and one to see where the last word ends
        self._generator = Generator(
            model, tokenizer, Sampling(do_sample=True), 2 * max_words + 2, num_return_sequences=draws, seed=seed
        )

    def fill(self, masked: Sequence[str], attempt: int) -> list[str | None]:
        """See `Filler.fill`. The texts' gaps are filled together: the first of all, then the second."""
        parts = [text.split(MASK) for text in masked]
        done = [row[0] for row in parts]
        generator = replace(self._generator, first_sample=attempt * self._generator.num_return_sequences)
        for number in range(1, max(map(len, parts), default=0)):
            places = [place for place, row in enumerate(parts) if len(row) > number]
            gaps = [_Gap(done[place], parts[place][number]) for place in places]
            for place, text in zip(places, self._fill(generator, gaps), strict=True):
                done[place] = text
        return list(done)

    def _fill(self, generator: Generator, gaps: Sequence[_Gap]) -> list[str]:
        size = max(1, _ROWS // generator.num_return_sequences)
        found: list[str] = []
        for start in range(0, len(gaps), size):
            some = gaps[start : start + size]
            candidates = self._candidates(generator, some)
            owners = [place for place, words in enumerate(candidates) for _ in words]
            words = [each for row in candidates for each in row]
            values = self._values([some[place] for place in owners], words)
            best: dict[int, int] = {}
            for row, place in enumerate(owners):
                if place not in best or values[row] > values[best[place]]:
                    best[place] = row
            found += [gap.filled(words[best[place]]) for place, gap in enumerate(some)]
        return found

    def _candidates(self, generator: Generator, gaps: Sequence[_Gap]) -> list[list[str]]:
        """The words that each gap may be filled with, in the order in which they were drawn."""
        prompts = [Prompt(gap.head.rstrip() or self._begin) for gap in gaps]
        found = []
        for gap, continuations in zip(gaps, continue_with(generator, prompts, self.decoder), strict=True):
            words: dict[str, None] = {"": None} if gap.tail.strip() else {}
            for one in continuations:
                line = one.text.split("\n")[0]
                ends = [match.end() for match in _WORD.finditer(line)]
                # the last word may go on beyond what was drawn
                whole = ends if line != one.text or len(one.token_ids) < generator.max_new_tokens else ends[:-1]
                words |= dict.fromkeys(line[:end] for end in whole[: self.max_words] if MASK not in line[:end])
            found.append(list(words) or [""])
        return found

    def _values(self, gaps: Sequence[_Gap], words: Sequence[str]) -> np.ndarray:
        """`[N]` how good each candidate is."""
        heads, tails = [], []
        for gap, some in zip(gaps, words, strict=True):
            head = _Gap(gap.head, "").filled(some).rstrip() or self._begin
            after = gap.filled(some)[len(head) :] if head != self._begin else gap.tail
            heads.append(self.tokenizer(head)["input_ids"][-_HEAD:])
            tails.append(self.tokenizer(after.rstrip(), add_special_tokens=False)["input_ids"][:_TAIL])
        nll = continuation_nll(self.model, heads, tails, batch_size=_ROWS).nll.numpy()
        if not self.reward_weight:
            return -nll
        toxicity = self.toxicity([gap.filled(some) for gap, some in zip(gaps, words, strict=True)])
        safety = np.log1p(-np.clip(np.nan_to_num(np.asarray(toxicity, dtype=np.float64), nan=1.0), 0, 1 - 1e-6))
        return self.reward_weight * safety - nll
