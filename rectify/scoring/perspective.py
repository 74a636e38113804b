"""A client of the Perspective API, and of every server that speaks its wire format."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence

import numpy as np
from requests.adapters import BaseAdapter

from rectify.errors import AnalysisError, ApiKeyError, EndpointError, InvalidArgumentError, PerspectiveError
from rectify.scoring.http_calls import Calls, as_completed, warn_if_shown
from rectify.scoring.perspective_endpoint import (
    GOOGLE_URL,
    KEY_VARIABLE,
    PERSPECTIVE_ATTRIBUTES,
    URL_VARIABLE,
    Endpoint,
)
from rectify.scoring.rate_limit import Clock
from rectify.scoring.scores import Reason, Scores, check_attributes, reason_against
from rectify.scoring.streams import gathered
from rectify.scoring.wire import MAX_BYTES, AttributeScore, analyze_body, parse_analyze_response

__all__ = [
    "PERSPECTIVE_ATTRIBUTES",
    "AnalysisError",
    "ApiKeyError",
    "EndpointError",
    "PerspectiveError",
    "PerspectiveScorer",
]


class PerspectiveScorer:
    """A `Scorer` that asks a server of the Perspective API.

    Each text is one call. What may pass (429, 5xx, timeouts, broken connections, answers that are cut short or lack an
    attribute) is tried again, `retries` times and for `time_limit` seconds at most; what is permanent is not, and is so
    only by an error of the service's own form: what a proxy or a firewall answers is no verdict on a text. All
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
        adapter: BaseAdapter | None = None,
        clock: Clock | None = None,
    ) -> None:
        if isinstance(languages, str):
            raise InvalidArgumentError(f"languages is {languages!r}: give a sequence, as ({languages!r},)")
        self.attributes = tuple(attributes)
        key = os.environ.get(KEY_VARIABLE, "") if key is None else key
        self._endpoint = Endpoint(endpoint or os.environ.get(URL_VARIABLE) or GOOGLE_URL, key)
        warn_if_shown(self._endpoint.url, self._endpoint.key)
        self.revision = f"v1alpha1 {self._endpoint.place} languages={','.join(languages) or 'detected'}"
        self.workers, self.languages, self.do_not_store = workers, tuple(languages), do_not_store
        self._calls = Calls(
            self._endpoint.url,
            self._endpoint.key,
            gone=self._endpoint.gone,
            rate=rate,
            workers=workers,
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            max_retry_after=max_retry_after,
            time_limit=time_limit,
            adapter=adapter,
            clock=clock,
        )

    def __repr__(self) -> str:
        settings = f"endpoint={self._endpoint.url!r}, rate={self._calls.rate:g}, workers={self.workers}"
        return f"{type(self).__name__}({settings})"

    def __enter__(self) -> PerspectiveScorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._calls.close()

    # -----------------------------------------------------------------------------------------------------------------
    # Many texts, one text

    def score(self, texts: Sequence[str], attributes: Sequence[str] = ("TOXICITY",)) -> Scores:
        """Score texts, in their order.

        Raises:
            UnknownAttributeError: an attribute is none of the scorer's, or the server knows it not.
            ApiKeyError: the server refuses the key.
            EndpointError: the endpoint is no such server, or is out of reach.
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
        def work(index: int, stop: threading.Event) -> tuple[int, np.ndarray, Reason | None]:
            found, reason = self._ask(texts[index], attributes, False, stop)
            row = [found[attribute].value if attribute in found else np.nan for attribute in attributes]
            return index, np.array(row), reason

        return as_completed(work, len(texts), self.workers, self.name)

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
        scores: dict[str, AttributeScore] = {}

        def judge(status: int, answer: object) -> Reason | None:
            reason = self._endpoint.judge(status, answer, harmless=False)
            if reason is None:
                try:
                    scores.update(parse_analyze_response(answer, text, attributes))
                except ValueError:
                    return Reason.BAD_RESPONSE
                return None if len(scores) == len(attributes) else Reason.SCORE_MISSING
            return reason

        greeting = analyze_body("Hello.", attributes, languages=self.languages, do_not_store=True)
        return scores, self._calls.post(body, judge, stop, (greeting, self._endpoint.judge))
