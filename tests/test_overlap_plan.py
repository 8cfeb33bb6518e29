"""Plans say how the stages of several requests overlap: where, what waits meanwhile, and how soon pictures come."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sana_deploy.api import compile_spec
from sana_deploy.declare.compose import compose_spec
from sana_deploy.facts.allocator import workspace_bytes
from sana_deploy.facts.checkpoint import open_checkpoint
from sana_deploy.facts.machine import Machine
from sana_deploy.facts.virtual_machine import describe_machine
from sana_deploy.plan.admission import Admission
from sana_deploy.plan.artifact import Plan
from sana_deploy.plan.digest import digest_of
from sana_deploy.plan.overlap import cycle_seconds, schedule
from sana_deploy.plan.records import Place, Stage
from sana_deploy.report.terminal import render_plan
from sana_deploy.report.wording import overlap_words

LARGE = ("hardware=multi_gpu_balanced", "model=sana_600m_controlnet", "machine=virtual")
APART = ("hardware.pin.transformer=1", "hardware.pin.controlnet=1", "hardware.pin.text_encoder=0")
VAE_BESIDE = (*APART, "hardware.pin.vae=0")
RELEASED = sorted((Path(__file__).parent / "plans").glob("*.json"))
Seconds = st.floats(0.01, 5.0)


def planned(*overrides: str, gpus: str = "2xrtx3060") -> Plan:
    return compile_spec(compose_spec([*LARGE, f"machine.gpus={gpus}", *overrides]))


def stage(places: Sequence[Place], seconds: float) -> Stage:
    return Stage(phases=["denoise"], places=list(places), seconds=seconds)


def busiest(stages: Sequence[Stage]) -> float:
    """Seconds that the GPU with most to do works in a request."""
    places = {place for one in stages for place in one.places}
    return max(sum(one.seconds for one in stages if place in one.places) for place in places)


def test_a_stage_is_what_a_request_does_on_the_same_gpus_at_a_stretch() -> None:
    plan = planned(*VAE_BESIDE)
    assert plan.overlap is not None
    assert [(one.phases, one.places) for one in plan.overlap.stages] == [
        (["encode", "prepare"], [0]),
        (["denoise"], [1]),
        (["decode"], [0]),
    ]
    by_phase = plan.estimates.seconds
    seconds = [sum(by_phase[phase] for phase in one.phases) for one in plan.overlap.stages]
    assert [one.seconds for one in plan.overlap.stages] == pytest.approx(seconds, abs=1e-3)
    with_vae = planned(*APART, "hardware.pin.vae=1").overlap
    assert with_vae is not None
    assert [(one.phases, one.places) for one in with_vae.stages] == [
        (["encode"], [0]),
        (["prepare", "denoise", "decode"], [1]),
    ]


def test_pictures_come_as_soon_as_the_busiest_gpu_has_done_its_part() -> None:
    plan = planned(*VAE_BESIDE)
    assert plan.overlap is not None
    assert plan.overlap.in_flight == 3
    assert plan.overlap.seconds_per_image == pytest.approx(plan.estimates.seconds["denoise"], abs=1e-3)
    assert plan.overlap.images_per_second == pytest.approx(1 / plan.overlap.seconds_per_image, rel=1e-3)
    assert plan.images_per_second is not None
    assert plan.overlap.images_per_second > 1.2 * plan.images_per_second


@given(st.lists(st.tuples(st.sets(st.sampled_from([0, 1, 2]), min_size=1), Seconds), min_size=1, max_size=4),
       st.integers(1, 4))  # fmt: skip
def test_requests_never_come_sooner_than_the_bottleneck_and_never_later_than_one_by_one(
    path: list[tuple[set[int], float]], in_flight: int
) -> None:
    stages = [stage(sorted(places), seconds) for places, seconds in path]
    way = sum(one.seconds for one in stages)
    each = cycle_seconds(stages, in_flight)
    assert max(busiest(stages), way / in_flight * 0.9) <= each <= way * 1.001
    assert cycle_seconds(stages, 1) == pytest.approx(way)
    assert cycle_seconds(stages, in_flight, launches=100.0) == 100.0


@given(Seconds, Seconds, st.floats(1.0, 4.0), st.sampled_from([2, 3]))
def test_the_denoiser_s_gpu_never_waits_where_the_other_one_has_less_to_do(
    encode: float, decode: float, times: float, in_flight: int
) -> None:
    denoise = times * (encode + decode)
    stages = [stage([0], encode), stage([1], denoise), stage([0], decode)]
    assert cycle_seconds(stages, in_flight) == pytest.approx(denoise)


@given(st.lists(st.tuples(st.sets(st.sampled_from([0, 1, 2]), min_size=1), Seconds), min_size=1, max_size=4),
       st.integers(1, 4))  # fmt: skip
def test_a_place_has_one_request_at_a_time_and_a_request_one_stage(
    path: list[tuple[set[int], float]], in_flight: int
) -> None:
    stages = [stage(sorted(places), seconds) for places, seconds in path]
    visits, way = schedule(stages, in_flight, 12), sum(one.seconds for one in stages)
    ended = [one.end for one in visits if one.stage == len(stages) - 1]
    assert ended == sorted(ended)
    assert way * 0.999 <= ended[0] <= ended[-1] <= 12 * way * 1.001
    for one, other in itertools.combinations(visits, 2):
        at_once = one.begin < other.end and other.begin < one.end
        assert not at_once or not set(stages[one.stage].places) & set(stages[other.stage].places)
    for number in range(12):
        own = sorted((one for one in visits if one.request == number), key=lambda one: one.stage)
        assert all(one.end <= after.begin for one, after in itertools.pairwise(own))
    alone = [one.end for one in schedule(stages, 1, 3) if one.stage == len(stages) - 1]
    assert alone == pytest.approx([way, 2 * way, 3 * way])


def test_one_gpu_gains_nothing_and_plans_without_seconds_say_nothing() -> None:
    assert planned(gpus="1xrtx4090").overlap is None
    together = [f"hardware.pin.{name}=0" for name in ("transformer", "controlnet", "text_encoder", "vae")]
    assert planned(*together, gpus="2xrtx4090").overlap is None
    assert compile_spec(compose_spec(["precision=fp32"]), Machine("present", (), 64 << 30)).overlap is None


def test_halves_of_guidance_are_drawn_one_after_the_other() -> None:
    plan = planned("hardware.split=guidance", "hardware.objective=latency", gpus="3xrtx4090")
    assert plan.split == "guidance"
    assert plan.overlap is None


def test_each_gpu_has_room_for_what_waits_of_other_requests() -> None:
    plan = planned(*VAE_BESIDE)
    assert plan.overlap is not None
    embeddings = sum(one.bytes_per_image for one in plan.transfers if one.tensor == "prompt_embeds")
    for slot, use in zip(plan.slots, plan.overlap.slots, strict=True):
        workspace = 2 * workspace_bytes((slot.compute_capability[0], slot.compute_capability[1]))
        assert use.slot == slot.index
        assert use.peak_bytes == slot.peak_bytes + use.waiting_bytes <= slot.available_bytes
        assert use.waiting_bytes >= workspace + (2 * embeddings if slot.index == 1 else 0)


def test_fewer_requests_are_in_flight_where_memory_is_short_and_none_where_it_is_shorter() -> None:
    spec = compose_spec([*LARGE, "machine.gpus=2xrtx3060", *VAE_BESIDE])
    plan = compile_spec(spec)
    assert plan.overlap is not None
    slot, use = plan.slots[1], plan.overlap.slots[1]
    machine = describe_machine(spec.machine)  # type: ignore[arg-type]

    def with_room(free: int) -> Plan:
        gpus = (machine.gpus[0], replace(machine.gpus[1], free_bytes=free))
        return compile_spec(spec, replace(machine, gpus=gpus))

    three, two = with_room(use.peak_bytes).overlap, with_room(use.peak_bytes - 1).overlap
    assert three is not None
    assert two is not None
    assert (three.in_flight, two.in_flight) == (3, 2)
    assert two.slots[1].peak_bytes == slot.peak_bytes + use.waiting_bytes // 2
    tight = with_room(two.slots[1].peak_bytes - 1)
    assert tight.slots[1].peak_bytes == slot.peak_bytes
    assert tight.overlap is None


def test_a_plan_keeps_its_digest_whatever_it_says_of_overlap_and_reads_it_back(tmp_path: Path) -> None:
    plan = planned(*VAE_BESIDE)
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan
    values = json.loads(plan.to_json())
    without = {key: value for key, value in values.items() if key != "overlap"}
    basis = {key: how for key, how in values["basis"].items() if not key.startswith("overlap.")}
    assert len(basis) < len(values["basis"])
    assert digest_of({**without, "basis": basis}) == plan.digest


@pytest.mark.parametrize("path", RELEASED, ids=lambda path: path.stem)
def test_plans_of_earlier_versions_overlap_nothing(path: Path) -> None:
    assert Plan.load(path).overlap is None


def test_throughput_takes_the_placement_whose_stages_overlap_best() -> None:
    large = ("model=sana_1600m_controlnet", "hardware.replicas=1")
    fastest = planned(*large, "hardware.objective=latency", gpus="2x8GiB")
    most = planned(*large, "hardware.objective=throughput", gpus="2x8GiB")
    assert fastest.overlap is not None
    assert most.overlap is not None
    assert most.overlap.images_per_second > 1.15 * fastest.overlap.images_per_second
    assert [one.places for one in most.overlap.stages] == [[0], [1], [0]]
    assert most.estimates.seconds_per_image is not None
    assert fastest.estimates.seconds_per_image is not None
    assert most.estimates.seconds_per_image < 1.01 * fastest.estimates.seconds_per_image


def test_each_replica_has_its_own() -> None:
    plan = planned("hardware.replicas=2", gpus="4x8GiB")
    assert len(plan.each()) == 2
    assert [one.overlap for one in plan.each()] == [plan.overlap, plan.replicas[0].overlap]
    assert plan.overlap is not None


def test_a_batch_pays_where_its_pictures_come_sooner_than_one_by_one_with_overlap() -> None:
    plan = planned(*VAE_BESIDE)
    resolved, checkpoint = plan.resolve(), open_checkpoint(plan.model)
    apart, over = Admission(resolved, checkpoint), Admission(resolved, checkpoint, overlaps=True)
    shape, larger = plan.spec.workload.bounds, plan.spec.workload.bounds.model_copy(update={"width": 1056})
    assert plan.overlap is not None
    assert over.between(shape) == pytest.approx(plan.overlap.seconds_per_image, rel=1e-3)
    assert apart.between(shape) == apart.seconds(shape) == over.seconds(shape)
    assert over.between(larger) == over.seconds(larger)  # which is drawn alone
    assert over.batch(shape, 4) <= apart.batch(shape, 4)


def test_reports_say_how_soon_pictures_come_and_nothing_where_stages_do_not_overlap() -> None:
    plan = planned(*VAE_BESIDE)
    assert plan.overlap is not None
    said = f"3 requests at once overlap to ~{plan.overlap.images_per_second:.3g} images/s"
    assert overlap_words(plan) == said
    console = Console(width=120)
    with console.capture() as captured:
        console.print(render_plan(plan))
    assert said in captured.get()
    assert overlap_words(planned(gpus="1xrtx4090")) == ""
