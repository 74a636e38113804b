"""Rationales: why each labelled text has its label, as a teacher writes it, unless that argues against the label."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from tqdm import tqdm

from rectify.chat.model import ChatModel, Message
from rectify.detectors.templates import Template
from rectify.errors import InvalidArgumentError, ReplyError
from rectify.scoring.http_calls import as_completed


@dataclass(frozen=True)
class Wording:
    """What a teacher is told.

    Attributes:
        teach: asks for a rationale; `{question}`, `{label}` and `{answer}`, the lead with the label, are filled in.
        check: asks for the label that `{rationale}` argues for, one of `{labels}`.
    """

    teach: str
    check: str


ENGLISH = Wording(
    teach="{question}\n\nThe label is known: it is '{label}'. Write two or three sentences on what in the text leads "
    "to this label, as somebody who reads the text alone would. Then write, and end with:\n{answer}",
    check="Somebody has written the following about a text. Which label do these sentences argue for? Reply with the "
    "label alone, one of: {labels}.\n\n{rationale}",
)
STRUCTURED = replace(
    ENGLISH,
    teach="{question}\n\nThe classification is known: it is '{label}'. Answer in the form above, with this "
    "classification, as somebody who reads the statement alone would.",
)
CHINESE = Wording(
    teach="{question}\n\n已知标签是“{label}”。请像只看到文本的人那样，用两三句话说明文本中的哪些内容支持这个标签，"
    "最后写上：\n{answer}",
    check="下面是对一段文本的分析（“是”指含有不良内容，“否”指不含）。这段分析支持哪个标签？只回复标签本身，从中选一个："
    "{labels}。\n\n{rationale}",
)
WORDINGS = {"toxic": ENGLISH, "explained": STRUCTURED, "chinese": CHINESE}
"""By the name of the template."""


class Dropped(StrEnum):
    """Why a text has no rationale."""

    MALFORMED = "malformed"
    """The reply is not of the template's form, or has no rationale."""
    OTHER_LABEL = "other label"
    """It ends with another label than the one it was given."""
    ARGUES_AGAINST = "argues against"
    """Asked what its sentences argue for, the teacher names another label."""
    UNCLEAR = "unclear"
    """Asked so, it names none."""
    NO_REPLY = "no reply"


@dataclass
class Rationales:
    """What a teacher has written.

    Attributes:
        kept: `{"text", "label", …}` with the fields of the template's answer, in the order of the texts.
        dropped: `{"text", "label", "reason", "reply"}`.
        failures: how many texts got no reply, by reason.
    """

    kept: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[dict[str, Any]] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)

    @property
    def reasons(self) -> Counter[str]:
        """How many texts were dropped, by reason."""
        return Counter(record["reason"] for record in self.dropped)

    def __str__(self) -> str:
        parts = [f"{len(self.kept)} of {len(self.kept) + len(self.dropped)} kept"]
        parts += [f"{count} dropped: {reason}" for reason, count in self.reasons.most_common()]
        parts += [f"no reply: {count} {reason}" for reason, count in self.failures.most_common()]
        return "; ".join(parts)


def write_rationales(
    rows: Sequence[tuple[str, str]],
    chat: ChatModel,
    template: Template,
    wording: Wording = ENGLISH,
    *,
    seed: int = 0,
    tries: int = 2,
    check: bool = True,
) -> Rationales:
    """Have a teacher, who is told the label, say why each text has it; what argues against the label is dropped.

    Of the published 1,922 rationales about one in thirteen seems to argue against the label after it (a rough count by
    key words), as nothing there dropped any. Here a rationale is kept where it ends with the label that it was given
    and, asked without the text and the label what its sentences argue for, the teacher names the same.

    Args:
        rows: texts, each with a label of the template.
        chat: the teacher; `workers` of it, 1 by default, are asked at the same time.
        template: the question and the form of the answer.
        wording: what the teacher is told.
        seed: of the first try.
        tries: how often a rationale is asked for, each time with another seed, until one is kept.
        check: ask what it argues for.

    Raises:
        InvalidArgumentError: `tries` is below 1, or a label is none of the template's.
        ChatError: no reply can be had at all.
    """
    if tries < 1:
        raise InvalidArgumentError(f"tries is {tries}: give 1 or more")
    for index, (_, label) in enumerate(rows):
        if label not in template.labels:
            raise InvalidArgumentError(
                f"rows[{index}] has the label {label!r}: give one of {', '.join(template.labels)}"
            )

    teacher = _Teacher(chat, template, wording, seed, tries, check)
    results: dict[int, _Written] = {}

    def work(index: int, stop: threading.Event) -> tuple[int, _Written]:
        return index, teacher.write(*rows[index])

    workers = getattr(chat, "workers", 1)
    with tqdm(total=len(rows), unit="text", disable=None) as bar:
        for index, written in as_completed(work, len(rows), workers, "teacher"):
            results[index] = written
            bar.update()
    found = Rationales()
    for index, (text, label) in enumerate(rows):
        one = results[index]
        if one.reason is None:
            found.kept.append({"text": text, "label": label, **one.fields})
        else:
            found.dropped.append({"text": text, "label": label, "reason": one.reason, "reply": one.reply})
            found.failures.update(one.failures)
    return found


@dataclass(frozen=True)
class _Written:
    reason: Dropped | None = None
    reply: str = ""
    fields: dict[str, str] = field(default_factory=dict)
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Teacher:
    chat: ChatModel
    template: Template
    wording: Wording
    seed: int
    tries: int
    check: bool

    def write(self, text: str, label: str) -> _Written:
        """What comes of a text: the first rationale that is kept, or what is wrong with the last one."""
        written = _Written(Dropped.NO_REPLY)
        for attempt in range(self.tries):
            try:
                written = self._attempt(text, label, self.seed + attempt)
            except ReplyError as error:
                return _Written(Dropped.NO_REPLY, failures=(error.reason.value,))
            if written.reason is None:
                break
        return written

    def _attempt(self, text: str, label: str, seed: int) -> _Written:
        ask = _filled(
            self.wording.teach, question=self.template.ask(text), label=label, answer=self.template.lead + label
        )
        reply = self.chat.reply(_user(ask), seed)
        parsed = self.template.parse(reply)
        if parsed.label is None or parsed.incomplete or not parsed.fields:
            return _Written(Dropped.MALFORMED, reply)
        if parsed.label != label:
            return _Written(Dropped.OTHER_LABEL, reply)
        written = _Written(None, reply, dict(parsed.fields))
        if not self.check:
            return written
        rationale = "\n".join(parsed.fields.values())
        verdict = self.chat.reply(
            _user(_filled(self.wording.check, labels=", ".join(self.template.labels), rationale=rationale)), seed
        )
        said = verdict.strip(" \n\t.。'\"“”").casefold()
        named = [each for each in self.template.labels if each.casefold() == said]
        if named != [label]:
            return replace(written, reason=Dropped.ARGUES_AGAINST if named else Dropped.UNCLEAR)
        return written


def _user(content: str) -> list[Message]:
    return [{"role": "user", "content": content}]


def _filled(wording: str, **parts: str) -> str:
    """The wording with its parts; braces in the parts mean nothing."""
    pieces = []
    while parts:
        places = {name: wording.find(f"{{{name}}}") for name in parts}
        name = min((name for name in places if places[name] >= 0), key=lambda each: places[each], default=None)
        if name is None:
            break
        before, _, wording = wording.partition(f"{{{name}}}")
        pieces += [before, parts.pop(name)]
    return "".join([*pieces, wording])
