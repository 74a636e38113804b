"""Calls of a service that throttles, fails and costs: paced, retried within bounds, and the key to it shown nowhere."""

from __future__ import annotations

import ipaddress
import json
import logging
import math
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from itertools import islice
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, urlsplit

import requests
from requests.adapters import BaseAdapter
from requests.auth import AuthBase
from urllib3 import Retry
from urllib3.exceptions import HTTPError, InvalidHeader, MaxRetryError, ReadTimeoutError

from rectify.errors import InvalidArgumentError, RectifyError
from rectify.scoring.rate_limit import Clock, TokenBucket
from rectify.scoring.scores import Reason
from rectify.scoring.timed_connections import TimedAdapter
from rectify.scoring.unreachable import why_unreachable
from rectify.version import __version__

logger = logging.getLogger(__name__)

PASSING_STATUSES = frozenset({408, 429, *range(500, 600)})
MAX_ANSWER_BYTES = 4 * 2**20
_GIVEN_UP = 16  # calls one after another, each after all its retries, until a service counts as gone

Result = TypeVar("Result")
Judge = Callable[[int, Any], Reason | None]
"""What is wrong with an answer, given its status and its decoded body, `None` where that is no JSON."""


class Key(AuthBase):
    """The key, put into requests' headers and shown nowhere; false where there is none.

    Args:
        value: the key; may be empty.
        header: where it goes.
        scheme: what stands before it there.

    Raises:
        InvalidArgumentError: it holds what no header takes.
    """

    __slots__ = ("_header", "_scheme", "_value")

    def __init__(self, value: str, header: str = "X-Goog-Api-Key", scheme: str = "") -> None:
        self._value, self._header, self._scheme = value.strip(), header, scheme
        if not re.fullmatch("[!-~]*", self._value):  # requests would refuse it, and quote it
            raise InvalidArgumentError("key holds a blank or a character that no key has: copy it again")

    def __bool__(self) -> bool:
        return bool(self._value)

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Add the key to a request."""
        if self._value:
            request.headers[self._header] = self._scheme + self._value
        return request

    def hide_in(self, message: str) -> str:
        """A message without the key, which a server may repeat, and in one line."""
        for form in {self._value, quote(self._value), quote(self._value, safe="")} - {""}:
            message = message.replace(form, "***")
        return " ".join(message.split())


def whole_address(address: str, ending: str, path: str, remedy: str) -> str:
    """The address that is called.

    Args:
        address: its base, or all of it.
        ending: what all of it ends with.
        path: what follows the base.
        remedy: where the key is to go instead.

    Raises:
        InvalidArgumentError: it is malformed, or holds a user, a password or a query.
    """
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or "@" in parts.netloc or parts.query or parts.fragment:
        # not repeated: copied from an example, it may hold a key
        raise InvalidArgumentError(
            "endpoint is no plain address of a server: give one like 'http://127.0.0.1:8000', without user, password, "
            f"or anything from '?' on; {remedy}"
        )
    base = f"{parts.scheme}://{parts.netloc.lower()}{parts.path.rstrip('/')}"
    return base if base.endswith(ending) else base + path


def warn_if_shown(url: str, key: Key) -> None:
    """Warn of a key that travels unencrypted over a network."""
    name = urlsplit(url).hostname or ""
    try:
        local = name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        local = False
    if key and url.startswith("http:") and not local:
        host = urlsplit(url).netloc
        logger.warning("the key goes to %s unencrypted: give an https:// endpoint", host)


class _Outcome(NamedTuple):
    """What one call comes to: a reason without an answer, and why it will not get better; or an answer."""

    reason: Reason | None = None
    status: int = 0
    body: Any = None
    retry_after: str | None = None
    unreachable: str | None = None


class Calls:
    """Posts JSON to one address, from any number of threads.

    What may pass (timeouts, broken connections, and what the caller judges so) is tried again, `retries` times and for
    `time_limit` seconds at most. All threads share one pool of connections and one token bucket, which every call takes
    a token from, retries too; a server's `Retry-After` holds all of them. No redirection is followed: the key is for
    one host. No message of `requests` is passed on, as it may hold whatever the request does.

    A service that has not answered yet and cannot be reached (its name, its port, a proxy, TLS), or that something on
    the way answers for, ends the run at once; so does one that was reached and is gone.

    Args:
        url: where to.
        key: to it.
        gone: from what is wrong to the error that ends the run.
        rate: calls a second; infinity for no limit.
        workers: threads that call at the same time.
        timeout: seconds until a connection, and between parts of an answer.
        retries: of one call.
        backoff: seconds before the second retry, doubled for each further one, 30 at most; the first comes at once.
        max_retry_after: seconds; a server that asks for a longer wait does not get it.
        time_limit: seconds for one call from its first try on.
        adapter: the transport; by default over the network.
        clock: for tests.

    Raises:
        InvalidArgumentError: an argument is out of range.
    """

    def __init__(
        self,
        url: str,
        key: Key,
        *,
        gone: Callable[[str], RectifyError],
        rate: float,
        workers: int = 8,
        timeout: float = 20.0,
        retries: int = 6,
        backoff: float = 1.0,
        max_retry_after: float = 60.0,
        time_limit: float = 120.0,
        adapter: BaseAdapter | None = None,
        clock: Clock | None = None,
    ) -> None:
        for name, value, least in (("workers", workers, 1), ("retries", retries, 0)):
            if value < least:
                raise InvalidArgumentError(f"{name} is {value}: give {least} or more")
        for name, seconds in (("timeout", timeout), ("time_limit", time_limit)):
            if not 0 < seconds < math.inf:
                raise InvalidArgumentError(f"{name} is {seconds}: give seconds, more than 0 and not endless")
        for name, seconds in (("backoff", backoff), ("max_retry_after", max_retry_after)):
            if not 0 <= seconds < math.inf:
                raise InvalidArgumentError(f"{name} is {seconds}: give seconds, 0 or more and not endless")
        self.url, self.key, self._gone = url, key, gone
        self._answered = False  # by the service itself, and not by something on the way
        self._lost = 0  # calls without an answer since
        self._timeout, self._time_limit, self._max_retry_after = timeout, time_limit, max_retry_after
        self._clock = clock or Clock()
        self._bucket = TokenBucket(rate, clock=self._clock)
        self._retry = Retry(
            retries,
            allowed_methods={"POST"},
            status_forcelist=PASSING_STATUSES,
            backoff_factor=backoff / 2,  # urllib3 doubles it before its first use
            backoff_max=30.0,
        )
        self._adapter = adapter or TimedAdapter(pool_connections=1, pool_maxsize=workers)
        # proxies and certificates of the environment; its passwords (~/.netrc) are not for this
        self._network = requests.Session().merge_environment_settings(url, {}, None, None, None)
        self._local = threading.local()

    @property
    def rate(self) -> float:
        """Calls a second."""
        return self._bucket.rate

    def close(self) -> None:
        """Close the connections."""
        self._adapter.close()

    def post(
        self,
        body: Any,
        judge: Judge,
        stop: threading.Event | None = None,
        harmless: tuple[Any, Judge] | None = None,
    ) -> Reason | None:
        """Post until an answer is as wanted, or no other is to be expected.

        Args:
            body: a JSON value.
            judge: keeps what it needs of an answer; `BLOCKED` is for those that are not the service's own.
            stop: set by another thread to end the waiting.
            harmless: another body and judge, to tell a service that is out of reach from a body that something on the
                way does not let through.

        Returns:
            `None`, or why there is no answer as wanted.

        Raises:
            CancelledError: it was stopped.
            RectifyError: no other body would fare better; see `gone`.
            Exception: whatever `judge` raises.
        """
        stop = stop or threading.Event()
        data = json.dumps(body, ensure_ascii=False).encode("utf-8")
        if not self._bucket.acquire(stop):
            raise CancelledError
        deadline = self._clock.now() + self._time_limit
        retry = self._retry
        while True:
            outcome = self._call(data, deadline)
            if outcome.unreachable and not self._answered:
                raise self._gone(outcome.unreachable)
            reason = outcome.reason or judge(outcome.status, outcome.body)
            if reason is None or not reason.passing or reason is Reason.SCORE_MISSING:
                self._answered, self._lost = True, 0
            if reason is None or not reason.passing:
                return reason
            if reason is Reason.BLOCKED:  # not tried again: what decides by rules decides alike
                self._check_blocked(outcome, stop, harmless)
                return self._without_answer(reason)
            try:
                retry = retry.increment("POST")
            except MaxRetryError:
                return self._without_answer(reason)
            if (asked := self._pause(outcome)) is not None:
                self._bucket.hold(asked)
            elif (pause := retry.get_backoff_time()) > 0:
                if self._clock.now() + pause > deadline:
                    return self._without_answer(reason)
                self._clock.wait(pause, stop)
            if not self._bucket.acquire(stop, deadline):
                return self._without_answer(reason)

    def _check_blocked(self, outcome: _Outcome, stop: threading.Event, harmless: tuple[Any, Judge] | None) -> None:
        """End the run where something on the way lets nothing through to the service."""
        if self._answered:
            return
        if harmless is None:
            raise self._gone(
                f"something on the way, or another service, answers {outcome.status}, and not in the service's own "
                "form: a proxy, a firewall or a login page?"
            )
        self.post(harmless[0], harmless[1], stop)

    def _without_answer(self, reason: Reason) -> Reason:
        """Count a call that got no answer after all retries."""
        if reason is not Reason.SCORE_MISSING:
            self._lost += 1
            if self._lost >= _GIVEN_UP:
                raise self._gone(f"the last {self._lost} calls got no answer, for all retries ({reason})")
        return reason

    def _call(self, data: bytes, deadline: float) -> _Outcome:
        timeout = max(min(self._timeout, deadline - self._clock.now()), 0.001)
        try:
            with self._session().post(
                self.url,
                data=data,
                headers={"Content-Type": "application/json; charset=utf-8"},
                timeout=timeout,
                stream=True,
                allow_redirects=False,
                proxies=self._network["proxies"],
                verify=self._network["verify"],
                cert=self._network["cert"],
            ) as response:
                content = self._read(response, deadline)
        except (requests.Timeout, ReadTimeoutError, TimeoutError):
            return _Outcome(Reason.TIMEOUT)
        except (requests.exceptions.ContentDecodingError, requests.exceptions.ChunkedEncodingError):
            return _Outcome(Reason.BAD_RESPONSE)
        except requests.RequestException as error:
            return _Outcome(Reason.CONNECTION, unreachable=why_unreachable(error))
        except (HTTPError, ValueError):  # of the body alone
            return _Outcome(Reason.BAD_RESPONSE)
        except OSError as error:
            return _Outcome(Reason.CONNECTION, unreachable=why_unreachable(error))
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            if response.status_code == 200 and response.headers.get("Content-Type", "").startswith("text/html"):
                return _Outcome(Reason.BLOCKED, 200)  # a login page
            body = None
        return _Outcome(None, response.status_code, body, response.headers.get("Retry-After"))

    def _read(self, response: requests.Response, deadline: float) -> bytes:
        """The body, part by part, for a server may send one byte at a time for ever."""
        parts: list[bytes] = []
        size = 0
        while part := response.raw.read1(2**16, decode_content=True):
            parts.append(part)
            size += len(part)
            if size > MAX_ANSWER_BYTES:
                raise ValueError("too long an answer")
            if self._clock.now() > deadline:
                raise TimeoutError
        return b"".join(parts)

    def _pause(self, outcome: _Outcome) -> float | None:
        """How long the server asks for, within bounds."""
        if outcome.retry_after is None or outcome.status == 200:
            return None
        try:
            return min(self._retry.parse_retry_after(outcome.retry_after), self._max_retry_after)
        except (InvalidHeader, ValueError, OverflowError):
            return None

    def _session(self) -> requests.Session:
        """This thread's session, on the connections of all."""
        if not hasattr(self._local, "session"):
            session = requests.Session()
            session.trust_env = False
            session.auth = self.key
            session.headers["User-Agent"] = f"rectify/{__version__}"
            for scheme in ("https://", "http://"):
                session.mount(scheme, self._adapter)
            self._local.session = session
        return self._local.session


def as_completed(
    work: Callable[[int, threading.Event], Result], count: int, workers: int, name: str
) -> Iterator[Result]:
    """What threads make of the numbers from 0 to `count`, each handed over as soon as it is there.

    No more than `workers` are begun and not handed over yet, so that no more are lost with the process.

    Args:
        work: given a number, and the event by which it learns that nothing is wanted any more.
        count: how many.
        workers: threads.
        name: of the threads.

    Raises:
        Exception: whatever `work` raises.
    """
    stop, done = threading.Event(), SimpleQueue[Future[Result]]()
    executor = ThreadPoolExecutor(workers, thread_name_prefix=name)

    def begin(index: int) -> None:
        executor.submit(work, index, stop).add_done_callback(done.put)

    indices = iter(range(count))
    try:
        for index in islice(indices, workers):
            begin(index)
        for _ in range(count):
            yield done.get().result()
            for index in islice(indices, 1):
                begin(index)
    finally:
        stop.set()  # whoever waits for a token or a retry stops at once, whoever is in a call after its timeout
        executor.shutdown(wait=False, cancel_futures=True)
