"""Filling by a causal language model: gap by gap, under a method that keeps it from being toxic."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
from rectify.rephrasing.substitutions import Change, Substitutions
from rectify.rephrasing.words import word_places
from rectify.sampling import Sampling

_WORD = re.compile(r"\s*\S+")
_HEAD, _TAIL = 64, 12  # tokens before a gap and words after it that rank its candidates
_RANKED = 4  # candidates of a gap that the reward model sees
_ROWS = 192


@dataclass(frozen=True)
class _Filling:
    """What goes into a gap: words, with the blank that a model writes before them, or nothing.

    `before` and `after` are how many characters around the gap they replace as well.
    """

    words: str
    before: int = 0
    after: int = 0
    change: Change = field(default=Change(""), compare=False)


@dataclass(frozen=True)
class _Gap:
    """The text before a gap, filled already, and the text after it, as far as the next one.

    `removed` is what was in it, where that is asked for; `last` says that no other gap follows.
    """

    head: str
    tail: str
    removed: str | None
    last: bool

    def filled(self, filling: _Filling) -> str:
        """The text with words in the gap."""
        words, tail = filling.words, self.tail[filling.after :]
        head = self.head[: len(self.head) - filling.before]
        if not words.strip():
            return head.rstrip() + tail if head.strip() else tail.lstrip()
        if not head[-1:].isspace():
            return head + words.lstrip() + tail
        # some tokenizers give no blank back before a first word; and the word before a gap is not to be gone on with
        blank = " " if words[0].isalnum() else ""
        return head.rstrip() + blank + words + tail

    def changed(self, change: Change) -> _Filling:
        """What people put there, with a capital where what it replaces has one."""
        left, right = len(change.before.split()), len(change.after.split())
        before = len(self.head) - word_places(self.head)[-left][0] if left else 0
        after = word_places(self.tail)[right - 1][1] if right else 0
        words = change.put
        if words and f"{self.head[len(self.head) - before :]}{self.removed}"[0].isupper():
            words = words[0].upper() + words[1:]
        return _Filling(f" {words}" if words else "", before, after, change)


class CausalFiller:
    """Fills gaps from left to right with what a causal language model writes there.

    Of each gap it draws continuations of the text before it, with keyed noise and under a method; every beginning of
    one that ends with a word, and nothing at all, are candidates. Of the likeliest ones, by `log p(candidate, text
    after it as far as the next gap | text before it)`, that one is taken for which this, `reward_weight · log(1 −
    toxicity)` sum to the most. Where no text follows, the end token does. With substitutions, what people put in place
    of the same words are candidates as well, some of which replace words beside the gap too (*you* for *your ass*), and
    `substitution_weight · log p(candidate | what was there)` is added.

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
        if originals is not None and self.substitutions is not None:
            removed = [masked_words(*pair) for pair in zip(originals, masked, strict=True)]
        done: list[str | None] = [row[0] for row in parts]
        context = shared_context(self.model, self.decoder.reads)
        generator = replace(self._generator, first_sample=attempt * self._generator.num_return_sequences)
        size = max(1, _ROWS // generator.num_return_sequences)
        for number in range(1, max(map(len, parts), default=0)):
            gaps = {
                place: _Gap(
                    head, row[number], None if removed is None else removed[place][number - 1], len(row) == number + 1
                )
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
            for gap, fillings, row in zip(gaps, candidates, values, strict=True):
                if gap.removed is not None and self.substitutions.knows(gap.removed):
                    changes = [filling.change for filling in fillings]
                    known = self.substitutions.log_probability(changes, gap.removed, gap.head, gap.tail)
                    row += self.substitution_weight * np.array(known)
        ranked = [np.argsort(-row, kind="stable")[:_RANKED] for row in values]
        texts = [
            gap.filled(fillings[best])
            for gap, fillings, row in zip(gaps, candidates, ranked, strict=True)
            for best in row
        ]
        safety = iter(self._safety(texts))
        found = []
        for gap, fillings, row, order in zip(gaps, candidates, values, ranked, strict=True):
            sums = [row[place] + next(safety) for place in order]
            found.append(gap.filled(fillings[order[int(np.argmax(sums))]]))
        return found

    def _candidates(self, generator: Generator, gaps: Sequence[_Gap]) -> list[list[_Filling]]:
        """What may go into each gap: nothing, words as they were drawn, and what people put there."""
        found = []
        prompts = [self._prompt(gap) for gap in gaps]
        for gap, continuations in zip(gaps, continue_with(generator, prompts, self.decoder), strict=True):
            fillings = {_Filling(""): None}
            for one in continuations:
                line = one.text.split("\n")[0]
                ends = [match.end() for match in _WORD.finditer(line)]
                # the last word may go on beyond what was drawn
                whole = ends if line != one.text or len(one.token_ids) < generator.max_new_tokens else ends[:-1]
                drawn = (line[:end] for end in whole[: self.max_words] if MASK not in line[:end])
                fillings |= dict.fromkeys(_Filling(words, change=Change.to(words)) for words in drawn)
            if self.substitutions is not None and gap.removed is not None:
                put = self.substitutions.proposals(gap.removed, gap.head, gap.tail)
                fillings |= dict.fromkeys(map(gap.changed, put))
            found.append(list(fillings))
        return found

    def _log_likelihood(self, gaps: Sequence[_Gap], candidates: Sequence[Sequence[_Filling]]) -> list[np.ndarray]:
        """Of each gap, of each candidate with the text after it, in nats."""
        heads, texts = [], []
        most = max(map(len, candidates))
        for gap, fillings in zip(gaps, candidates, strict=True):
            # the texts of all candidates begin and end at the same places
            head = gap.head[: len(gap.head) - max(filling.before for filling in fillings)].rstrip()
            before = self.tokenizer(head)["input_ids"] if head else []
            heads.append((before or [self._begin])[-_HEAD:])
            words = [match.end() for match in _WORD.finditer(gap.tail)][:_TAIL]
            cut = max([*words[-1:], *(filling.after for filling in fillings)])
            near, end = replace(gap, tail=gap.tail[:cut]), []
            if gap.last and not all(gap.tail[filling.after :].strip() for filling in fillings):
                end = self._end
            rows = [self._ids(near.filled(filling)[len(head) :].rstrip()) + end for filling in fillings]
            texts.append(rows + rows[:1] * (most - len(rows)))  # each head is read once, for as many texts
        nll = prompted_nll(self.model, heads, texts, batch_size=_ROWS).nll.view(len(gaps), most).numpy()
        return [-row[: len(fillings)] for row, fillings in zip(nll, candidates, strict=True)]

    def _ids(self, text: str) -> list[int]:
        return cast(list[int], self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _safety(self, texts: Sequence[str]) -> np.ndarray:
        """`reward_weight · log(1 − toxicity)` of texts; as of the most toxic ones where it is not known."""
        if not self.reward_weight:
            return np.zeros(len(texts))
        toxicity = np.nan_to_num(np.asarray(self.toxicity(texts), dtype=np.float64), nan=1.0)
        return self.reward_weight * np.log1p(-np.clip(toxicity, 0, 1 - 1e-6))
