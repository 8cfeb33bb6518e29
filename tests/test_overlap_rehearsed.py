"""Requests in flight on virtual GPUs: memory is what plans say, and pictures have the bits of one by one."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sana_deploy import compile_plan
from sana_deploy.errors import InfeasibleError, RunError, UsageError
from sana_deploy.facts.allocator import workspace_bytes
from sana_deploy.plan.artifact import Plan
from sana_deploy.rehearsal.overlap import Stand
from sana_deploy.run.request_state import RequestState

SECONDS = 120
APART = ("hardware=multi_gpu_balanced", "hardware.pin.transformer=1", "hardware.pin.controlnet=1",
         "hardware.pin.vae=0", "hardware.pin.text_encoder=0", "machine=virtual")  # fmt: skip
TINY = ("precision=fp32", "workload.height=64", "workload.width=96", "workload.steps=3", "machine.fidelity=numbers")
LARGE = ("model=sana_600m_controlnet", "machine.gpus=2xrtx4090")


def tiny_plan(*overrides: str) -> Plan:
    return compile_plan([*APART, *TINY, "machine.gpus=2xrtx4090", "runtime=graphs", *overrides])


def rehearsed_at_their_fullest(plan: Plan) -> tuple[Stand, list[str]]:
    """Three requests: while the first one has denoised, and the second one too, the third one encodes and prepares."""
    stand, request = Stand(plan), plan.spec.workload.request
    for _ in range(2 if plan.runtime == "graphs" else 0):  # which are drawn alone
        stand.draw(request)
    ahead = [RequestState(), RequestState()]
    reached, go_on, entered = [threading.Event() for _ in ahead], threading.Event(), list[str]()
    for state, event in zip(ahead, reached, strict=True):

        def holds(_: object, call: str, event: threading.Event = event, state: RequestState = state) -> None:
            if call == "transformer.forward" and state.calls["transformer"] == 2:
                event.set()
                if event is reached[0]:
                    assert go_on.wait(SECONDS)

        state.observers.append(holds)
    last = RequestState()

    def notes(event: str, call: str) -> None:
        entered.append(f"{event} {call}")
        if (event, call) == ("leave", "vae.encode"):
            go_on.set()  # until here the first one was in the loop, and the second one waited for it

    last.observers.append(notes)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(stand.draw, request, ahead[0])
        assert reached[0].wait(SECONDS)
        second = pool.submit(stand.draw, request, ahead[1])
        while ahead[1].calls["vae"] < 1:
            assert not second.done()
        third = pool.submit(stand.draw, request, last)
        for one in (first, second, third):
            one.result(SECONDS)
    return stand, entered


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["eager", "graphs"])
def test_three_requests_take_what_the_plan_says_on_each_gpu(runtime: str) -> None:
    plan = compile_plan([*APART, *LARGE, f"runtime={runtime}"])
    assert plan.overlap is not None
    assert plan.overlap.in_flight == 3
    stand, entered = rehearsed_at_their_fullest(plan)
    assert "leave vae.encode" in entered
    peaks, planned = stand.peaks(), stand.planned()
    for slot in plan.slots:
        # Headroom, and the workspaces of the other threads, are no tensors of a rehearsal.
        headroom = int(0.02 * slot.capacity_bytes)
        workspaces = 2 * workspace_bytes((slot.compute_capability[0], slot.compute_capability[1]))
        counted = planned[slot.index] - headroom - workspaces
        assert 0.95 * counted <= peaks[slot.index] <= 1.001 * counted
        if slot.index == plan.home:  # where requests wait
            assert peaks[slot.index] > slot.peak_bytes - headroom


@pytest.mark.usefixtures("short_prompts")
def test_pictures_in_numbers_have_the_bits_of_one_by_one(tiny: Path) -> None:
    plan = tiny_plan()
    stand, asked = Stand(plan), plan.spec.workload.request
    requests = [asked.model_copy(update={"seed": seed, "prompt": f"fox {seed}"}) for seed in range(4)]
    exact = [stand.draw(request)[0].tobytes() for request in requests]
    together = stand.together(requests)
    assert [image.tobytes() for image in together.images] == exact
    assert len(set(exact)) == 4
    assert all(together.peaks[slot] <= planned for slot, planned in together.planned.items())


@pytest.mark.usefixtures("short_prompts")
def test_the_timeline_shows_stages_of_several_requests_at_once(tiny: Path) -> None:
    plan = tiny_plan()
    assert plan.overlap is not None
    together = Stand(plan).together([plan.spec.workload.request] * 3)
    pairs = [
        (one, other)
        for one, other in itertools.combinations(together.timeline, 2)
        if one.begin < other.end and other.begin < one.end
    ]
    assert pairs
    assert all(one.request != other.request for one, other in pairs)
    assert {one.stage for pair in pairs for one in pair} == {0, 1, 2}
    assert max(one.end for one in together.timeline) < 3 * sum(stage.seconds for stage in plan.overlap.stages)


def test_a_virtual_gpu_that_is_too_small_for_what_waits_says_so(tiny: Path) -> None:
    plan = tiny_plan()
    stand = Stand(plan)
    stand.host.ledger.capacities[1] = stand.host.ledger.live(1) + 1024
    with pytest.raises(RunError, match="vgpu:1 is out of memory"):
        stand.together([plan.spec.workload.request] * 2)


def test_a_plan_without_overlap_is_no_stand() -> None:
    with pytest.raises(UsageError, match="do not overlap"):
        Stand(compile_plan(["hardware=single_gpu", "machine=virtual", "machine.gpus=1xrtx4090", *LARGE[:1]]))
    with pytest.raises((UsageError, InfeasibleError)):
        Stand(compile_plan(["precision=fp32"]))
