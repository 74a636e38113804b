"""Filling by a causal language model: gap by gap, under a method that keeps it from being toxic."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rectify.builders.masking import MASK, masked_words
from rectify.builders.trajectories import Score
from rectify.errors import InvalidArgumentError
from rectify.evaluation.fluency import prompted_nll
from rectify.evaluation.language_model import begin_token
from rectify.generation.generator import Generator, continue_with, shared_context
from rectify.generation.prompts import Prompt
from rectify.methods.method import Decoder
from rectify.rephrasing.substitutions import Substitutions
from rectify.sampling import Sampling

_WORD = re.compile(r"\s*\S+")
_HEAD, _TAIL = 64, 16  # tokens around a gap that rank its candidates
_RANKED = 4  # candidates of a gap that the reward model sees
_ROWS = 192


@dataclass(frozen=True)
class _Gap:
    """The text before a gap, filled already, and the text after it, as far as the next one; and what was in it."""

    head: str
    tail: str
    removed: str | None

    def filled(self, words: str) -> str:
        """The text with words, given with the blank that the model wrote before them, or with none."""
        if not words.strip():
            return self.head.rstrip() + self.tail if self.head.strip() else self.tail.lstrip()
        if not self.head[-1:].isspace():
            return self.head + words.lstrip() + self.tail
        # some tokenizers give no blank back before a first word; and the word before a gap is not to be gone on with
        blank = " " if words[0].isalnum() else ""
        return self.head.rstrip() + blank + words + self.tail


class CausalFiller:
    """Fills gaps from left to right with what a causal language model writes there.

    Of each gap it draws continuations of the text before it, with keyed noise and under a method; every beginning of
    one that ends with a word, and nothing at all, are candidates. Of the likeliest ones, by `log p(candidate, text
    after it as far as the next gap | text before it)`, that one is taken for which this, `reward_weight · log(1 −
    toxicity)` sum to the most. Where no text follows, the end token does. With substitutions, what people put in place
    of the same words are candidates as well, and `substitution_weight · log p(candidate | what was there)` is added.

    Args:
        model, tokenizer: the language model; the tokenizer pads on the left.
        decoder: the method, bound to the model.
        toxicity: of candidates with the text around them, by a reward model.
        name: of all of these.
        draws: continuations of each gap.
        max_words: the greatest number of words in a gap.
        reward_weight: of the reward, 0 or more.
        substitutions: what people put in place of words; `None` where it is not known. Asked only where `fill` is
            given the originals.
        substitution_weight: of their log-probability, 0 or more.
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
        max_words: int = 2,
        reward_weight: float = 2.0,
        substitutions: Substitutions | None = None,
        substitution_weight: float = 2.0,
        seed: int = 0,
    ) -> None:
        for setting, value in (("draws", draws), ("max_words", max_words)):
            if value < 1:
                raise InvalidArgumentError(f"{setting} is {value}: give 1 or more")
        self.model, self.tokenizer, self.decoder, self.toxicity = model, tokenizer, decoder, toxicity
        self.max_words, self.reward_weight = max_words, reward_weight
        self.substitutions, self.substitution_weight = substitutions, substitution_weight
        self._begin = begin_token(tokenizer)
        self._begin_text = str(tokenizer.convert_ids_to_tokens(self._begin))
        end = tokenizer.eos_token_id
        self._end = [] if end is None else [cast(int, end)]
        self.name = f"{name},{draws=},{max_words=},{reward_weight=:g},{seed=}"
        if substitutions is not None:
            self.name += f",substitutions={substitutions.digest},{substitution_weight=:g}"
        # a token or two a word, and one to see where the last word ends
        self._generator = Generator(
            model, tokenizer, Sampling(do_sample=True), 2 * max_words + 2, num_return_sequences=draws, seed=seed
        )

    def fill(self, masked: Sequence[str], attempt: int, originals: Sequence[str] | None = None) -> list[str | None]:
        """See `Filler.fill`; `None` where the text before a gap is too long for the model, or for what it reads along.

        The texts' gaps are filled together: the first of all, then the second.
        """
        parts = [text.split(MASK) for text in masked]
        removed: list[list[str]] | None = None
        if originals is not None:
            removed = [masked_words(*pair) for pair in zip(originals, masked, strict=True)]
        done: list[str | None] = [row[0] for row in parts]
        context = shared_context(self.model, self.decoder.reads)
        generator = replace(self._generator, first_sample=attempt * self._generator.num_return_sequences)
        size = max(1, _ROWS // generator.num_return_sequences)
        for number in range(1, max(map(len, parts), default=0)):
            gaps = {
                place: _Gap(head, row[number], None if removed is None else removed[place][number - 1])
                for place, (head, row) in enumerate(zip(done, parts, strict=True))
                if head is not None and len(row) > number
            }
            for index in generator.unusable([self._prompt(gap) for gap in gaps.values()], context):
                done[list(gaps)[index]] = None
            places = [place for place in gaps if done[place] is not None]
            for start in range(0, len(places), size):
                some = places[start : start + size]
                for place, text in zip(some, self._fill(generator, [gaps[place] for place in some]), strict=True):
                    done[place] = text
        return done

    def _prompt(self, gap: _Gap) -> Prompt:
        """What is continued to fill a gap."""
        return Prompt(gap.head.rstrip() or self._begin_text)

    def _fill(self, generator: Generator, gaps: Sequence[_Gap]) -> list[str]:
        candidates = self._candidates(generator, gaps)
        # the likeliest few of each gap, as a reward costs as much as a likelihood
        values = self._log_likelihood(gaps, candidates)
        if self.substitutions is not None:
            for gap, words, row in zip(gaps, candidates, values, strict=True):
                if gap.removed is not None:
                    known = self.substitutions.log_probability(words, gap.removed, gap.head, gap.tail)
                    row += self.substitution_weight * np.array(known)
        ranked = [np.argsort(-row, kind="stable")[:_RANKED] for row in values]
        texts = [
            gap.filled(words[best]) for gap, words, row in zip(gaps, candidates, ranked, strict=True) for best in row
        ]
        safety = iter(self._safety(texts))
        found = []
        for gap, words, row, order in zip(gaps, candidates, values, ranked, strict=True):
            sums = [row[place] + next(safety) for place in order]
            found.append(gap.filled(words[order[int(np.argmax(sums))]]))
        return found

    def _candidates(self, generator: Generator, gaps: Sequence[_Gap]) -> list[list[str]]:
        """What each gap may be filled with: nothing, words as they were drawn, and what people put there."""
        found = []
        prompts = [self._prompt(gap) for gap in gaps]
        for gap, continuations in zip(gaps, continue_with(generator, prompts, self.decoder), strict=True):
            words = {"": None}
            for one in continuations:
                line = one.text.split("\n")[0]
                ends = [match.end() for match in _WORD.finditer(line)]
                # the last word may go on beyond what was drawn
                whole = ends if line != one.text or len(one.token_ids) < generator.max_new_tokens else ends[:-1]
                words |= dict.fromkeys(line[:end] for end in whole[: self.max_words] if MASK not in line[:end])
            if self.substitutions is not None and gap.removed is not None:
                put = self.substitutions.proposals(gap.removed, gap.head, gap.tail)
                words |= dict.fromkeys(_like(each, gap.removed) for each in put)
            found.append(list(words))
        return found

    def _log_likelihood(self, gaps: Sequence[_Gap], candidates: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Of each gap, of each candidate with the text after it, in nats."""
        heads, texts = [], []
        most = max(map(len, candidates))
        for gap, words in zip(gaps, candidates, strict=True):
            before = self.tokenizer(gap.head.rstrip())["input_ids"] if gap.head.strip() else []
            heads.append((before or [self._begin])[-_HEAD:])
            rows = [self._after(gap, each) for each in words]
            texts.append(rows + rows[:1] * (most - len(rows)))  # each head is read once, for as many texts
        nll = prompted_nll(self.model, heads, texts, batch_size=_ROWS).nll.view(len(gaps), most).numpy()
        return [-row[: len(words)] for row, words in zip(nll, candidates, strict=True)]

    def _after(self, gap: _Gap, words: str) -> list[int]:
        """The tokens of a candidate and of the text after it; the end token where there is none."""
        text = gap.filled(words)[len(gap.head.rstrip()) :] if gap.head.strip() else gap.filled(words)
        ids = cast(list[int], self.tokenizer(text.rstrip(), add_special_tokens=False)["input_ids"])
        own = len(cast(list[int], self.tokenizer(words, add_special_tokens=False)["input_ids"])) if words else 0
        return ids[: own + _TAIL] + ([] if gap.tail.strip() else self._end)

    def _safety(self, texts: Sequence[str]) -> np.ndarray:
        """`reward_weight · log(1 − toxicity)` of texts; as of the most toxic ones where it is not known."""
        if not self.reward_weight:
            return np.zeros(len(texts))
        toxicity = np.nan_to_num(np.asarray(self.toxicity(texts), dtype=np.float64), nan=1.0)
        return self.reward_weight * np.log1p(-np.clip(toxicity, 0, 1 - 1e-6))


def _like(words: str, removed: str) -> str:
    """Words with the blank that a model writes before them, and with a capital where what they replace has one."""
    if not words:
        return ""
    return " " + (words[0].upper() + words[1:] if removed[:1].isupper() else words)
