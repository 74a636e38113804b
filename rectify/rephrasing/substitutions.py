"""What people put in place of toxic words, counted in their rewrites of toxic sentences."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NamedTuple

from rectify.errors import CheckpointError, InvalidArgumentError
from rectify.hub import checkpoint_folder
from rectify.json_files import check_format_version, sha256_of, write_json, write_records
from rectify.pretrained import refusing
from rectify.rephrasing.sentences import Sentence
from rectify.rephrasing.words import plain, split_words, without_marks
from rectify.saved_config import read_config, read_records

CONFIG_FILE, COUNTS_FILE = "substitutions.json", "substitutions.jsonl"
_FORMAT = 1

_EDGE = ""  # the neighbour of a text's first and last words
_FLOOR = 1e-4  # probability of words that nobody put anywhere


@dataclass(frozen=True, kw_only=True)
class SubstitutionsConfig:
    """How rewrites are counted; saved as `substitutions.json`.

    Attributes:
        prior: how many rewrites what is known less specifically counts as, above 0.
        min_ratio: of the words of a sentence and a rewrite of it, the least share that both have, from 0 to 1; others
            are new sentences, from which no word for a word is learned.
        max_words: the most words that are replaced, and that replace them.
        training: free-form record of what was counted.
    """

    prior: float = 5.0
    min_ratio: float = 0.7
    max_words: int = 3
    training: dict[str, Any] = field(default_factory=dict)
    format_version: int = _FORMAT

    def __post_init__(self) -> None:
        check_format_version(self.format_version, _FORMAT)
        if not 0 < self.prior < math.inf:
            raise InvalidArgumentError(f"prior is {self.prior}: give a number above 0")
        if not 0 <= self.min_ratio <= 1:
            raise InvalidArgumentError(f"min_ratio is {self.min_ratio}: give a share from 0 to 1")
        if self.max_words < 1:
            raise InvalidArgumentError(f"max_words is {self.max_words}: give 1 or more")


@dataclass(frozen=True, order=True)
class Edit:
    """Words that were replaced, those before and after them, and what was put there; lower case, `""` for none."""

    before: str
    removed: str
    after: str
    put: str

    def __post_init__(self) -> None:
        for name, words in vars(self).items():
            if not isinstance(words, str) or words != " ".join(split_words(words)):
                raise InvalidArgumentError(f"{name} is {words!r}: give words in lower case with blanks between them")
        if not self.removed:
            raise InvalidArgumentError("removed is empty: give the words that were replaced")


@dataclass(frozen=True)
class _Counted:
    """A record of the counts: an `Edit` and how often it was seen."""

    before: str
    removed: str
    after: str
    put: str
    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InvalidArgumentError(f"count is {self.count}: give 1 or more")


class Change(NamedTuple):
    """What replaces words, and the words right before and after them that it replaces too; `""` for none.

    In `care` for `give a damn`, seen from `damn`, `give a` goes with it.
    """

    put: str
    before: str = ""
    after: str = ""

    @classmethod
    def to(cls, words: str) -> Change:
        """The change to some words in any spelling, of the words in question alone."""
        return cls(plain(split_words(words)))


class Substitutions:
    """The probability of changes of words, given the words beside them.

    An edit counts as a change of all of its words, and of any of them with which the others went. With `n` the number
    of changes, `c` one of the words `w` between `l` and `r`, and κ the prior:

        p(c) = max(n(c) / n, 1e-4)
        p(c | w) = (n(w → c) + κ p(c)) / (n(w) + κ)
        p(c | l, w, r) = (n(l w → c) + n(w r → c) + κ p(c | w)) / (n(l w) + n(w r) + κ)

    Of several words of which nothing is known together, those without the marks around them count, or else the last.

    Args:
        edits: with the number of times that each was seen, 1 or more.
        config: how they were counted.

    Raises:
        InvalidArgumentError: there is no edit.

    Example:
        >>> from rectify.rephrasing.sentences import Sentence
        >>> from rectify.rephrasing.substitutions import Substitutions
        >>> sentence = Sentence("nobody here really gives a damn about it", ("nobody here really cares about it",))
        >>> known = Substitutions.learn([sentence])
        >>> known.proposals("damn", "she gives a ", " about me")
        [Change(put='cares', before='gives a', after='')]
    """

    def __init__(self, edits: dict[Edit, int], config: SubstitutionsConfig | None = None) -> None:
        if not edits:
            raise InvalidArgumentError("edits: there is none: give sentences whose rewrites keep most of their words")
        self.edits, self.config = edits, config or SubstitutionsConfig()
        self._all: Counter[Change] = Counter()
        self._of: defaultdict[tuple[str | None, str, str | None], Counter[Change]] = defaultdict(Counter)
        for edit, count in edits.items():
            for left, removed, right, change in _changes(edit):
                self._all[change] += count
                for key in ((None, removed, None), (left, removed, None), (None, removed, right)):
                    self._of[key][change] += count
        self._total = self._all.total()

    @classmethod
    def learn(cls, sentences: Iterable[Sentence], config: SubstitutionsConfig | None = None) -> Substitutions:
        """Count what people put in place of what, by aligning the words of sentences and of their rewrites.

        Raises:
            InvalidArgumentError: nothing is learned from any sentence.
        """
        config = config or SubstitutionsConfig()
        edits: Counter[Edit] = Counter()
        rewrites = aligned = 0
        for sentence in sentences:
            old = split_words(sentence.text)
            for reference in sentence.references:
                new = split_words(reference)
                matcher = SequenceMatcher(None, old, new, autojunk=False)
                rewrites += 1
                if matcher.ratio() < config.min_ratio:
                    continue
                aligned += 1
                for kind, start, end, new_start, new_end in matcher.get_opcodes():
                    if kind not in ("replace", "delete"):
                        continue
                    if end == len(old):  # that the last mark of a text is left out says nothing of its words
                        end = start + len(without_marks(old[start:end], front=False))
                    if start < end and max(end - start, new_end - new_start) <= config.max_words:
                        before = old[start - 1] if start else _EDGE
                        after = old[end] if end < len(old) else _EDGE
                        removed, put = " ".join(old[start:end]), plain(new[new_start:new_end])
                        edits[Edit(before, removed, after, put)] += 1
        counts = {"rewrites": rewrites, "aligned": aligned, "edits": edits.total()}
        fields = asdict(config) | {"training": config.training | counts}
        return cls(dict(sorted(edits.items())), SubstitutionsConfig(**fields))

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None) -> Substitutions:
        """Load from a folder or a Hub id.

        Raises:
            CheckpointError: nothing usable is there.
        """
        folder = checkpoint_folder(name, revision)
        remedy = "give a folder of `rectify train substitutions`"
        with refusing(name):
            config = read_config(SubstitutionsConfig, folder / CONFIG_FILE, remedy)
            edits: Counter[Edit] = Counter()
            try:
                for row in read_records(_Counted, folder / COUNTS_FILE, remedy):
                    edits[Edit(row.before, row.removed, row.after, row.put)] += row.count
                return cls(edits, config)
            except InvalidArgumentError as error:
                raise CheckpointError(f"its {COUNTS_FILE} cannot be used ({error}): {remedy}") from error

    def save_pretrained(self, folder: str | Path) -> None:
        """Write configuration and counts to a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG_FILE, asdict(self.config))
        write_records((folder / COUNTS_FILE, self._records()))

    @property
    def digest(self) -> str:
        """What tells tables apart: a SHA-256 of counts and prior, the first 12 hexadecimal digits."""
        return sha256_of([self.config.prior, list(self._records())])[:12]

    def knows(self, removed: str) -> bool:
        """Whether anything was put in place of these words by anyone."""
        return (None, self._known(removed, "", "")[1], None) in self._of

    def proposals(self, removed: str, before: str, after: str, limit: int = 24) -> list[Change]:
        """What was put in place of these words by anyone, the likeliest first.

        Args:
            removed: the words.
            before, after: the text before and after them; changes that replace other words there are left out.
            limit: the most that are given.
        """
        known = self._known(removed, before, after)
        left, right = split_words(before), split_words(after)
        fitting = [
            change
            for change in self._of.get((None, known[1], None), ())
            if left[len(left) - len(change.before.split()) :] == change.before.split()
            and right[: len(change.after.split())] == change.after.split()
        ]
        return sorted(fitting, key=lambda change: (-self._probability(change, *known), change))[:limit]

    def log_probability(self, changes: Sequence[Change], removed: str, before: str, after: str) -> list[float]:
        """`log p(c | l, w, r)` of changes of words, in nats; arguments as in `proposals`."""
        known = self._known(removed, before, after)
        return [math.log(self._probability(change, *known)) for change in changes]

    # -----------------------------------------------------------------------------------------------------------------

    def _known(self, removed: str, before: str, after: str) -> tuple[str, str, str]:
        """The words beside and in a place, as far as they are known together."""
        words = split_words(removed)
        left, right = "".join(split_words(before)[-1:]), "".join(split_words(after)[:1])
        if (None, " ".join(words), None) in self._of:
            return left, " ".join(words), right
        words = without_marks(words)
        if len(words) > 1 and (None, " ".join(words), None) not in self._of:
            left, words = words[-2], words[-1:]
        return left, " ".join(words), right

    def _probability(self, change: Change, before: str, removed: str, after: str) -> float:
        value = max(self._all[change] / self._total, _FLOOR)
        for keys in (((None, removed, None),), ((before, removed, None), (None, removed, after))):
            tables = [self._of[key] for key in keys if key in self._of]
            seen = sum(table[change] for table in tables)
            total = sum(table.total() for table in tables)
            value = (seen + self.config.prior * value) / (total + self.config.prior)
        return value

    def _records(self) -> Iterable[dict[str, Any]]:
        return (asdict(edit) | {"count": count} for edit, count in sorted(self.edits.items()))


def _changes(edit: Edit) -> Iterator[tuple[str, str, str, Change]]:
    """What an edit says of each run of its words: the word before it, the run, the word after it, and the change."""
    words = edit.removed.split()
    for start in range(len(words)):
        for end in range(start + 1, len(words) + 1):
            left = words[start - 1] if start else edit.before
            right = words[end] if end < len(words) else edit.after
            change = Change(edit.put, " ".join(words[:start]), " ".join(words[end:]))
            yield left, " ".join(words[start:end]), right, change
