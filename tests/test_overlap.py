"""Requests in flight on one placed pipeline: stages overlap, and pictures have the bits of requests one by one."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from sana_deploy._units import GIB
from sana_deploy.api import compile_spec
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.workload import Request, Workload
from sana_deploy.errors import RunError
from sana_deploy.facts.machine import Gpu, Machine
from sana_deploy.plan.artifact import ResolvedPlan
from sana_deploy.run.generate import generate
from sana_deploy.run.hook import border_of
from sana_deploy.run.load import load_pipeline
from sana_deploy.run.offload import OffloadedWeights
from sana_deploy.run.overlap import InFlight, Overlapped, own_pipeline
from sana_deploy.run.request_state import RequestState

pytestmark = pytest.mark.usefixtures("short_prompts")
SECONDS = 60
"""A test that waits so long has failed."""
APART = ("hardware=multi_gpu_balanced", "hardware.pin.transformer=1", "hardware.pin.controlnet=1",
         "hardware.pin.vae=0", "hardware.pin.text_encoder=0", "precision=fp32", "runtime=graphs")  # fmt: skip
SMALL = ("workload.height=64", "workload.width=96", "workload.steps=3", "workload.control_image=null")
Case = tuple[Workload, Request]


class LeftError(Exception):
    """A client left."""


@pytest.fixture(scope="module")
def resolved(tiny: Path) -> ResolvedPlan:
    """A plan for two GPUs that runs on the CPU, for want of GPUs: its slots are places all the same."""
    gpus = tuple(Gpu(i, "NVIDIA GeForce RTX 3060", 8 * GIB, 8 * GIB, (8, 6), 28) for i in range(2))
    return compile_spec(compose_spec([*SMALL, *APART]), Machine("present", gpus, 64 * GIB)).resolve()


@pytest.fixture(scope="module")
def pipeline(resolved: ResolvedPlan) -> DiffusionPipeline:
    return load_pipeline(resolved)


@pytest.fixture
def overlapped(pipeline: DiffusionPipeline, resolved: ResolvedPlan) -> Overlapped:
    assert resolved.plan.overlap is not None
    assert resolved.plan.overlap.in_flight == 3
    return Overlapped(pipeline, resolved, resolved.plan.overlap)


@pytest.fixture
def cases(resolved: ResolvedPlan) -> list[Case]:
    """Requests that differ in everything that a call of the pipeline keeps: guidance, steps, seeds and sizes."""
    shapes = [
        (64, 96, 3, 4.5),
        (64, 64, 5, 1.0),
        (32, 96, 2, 7.0),
        (64, 96, 4, 3.0),
        (64, 96, 3, 4.5),
        (64, 96, 3, 1.0),
    ]
    planned, asked = resolved.plan.spec.workload.bounds, resolved.plan.spec.workload.request
    return [
        (
            planned.model_copy(update={"height": height, "width": width, "steps": steps, "guided": scale > 1}),
            asked.model_copy(update={"prompt": f"fox {number}", "guidance_scale": scale, "seed": number}),
        )
        for number, (height, width, steps, scale) in enumerate(shapes)
    ]


@dataclass
class Flight:
    """A request in a thread of its own, which is held where the test says."""

    future: Future[bytes]
    state: RequestState
    holds: dict[str, Hold]


@dataclass
class Hold:
    """A place in a request where it waits for the test."""

    reached: threading.Event
    go_on: threading.Event
    raises: BaseException | None = None

    def __call__(self) -> None:
        self.reached.set()
        assert self.go_on.wait(SECONDS)
        if self.raises is not None:
            raise self.raises


@contextmanager
def pilots() -> Iterator[Callable[..., Flight]]:
    """Start requests; all holds are let go at the end."""
    holds: list[Hold] = []
    with ThreadPoolExecutor(8) as pool:

        def start(whole: Overlapped, case: Case, *at: str, raises: BaseException | None = None) -> Flight:
            own = {call: Hold(threading.Event(), threading.Event(), raises) for call in at}
            holds.extend(own.values())
            state = RequestState()
            state.observers.append(lambda event, call: own[call]() if event == "enter" and call in own else None)

            def draw() -> bytes:
                with whole.request(case[0]) as flying:
                    return flying.generate(*case, state=state)[0][0].tobytes()

            return Flight(pool.submit(draw), state, own)

        try:
            yield start
        finally:
            for hold in holds:
                hold.go_on.set()


def one_by_one(pipeline: DiffusionPipeline, cases: Sequence[Case]) -> list[bytes]:
    return [generate(pipeline, *case)[0][0].tobytes() for case in cases]


def test_pictures_in_flight_have_the_bits_of_pictures_one_by_one(
    overlapped: Overlapped, pipeline: DiffusionPipeline, cases: list[Case]
) -> None:
    exact = one_by_one(pipeline, cases)
    with pilots() as start:
        flights = [start(overlapped, case) for case in cases]
        assert [flight.future.result(SECONDS) for flight in flights] == exact
    assert len(set(exact)) == len(exact)
    assert one_by_one(pipeline, cases) == exact
    for flight, (workload, request) in zip(flights, cases, strict=True):
        passes = {"vae": 2, "transformer": workload.steps, "controlnet": workload.steps}
        passes["text_encoder"] = 2 if request.guided else 1
        assert flight.state.calls == passes


def test_three_requests_are_at_work_at_once_each_in_another_stage(
    overlapped: Overlapped, pipeline: DiffusionPipeline, resolved: ResolvedPlan, cases: list[Case]
) -> None:
    exact = one_by_one(pipeline, cases[:3])
    with pilots() as start:
        first = start(overlapped, cases[0], "vae.encode", "transformer.forward")
        encoding = first.holds["vae.encode"]
        assert encoding.reached.wait(SECONDS)
        encoding.go_on.set()
        assert first.holds["transformer.forward"].reached.wait(SECONDS)
        # While it denoises, the next one encodes on the other GPU, and no third one beside that.
        second = start(overlapped, cases[1], "text_encoder.forward", "transformer.forward", "vae.decode")
        assert second.holds["text_encoder.forward"].reached.wait(SECONDS)
        third = start(overlapped, cases[2], "text_encoder.forward")
        assert not third.holds["text_encoder.forward"].reached.wait(0.05)
        second.holds["text_encoder.forward"].go_on.set()
        assert third.holds["text_encoder.forward"].reached.wait(SECONDS)  # the second one waits for the denoiser
        assert not second.holds["transformer.forward"].reached.is_set()
        first.holds["transformer.forward"].go_on.set()
        # The first one is done with the denoiser, so that the second one has it, and waits for the third to encode.
        assert second.holds["transformer.forward"].reached.wait(SECONDS)
        assert not first.future.done()
        third.holds["text_encoder.forward"].go_on.set()
        assert first.future.result(SECONDS) == exact[0]
        second.holds["transformer.forward"].go_on.set()
        assert second.holds["vae.decode"].reached.wait(SECONDS)
        second.holds["vae.decode"].go_on.set()
        assert [second.future.result(SECONDS), third.future.result(SECONDS)] == exact[1:]


@pytest.mark.parametrize("call", ["text_encoder.forward", "vae.encode", "transformer.forward", "vae.decode"])
@pytest.mark.parametrize("problem", [RunError("it failed"), LeftError(), torch.OutOfMemoryError("no memory")])
def test_a_request_that_ends_in_any_stage_leaves_the_others_right(
    overlapped: Overlapped, pipeline: DiffusionPipeline, cases: list[Case], call: str, problem: BaseException
) -> None:
    exact = one_by_one(pipeline, cases[:3])
    with pilots() as start:
        before = start(overlapped, cases[0])
        failing = start(overlapped, cases[3], call, raises=problem)
        assert failing.holds[call].reached.wait(SECONDS)
        after = [start(overlapped, case) for case in cases[1:3]]
        failing.holds[call].go_on.set()
        with pytest.raises((RunError, LeftError)):
            failing.future.result(SECONDS)
        assert [one.future.result(SECONDS) for one in (before, *after)] == exact
    assert not overlapped.turns._flying
    assert one_by_one(pipeline, cases[:1]) == exact[:1]


def test_a_request_that_failed_keeps_no_tensors_when_others_get_its_places(
    overlapped: Overlapped, cases: list[Case]
) -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def fails(name: str, method: str, output: Any) -> None:
        if method == "encode":
            held.append(weakref.ref(output.latent))
            raise RunError("it failed")

    state = RequestState()
    state.on_outputs.append(fails)
    with pytest.raises(RunError, match="it failed") as caught, overlapped.request(cases[0][0]) as flying:
        flying.generate(*cases[0], state=state)
    gc.collect()
    assert held
    assert held[0]() is None
    assert caught.value.__traceback__ is not None


def test_a_call_that_waits_for_others_ends_when_its_client_leaves(overlapped: Overlapped, cases: list[Case]) -> None:
    left = threading.Event()

    def check() -> None:
        if left.is_set():
            raise LeftError

    def draw() -> None:
        with overlapped.request(cases[1][0], check) as flying:
            flying.generate(*cases[1])

    with pilots() as start:
        first = start(overlapped, cases[0], "transformer.forward")
        assert first.holds["transformer.forward"].reached.wait(SECONDS)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(draw)
            left.set()
            with pytest.raises(LeftError):
                waiting.result(SECONDS)
        assert not first.future.done()
        first.holds["transformer.forward"].go_on.set()
        first.future.result(SECONDS)


def test_what_exceeds_the_planned_workload_is_drawn_alone(
    overlapped: Overlapped, pipeline: DiffusionPipeline, cases: list[Case]
) -> None:
    larger = (cases[0][0].model_copy(update={"height": 96}), cases[0][1])
    exact = one_by_one(pipeline, [cases[0], larger, cases[1]])
    with pilots() as start:
        first = start(overlapped, cases[0], "transformer.forward")
        assert first.holds["transformer.forward"].reached.wait(SECONDS)
        alone = start(overlapped, larger, "text_encoder.forward", "vae.decode")
        assert not alone.holds["text_encoder.forward"].reached.wait(0.05)
        first.holds["transformer.forward"].go_on.set()
        assert alone.holds["text_encoder.forward"].reached.wait(SECONDS)
        assert first.future.done()
        later = start(overlapped, cases[1], "text_encoder.forward")
        alone.holds["text_encoder.forward"].go_on.set()
        assert alone.holds["vae.decode"].reached.wait(SECONDS)
        assert not later.holds["text_encoder.forward"].reached.is_set()
        alone.holds["vae.decode"].go_on.set()
        later.holds["text_encoder.forward"].go_on.set()
        assert [one.future.result(SECONDS) for one in (first, alone, later)] == exact


def test_a_request_s_pipeline_shares_components_and_nothing_that_a_call_writes(
    pipeline: DiffusionPipeline, overlapped: Overlapped, cases: list[Case]
) -> None:
    before = dict(vars(pipeline))
    steps = pipeline.scheduler.num_inference_steps
    own = own_pipeline(pipeline)
    for name in border_of(pipeline).pipeline.names:
        assert getattr(own, name) is getattr(pipeline, name)
    assert border_of(own) is border_of(pipeline)
    assert own.scheduler is not pipeline.scheduler
    with overlapped.request(cases[1][0]) as flying:
        flying.generate(*cases[1])
        assert flying.pipeline.guidance_scale == 1.0
        assert flying.pipeline.scheduler.num_inference_steps == 5
    assert {key: value for key, value in vars(pipeline).items() if before.get(key) is not value} == {}
    assert pipeline.scheduler.num_inference_steps == steps


def test_a_preview_has_the_decoder_s_gpu_besides_that_of_the_loop(
    overlapped: Overlapped, pipeline: DiffusionPipeline, cases: list[Case]
) -> None:
    exact, seen = one_by_one(pipeline, cases[:2]), threading.Event()

    def look(flying: InFlight) -> Callable[[int, int], None]:
        def stepped(done: int, of: int) -> None:
            if done == 1:
                with flying.besides("decode"):
                    seen.set()
                    assert {0, 1} == flying._turn.held

        return stepped

    def draw() -> bytes:
        with overlapped.request(cases[0][0]) as flying:
            return flying.generate(*cases[0], look(flying))[0][0].tobytes()

    with pilots() as start, ThreadPoolExecutor(1) as pool:
        looking = pool.submit(draw)
        other = start(overlapped, cases[1], "vae.encode")
        assert other.holds["vae.encode"].reached.wait(SECONDS)
        other.holds["vae.encode"].go_on.set()
        assert [looking.result(SECONDS), other.future.result(SECONDS)] == exact
    assert seen.is_set()


def test_offloaded_weights_stay_for_the_request_that_they_came_for() -> None:
    weights = OffloadedWeights(torch.nn.Linear(4, 4), "text_encoder", torch.device("cpu"))

    def stay(user: RequestState, goes_on: RequestState) -> bool:
        weights.arrive(user)
        weights.leave_after(goes_on)
        return weights.there

    user, other, single = RequestState(overlaps=True), RequestState(overlaps=True), RequestState()
    assert stay(user, other)
    assert not stay(user, user)
    assert stay(user, other)
    del user
    gc.collect()
    weights.leave_after(other)
    assert not weights.there
    assert not stay(single, other), "nobody overlaps with it: it was called by itself, and ended"
