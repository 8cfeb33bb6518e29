"""Requests of other shapes on a plan's placement: costed as the planner would, with the largest size that fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sana_deploy.api import compile_spec
from sana_deploy.declare.compose import compose_spec
from sana_deploy.errors import InfeasibleError
from sana_deploy.facts.checkpoint import open_checkpoint
from sana_deploy.plan.admission import Admission
from sana_deploy.plan.artifact import Plan

BIG = "model=sana_1600m_controlnet"
Admit = Callable[..., tuple[Plan, Admission]]


def admission(*overrides: str, other_shapes: bool = True) -> tuple[Plan, Admission]:
    plan = compile_spec(compose_spec(overrides))
    return plan, Admission(plan.resolve(), open_checkpoint(plan.spec.model), other_shapes)


def shape(plan: Plan, **changed: Any) -> Any:
    return plan.spec.workload.bounds.model_copy(update=changed)


@pytest.mark.parametrize(
    "overrides",
    [("machine=2x8gb",), ("machine=8xh100",), ("machine=2xrtx3060", "hardware.allow=[split_controlnet]"),
     ("machine=1xrtx4090", "hardware=single_gpu", "precision=int8"), ("machine=8xh100", "hardware.split=guidance")],
)  # fmt: skip
def test_the_planned_workload_needs_what_the_plan_says(overrides: tuple[str, ...]) -> None:
    plan, admit = admission(BIG, *overrides)
    need = admit.need(shape(plan))
    tightest = min(plan.slots, key=lambda slot: slot.available_bytes - slot.peak_bytes)
    assert (need.place, need.phase, need.peak_bytes) == (tightest.index, tightest.peak_phase, tightest.peak_bytes)
    assert need.available_bytes == tightest.available_bytes
    assert admit.seconds(shape(plan)) == pytest.approx(sum(plan.estimates.seconds.values()), abs=1e-3)


@pytest.mark.parametrize("machine", ["2x8gb", "1xrtx4090"])
def test_another_shape_needs_what_a_plan_for_it_on_the_same_places_would_say(machine: str) -> None:
    plan, admit = admission(BIG, f"machine={machine}", "runtime=eager", "hardware.allow=[encode_once]")
    wanted = shape(plan, height=768, width=1280)
    places = ",".join(f"{name}:{place}" for name, place in plan.device_map.items())
    knobs = f"hardware.knobs=[{','.join(plan.knobs)}]"
    custom = (f"machine={machine}", "hardware=custom_map", f"hardware.device_map={{{places}}}", knobs, "runtime=eager")
    other = compile_spec(
        compose_spec(
            [BIG, *custom, f"precision={plan.spec.precision.name}", "workload.height=768", "workload.width=1280"]
        )
    )
    tightest = min(other.slots, key=lambda slot: slot.available_bytes - slot.peak_bytes)
    assert admit.need(wanted).peak_bytes == tightest.peak_bytes


def test_what_does_not_fit_is_refused_with_numbers_and_the_largest_size_that_does() -> None:
    plan, admit = admission(BIG, "machine=2x8gb")
    admit.check(shape(plan, height=512, width=512, steps=900))
    with pytest.raises(
        InfeasibleError, match=r"2048x1024 needs \d+\.\d+ GiB on GPU 1 in prepare, 8.00 GiB are"
    ) as caught:
        admit.check(shape(plan, height=1024, width=2048))
    largest = admit.largest(shape(plan, height=1024, width=2048))
    assert largest is not None
    assert caught.value.hint == f"{largest.width}x{largest.height} fits"
    assert largest.width == pytest.approx(2 * largest.height, abs=63)
    admit.check(largest)
    with pytest.raises(InfeasibleError):
        admit.check(largest.model_copy(update={"height": largest.height + 32, "width": largest.width + 64}))


def test_only_the_plan_s_own_sizes_are_taken_where_that_is_asked_for() -> None:
    plan, admit = admission(BIG, "machine=8xh100", other_shapes=False)
    admit.check(shape(plan, height=512))
    with pytest.raises(InfeasibleError, match="1056x1024 exceeds the 1024x1024 that this plan is for") as caught:
        admit.check(shape(plan, width=1056))
    assert caught.value.hint == "ask for 1024x1024 or less"


def test_guidance_that_the_plan_does_not_have_is_costed() -> None:
    plan, admit = admission(BIG, "machine=2x8gb", "workload.guidance_scale=1")
    guided = shape(plan, guided=True)
    assert not admit.planned(guided)
    assert admit.need(guided).peak_bytes > admit.need(shape(plan)).peak_bytes


def test_a_split_plan_takes_other_shapes_with_guidance_and_without() -> None:
    plan, admit = admission(BIG, "machine=2xrtx4090", "hardware.split=guidance")
    assert plan.units
    other = {"height": 1536, "width": 1536}
    admit.check(shape(plan, **other))
    admit.check(shape(plan, guided=False, **other))
    with pytest.raises(InfeasibleError, match="6144x6144 needs"):
        admit.check(shape(plan, guided=False, height=6144, width=6144))


def test_graphs_of_the_planned_workload_keep_their_memory_beside_those_of_another() -> None:
    plan, admit = admission(BIG, "machine=8xh100", "runtime=graphs", "hardware=single_gpu")
    eager_plan, eager = admission(BIG, "machine=8xh100", "runtime=eager", "hardware=single_gpu")
    pool = plan.slots[0].pool_bytes
    wider = {"width": 1056}
    more = admit.need(shape(plan, **wider)).peak_bytes - eager.need(shape(eager_plan, **wider)).peak_bytes
    assert more > pool > 0


def test_a_batch_is_as_large_as_it_pays_and_fits() -> None:
    plan, host_bound = admission(BIG, "machine=1xrtx4090", "runtime=eager", "workload.height=512", "workload.width=512")
    best = host_bound.batch(shape(plan), 8)
    each = [(host_bound.seconds(shape(plan, batch=n), True) or 0) / n for n in (1, best)]
    assert best > 1
    assert each[1] <= 0.95 * each[0]
    assert host_bound.batch(shape(plan), 2) == 2
    plan, busy = admission(BIG, "machine=2x8gb")
    assert busy.batch(shape(plan), 8) == 1, "the GPU is busy anyway"


def test_a_batch_that_is_asked_for_is_as_large_as_fits() -> None:
    plan, admit = admission(BIG, "machine=1xrtx4090")
    most = admit.batch(shape(plan), 64, forced=True)
    assert 1 < most < 64
    assert admit.need(shape(plan, batch=most), True).lacking_bytes <= 0
    assert admit.need(shape(plan, batch=most + 1), True).lacking_bytes > 0


def test_pictures_of_different_prompts_take_more_than_those_of_one() -> None:
    plan, admit = admission(BIG, "machine=1xrtx4090", "hardware.allow=[encode_once]")
    together = shape(plan, batch=4)
    assert admit.need(together, True).peak_bytes >= admit.need(together).peak_bytes
    assert (admit.seconds(together, True) or 0) > (admit.seconds(together) or 0)


def test_on_the_cpu_the_host_s_memory_bounds_and_nothing_is_known_of_seconds() -> None:
    plan, admit = admission("precision=fp32", "workload.height=64", "workload.width=64")
    need = admit.need(shape(plan))
    assert (need.place, need.phase) == ("cpu", None)
    assert "on CPU, " in str(need)
    assert admit.seconds(shape(plan)) is None
    assert admit.batch(shape(plan), 8) == 1
    assert admit.batch(shape(plan), 8, forced=True) == 8


def test_a_form_that_was_not_measured_is_beyond_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, admit = admission(BIG, "machine=2x8gb")
    monkeypatch.setattr("sana_deploy.facts.catalogue.calibrated", dict)
    admit.check(shape(plan, height=512))
    with pytest.raises(InfeasibleError, match="exceeds the 1024x1024"):
        admit.check(shape(plan, height=1056))
    assert admit.seconds(shape(plan)) is None


def test_no_size_may_fit_beside_a_plan_that_was_forced() -> None:
    places = "hardware.device_map={text_encoder:0,vae:0,transformer:0,controlnet:0}"
    forced = ("machine=virtual", "machine.gpus=2GiB", "hardware=custom_map", places, "hardware.force=true")
    plan, admit = admission(BIG, *forced)
    admit.check(shape(plan))
    with pytest.raises(InfeasibleError) as caught:
        admit.check(shape(plan, height=1056))
    assert caught.value.hint == "no size of these proportions fits"


def test_a_request_is_taken_where_every_replica_can_draw_it() -> None:
    unlike = (BIG, "machine=virtual", "machine.gpus='rtx4090,h100'", "hardware=multi_gpu_balanced", "precision=bf16")
    plan, both = admission(*unlike, "hardware.replicas=2")
    each = [Admission(one, open_checkpoint(plan.spec.model)) for one in both.resolved.each()]
    smaller, larger = sorted(each, key=lambda one: one.need(shape(plan)).available_bytes)
    wanted = shape(plan, height=4096, width=4096)
    larger.check(wanted)
    with pytest.raises(InfeasibleError, match=r"4096x4096 needs \d+\.\d+ GiB on GPU 0 in \w+, 23.65 GiB are") as caught:
        both.check(wanted)
    assert both.largest(wanted) == smaller.largest(wanted)
    assert caught.value.hint == f"{both.largest(wanted).width}x{both.largest(wanted).height} fits"  # type: ignore[union-attr]
    slow, fast = (one.seconds(shape(plan)) or 0 for one in (smaller, larger))
    assert both.seconds(shape(plan)) == slow > fast > 0
    assert both.batch(wanted, 8, forced=True) == 1
    assert both.batch(shape(plan), 8, forced=True) == smaller.batch(shape(plan), 8, forced=True)
