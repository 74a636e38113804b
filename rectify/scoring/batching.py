"""Dynamic batching: concurrent requests are scored together, as many as have come while the scorer was busy."""

from __future__ import annotations

import asyncio
import heapq
import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from rectify.errors import InvalidArgumentError, ScoringError, UnavailableError
from rectify.scoring.failures import kind_and_place
from rectify.scoring.scores import Scorer, Scores

logger = logging.getLogger(__name__)

# bytes: a text of 20 kB takes a small scorer as long as some hundred comments
_SHORT = 1024
_MAX_BYTES = 8192
_MAX_LONG = 256  # calls: more would not be answered in time, and hold connections
_SECONDS_TO_TELL_APART = 1.0  # calls that failed together are scored one by one, where that takes no longer


@dataclass(eq=False)
class Flow:
    """Calls that came together, as those of one HTTP request: they take turns with those of others.

    Attributes:
        deadline: the event loop's time at which they are given up.
    """

    deadline: float = math.inf
    turns: dict[_Queue, int] = field(default_factory=dict, repr=False)


@dataclass(eq=False)
class _Call:
    texts: Sequence[str] = field(repr=False)
    attributes: tuple[str, ...]
    size: int
    turn: int
    number: int
    answer: asyncio.Future[Scores] = field(repr=False)

    def __lt__(self, other: _Call) -> bool:
        return (self.turn, self.number) < (other.turn, other.number)


