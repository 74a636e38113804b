"""How an instruction-style detector is asked and how it answers: templates, and a strict parser of answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from rectify.errors import InvalidArgumentError

TEXT = "{text}"


class Problem(StrEnum):
    """Why an answer has no label."""

    NO_LABEL = "no label"
    SEVERAL_LABELS = "several labels"
    UNKNOWN_LABEL = "unknown label"
    TRUNCATED = "truncated"
    """The answer ends within the label, or where it may still have gone on."""
    DISORDER = "disorder"
    """A field comes twice or in another place, or there is text before the first one."""


@dataclass(frozen=True)
class Parsed:
    """What an answer says.

    Attributes:
        label: `None` where the answer is not of the template's form: it then counts as unparsed, never as toxic or not.
        problem: why, in that case.
        fields: what it says beside the label, by name; those that it lacks are lacking.
        start: where the label begins in the answer; −1 without one.
        incomplete: whether a field that goes with the label is lacking, or cut off.
    """

    label: str | None
    problem: Problem | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    start: int = -1
    incomplete: bool = False


@dataclass(frozen=True)
class Template:
    """A question about a text, and the form of its answer.

    An answer is the lead and a label, with or without other fields: those of `before`, each begun by its marker, in
    their order, the label after its lead, and those of `after`, if the label is a toxic one. Where there are no fields
    before the label, any text before its lead is the field `rationale`.

    Attributes:
        prompt: the question; `{text}` stands for the text.
        lead: what stands before the label.
        labels: them, as they are written; none begins another.
        toxic: those that count as toxic.
        before, after: names and markers of the other fields.

    Raises:
        InvalidArgumentError: labels or markers cannot be told apart, or the text has no place.

    Example:
        >>> from rectify.detectors.templates import TEMPLATES
        >>> template = TEMPLATES["toxic"]
        >>> template.parse("It wishes somebody well.\\nLabel: non-toxic").label
        'non-toxic'
        >>> template.parse("I would say that it is").problem
        <Problem.NO_LABEL: 'no label'>
    """

    prompt: str
    lead: str
    labels: tuple[str, ...]
    toxic: tuple[str, ...]
    before: tuple[tuple[str, str], ...] = ()
    after: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name in ("labels", "toxic", "before", "after"):  # from JSON they come as lists
            value = tuple(tuple(each) if isinstance(each, list) else each for each in getattr(self, name))
            object.__setattr__(self, name, value)
        if self.prompt.count(TEXT) != 1:
            raise InvalidArgumentError(f"prompt holds {TEXT} {self.prompt.count(TEXT)} times: give it once")
        if len(self.labels) < 2 or any(not label.strip() or label != label.strip() for label in self.labels):
            raise InvalidArgumentError(f"labels are {self.labels!r}: give two or more, none of them blank")
        for label in self.labels:
            if any(other != label and other.startswith(label) for other in self.labels) or self.labels.count(label) > 1:
                raise InvalidArgumentError(f"labels {self.labels!r}: {label!r} begins another: give others")
        if not self.toxic or not set(self.toxic) < set(self.labels):
            raise InvalidArgumentError(f"toxic is {self.toxic!r}: give some of the labels {self.labels!r}, not all")
        if not all(marker.strip() for _, marker in self._marked):
            raise InvalidArgumentError("lead and markers may not be blank: give each a word")

    @property
    def _marked(self) -> tuple[tuple[str, str], ...]:
        """Names and markers of all fields, in their order; that of the label is empty."""
        return (*self.before, ("", self.lead), *self.after)

    def ask(self, text: str) -> str:
        """The prompt for a text."""
        return self.prompt.replace(TEXT, text)

    def write(self, label: str, fields: Mapping[str, str] | None = None) -> str:
        """The answer with this label, and with fields.

        Raises:
            InvalidArgumentError: the label or a field is none of the template's.
        """
        fields = fields or {}
        if label not in self.labels:
            raise InvalidArgumentError(f"label is {label!r}: give one of {', '.join(self.labels)}")
        known = [name for name, _ in self._marked if name] if self.before else ["rationale"]
        for name in fields:
            if name not in known:
                raise InvalidArgumentError(f"fields hold {name!r}: give some of {', '.join(known)}")
        if not self.before:
            rationale = " ".join(fields.get("rationale", "").split())
            return f"{rationale} {self.lead}{label}" if rationale else self.lead + label
        parts = [f"{marker} {fields[name].strip()}" for name, marker in self.before if name in fields]
        parts.append(self.lead + label)
        if label in self.toxic:
            parts += [f"{marker} {fields[name].strip()}" for name, marker in self.after if name in fields]
        return "\n".join(parts)

    def parse(self, answer: str, ended: bool = True) -> Parsed:
        """What an answer says.

        Args:
            answer: without special tokens.
            ended: whether the model ended it by itself; else more might have followed.
        """
        found: list[tuple[int, int, str]] = []
        for name, marker in self._marked:
            bare, start = marker.strip(), -1
            if (count := answer.count(bare)) > 1:
                return Parsed(None, Problem.DISORDER if name else Problem.SEVERAL_LABELS)
            if count:
                start = answer.index(bare)
                found.append((start, start + len(bare), name))
        if not any(name == "" for _, _, name in found):
            return Parsed(None, Problem.NO_LABEL if ended else Problem.TRUNCATED)
        if found != sorted(found):
            return Parsed(None, Problem.DISORDER)
        opening = answer[: found[0][0]].strip()
        if opening and self.before:
            return Parsed(None, Problem.DISORDER)
        fields = {"rationale": opening} if opening else {}
        label, label_start, cut = "", -1, False
        for place, (_, end, name) in enumerate(found):
            last = place == len(found) - 1
            value = answer[end:] if last else answer[end : found[place + 1][0]]
            if name:
                fields[name] = value.strip()
                cut |= last and not ended
            else:
                label = value.strip()
                label_start = end + len(value) - len(value.lstrip())
                if last and not ended:
                    return Parsed(None, Problem.TRUNCATED)
        if label not in self.labels:
            return Parsed(None, Problem.UNKNOWN_LABEL)
        wanted = [name for name, _ in self.before + (self.after if label in self.toxic else ())]
        lacking = any(not fields.get(name) for name in wanted)
        return Parsed(label, None, fields, label_start, lacking or cut)


TEMPLATES = {
    "toxic": Template(
        prompt="Is the following text toxic: rude, disrespectful, hateful, threatening, or an attack on somebody?\n\n"
        f"Text: {TEXT}\n\nAnswer:\n",
        lead="Label: ",
        labels=("non-toxic", "toxic"),
        toxic=("toxic",),
    ),
    "explained": Template(
        prompt="### User: Categorize the following statement as neutral, offensive, or hateful:\n\n"
        f"'{TEXT}'\n\n"
        "Answer in this form:\n"
        "(1) Holistic Explanation: what the statement says and how it says it\n"
        "Classification: neutral, offensive or hate\n"
        "and, unless it is neutral,\n"
        "(2) Affected Groups: whom it is about\n"
        "(3) Harmful Words: those of its words that do harm\n"
        "(4) Reason for Harm: what makes them harmful\n\n"
        "### Assistant:\n",
        lead="Classification: ",
        labels=("neutral", "offensive", "hate"),
        toxic=("offensive", "hate"),
        before=(("explanation", "(1) Holistic Explanation:"),),
        after=(
            ("affected_groups", "(2) Affected Groups:"),
            ("harmful_words", "(3) Harmful Words:"),
            ("reason", "(4) Reason for Harm:"),
        ),
    ),
    "chinese": Template(
        prompt=f"请判断下面的文本是否含有不良内容，例如粗俗的言语、对个人或群体的歧视。\n\n文本：{TEXT}\n\n回答：\n",
        lead="不良内容：",
        labels=("否", "是"),
        toxic=("是",),
    ),
}
"""Templates by name; `explained` has the fields of ExplainingHate-OptimalQLoRA, `chinese` the labels of the published
ToxiCN detector."""
