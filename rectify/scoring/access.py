"""Who may call the server, and how often."""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import time
from collections.abc import Callable, Sequence

from rectify.errors import InvalidArgumentError
from rectify.scoring.wire_errors import key_error, missing_key_error, quota_error


class Access:
    """API keys, and a quota of calls a minute.

    Args:
        api_keys: those that are accepted; none where no key is needed, and any is taken.
        quota_per_minute: of each key, or of all callers together where none is needed; `None` for no limit.
        clock: seconds, never going back.

    Raises:
        InvalidArgumentError: a key is empty or not of printable ASCII, or the quota is below 1.
    """

    def __init__(
        self,
        api_keys: Sequence[str] = (),
        quota_per_minute: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if isinstance(api_keys, str) or not all(api_keys):
            raise InvalidArgumentError("api_keys is no sequence of keys, or one is empty: give another")
        if not all(re.fullmatch(r"[!-~]+", key) for key in api_keys):  # the message must not show it
            raise InvalidArgumentError(
                "api_keys hold one with blanks or other than ASCII, as no header can: give another"
            )
        if quota_per_minute is not None and quota_per_minute < 1:
            raise InvalidArgumentError(f"quota_per_minute is {quota_per_minute}: give 1 or more, or None for no limit")
        # digests are all of one length, so that comparing them takes the same time whatever is given
        self._keys = [_digest(key) for key in api_keys]
        self._quota, self._clock = quota_per_minute, clock
        self._used: dict[bytes, tuple[float, int]] = {}

    @property
    def needs_key(self) -> bool:
        """Whether callers without a key are refused."""
        return bool(self._keys)

    def enter(self, key: str) -> bytes:
        """Who has the key, by a name that does not tell it.

        Raises:
            WireError: the key is missing or wrong.
        """
        if not self._keys:
            return b""
        if not key:
            raise missing_key_error()
        given = _digest(key)
        if sum(hmac.compare_digest(given, known) for known in self._keys) == 0:  # all of them, without an early end
            raise key_error()
        return given

    def count(self, caller: bytes, calls: int = 1) -> None:
        """Count calls of someone who came in; minutes begin with a call.

        Args:
            caller: as from `enter`.
            calls: how many; none to ask whether there may be one.

        Raises:
            WireError: the quota of this minute is used up.
        """
        if self._quota is None:
            return
        now = self._clock()
        began, used = self._used.get(caller, (now, 0))
        if now - began >= 60:
            began, used = now, 0
        if used >= self._quota:
            raise quota_error(self._quota, retry_after=max(1, math.ceil(began + 60 - now)))
        self._used[caller] = began, used + calls


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