class Batcher:
    """Scores the texts of many callers in batches; for use within one event loop.

    A batch takes what waits, in the order of coming, and never part of a call. Calls that ask for different attributes
    are scored one after another, so that none depends on what another asked for. So that none can keep the others
    waiting, a batch has few bytes, unless it is a single call; the calls of one flow take turns with those of other
    flows; and long calls have a queue of their own. A scorer whose attribute `reentrant` is true scores one batch of
    each queue at the same time, any other one batch at a time.

    Args:
        scorer: called by one thread at a time, or by two where it is reentrant.
        max_batch: texts in a batch; a single call may have more.
        max_delay: seconds that a batch which is not full waits for more.
        max_waiting: texts that may wait in a queue; more are refused.

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
        self._short, self._long = _Queue("short"), _Queue("long")
        self._open: set[_Call] = set()
        self._number = 0
        self._alone: AbstractAsyncContextManager[None] = (
            nullcontext() if getattr(scorer, "reentrant", False) else asyncio.Lock()
        )
        self._closed = False

    async def score(self, texts: Sequence[str], attributes: Sequence[str], flow: Flow | None = None) -> Scores:
        """Score texts, in their order, together with those of other callers.

        Args:
            texts: those of one call.
            attributes: in any order.
            flow: what the call belongs to; by default it is one of its own.

        Raises:
            ScoringError: the scorer failed; what with is in the log, without any text.
            UnavailableError: too many texts wait, or the batcher is closed.
        """
        if self._closed:
            raise UnavailableError("the batcher is closed: make another")
        size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
        queue = self._short if size <= _SHORT else self._long
        if queue is self._long and len(queue) >= _MAX_LONG:
            raise UnavailableError(f"{len(queue)} long calls wait: try again later")
        if queue.waiting and queue.waiting + len(texts) > self.max_waiting:
            raise UnavailableError(
                f"max_waiting is {self.max_waiting}, and {queue.waiting} texts wait: try again later"
            )
        loop = asyncio.get_running_loop()
        if queue.worker is None:
            queue.worker = loop.create_task(self._work(queue))
        flow = flow or Flow()
        begins = max(flow.turns.get(queue, 0), queue.turn)
        flow.turns[queue] = begins + max(1, size // _SHORT)
        self._number += 1
        # in one order, so that it does not matter in which one the attributes are asked for
        call = _Call(texts, tuple(sorted(attributes)), size, begins, self._number, loop.create_future())
        self._open.add(call)
        queue.push(call)
        try:
            return await call.answer
        finally:
            self._open.discard(call)

    async def close(self) -> None:
        """Take no more, and refuse what is not answered yet. A batch that is being scored is not waited for."""
        self._closed = True
        workers = [queue.worker for queue in (self._short, self._long) if queue.worker is not None]
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        for call in self._open:
            if not call.answer.done():
                call.answer.set_exception(UnavailableError("the batcher is closed: make another"))
        for queue in (self._short, self._long):
            queue.close()

    # -----------------------------------------------------------------------------------------------------------------

    async def _work(self, queue: _Queue) -> None:
        while True:
            await queue.arrived.wait()
            if queue.waiting < self.max_batch:
                await asyncio.sleep(self.max_delay)
            async with self._alone:
                for attributes, calls in queue.take(self.max_batch).items():
                    await self._answer(queue.thread, attributes, calls)

    async def _answer(self, thread: ThreadPoolExecutor, attributes: tuple[str, ...], calls: list[_Call]) -> None:
        began = time.monotonic()
        try:
            answers = await self._scored(thread, attributes, calls)
        except Exception as error:  # whatever it is, the others are none the worse for it
            if len(calls) > 1 and (time.monotonic() - began) * len(calls) < _SECONDS_TO_TELL_APART:
                for call in calls:
                    await self._answer(thread, attributes, [call])
                return
            # the error's own message may hold a text
            texts = sum(len(call.texts) for call in calls)
            logger.error("the scorer %r failed with %d texts: %s", self.scorer.name, texts, kind_and_place(error))
            for call in calls:
                if not call.answer.done():
                    call.answer.set_exception(ScoringError(f"the scorer failed ({type(error).__name__}): see the log"))
            return
        for call, answer in zip(calls, answers, strict=True):
            if not call.answer.done():
                call.answer.set_result(answer)

    async def _scored(
        self, thread: ThreadPoolExecutor, attributes: tuple[str, ...], calls: list[_Call]
    ) -> list[Scores]:
        """The scores of each call."""
        texts = [text for call in calls for text in call.texts]
        scores = await asyncio.get_running_loop().run_in_executor(thread, self.scorer.score, texts, attributes)
        if len(scores) != len(texts):
            raise ValueError(f"{len(scores)} scores for {len(texts)} texts")
        return [
            Scores(scores.values[begin:end], scores.attributes, scores.reasons[begin:end])
            for begin, end in pairwise(accumulate((len(call.texts) for call in calls), initial=0))
        ]


class _Queue:
    """Calls that wait for their turn: a flow's calls have turns one behind another, those of a new flow the next."""

    def __init__(self, name: str) -> None:
        # of its own, as the C library gives each thread memory of its own, and long texts take much
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=f"scorer of {name} calls")
        self._calls: list[_Call] = []
        self.waiting = 0  # texts
        self.turn = 0  # that of the call which was taken last
        self.arrived = asyncio.Event()
        self.worker: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._calls)

    def push(self, call: _Call) -> None:
        heapq.heappush(self._calls, call)
        self.waiting += len(call.texts)
        self.arrived.set()

    def close(self) -> None:
        self._calls.clear()
        self.waiting = 0
        self.thread.shutdown(wait=False, cancel_futures=True)

    def take(self, max_batch: int) -> dict[tuple[str, ...], list[_Call]]:
        """The next batch, its calls by what they ask for."""
        batch: dict[tuple[str, ...], list[_Call]] = {}
        texts = size = 0
        while self._calls and (
            not texts or (texts + len(self._calls[0].texts) <= max_batch and size + self._calls[0].size <= _MAX_BYTES)
        ):
            call = heapq.heappop(self._calls)
            self.waiting -= len(call.texts)
            self.turn = max(self.turn, call.turn)
            if not call.answer.done():  # else its caller has gone
                batch.setdefault(call.attributes, []).append(call)
                texts += len(call.texts)
                size += call.size
        if not self._calls:
            self.arrived.clear()
        return batch
