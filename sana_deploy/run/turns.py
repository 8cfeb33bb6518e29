"""Turns: requests at work on one placed pipeline, each stage on places that no other one works on.

A request gives back what it has before it waits for what its next stage needs, so that none waits for another in a
circle. Where several want the same place, the one that began first gets it: requests end in the order in which they
began, and each stage is entered in that order.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ..plan.records import Place

Places = frozenset[Place]
_NONE: Places = frozenset()
_LOOK_SECONDS = 0.1
"""How often a request that waits looks whether anybody waits for it still."""


def _nothing() -> None:
    """Nobody can give a request up."""


@dataclass(eq=False)
class Turn:
    """One request in flight.

    Attributes:
        number: those that began earlier have smaller ones.
        check: raises where nobody waits for the request any more.
        alone: no other request is in flight beside it.
        held: where it works.
        wanted: where it waits to work.
    """

    number: int
    check: Callable[[], None] = _nothing
    alone: bool = False
    held: Places = _NONE
    wanted: Places = _NONE


class Turns:
    """Requests in flight, at most so many at once; for threads, one for each request.

    Args:
        most: requests in flight.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._numbers = itertools.count()
        self._coming: list[Turn] = []
        self._flying: list[Turn] = []
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def turn(self, check: Callable[[], None] = _nothing, alone: bool = False) -> Iterator[Turn]:
        """Be in flight while the block runs; waits, first come, first served, until there is room.

        Args:
            check: called now and then while the request waits, here and in `take`; what it raises ends the request.
            alone: no other request is in flight then.
        """
        turn = Turn(next(self._numbers), check, alone)
        with self._changed:
            self._coming.append(turn)
            try:
                self._wait(turn, lambda: self._coming[0] is turn and self._has_room(turn))
                self._flying.append(turn)
            finally:
                self._coming.remove(turn)
                self._changed.notify_all()
        try:
            yield turn
        finally:
            with self._changed:
                self._flying.remove(turn)
                self._changed.notify_all()

    def take(self, turn: Turn, places: Iterable[Place]) -> None:
        """Give back the places that a request has, and wait for others; it keeps them where it needs no others."""
        wanted = frozenset(places)
        with self._changed:
            turn.held &= wanted if wanted <= turn.held else _NONE
            self._claim(turn, wanted)

    @contextlib.contextmanager
    def also(self, turn: Turn, places: Iterable[Place]) -> Iterator[None]:
        """Have other places besides while the block runs.

        Only a request that has the places of the denoising loop may ask: no one else has some and waits for more.
        """
        before = turn.held
        with self._changed:
            self._claim(turn, before | frozenset(places))
        try:
            yield
        finally:
            with self._changed:
                turn.held = before
                self._changed.notify_all()

    def _claim(self, turn: Turn, wanted: Places) -> None:
        turn.wanted = wanted - turn.held
        self._changed.notify_all()
        try:
            self._wait(turn, lambda: self._is_free(turn))
            turn.held |= turn.wanted
        finally:
            turn.wanted = _NONE
            self._changed.notify_all()

    def _wait(self, turn: Turn, ready: Callable[[], bool]) -> None:
        while not ready():
            self._changed.wait(_LOOK_SECONDS)
            turn.check()

    def _has_room(self, turn: Turn) -> bool:
        if turn.alone:
            return not self._flying
        return len(self._flying) < self.most and not any(other.alone for other in self._flying)

    def _is_free(self, turn: Turn) -> bool:
        """Whether nobody works where this request wants to, and nobody who began earlier waits for it."""
        others = [other for other in self._flying if other is not turn]
        return not any(
            turn.wanted & other.held or (other.number < turn.number and turn.wanted & other.wanted) for other in others
        )
