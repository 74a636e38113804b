"""A program of the user's own as a scorer, in its own environment."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
from collections.abc import Sequence

import numpy as np

from rectify.errors import ScorerError, first_line
from rectify.scoring.scores import Reason, Scores, check_attributes, reason_against


class ProcessScorer:
    """Scores with a program that reads texts as JSON strings, a line each, and writes a number or `null` a line each.

    With `--version` it writes its name and version instead, which is the scorer's revision. It runs in its own
    environment and need not import rectify; `eval/profanity_judge.py` is one. Blank texts are not sent.

    Args:
        command: the program and its arguments, as in a shell.

    Raises:
        ScorerError: it cannot be run.
    """

    attributes: tuple[str, ...] = ("TOXICITY",)

    def __init__(self, command: str) -> None:
        self.name = f"process:{command}"
        self._command = shlex.split(command)
        self.revision = self._run(["--version"], "").strip()

    def score(self, texts: Sequence[str], attributes: Sequence[str] = ("TOXICITY",)) -> Scores:
        """Score texts; see `Scorer.score`.

        Raises:
            ScorerError: the program fails, or does not answer with a number from 0 to 1 or `null` for each text.
        """
        asked = check_attributes(self, attributes)
        reasons = [reason_against(text) for text in texts]
        values = np.full((len(texts), len(asked)), np.nan)
        sent = [place for place, reason in enumerate(reasons) if reason is None]
        given = "".join(json.dumps(texts[place]) + "\n" for place in sent)
        answers = self._run([], given).splitlines() if sent else []
        if len(answers) != len(sent):
            raise ScorerError(
                f"process {self._command[0]!r} answered {len(answers)} of {len(sent)} texts: check it alone"
            )
        for place, answer in zip(sent, answers, strict=True):
            values[place] = self._value(answer)
            if np.isnan(values[place]).any():
                reasons[place] = Reason.SCORE_MISSING
        return Scores(values, asked, tuple(reasons))

    def _value(self, answer: str) -> float:
        if answer == "null":
            return math.nan
        try:
            value = float(answer)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 1:
            raise ScorerError(
                f"process {self._command[0]!r} answered {answer!r}: it must give a number from 0 to 1, or null"
            )
        return value

    def _run(self, arguments: list[str], given: str) -> str:
        try:
            done = subprocess.run(
                [*self._command, *arguments], input=given, capture_output=True, encoding="utf-8", check=False
            )
        except OSError as error:
            raise ScorerError(
                f"process {self._command[0]!r} cannot be run ({first_line(error)}): check the path"
            ) from error
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
            raise ScorerError(
                f"process {self._command[0]!r} ended with {done.returncode} ({reason}): run it in an environment in "
                "which its packages are installed"
            )
        return done.stdout
