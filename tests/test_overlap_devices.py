"""Requests in flight, and what they share of devices: graphs, copies between GPUs, how far a GPU is behind."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from repeating import RepeatingHost

from sana_deploy import compile_plan
from sana_deploy._units import GIB
from sana_deploy.api import compile_spec
from sana_deploy.declare.compose import compose_spec
from sana_deploy.errors import RunError
from sana_deploy.facts.machine import Gpu, Machine
from sana_deploy.plan.artifact import ResolvedPlan
from sana_deploy.rehearsal.overlap import Stand
from sana_deploy.run.generate import generate
from sana_deploy.run.hook import border_of
from sana_deploy.run.load import load_pipeline
from sana_deploy.run.overlap import Overlapped
from sana_deploy.run.request_state import RequestState

pytestmark = pytest.mark.usefixtures("short_prompts")
APART = ("hardware=multi_gpu_balanced", "hardware.pin.transformer=1", "hardware.pin.controlnet=1",
         "hardware.pin.vae=0", "hardware.pin.text_encoder=0", "precision=fp32", "runtime=graphs",
         "workload.height=64", "workload.width=96", "workload.steps=4")  # fmt: skip


@pytest.fixture(scope="module")
def resolved(tiny: Path) -> ResolvedPlan:
    """A plan for two GPUs that runs on the CPU, for want of GPUs."""
    gpus = tuple(Gpu(i, "NVIDIA GeForce RTX 3060", 8 * GIB, 8 * GIB, (8, 6), 28) for i in range(2))
    return compile_spec(compose_spec(APART), Machine("present", gpus, 64 * GIB)).resolve()


def overlapped_on(host: RepeatingHost | None, resolved: ResolvedPlan) -> Overlapped:
    assert resolved.plan.overlap is not None
    return Overlapped(load_pipeline(resolved, None, host), resolved, resolved.plan.overlap)


def test_requests_in_flight_share_graphs_and_have_the_bits_of_eager_ones_one_by_one(resolved: ResolvedPlan) -> None:
    host = RepeatingHost()
    whole, work = overlapped_on(host, resolved), resolved.plan.spec.workload
    eager = load_pipeline(resolved)
    shapes = [work.bounds, work.bounds.model_copy(update={"height": 32, "steps": 3})]
    cases = [
        (shapes[number % 2], work.request.model_copy(update={"seed": number, "prompt": f"fox {number}"}))
        for number in range(8)
    ]
    exact = [generate(eager, *case)[0][0].tobytes() for case in cases]
    states = [RequestState() for _ in cases]

    def draw(number: int) -> bytes:
        with whole.request(cases[number][0]) as flying:
            return flying.generate(*cases[number], state=states[number])[0][0].tobytes()

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(draw, range(8))) == exact
    assert len(set(exact)) == 8
    assert host.made.recorded >= 4, "transformer and ControlNet, for each size"
    assert not any(state.eager_calls for state in states)


def test_the_first_requests_of_a_size_are_drawn_alone_while_graphs_are_captured(resolved: ResolvedPlan) -> None:
    whole, bounds = overlapped_on(RepeatingHost(), resolved), resolved.plan.spec.workload.bounds
    request, other = resolved.plan.spec.workload.request, bounds.model_copy(update={"height": 32})
    found = []
    for _ in range(3):
        found.append(whole._is_alone(bounds.model_copy(update={"steps": 2})))
        with whole.request(bounds) as flying:
            flying.generate(bounds, request)
    assert found == [True, True, False]
    assert whole._is_alone(other)
    assert not overlapped_on(None, resolved)._is_alone(bounds), "a CPU captures nothing"


def test_a_gpu_is_one_step_behind_at_most_so_that_copies_of_others_wait_for_no_more(
    resolved: ResolvedPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, work, events = overlapped_on(None, resolved), resolved.plan.spec.workload, list[str]()

    def mark(device: torch.device) -> Callable[[], object]:
        name = str(sum(event.startswith("mark") for event in events))
        events.append(f"mark {name}")
        return lambda: events.append(f"wait {name}")

    monkeypatch.setattr(border_of(whole.pipeline).host, "mark", mark)
    with whole.request(work.bounds) as flying:
        flying.generate(work.bounds, work.request)
    assert events == ["mark 0", "wait 0", "mark 1", "wait 1", "mark 2", "wait 2", "mark 3"]
    generate(whole.pipeline, work.bounds, work.request)
    assert len(events) == 7, "a request alone is not held back"


class NotedAside:
    """A stream aside that notes who is on it."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def enter(self) -> None:
        self.events.append("aside")

    def leave(self) -> None:
        self.events.append("back")

    def synchronize(self) -> None:
        self.events.append("wait")


def noting(owner: Any, method: str, events: list[str]) -> None:
    """Have a request's own pipeline or scheduler note a call."""
    inner = getattr(owner, method)

    def noted(*args: Any, **kwargs: Any) -> Any:
        events.append(method)
        return inner(*args, **kwargs)

    vars(owner)[method] = noted


@pytest.mark.parametrize("fails", [False, True])
def test_what_comes_before_the_loop_goes_aside_and_nothing_of_the_loop_does(
    resolved: ResolvedPlan, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    events = list[str]()
    whole, work = overlapped_on(None, resolved), resolved.plan.spec.workload
    whole.home, whole.aside = torch.device("cuda:1"), NotedAside(events)  # the CPU stands for both GPUs

    def observe(event: str, call: str) -> None:
        events.append(call if event == "enter" else f"end {call}")
        if fails and call == "vae.encode":
            raise RunError("it failed")

    state = RequestState()
    state.observers.append(observe)
    try:
        with whole.request(work.bounds) as flying:
            noting(flying.pipeline, "prepare_image", events)
            noting(flying.pipeline, "prepare_latents", events)
            noting(flying.pipeline.scheduler, "set_timesteps", events)
            flying.generate(work.bounds, work.request, state=state)
    except RunError:
        assert fails
    before = ["aside", "text_encoder.forward", "end text_encoder.forward", "text_encoder.forward",
              "end text_encoder.forward", "back", "wait", "aside", "prepare_image", "vae.encode"]  # fmt: skip
    assert events[: len(before)] == before
    after = events[len(before) :]
    assert after[:2] == (["back", "wait"] if fails else ["end vae.encode", "back"])
    if not fails:
        assert after[2:6] == ["wait", "set_timesteps", "prepare_latents", "controlnet.forward"]
        assert "aside" not in after


def test_results_are_sent_to_another_gpu_once_they_are_there(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = compile_plan([*APART, "machine=virtual", "machine.gpus=2xrtx4090", "machine.fidelity=numbers"])
    stand, events, state = Stand(plan), list[str](), RequestState()
    monkeypatch.setattr(stand.host, "synchronize", lambda device: events.append(str(device)))
    state.on_outputs.append(lambda name, method, output: events.append(name))
    stand.draw(plan.spec.workload.request, state)
    after = [later for event, later in itertools.pairwise(events) if event in ("text_encoder", "vae")]
    assert after[:3] == ["vgpu:0"] * 3, "two prompts and the control image"
    loop = [later for event, later in itertools.pairwise(events) if event == "controlnet"]
    assert loop == ["transformer"] * 4, "which is on the same GPU, and waits for nothing"
