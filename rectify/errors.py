"""The one error tree: every message names the argument, the value it got, and the remedy."""


class RectifyError(Exception):
    """Anything that rectify refuses to do; the parent of every error that it raises on purpose."""


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


def first_line(error: BaseException) -> str:
    """What another library's error says, short enough to be part of a message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
