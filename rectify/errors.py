"""The one error tree: every message names the argument, the value it got, and the remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rectify.scoring.scores import Reason

_WIRE_ERROR_TYPE = "type.googleapis.com/google.commentanalyzer.v1alpha1.Error"


class RectifyError(Exception):
    """Anything that rectify refuses to do; the parent of every error that it raises on purpose.

    Attributes:
        hint: what to do about it, where that takes a line of its own, which then follows the message.
    """

    hint: str = ""

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}\n{self.hint}" if self.hint else message


class InvalidArgumentError(RectifyError, ValueError):
    """An argument outside its range or of the wrong form."""


class CheckpointError(RectifyError, OSError):
    """A path or Hub id that holds no usable model or Q network."""


class VocabularyMismatchError(RectifyError, ValueError):
    """Two parts that must share token ids do not."""


class PromptError(RectifyError, ValueError):
    """A prompt, or a line of a prompts file, that cannot be used."""


class TrajectoryError(RectifyError, ValueError):
    """A file of trajectories or texts, or a line of one, that cannot be used."""


class ScorerError(RectifyError, RuntimeError):
    """A scorer that cannot be run, or whose answers cannot be used."""


class UnknownAttributeError(InvalidArgumentError):
    """An attribute that a scorer does not score."""


class ChatError(RectifyError, RuntimeError):
    """No conversation gets a reply: the run ends."""


class ReplyError(RectifyError, RuntimeError):
    """One conversation gets no reply; `reason` says why, and whether it may get one another time."""

    def __init__(self, reason: Reason, said: str = "") -> None:
        remedy = "try again later" if reason.passing else "change it"
        super().__init__(f"conversation has no reply ({reason}{f', {said}' if said else ''}): {remedy}")
        self.reason = reason


class CacheError(RectifyError, RuntimeError):
    """A file of results that cannot be used."""


class UnavailableError(RectifyError, RuntimeError):
    """Nothing is scored now: too much waits already, or the end has come."""


class ScoringError(RectifyError, RuntimeError):
    """The scorer failed with a whole batch."""


class PerspectiveError(RectifyError, RuntimeError):
    """No text can be scored: the run ends."""


class ApiKeyError(PerspectiveError):
    """The key is missing, malformed or refused."""


class EndpointError(PerspectiveError):
    """The endpoint does not speak Perspective's format."""


class AnalysisError(RectifyError, RuntimeError):
    """One text has no score; `reason` says why."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(f"text has no score ({reason}): {'try again later' if reason.passing else 'change it'}")
        self.reason = reason


class WireError(RectifyError):
    """An error as Perspective sends it.

    Args:
        message: for people.
        error_type: Perspective's name of the error, as `"COMMENT_EMPTY"`; `None` where its errors carry none.
        code: HTTP status.
        status: Google's name of the status.
        details: whole details, after the one that names the type.
        fields: further fields of that one.
        headers: of the HTTP answer.
    """

    def __init__(
        self,
        message: str,
        error_type: str | None = None,
        code: int = 400,
        status: str = "INVALID_ARGUMENT",
        details: Sequence[dict[str, Any]] = (),
        fields: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.error_type, self.code, self.status = message, error_type, code, status
        self.headers = dict(headers or {})
        self._details = list(details)
        if error_type is not None:
            self._details.insert(0, {"@type": _WIRE_ERROR_TYPE, "errorType": error_type, **(fields or {})})

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        error: dict[str, Any] = {"code": self.code, "message": self.message, "status": self.status}
        return {"error": error | ({"details": self._details} if self._details else {})}


class OutputError(RectifyError, OSError):
    """An output that cannot be written, or that another run is writing."""


class MissingExtraError(RectifyError, ImportError):
    """A library is lacking that only some commands need.

    Args:
        library: its name.
        extra: of this package, which brings it.
    """

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library} is not installed: {install_line(extra)}")


def install_line(extra: str) -> str:
    """Return the command that installs an extra, as messages show it."""
    return f"pip install 'rectify-lm[{extra}]'"


def shown(value: object) -> str:
    """How a message shows a value: its `repr`, cut after 60 characters."""
    written = repr(value)
    return written if len(written) <= 60 else f"{written[:60]}…"


def first_line(error: BaseException) -> str:
    """What another library's error says, short enough to be part of a message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
