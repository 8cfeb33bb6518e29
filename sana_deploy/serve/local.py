"""The engine within this process: threads for each replica, as many as it draws at once, and one queue for them all."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import RunError, SanaDeployError
from .batching import Job, Queue, Ticket
from .engine import (
    Drawn,
    Made,
    NotServingError,
    Observer,
    OnProgress,
    Order,
    Preview,
    Progress,
    QueueFullError,
    Replica,
    Standing,
    StoppedError,
    TooLateError,
    at_once,
)

log = logging.getLogger(__name__)
_NEWEST = 0.3
"""Weight of the newest batch in the seconds that a picture takes."""
_END_SECONDS = 5.0
"""How long the end waits for a thread, which ends after the step that it is in."""


class LocalEngine:
    """Draws orders on replicas of this process; see `Engine`.

    Args:
        replicas: not loaded yet.
        queue: pictures that may wait.
        timeout: seconds that an order may take.
        pace: seconds that a picture is expected to take, until that is measured.
        few_sizes: draw batches of few sizes; see `Queue`.
        warm_up: is called with each replica once it is loaded; what it raises is a failure to load.
        observer: is told what happens.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        *,
        queue: int,
        timeout: float,
        pace: float = 1.0,
        few_sizes: bool = False,
        warm_up: Callable[[Replica], None] | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._replicas, self._most, self._timeout, self._pace = list(replicas), queue, timeout, pace
        self._warm_up = warm_up
        self._queue, self._observer = Queue(few_sizes), observer or Observer()
        self._jobs: set[Job] = set()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._ready = self._hands = self._working = 0
        self._gone: set[Replica] = set()
        self._draining = self._started = False
        self._loop: asyncio.AbstractEventLoop
        self._lost: asyncio.Future[SanaDeployError]

    @property
    def standing(self) -> Standing:
        """See `Engine`."""
        return Standing(self._ready, len(self._replicas), len(self._queue), self._working, self._draining)

    async def start(self) -> None:
        """See `Engine`."""
        self._started, self._loop = True, asyncio.get_running_loop()
        self._lost = self._loop.create_future()
        loaded = [self._loop.create_future() for _ in self._replicas]
        for number, (replica, done) in enumerate(zip(self._replicas, loaded, strict=True)):
            thread = threading.Thread(target=self._serve, args=(replica, done), name=f"replica {number}", daemon=True)
            self._threads.append(thread)
            thread.start()
        await asyncio.gather(*loaded)

    async def draw(self, order: Order, on_progress: OnProgress | None = None) -> Sequence[Drawn]:
        """See `Engine`."""
        self.admit(len(order.contents))
        job = Job(order, self._loop.create_future(), on_progress)
        self._jobs.add(job)
        self._queue.put(job.tickets)
        try:
            async with asyncio.timeout(self._timeout):
                return await job.answer
        except TimeoutError:
            done, of = len(job.drawn), len(order.contents)
            raise TooLateError(
                f"{done} of {of} pictures were done within {self._timeout:g} s, the rest is given up"
            ) from None
        except asyncio.CancelledError:
            self._observer.cancelled(len(order.contents) - len(job.drawn))
            raise
        finally:
            job.over = True
            self._queue.drop(job)
            self._jobs.discard(job)

    def admit(self, pictures: int) -> None:
        """See `Engine`."""
        if self._draining:
            raise NotServingError("the service is stopping and takes no more requests")
        if not self._ready:
            raise NotServingError("the model is still loading" if self._started else "the engine was not started")
        waiting = len(self._queue)
        if waiting + pictures > self._most:
            seconds = (waiting + self._working) * self._pace / self._hands
            places = f"{waiting} of {self._most} places in the queue are taken"
            raise QueueFullError(f"{places} and {pictures} {'are' if pictures > 1 else 'is'} needed", seconds)

    async def drain(self, seconds: float) -> bool:
        """See `Engine`."""
        self._draining = True
        answers = [job.answer for job in self._jobs]
        late = (await asyncio.wait(answers, timeout=seconds))[1] if answers else ()
        self._fail_all(
            NotServingError(f"the service stopped before this request was done, {seconds:g} s after it was told to")
        )
        return not late

    async def close(self) -> None:
        """See `Engine`."""
        self._draining = True
        self._fail_all(NotServingError("the service has stopped"))
        self._queue.close()
        for thread in self._threads:
            await asyncio.to_thread(thread.join, _END_SECONDS)

    async def lost(self) -> SanaDeployError:
        """See `Engine`."""
        return await asyncio.shield(self._lost)

    def _fail_all(self, problem: SanaDeployError) -> None:
        for job in list(self._jobs):
            self._fail(job, problem)

    def _serve(self, replica: Replica, loaded: asyncio.Future[None]) -> None:
        """Load a replica and draw what comes, until the queue is closed or the replica lost; runs in its thread."""
        try:
            replica.load()
            if self._warm_up:
                self._warm_up(replica)
        except BaseException as problem:
            self._in_loop(_set_exception, loaded, problem)
            return
        hands = at_once(replica)
        with self._lock:
            self._ready += 1
            self._hands += hands
        self._in_loop(_set_result, loaded, None)
        for number in range(1, hands):
            name = f"{threading.current_thread().name}, {number}"
            thread = threading.Thread(target=self._work, args=(replica,), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()
        self._work(replica)

    def _work(self, replica: Replica) -> None:
        """Draw what comes on a loaded replica; runs in each of its threads."""
        while tickets := self._queue.take():
            if replica in self._gone:
                self._queue.put(tickets, first=True)
                return
            if not self._draw(replica, tickets):
                if not self._ready:
                    why = "the last replica was lost: its GPU does not compute any more"
                    self._end(RunError(why, where="serve"))
                return

    def _draw(self, replica: Replica, tickets: Sequence[Ticket]) -> bool:
        """Draw a batch. Whether the replica can go on."""
        tickets = [ticket for ticket in tickets if not ticket.job.over]
        if not tickets:
            return True
        began = time.monotonic()
        waited = [began - ticket.job.arrived for ticket in tickets]
        self._observer.began(waited)
        with self._lock:
            self._working += len(tickets)
        try:
            contents = [ticket.content for ticket in tickets]
            made = replica.draw(tickets[0].job.order.settings, contents, _Watch(tickets, self._in_loop))
        except StoppedError:
            return True
        except BaseException as problem:
            return self._failed(replica, tickets, problem)
        finally:
            with self._lock:
                self._working -= len(tickets)
        self._pace += _NEWEST * ((time.monotonic() - began) / len(tickets) - self._pace)
        self._observer.made(made)
        self._hand_out(tickets, waited, made)
        return True

    def _failed(self, replica: Replica, tickets: Sequence[Ticket], problem: BaseException) -> bool:
        """A batch failed: each of its pictures is drawn once more alone, so that the one at fault fails alone."""
        names = ", ".join(dict.fromkeys(ticket.job.order.name for ticket in tickets))
        log.error("drawing failed for %s", names, exc_info=problem)
        if not _recovers(replica):
            self._lose(replica)
            self._give_back(tickets, problem)
            return False
        if len(tickets) == 1:
            self._fail(tickets[0].job, problem)
            return True
        self._observer.retried(len(tickets))
        for number, ticket in enumerate(tickets):
            if not self._draw(replica, [ticket]):
                self._give_back(tickets[number + 1 :], problem)
                return False
        return True

    def _give_back(self, tickets: Sequence[Ticket], problem: BaseException) -> None:
        """A replica was lost with these: another one draws them, but none twice, for one of them may be the reason."""
        again = [ticket for ticket in tickets if not ticket.job.over and not ticket.job.retried]
        for ticket in tickets:
            if ticket not in again or not self._ready:
                self._fail(ticket.job, problem)
        for ticket in again:
            ticket.job.retried = True
        if again and self._ready:
            self._observer.retried(len(again))
            self._queue.put(again, first=True)

    def _lose(self, replica: Replica) -> None:
        """A replica has ended, whichever of its threads saw it: none of them takes anything more."""
        with self._lock:
            if replica in self._gone:
                return
            self._gone.add(replica)
            self._ready -= 1
            self._hands -= at_once(replica)
        log.error("a replica was lost, %d are left", self._ready)

    def _end(self, problem: SanaDeployError) -> None:
        """Nothing can be drawn any more."""
        self._draining = True
        self._in_loop(self._fail_all, NotServingError("the service lost its last GPU"))
        self._in_loop(_set_result, self._lost, problem)

    def _hand_out(self, tickets: Sequence[Ticket], waited: Sequence[float], made: Made) -> None:
        remarks = made.remarks or [()] * len(tickets)
        for ticket, picture, seconds, said in zip(tickets, made.pictures, waited, remarks, strict=True):
            drawn = Drawn(picture, seconds, made.seconds, len(tickets), said)
            self._in_loop(_finish, ticket, drawn)

    def _fail(self, job: Job, problem: BaseException) -> None:
        job.over = True
        self._in_loop(_set_exception, job.answer, problem)

    def _in_loop(self, call: object, *arguments: object) -> None:
        """Call in the loop's thread; once the loop is closed nobody waits for it."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *arguments)  # type: ignore[arg-type]


class _Watch:
    """Ends drawings that nobody waits for, and tells the others of their steps; see `OnStep`."""

    def __init__(self, tickets: Sequence[Ticket], in_loop: Callable[..., None]) -> None:
        self._tickets, self._in_loop = tickets, in_loop
        self._told = [ticket for ticket in tickets if ticket.job.on_progress]
        previews = {ticket.job.order.previews for ticket in self._told}
        steps = tickets[0].job.order.settings.steps
        self.shown = frozenset[int]().union(*(_shown_after(count, steps) for count in previews))

    def check(self) -> None:
        """See `OnStep`."""
        if all(ticket.job.over for ticket in self._tickets):
            raise StoppedError

    def __call__(self, done: int, of: int, preview: Preview) -> None:
        """See `OnStep`."""
        self.check()
        told = [ticket for ticket in self._told if not ticket.job.over]
        curious = [ticket for ticket in told if done in _shown_after(ticket.job.order.previews, of)]
        pictures = preview() if curious else None
        for ticket in told:
            picture = pictures[self._tickets.index(ticket)] if pictures and ticket in curious else None
            self._in_loop(ticket.job.on_progress, Progress(ticket.number, done, of, picture))


def _finish(ticket: Ticket, drawn: Drawn) -> None:
    job = ticket.job
    job.drawn[ticket.number] = drawn
    if len(job.drawn) == len(job.order.contents):
        job.over = True
        _set_result(job.answer, [job.drawn[number] for number in range(len(job.drawn))])


def _set_result(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)


def _set_exception(future: asyncio.Future[Any], problem: BaseException) -> None:
    if not isinstance(problem, Exception) or isinstance(problem, StopIteration):  # which a future does not take
        problem = RunError(f"drawing ended with {type(problem).__name__}")
    if not future.done():
        future.set_exception(problem)


def _recovers(replica: Replica) -> bool:
    try:
        return replica.recover()
    except Exception:
        log.exception("a replica does not answer after a failure")
        return False


def _shown_after(previews: int, steps: int) -> set[int]:
    """The steps after which previews are made: as many, spread evenly, and none after the last step."""
    return {max(1, round(steps * (number + 1) / (previews + 1))) for number in range(previews)} - {steps}
