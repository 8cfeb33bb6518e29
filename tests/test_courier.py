"""What waits for what when results are sent between two CUDA devices: streams and events are stood in for.

Each stream knows what must have happened before the next thing that it does, as CUDA's rules say.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from sana_deploy.run.courier import CudaCourier
from sana_deploy.run.graphs import Chain, Graph

NET, HOME = torch.device("cuda", 1), torch.device("cuda", 0)
COUNT = 3


class Stream:
    """A CUDA stream: `before` is all that happens before what it is given next."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before: set[str] = set()

    def do(self, work: str) -> set[str]:
        """Do `work`; what is certain to have happened before it."""
        known = set(self.before)
        self.before.add(work)
        return known

    def wait_stream(self, other: Stream) -> None:
        self.before |= other.before

    def wait_event(self, event: Event) -> None:
        assert event.before is not None, "it was recorded"
        self.before |= event.before


class Event:
    """A CUDA event."""

    def __init__(self) -> None:
        self.before: set[str] | None = None

    def record(self, stream: Stream) -> None:
        self.before = set(stream.before)


class Streams:
    """The current streams of both devices, and the copies between them."""

    def __init__(self) -> None:
        self.current = {device: Stream(device) for device in (NET, HOME)}
        self.copies: dict[str, set[str]] = {}

    @contextlib.contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        before, self.current[stream.device] = self.current[stream.device], stream
        yield
        self.current[stream.device] = before

    def copy(self, name: str) -> None:
        """As PyTorch copies between devices: on the source's current stream, and both wait for each other."""
        source, destination = self.current[NET], self.current[HOME]
        source.wait_stream(destination)
        self.copies[name] = source.do(name)
        destination.wait_stream(source)


class Buffer:
    """Where a result is sent."""

    def __init__(self, streams: Streams, number: int) -> None:
        self.streams, self.number = streams, number

    def copy_(self, result: str, non_blocking: bool) -> None:
        assert non_blocking
        self.streams.copy(f"copy {self.number} of {result}")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    found = Streams()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", found.use)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: found.current[device])
    return found


@pytest.fixture
def courier(streams: Streams) -> CudaCourier:
    return CudaCourier(NET, HOME)


def step(courier: CudaCourier, streams: Streams, name: str, early: bool = True) -> list[set[str]]:
    """A denoising step; what had happened when the denoiser read each residual."""
    buffers: Any = [Buffer(streams, number) for number in range(COUNT)]
    for number in range(COUNT):
        streams.current[NET].do(f"{name}: make {number}")
        if number < COUNT - 1:
            courier.made(number)
    results: Any = [name] * COUNT
    courier.send(results, buffers, early)
    read = []
    for number in range(COUNT):
        courier.wait(number)
        read.append(streams.current[HOME].do(f"{name}: read {number}"))
    return read


def test_each_residual_leaves_when_it_is_made_and_is_read_when_it_has_come(
    courier: CudaCourier, streams: Streams
) -> None:
    read = step(courier, streams, "first")
    for number in range(COUNT):
        copied = streams.copies[f"copy {number} of first"]
        assert f"first: make {number}" in copied
        assert f"first: make {number + 1}" not in copied, "it does not wait for the next block"
        assert f"copy {number} of first" in read[number]
        assert f"copy {number + 1} of first" not in read[number], "the denoiser does not wait for the next one"


def test_memory_is_written_anew_when_it_was_read(courier: CudaCourier, streams: Streams) -> None:
    step(courier, streams, "first")
    assert {f"copy {number} of first" for number in range(COUNT)} <= streams.current[NET].before, "results have left"
    step(courier, streams, "second")
    reads = {f"first: read {number}" for number in range(COUNT)}
    assert all(reads <= streams.copies[f"copy {number} of second"] for number in range(COUNT))


def test_results_of_an_eager_call_leave_when_all_are_made(courier: CudaCourier, streams: Streams) -> None:
    step(courier, streams, "first", early=False)
    made = {f"first: make {number}" for number in range(COUNT)}
    assert all(made <= before for before in streams.copies.values())


class Written:
    """Memory that graphs read, and the host's work on the current stream writes."""

    def __init__(self, streams: Streams, name: str) -> None:
        self.streams, self.name = streams, name

    def take(self, step: str) -> None:
        self.streams.current[NET].do(f"{step}: write {self.name}")


def test_what_graphs_read_is_written_before_them_and_after_the_step_before(
    courier: CudaCourier, streams: Streams
) -> None:
    """A graph is replayed on the current stream of its device, where its inputs are written too."""
    known: dict[str, set[str]] = {}
    pieces: list[Callable[[], object]] = []
    turn = "none"

    def do(work: str) -> None:
        known[f"{turn}: {work}"] = streams.current[NET].do(f"{turn}: {work}")

    for number in range(COUNT):
        pieces.append(partial(do, f"make {number}"))
        if number < COUNT - 1:
            pieces.append(partial(courier.made, number))
    written: Any = [Written(streams, name) for name in ("input", "factor")]
    once = "write what a request computes once"
    replay = Chain(pieces=pieces).replay
    graph = Graph(replay, written[:1], None, factors=written[1:], refresh=partial(do, once))
    for turn in ("first", "second"):
        given: Any = [turn]
        graph.run(given, given)
        buffers: Any = [Buffer(streams, number) for number in range(COUNT)]
        courier.send(given * COUNT, buffers, early=True)
        inputs = {f"{turn}: write input", f"{turn}: write factor"}
        assert inputs <= known[f"{turn}: {once}"], "it is made of inputs"
        assert {*inputs, f"{turn}: {once}"} <= known[f"{turn}: make 0"]
        assert all(known[f"{turn}: make 0"] <= streams.copies[f"copy {number} of {turn}"] for number in range(COUNT))
    before = {work for number in range(COUNT) for work in (f"first: make {number}", f"copy {number} of first")}
    assert before <= known[f"second: {once}"], "nothing of the first step reads it any more"


def test_nothing_else_runs_on_another_stream_afterwards(courier: CudaCourier, streams: Streams) -> None:
    before = dict(streams.current)
    step(courier, streams, "first")
    assert streams.current == before
