"""Requests in flight: each stage alone on its places, in the order in which requests began, and none waits for ever."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from sana_deploy.run.turns import Turn, Turns

SECONDS = 20
"""A test that waits so long has failed."""


class LeftError(Exception):
    """Nobody waits any more."""


class Request:
    """A request in a thread of its own, which goes on when it is told to."""

    def __init__(self, turns: Turns, *stages: Any, **given: Any) -> None:
        self.turns, self.stages, self.given = turns, stages, given
        self.begun, self.entered = threading.Event(), [threading.Event() for _ in stages]
        self.may_go = [threading.Event() for _ in stages]
        self.problem: BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            with self.turns.turn(**self.given) as turn:
                self.begun.set()
                for places, entered, may_go in zip(self.stages, self.entered, self.may_go, strict=True):
                    if isinstance(places, BaseException):
                        raise places
                    self.turns.take(turn, places)
                    entered.set()
                    assert may_go.wait(SECONDS)
        except BaseException as problem:
            self.problem = problem

    def go_on(self, stage: int) -> None:
        assert self.entered[stage].wait(SECONDS)
        self.may_go[stage].set()

    def end(self) -> None:
        for event in self.may_go:
            event.set()
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()


def end(*requests: Request) -> None:
    """Let all of them go on to their end."""
    for one in requests:
        for event in one.may_go:
            event.set()
    for one in requests:
        one.end()
        assert one.problem is None


def until(turns: Turns, ready: Callable[[], bool]) -> None:
    """Wait until turns are as `ready` says."""
    with turns._changed:
        late = time.monotonic() + SECONDS
        while not ready():
            assert time.monotonic() < late
            turns._changed.wait(0.02)


def waits(turns: Turns, number: int) -> None:
    """Wait until a request wants places that it has not got."""
    until(turns, lambda: any(one.number == number and one.wanted for one in turns._flying))


def comes(turns: Turns, count: int = 1) -> None:
    """Wait until so many requests wait to begin."""
    until(turns, lambda: len(turns._coming) == count)


def test_stages_of_three_requests_are_at_work_at_once() -> None:
    turns, requests = Turns(3), list[Request]()
    for number in range(3):
        requests.append(Request(turns, {0}, {1}, {2}))
        for earlier in range(number + 1):  # the oldest is in the last stage
            assert requests[earlier].entered[number - earlier].wait(SECONDS)
        if number < 2:
            for one, stage in zip(requests, range(number, -1, -1), strict=True):
                one.go_on(stage)
                assert one.entered[stage + 1].wait(SECONDS)
    assert [sorted(one.held) for one in turns._flying] == [[2], [1], [0]]
    end(*requests)


def test_a_stage_that_comes_back_to_a_place_goes_before_requests_that_began_later() -> None:
    turns = Turns(3)
    first = Request(turns, {0}, {1}, {0})
    first.go_on(0)
    assert first.entered[1].wait(SECONDS)
    second = Request(turns, {0}, {1}, {0})
    assert second.entered[0].wait(SECONDS)
    third = Request(turns, {0}, {1}, {0})
    waits(turns, 2)
    first.go_on(1)
    waits(turns, 0)
    second.go_on(0)  # what it gives back goes to the first one, though the third one has waited longer
    assert first.entered[2].wait(SECONDS)
    assert not third.entered[0].is_set()
    end(first, second, third)


def test_a_request_keeps_the_places_that_its_next_stage_needs_too() -> None:
    turns = Turns(2)
    with turns.turn() as turn:
        turns.take(turn, {0, 1})
        other = Request(turns, {1})
        waits(turns, 1)
        turns.take(turn, {0})
        assert turn.held == {0}
        assert other.entered[0].wait(SECONDS)
        other.end()


def test_no_more_requests_are_in_flight_than_there_is_room_for() -> None:
    turns = Turns(2)
    first, second = Request(turns, {0}), Request(turns, {1})
    assert first.entered[0].wait(SECONDS)
    assert second.entered[0].wait(SECONDS)
    third = Request(turns, {2})
    comes(turns)
    assert not third.begun.is_set()
    second.end()
    assert third.entered[0].wait(SECONDS)
    third.end()
    first.end()


def test_a_request_that_is_alone_waits_for_all_and_keeps_later_ones_out() -> None:
    turns = Turns(3)
    first = Request(turns, {0})
    assert first.entered[0].wait(SECONDS)
    alone = Request(turns, {0}, alone=True)
    comes(turns, 1)
    later = Request(turns, {1})
    comes(turns, 2)
    first.end()
    assert alone.entered[0].wait(SECONDS)
    assert not later.begun.is_set()
    alone.end()
    assert later.entered[0].wait(SECONDS)
    later.end()


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_request_that_fails_gives_its_places_back(stage: int) -> None:
    turns, stages = Turns(2), list[Any]([{0}, {1}, {0}])
    stages[stage] = ValueError("it failed")
    failing = Request(turns, *stages)
    for event in failing.may_go:
        event.set()
    failing.end()
    assert isinstance(failing.problem, ValueError)
    end(*(Request(turns, {0}, {1}, {0}) for _ in range(3)))


@pytest.mark.parametrize("coming", [False, True])
def test_a_request_that_nobody_waits_for_ends_while_it_waits(coming: bool) -> None:
    turns, left = Turns(1 if coming else 2), threading.Event()

    def check() -> None:
        if left.is_set():
            raise LeftError

    first = Request(turns, {0})
    assert first.entered[0].wait(SECONDS)
    second = Request(turns, {0}, check=check)
    if coming:
        comes(turns)
    else:
        waits(turns, 1)
    left.set()
    second.thread.join(SECONDS)
    assert isinstance(second.problem, LeftError)
    assert first.thread.is_alive()
    third = Request(turns, {0})
    first.end()
    assert third.entered[0].wait(SECONDS)
    third.end()


def test_places_are_had_besides_for_a_while() -> None:
    turns = Turns(2)
    other = Request(turns, {0}, {1})
    assert other.entered[0].wait(SECONDS)
    entered = threading.Event()

    def preview(turn: Turn) -> None:
        with turns.also(turn, {0}):
            assert turn.held == {0, 1}
            entered.set()

    with turns.turn() as turn:
        turns.take(turn, {1})
        thread = threading.Thread(target=preview, args=(turn,))
        thread.start()
        waits(turns, 1)
        assert not entered.is_set()
        other.go_on(0)  # it gives the place back before it waits for the other one, which is held here
        assert entered.wait(SECONDS)
        thread.join(SECONDS)
        assert turn.held == {1}
        assert not other.entered[1].is_set()
    assert other.entered[1].wait(SECONDS)
    other.end()


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_held_twice_and_all_end_whatever_fails(seed: int) -> None:
    chance = random.Random(seed)
    turns, guard = Turns(chance.randint(1, 4)), threading.Lock()
    works: dict[int, int] = {}
    paths = [[set(chance.sample(range(3), chance.randint(1, 2))) for _ in range(4)] for _ in range(24)]
    fails, alone = {chance.randrange(24) for _ in range(6)}, {chance.randrange(24) for _ in range(3)}

    def request(number: int) -> None:
        with turns.turn(alone=number in alone) as turn:
            for step, places in enumerate(paths[number]):
                turns.take(turn, places)
                with guard:
                    assert not places & works.keys()
                    works.update(dict.fromkeys(places, number))
                with guard:
                    for place in places:
                        del works[place]
                if number in fails and step == 2:
                    raise ValueError

    with ThreadPoolExecutor(8) as pool:
        ended = [pool.submit(request, number) for number in range(24)]
        problems = [one.exception(SECONDS) for one in ended]
    assert [number for number, problem in enumerate(problems) if problem] == sorted(fails)
    assert all(isinstance(problem, ValueError) for problem in problems if problem)
    assert not works
    assert not turns._flying
