"""Dynamic batching: concurrent requests are scored together, as many as have come while the scorer was busy."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from rectify.errors import InvalidArgumentError, ScoringError, UnavailableError
from rectify.scoring.scores import Scorer, Scores

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Call:
    texts: Sequence[str] = field(repr=False)
    attributes: tuple[str, ...]
    answer: asyncio.Future[Scores] = field(repr=False)


class Batcher:
    """Scores the texts of many callers in batches, on one thread; for use within one event loop.

    A batch takes what waits, in the order of coming, and never part of a call. Calls that ask for different attributes
    are scored one after another, so that none depends on what another asked for.

    Args:
        scorer: called by one thread at a time.
        max_batch: texts in a batch; a single call may have more.
        max_delay: seconds that a batch which is not full waits for more.
        max_waiting: texts that may wait; more are refused.

    Raises:
        InvalidArgumentError: a number is out of range.
    """

    def __init__(
        self, scorer: Scorer, *, max_batch: int = 64, max_delay: float = 0.002, max_waiting: int = 8192
    ) -> None:
        for name, value, least in (("max_batch", max_batch, 1), ("max_waiting", max_waiting, 1)):
            if value < least:
                raise InvalidArgumentError(f"{name} is {value}: give {least} or more")
        if not 0 <= max_delay <= 10:
            raise InvalidArgumentError(f"max_delay is {max_delay}: give seconds from 0 to 10")
        self.scorer = scorer
        self.max_batch, self.max_delay, self.max_waiting = max_batch, max_delay, max_waiting
        self._queue: deque[_Call] = deque()
        self._waiting = 0  # texts of the queue
        self._open: set[_Call] = set()
        self._arrived = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scorer")
        self._closed = False

    async def score(self, texts: Sequence[str], attributes: Sequence[str]) -> Scores:
        """Score texts, in their order, together with those of other callers.

        Raises:
            ScoringError: the scorer failed; what with is in the log, without any text.
            UnavailableError: too many texts wait, or the batcher is closed.
        """
        if self._closed:
            raise UnavailableError("the batcher is closed: make another")
        if self._waiting and self._waiting + len(texts) > self.max_waiting:
            raise UnavailableError(
                f"max_waiting is {self.max_waiting}, and {self._waiting} texts wait: try again later"
            )
        loop = asyncio.get_running_loop()
        if self._worker is None:
            self._worker = loop.create_task(self._work())
        # in one order, so that it does not matter in which one the attributes are asked for
        call = _Call(texts, tuple(sorted(attributes)), loop.create_future())
        self._open.add(call)
        self._queue.append(call)
        self._waiting += len(texts)
        self._arrived.set()
        try:
            return await call.answer
        finally:
            self._open.discard(call)

    async def close(self) -> None:
        """Take no more, and refuse what is not answered yet. A batch that is being scored is not waited for."""
        self._closed = True
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        for call in self._open:
            if not call.answer.done():
                call.answer.set_exception(UnavailableError("the batcher is closed: make another"))
        self._queue.clear()
        self._thread.shutdown(wait=False, cancel_futures=True)

    # -----------------------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while True:
            await self._arrived.wait()
            if self._waiting < self.max_batch:
                await asyncio.sleep(self.max_delay)
            for attributes, calls in self._take().items():
                await self._answer(attributes, calls)

    def _take(self) -> dict[tuple[str, ...], list[_Call]]:
        """The next batch, its calls by what they ask for."""
        batch: dict[tuple[str, ...], list[_Call]] = {}
        size = 0
        while self._queue and (not size or size + len(self._queue[0].texts) <= self.max_batch):
            call = self._queue.popleft()
            self._waiting -= len(call.texts)
            if not call.answer.done():  # else its caller has gone
                batch.setdefault(call.attributes, []).append(call)
                size += len(call.texts)
        if not self._queue:
            self._arrived.clear()
        return batch

    async def _answer(self, attributes: tuple[str, ...], calls: list[_Call]) -> None:
        texts = [text for call in calls for text in call.texts]
        try:
            scores = await asyncio.get_running_loop().run_in_executor(
                self._thread, self.scorer.score, texts, attributes
            )
            if len(scores) != len(texts):
                raise ValueError(f"{len(scores)} scores for {len(texts)} texts")
        except Exception as error:  # whatever it is, the other batches are none the worse for it
            # the error's own message may hold a text
            place = "".join(traceback.format_tb(error.__traceback__)[-1:]).strip()
            logger.error("the scorer %r failed with %d texts: %s, %s", self.scorer.name, len(texts), type(error), place)
            for call in calls:
                if not call.answer.done():
                    call.answer.set_exception(ScoringError(f"the scorer failed ({type(error).__name__}): see the log"))
            return
        begin = 0
        for call in calls:
            end = begin + len(call.texts)
            if not call.answer.done():
                part = Scores(scores.values[begin:end], scores.attributes, scores.reasons[begin:end])
                call.answer.set_result(part)
            begin = end
