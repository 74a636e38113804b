"""Scorers by name, as the commands and the server take them."""

from __future__ import annotations

import argparse
import inspect
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rectify.errors import CheckpointError, InvalidArgumentError
from rectify.scoring.scores import Scorer

SCORERS = {
    "pocket": "the bundled scorer of RealToxicityPrompts' eight attributes (default; pocket:PATH: one like it)",
    "detector:PATH": "a classifier or gated detector of `rectify train`",
    "moderation:PATH": "a moderation of questions with their answers, of `rectify train` or of the published form",
    "instruction:PATH": "a language model that answers, of `rectify train instruction`",
    "cascade:PATH": "a small detector that asks a larger one where it is unsure, of `rectify train cascade`",
    "hf:ID": "any text classifier of the transformers library, folder or Hub id",
    "detoxify:NAME": "a model of the package detoxify (extra [detoxify])",
    "keywords:FILE": "a word list: 1 where one of its terms is in the text",
    "process:COMMAND": "a program of your own: texts in as JSON strings, numbers out, a line each",
    "perspective": "the Perspective API, or a server that speaks its format",
    "stub": "made-up numbers, for trying the machinery",
}
"""What there is, and what each is."""


_OF_PAIRS = {"moderation"}
_RUN_OR_CALL = {
    "process": "runs a command",
    "perspective": "sends texts to a service",
    "detoxify": "fetches a pickle and reads it",
}


def judges_pairs(spec: str) -> bool:
    """Whether the scorer of a name judges answers together with what they answer; see `pair_text`."""
    return spec.partition(":")[0] in _OF_PAIRS


def load_scorer(spec: str, **options: Any) -> Scorer:
    """The scorer of a name.

    Args:
        spec: one of `SCORERS`, with what follows the colon put in.
        options: further arguments of the scorer's class, as `device` or `endpoint`.

    Raises:
        InvalidArgumentError: there is no such scorer, or it has no such option.
        RectifyError: it cannot be loaded; see the scorer's class.

    Example:
        >>> from rectify.scoring.load import load_scorer
        >>> scorer = load_scorer("hf:s-nlp/roberta_toxicity_classifier", device="cpu")
        >>> scorer.score(["Have a nice day", ""])["TOXICITY"]  # the second is NaN
    """
    kind, argument = _parts(spec)
    make = _class(kind)
    given = [argument] if argument else ["pocket-scorer"] if kind == "pocket" else []
    for name in options:
        if name not in inspect.signature(make).parameters:
            raise InvalidArgumentError(f"{name} is given, but the scorer {spec!r} has no such option: leave it out")
    return make(*given, **options)


def has_option(spec: str, name: str) -> bool:
    """Whether the scorer of a name has an option of this name.

    Raises:
        InvalidArgumentError: there is no such scorer.
    """
    return name in inspect.signature(_class(_parts(spec)[0])).parameters


def check_saved(spec: str, place: str, allow: Sequence[str] = ()) -> None:
    """Refuse the name of a scorer that stands in a file, where it runs a command, sends texts away, or unpickles.

    A folder of weights may come from anybody; what runs here, and who gets the texts, only the user says.

    Args:
        spec: the name.
        place: of it, for the message.
        allow: names that the user has given as well, letter for letter.

    Raises:
        CheckpointError: it is such a scorer and not allowed, or a word list that is no file.
    """
    kind, _, argument = spec.partition(":")
    if kind in _RUN_OR_CALL and spec not in allow:
        raise CheckpointError(
            f"{place} is {spec!r}, which {_RUN_OR_CALL[kind]}, and a file may not name such a scorer: if you trust it, "
            f"name it yourself:{allow_flag(spec)}"
        )
    if kind == "keywords" and not Path(argument).expanduser().is_file():
        raise CheckpointError(f"{place} is {spec!r}, where no file is: put the word list there")


def allow_flag(spec: str) -> str:
    """The flag, after a blank, that a folder needs which names this scorer; nothing where it needs none."""
    return f" --allow {shlex.quote(spec)}" if spec.partition(":")[0] in _RUN_OR_CALL else ""


def add_allow(parser: argparse._ActionsContainer) -> None:
    """Give a command the flag `--allow`, see `check_saved`."""
    parser.add_argument(
        "--allow",
        action="append",
        metavar="SCORER",
        help="cascade: a process:, perspective or detoxify: that its folder may name, letter for letter (may be "
        "repeated); without this no file of a folder has a command run or a text sent away",
    )


def _parts(spec: str) -> tuple[str, str]:
    """The kind of a scorer, and what follows the colon."""
    kind, colon, argument = spec.partition(":")
    form = next((form for form in SCORERS if form.partition(":")[0] == kind), None)
    if form is None:
        raise InvalidArgumentError(f"scorer is {spec!r}: give one of {', '.join(SCORERS)}")
    takes_one, needs_one = ":" in form or kind == "pocket", ":" in form
    if (argument and not takes_one) or (needs_one and not argument) or (colon and not argument):
        raise InvalidArgumentError(f"scorer is {spec!r}: give {form}")
    return kind, argument


def _class(kind: str) -> Callable[..., Scorer]:
    # imported when asked for, so that one scorer does not wait for another's libraries
    if kind == "pocket":
        from rectify.scoring.pocket import PocketScorer

        return PocketScorer.from_pretrained
    if kind == "detector":
        from rectify.scoring.classifiers import DetectorScorer

        return DetectorScorer
    if kind == "moderation":
        from rectify.scoring.moderation import ModerationScorer

        return ModerationScorer
    if kind == "instruction":
        from rectify.scoring.instruction import InstructionScorer

        return InstructionScorer
    if kind == "cascade":
        from rectify.scoring.cascade import CascadeScorer

        return CascadeScorer
    if kind == "hf":
        from rectify.scoring.classifiers import HfScorer

        return HfScorer
    if kind == "detoxify":
        from rectify.scoring.detoxify_scorer import DetoxifyScorer

        return DetoxifyScorer
    if kind == "keywords":
        from rectify.scoring.keywords import KeywordScorer

        return KeywordScorer
    if kind == "process":
        from rectify.scoring.process_scorer import ProcessScorer

        return ProcessScorer
    if kind == "perspective":
        from rectify.scoring.perspective import PerspectiveScorer

        return PerspectiveScorer
    from rectify.scoring.stub import StubScorer

    return StubScorer
