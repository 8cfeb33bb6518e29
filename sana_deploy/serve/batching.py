"""The queue in front of replicas: bounded, first in first out, and batches of pictures that share their settings."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .engine import Content, Drawn, OnProgress, Order


@dataclass(eq=False)
class Job:
    """An order in an engine.

    Attributes:
        order: what is asked for.
        answer: its pictures, or why there are none; belongs to the loop that asked.
        on_progress: is told of its steps, in that loop.
        drawn: its pictures by number, as far as they are done.
        over: nobody waits any more: it is done, failed, late or cancelled. Set from the loop, read in threads.
        retried: whether a replica was lost with it once.
        arrived: when it was accepted, in seconds of the monotonic clock.
    """

    order: Order
    answer: asyncio.Future[Sequence[Drawn]]
    on_progress: OnProgress | None = None
    drawn: dict[int, Drawn] = field(default_factory=dict)
    over: bool = False
    retried: bool = False
    arrived: float = field(default_factory=time.monotonic)

    @property
    def tickets(self) -> list[Ticket]:
        """One for each of its pictures."""
        return [Ticket(self, number) for number in range(len(self.order.contents))]


@dataclass(frozen=True, eq=False)
class Ticket:
    """One picture of a job."""

    job: Job
    number: int

    @property
    def content(self) -> Content:
        """What it is of."""
        return self.job.order.contents[self.number]


class Queue:
    """Tickets that wait, for any number of threads that take batches of them.

    Args:
        few_sizes: cut batches to powers of two, for replicas to which each size is a form of its own.
    """

    def __init__(self, few_sizes: bool = False) -> None:
        self._few_sizes = few_sizes
        self._tickets: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        return len(self._tickets)

    def put(self, tickets: Iterable[Ticket], first: bool = False) -> None:
        """Add tickets at the end; or at the front, where a lost replica gives them back."""
        with self._changed:
            if first:
                self._tickets.extendleft(reversed(list(tickets)))
            else:
                self._tickets.extend(tickets)
            self._changed.notify_all()

    def take(self) -> Sequence[Ticket]:
        """Wait for a batch: the oldest ticket, and others with its settings in their order. Empty once closed."""
        with self._changed:
            while not self._tickets and not self._closed:
                self._changed.wait()
            if not self._tickets:
                return ()
            oldest = self._tickets[0].job.order
            alike = [one for one in self._tickets if one.job.order.settings == oldest.settings][: oldest.batch]
            if self._few_sizes:
                alike = alike[: 1 << (len(alike).bit_length() - 1)]
            taken = set(map(id, alike))
            self._tickets = deque(ticket for ticket in self._tickets if id(ticket) not in taken)
            return alike

    def drop(self, job: Job) -> None:
        """Take the tickets of a job out."""
        with self._changed:
            self._tickets = deque(ticket for ticket in self._tickets if ticket.job is not job)

    def empty(self) -> list[Ticket]:
        """Take all tickets out."""
        with self._changed:
            left, self._tickets = list(self._tickets), deque()
            return left

    def close(self) -> None:
        """Have `take` return nothing once no ticket is left."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
