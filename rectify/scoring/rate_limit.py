"""A token bucket: how often something may be done, by all threads together."""

from __future__ import annotations

import math
import threading
import time

from rectify.errors import InvalidArgumentError


class Clock:
    """The time, and waiting for it; tests put their own in its place."""

    def now(self) -> float:
        """Seconds since some moment; never going back."""
        return time.monotonic()

    def wait(self, seconds: float, stop: threading.Event) -> None:
        """Wait that long, or until `stop` is set."""
        stop.wait(seconds)


class TokenBucket:
    """Gives out tokens, in the order of asking, no faster than a rate; safe with threads.

    Args:
        rate: tokens a second; infinity for no limit.
        burst: tokens that gather while none is asked for.
        clock: the time.

    Raises:
        InvalidArgumentError: `rate` is not above 0, or `burst` is below 1.
    """

    def __init__(self, rate: float, burst: int = 1, clock: Clock | None = None) -> None:
        if math.isnan(rate) or rate <= 0:
            raise InvalidArgumentError(f"rate is {rate}: give a number of tokens a second above 0")
        if burst < 1:
            raise InvalidArgumentError(f"burst is {burst}: give 1 or more")
        self.rate, self.burst = rate, burst
        self._clock = clock or Clock()
        self._lock = threading.Lock()
        self._free = -math.inf  # when the next token is to be had
        self._held = -math.inf  # no token before

    def acquire(self, stop: threading.Event, until: float = math.inf) -> bool:
        """Wait for a token.

        Args:
            stop: set by another thread to end the waiting.
            until: time of the clock after which a token is of no use.

        Returns:
            Whether there is one; `False` at once where it would come too late.
        """
        while not stop.is_set():
            with self._lock:
                now = self._clock.now()
                slot = max(self._free, self._held, now - (self.burst - 1) / self.rate)
                if slot > until:
                    return False
                self._free = slot + 1 / self.rate
            if slot > now:
                self._clock.wait(slot - now, stop)
            with self._lock:
                if self._held <= slot:  # else a hold came while this thread waited: it asks again
                    return not stop.is_set()
        return False

    def hold(self, seconds: float) -> None:
        """Give nothing for so long, not even to those who wait already."""
        with self._lock:
            self._held = max(self._held, self._clock.now() + seconds)
