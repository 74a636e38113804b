"""A client of the Perspective API, and of every server that speaks its wire format."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from itertools import islice
from queue import SimpleQueue

import numpy as np
import requests
from requests.adapters import HTTPAdapter
from urllib3 import Retry
from urllib3.exceptions import HTTPError, InvalidHeader, MaxRetryError, ReadTimeoutError

from rectify.errors import InvalidArgumentError
from rectify.scoring.perspective_endpoint import (
    GOOGLE_URL,
    KEY_VARIABLE,
    PASSING_STATUSES,
    PERSPECTIVE_ATTRIBUTES,
    URL_VARIABLE,
    AnalysisError,
    Answer,
    ApiKeyError,
    Endpoint,
    EndpointError,
    PerspectiveError,
)
from rectify.scoring.rate_limit import Clock, TokenBucket
from rectify.scoring.scores import Reason, Scores, check_attributes, reason_against
from rectify.scoring.streams import gathered
from rectify.scoring.wire import MAX_BYTES, AttributeScore, analyze_body, parse_analyze_response
from rectify.version import __version__

logger = logging.getLogger(__name__)

__all__ = [
    "PERSPECTIVE_ATTRIBUTES",
    "AnalysisError",
    "ApiKeyError",
    "EndpointError",
    "PerspectiveError",
    "PerspectiveScorer",
]

MAX_ANSWER_BYTES = 4 * 2**20


class PerspectiveScorer:
    """A `Scorer` that asks a server of the Perspective API.

    Each text is one call. What may pass (429, 5xx, timeouts, broken connections, answers that are cut short or lack an
    attribute) is tried again, `retries` times and for `time_limit` seconds at most; what is permanent is not. All
    threads share one pool of connections and one token bucket, which every call takes a token from, retries too; a
    server's `Retry-After` holds all of them. Texts are sent with `doNotStore` unless told otherwise. The key goes in a
    header: no address, hence no log and no error, holds it.

    Perspective does not version its models, so `revision` cannot: it holds the version of the API, the endpoint and
    the languages, and scores of distant days may come from different models.

    Args:
        key: by default the environment's `PERSPECTIVE_API_KEY`; Google's service needs one.
        endpoint: base address, or the whole one, which ends in "analyze"; by default the environment's
            `PERSPECTIVE_API_URL`, else Google's.
        rate: calls a second (Perspective's default quota is 1); infinity for no limit.
        workers: calls at the same time.
        languages: of the texts, as ISO 639-1 codes; none to leave them to the server.
        do_not_store: whether the server is told to forget the texts.
        attributes: those that the server scores.
        timeout: seconds until a connection, and between parts of an answer.
        retries: of one text.
        backoff: seconds before the second retry, doubled for each further one, 30 at most; the first comes at once.
        max_retry_after: seconds; a server that asks for a longer wait does not get it.
        time_limit: seconds for one text from its first call on.
        adapter: the transport; by default over the network.
        clock: for tests.

    Raises:
        InvalidArgumentError: an argument is out of range or malformed.
        ApiKeyError: Google's endpoint without a key.

    Example:
        >>> from rectify.scoring.perspective import PerspectiveScorer
        >>> with PerspectiveScorer(endpoint="http://127.0.0.1:8000", rate=100) as scorer:
        ...     scores = scorer.score(["You are an idiot", ""])  # the second is NaN, its reason COMMENT_EMPTY
    """

    name = "perspective"

    def __init__(
        self,
        key: str | None = None,
        endpoint: str | None = None,
        *,
        rate: float = 1.0,
        workers: int = 8,
        languages: Sequence[str] = ("en",),
        do_not_store: bool = True,
        attributes: Sequence[str] = PERSPECTIVE_ATTRIBUTES,
        timeout: float = 20.0,
        retries: int = 6,
        backoff: float = 1.0,
        max_retry_after: float = 60.0,
        time_limit: float = 120.0,
        adapter: requests.adapters.BaseAdapter | None = None,
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
        if isinstance(languages, str):
            raise InvalidArgumentError(f"languages is {languages!r}: give a sequence, as ({languages!r},)")
        self.attributes = tuple(attributes)
        key = os.environ.get(KEY_VARIABLE, "") if key is None else key
        self._endpoint = Endpoint(endpoint or os.environ.get(URL_VARIABLE) or GOOGLE_URL, key)
        if self._endpoint.shows_key:
            logger.warning("the key goes to %s unencrypted: give an https:// endpoint", self._endpoint.host)
        self.revision = f"v1alpha1 {self._endpoint.place} languages={','.join(languages) or 'detected'}"
        self.workers, self.languages, self.do_not_store = workers, tuple(languages), do_not_store
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
        self._adapter = adapter or HTTPAdapter(pool_connections=1, pool_maxsize=workers)
        # proxies and certificates of the environment; its passwords (~/.netrc) are not for this
        self._network = requests.Session().merge_environment_settings(self._endpoint.url, {}, None, None, None)
        self._local = threading.local()

    def __repr__(self) -> str:
        settings = f"endpoint={self._endpoint.url!r}, rate={self._bucket.rate:g}, workers={self.workers}"
        return f"{type(self).__name__}({settings})"

    def __enter__(self) -> PerspectiveScorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._adapter.close()

    # -----------------------------------------------------------------------------------------------------------------
    # Many texts, one text

    def score(self, texts: Sequence[str], attributes: Sequence[str] = ("TOXICITY",)) -> Scores:
        """Score texts, in their order.

        Raises:
            UnknownAttributeError: an attribute is none of the scorer's, or the server knows it not.
            ApiKeyError: the server refuses the key.
            EndpointError: the endpoint is no such server.
        """
        asked = check_attributes(self, attributes)
        return gathered(self._stream(texts, asked), len(texts), asked)

    def score_stream(
        self, texts: Sequence[str], attributes: Sequence[str] = ("TOXICITY",)
    ) -> Iterator[tuple[int, np.ndarray, Reason | None]]:
        """Score texts, each handed over as soon as it is done.

        No more than `workers` texts are begun and not handed over yet, so that no more are lost with the process.

        Yields:
            The text's index, its scores (`[A]` float64, NaN where there is none), and why one is NaN, if one is.

        Raises:
            See `score`.
        """
        return self._stream(texts, check_attributes(self, attributes))

    def _stream(
        self, texts: Sequence[str], attributes: tuple[str, ...]
    ) -> Iterator[tuple[int, np.ndarray, Reason | None]]:
        stop, done = threading.Event(), SimpleQueue[Future[tuple[int, np.ndarray, Reason | None]]]()
        executor = ThreadPoolExecutor(self.workers, thread_name_prefix=self.name)

        def work(index: int) -> tuple[int, np.ndarray, Reason | None]:
            found, reason = self._ask(texts[index], attributes, False, stop)
            row = [found[attribute].value if attribute in found else np.nan for attribute in attributes]
            return index, np.array(row), reason

        def begin(index: int) -> None:
            executor.submit(work, index).add_done_callback(done.put)

        indices = iter(range(len(texts)))
        try:
            for index in islice(indices, self.workers):
                begin(index)
            for _ in range(len(texts)):
                yield done.get().result()
                for index in islice(indices, 1):
                    begin(index)
        finally:
            stop.set()  # whoever waits for a token or a retry stops at once, whoever is in a call after its timeout
            executor.shutdown(wait=False, cancel_futures=True)

    def analyze(
        self, text: str, attributes: Sequence[str] = ("TOXICITY",), *, span_annotations: bool = False
    ) -> dict[str, AttributeScore]:
        """The scores of one text and of its spans, whose places are those of the Python string.

        Args:
            text: the text.
            attributes: what to score.
            span_annotations: score each span by itself, not only the whole.

        Returns:
            For each attribute its score; attributes that every answer lacked are lacking.

        Raises:
            AnalysisError: there is no answer.
            PerspectiveError, UnknownAttributeError: see `score`.
        """
        scores, reason = self._ask(text, check_attributes(self, attributes), span_annotations, threading.Event())
        if reason not in (None, Reason.SCORE_MISSING):
            raise AnalysisError(reason)
        return scores

    # -----------------------------------------------------------------------------------------------------------------
    # Calls

    def _ask(
        self, text: str, attributes: tuple[str, ...], span_annotations: bool, stop: threading.Event
    ) -> tuple[dict[str, AttributeScore], Reason | None]:
        """What is known of a text after all retries, and why something is not."""
        reason = reason_against(text)
        if reason is None and len(text.encode("utf-8")) > MAX_BYTES:
            reason = Reason.COMMENT_TOO_LONG
        if reason is not None:
            return {}, reason
        body = analyze_body(
            text,
            attributes,
            languages=self.languages,
            do_not_store=self.do_not_store,
            span_annotations=span_annotations,
        )
        data = json.dumps(body, ensure_ascii=False).encode("utf-8")
        if not self._bucket.acquire(stop):
            raise CancelledError
        deadline = self._clock.now() + self._time_limit
        retry, scores = self._retry, dict[str, AttributeScore]()
        while True:
            answer = self._call(data, deadline)
            reason = answer.reason
            if reason is None:
                try:
                    scores |= parse_analyze_response(answer.body, text, attributes)
                    reason = None if len(scores) == len(attributes) else Reason.SCORE_MISSING
                except ValueError:
                    reason = Reason.BAD_RESPONSE
            if reason is None or not reason.passing:
                return scores, reason
            try:
                retry = retry.increment("POST")
            except MaxRetryError:
                return scores, reason
            if (asked := self._pause(answer.retry_after)) is not None:
                self._bucket.hold(asked)
            elif (pause := retry.get_backoff_time()) > 0:
                if self._clock.now() + pause > deadline:
                    return scores, reason
                self._clock.wait(pause, stop)
            if not self._bucket.acquire(stop, deadline):
                return scores, reason

    def _call(self, data: bytes, deadline: float) -> Answer:
        """One HTTP request. No message of `requests` is passed on: it may hold whatever the request does."""
        timeout = max(min(self._timeout, deadline - self._clock.now()), 0.001)
        try:
            with self._session().post(
                self._endpoint.url,
                data=data,
                headers={"Content-Type": "application/json; charset=utf-8"},
                timeout=timeout,
                stream=True,
                allow_redirects=False,  # the key is for this host only
                proxies=self._network["proxies"],
                verify=self._network["verify"],
                cert=self._network["cert"],
            ) as response:
                content = self._read(response, deadline)
        except (requests.Timeout, ReadTimeoutError, TimeoutError):
            return Answer(Reason.TIMEOUT)
        except (requests.exceptions.ContentDecodingError, requests.exceptions.ChunkedEncodingError):
            return Answer(Reason.BAD_RESPONSE)
        except requests.RequestException:
            return Answer(Reason.CONNECTION)
        except (HTTPError, ValueError):  # of the body alone
            return Answer(Reason.BAD_RESPONSE)
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            body = None
        return self._endpoint.judge(response.status_code, body, response.headers.get("Retry-After"))

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

    def _pause(self, retry_after: str | None) -> float | None:
        """How long the server asks for, within bounds."""
        if retry_after is None:
            return None
        try:
            return min(self._retry.parse_retry_after(retry_after), self._max_retry_after)
        except (InvalidHeader, ValueError, OverflowError):
            return None

    def _session(self) -> requests.Session:
        """This thread's session, on the connections of all."""
        if not hasattr(self._local, "session"):
            session = requests.Session()
            session.trust_env = False
            session.auth = self._endpoint.key
            session.headers["User-Agent"] = f"rectify/{__version__}"
            for scheme in ("https://", "http://"):
                session.mount(scheme, self._adapter)
            self._local.session = session
        return self._local.session
