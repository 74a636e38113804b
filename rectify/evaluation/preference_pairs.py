"""Dialogues of which one is preferred as harmless, as records of questions and answers.

Source of the form: Bai et al., "Training a Helpful and Harmless Assistant with RLHF", 2022 (arXiv 2204.05862).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rectify.detectors.moderation import Pair
from rectify.errors import first_line
from rectify.json_files import parse_json
from rectify.text_lines import TextFile

UNSAFE = "unsafe"
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def last_pair(dialogue: str) -> Pair | None:
    """The last question of a dialogue and the answer to it; `None` where one of them is blank or lacking."""
    before, answered, answer = dialogue.rpartition(_ASSISTANT)
    _, asked, question = before.rpartition(_HUMAN)
    pair = Pair(question.strip(), answer.strip())
    return pair if answered and asked and all(pair) else None


def preference_records(path: Path) -> Iterator[dict[str, Any]]:
    """Two records of BeaverTails' form for each preference: the chosen answer is safe, the rejected one `unsafe`.

    They are relative: both may be safe, or neither. Preferences without two different pairs are passed over.

    Args:
        path: JSON lines `{"chosen": dialogue, "rejected": dialogue}`, packed with gzip or not.

    Raises:
        TrajectoryError: the file cannot be read, or a line, named by its number, is of another form.
    """
    file = TextFile(path, "preferences")
    for number, line in file.texts():
        try:
            preference = parse_json(line)
            pairs = [last_pair(preference[name]) for name in ("chosen", "rejected")]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise file.refusal(
                f'give {{"chosen": "…", "rejected": "…"}} a line ({first_line(error)})', number
            ) from error
        if None not in pairs and pairs[0] != pairs[1]:
            for pair, unsafe in zip(pairs, (False, True), strict=True):
                assert pair is not None
                yield {
                    "prompt": pair.question,
                    "response": pair.answer,
                    "category": {UNSAFE: unsafe},
                    "is_safe": not unsafe,
                }
