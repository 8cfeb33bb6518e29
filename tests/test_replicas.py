"""Several pipelines beside each other: the GPUs are dealt as well as they can be, and the plan holds every replica."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_plan import numbers
from test_planner import profiles

from sana_deploy import compile_plan
from sana_deploy._units import GIB
from sana_deploy.api import compile_spec
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import InfeasibleError, InvalidSpecError, PlanError
from sana_deploy.facts.known_gpus import KNOWN_GPUS
from sana_deploy.facts.machine import Gpu, Machine
from sana_deploy.plan.artifact import Plan
from sana_deploy.plan.diff import compare, render
from sana_deploy.plan.digest import digest_of
from sana_deploy.plan.grid import Rules
from sana_deploy.plan.profile import PipelineProfile
from sana_deploy.plan.records import Replica
from sana_deploy.plan.replicas import Wanted, alike, deals_of
from sana_deploy.plan.search import search_balanced
from sana_deploy.plan.ways import Choice, Way
from sana_deploy.run.audit import in_float32

Small = Callable[..., DeploySpec]
LARGE = ("model=sana_1600m_controlnet", "hardware=multi_gpu_balanced", "machine=virtual")
MOST = "hardware.objective=throughput"
H100 = "machine.gpus=8xh100"
MIXED = "machine.gpus='13GiB,9GiB,8GiB,24GiB'"
SHARED = {
    "schema_version", "tool_version", "digest", "spec", "checkpoint", "basis", "feasible", "libraries",
    "pipeline_class", "replicas", "images_per_second",
}  # fmt: skip
"""What of a plan all its replicas have in common, or what is said of all."""


@st.composite
def gpus(draw: st.DrawFn) -> list[Gpu]:
    """Up to four GPUs, of which some may be alike."""
    sizes = draw(st.lists(st.sampled_from([6, 9, 12, 18, 30]), min_size=1, max_size=4))
    names = st.sampled_from(sorted(one.name for one in KNOWN_GPUS.values())[::12])
    return [Gpu(i, draw(names), size * GIB, size * GIB, (9, 0), 100) for i, size in enumerate(sizes)]


def partitions(items: Sequence[int]) -> Iterator[list[list[int]]]:
    """Every way to deal some of `items` into groups."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    yield from partitions(rest)
    for size in range(len(rest) + 1):
        for others in itertools.combinations(rest, size):
            left = [item for item in rest if item not in others]
            for groups in partitions(left):
                yield [[first, *others], *groups]


def planner(profile: PipelineProfile) -> Callable[[Machine], Choice]:
    def planned(part: Machine) -> Choice:
        found = search_balanced(profile, part.gpus, Rules(objective="latency"))
        return Choice(Way("eager", "none"), profile, found)

    return planned


def rate_of(choice: Choice) -> float | None:
    best = choice.search.best
    if best is None:
        return None
    seconds = sum((best.seconds or {}).values())
    return 1 / seconds if seconds else 0.0


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(profile=profiles(), machine=gpus(), wanted=st.sampled_from(["every count", "most images", "most replicas"]))
def test_no_other_deal_draws_more_or_holds_more(profile: PipelineProfile, machine: list[Gpu], wanted: Wanted) -> None:
    host = Machine("virtual", tuple(machine), 64 * GIB)
    planned = planner(profile)

    @cache
    def rate(group: tuple[int, ...]) -> float | None:
        return rate_of(planned(replace(host, gpus=tuple(machine[i] for i in group))))

    found: dict[int, float] = {0: 0.0}
    for groups in partitions(range(len(machine))):
        rates = [rate(tuple(sorted(group))) for group in groups]
        if None not in rates:
            found[len(groups)] = max(found.get(len(groups), 0.0), sum(one for one in rates if one is not None))
    deals = deals_of(host, planned, range(1, len(profile.units) + 1), wanted)
    assert deals.most == max(found)
    if wanted == "most replicas":
        return
    asked: list[Any] = ["auto", "max", *(range(1, deals.most + 1) if wanted == "every count" else ())]
    for count in asked:
        chosen = deals.chosen(count)
        taken = [gpu.index for group in chosen for gpu in group.machine.gpus]
        assert len(taken) == len(set(taken))
        drawn = sum(rate_of(group.choice) or 0.0 for group in chosen)
        best = max(found.values()) if count == "auto" else found[deals.most if count == "max" else count]
        assert drawn == pytest.approx(best, rel=1e-6, abs=1e-7)


def test_eight_gpus_draw_at_once_and_none_is_idle() -> None:
    one, all_of_them = (compile_plan([*LARGE, gpus, MOST]) for gpus in ("machine.gpus=h100", H100))
    assert [slot.index for slot in all_of_them.all_slots] == list(range(8))
    assert len(all_of_them.each()) == 8
    assert one.images_per_second == one.estimates.images_per_second
    assert all_of_them.images_per_second == pytest.approx(8 * (one.images_per_second or 0), rel=1e-4)
    assert not [remark for remark in all_of_them.diagnostics if remark.type == "idle_gpus"]


def test_one_pipeline_is_planned_unless_more_are_asked_for() -> None:
    plain = compile_plan([*LARGE, H100])
    assert plain.replicas == []
    assert plain.each() == [plain]
    assert compile_plan([*LARGE, H100, MOST, "hardware.replicas=1"]).replicas == []


def test_single_gpu_gives_each_replica_a_gpu_where_it_fits() -> None:
    gpus = "machine.gpus='h100,8GiB,h100'"
    plan = compile_plan([LARGE[0], "hardware=single_gpu", "machine=virtual", gpus, MOST])
    assert [[slot.index for slot in one.slots] for one in plan.each()] == [[0], [2]]
    (idle,) = [remark for remark in plan.diagnostics if remark.type == "idle_gpus"]
    assert idle.message == "GPU 1 stays idle: no further replica fits there"


def test_small_gpus_share_a_replica_and_large_ones_have_their_own() -> None:
    plan = compile_plan([*LARGE, MIXED, MOST, "hardware.split=none"])
    groups = sorted([slot.index for slot in one.slots] for one in plan.each())
    assert groups == [[0], [1, 2], [3]]
    for one in plan.each():
        assert {part.slot for part in one.components.values()} == {slot.index for slot in one.slots}


@pytest.mark.parametrize("gpus", ["13GiB,9GiB,8GiB,24GiB", "h100,rtx3060,rtx3060,t4", "h100,h100,8GiB"])
def test_a_replica_with_the_halves_of_guidance_apart_competes_with_replicas_on_one_gpu_each(gpus: str) -> None:
    machine, rates = f"machine.gpus='{gpus}'", {}
    count = len(gpus.split(","))
    for size in range(1, count + 1):
        for group in itertools.combinations(range(count), size):
            alone = f"hardware.use=[{','.join(map(str, group))}]"
            with contextlib.suppress(InfeasibleError):
                rates[group] = compile_plan([*LARGE, machine, "hardware.objective=latency", alone]).images_per_second
    drawn = [
        sum(rates[tuple(group)] or 0 for group in groups)
        for groups in partitions(range(count))
        if all(tuple(group) in rates for group in groups)
    ]
    plan = compile_plan([*LARGE, machine, MOST])
    assert plan.images_per_second == pytest.approx(max(drawn), abs=1e-3)


def test_two_gpus_that_are_alike_draw_more_with_a_replica_each_than_with_half_of_guidance_each() -> None:
    plan = compile_plan([*LARGE, "machine.gpus=2xh100", MOST])
    halves = compile_plan([*LARGE, "machine.gpus=2xh100", MOST, "hardware.replicas=1"])
    assert [one.split for one in plan.each()] == ["none", "none"]
    assert halves.split == "guidance"
    assert (halves.images_per_second or 0) < (plan.images_per_second or 0) < 2 * (halves.images_per_second or 0)


@pytest.mark.parametrize("asked", [MOST, "hardware.replicas=max", "hardware.replicas=3"])
def test_where_guidance_is_to_be_split_each_replica_has_two_gpus_at_least(asked: str) -> None:
    plan = compile_plan([*LARGE, "machine.gpus=7xh100", "hardware.split=guidance", asked])
    assert [[slot.index for slot in one.slots] for one in plan.each()] == [[0, 1], [2, 3], [4, 5]]
    for one in plan.each():
        assert (one.split, one.exactness, one.runtime) == ("guidance", "rounding", "graphs")
        assert set(one.units) == {"transformer.1", "controlnet.1"}
        assert {unit.slot for unit in one.units.values()} == {one.slots[1].index}
    assert alike(plan.each()) == [[0, 1, 2]]
    (idle,) = [remark for remark in plan.diagnostics if remark.type == "idle_gpus"]
    assert idle.message.startswith("GPU 6 stays idle")


def test_a_gpu_that_is_left_is_no_replica_with_the_halves_of_guidance_apart() -> None:
    with pytest.raises(
        InfeasibleError, match=r"on 2 of 3 GPUs; they leave 1, each part of an image takes one"
    ) as found:
        compile_plan([*LARGE, "machine.gpus=3xh100", "hardware.split=guidance", "hardware.replicas=2"])
    assert found.value.hint == "this fits: hardware.replicas=1; or hardware.split=auto"
    auto = compile_plan([*LARGE, "machine.gpus=3xh100", "hardware.split=auto", "hardware.replicas=2"])
    assert len(auto.each()) == 2


def test_what_is_said_to_be_faster_than_replicas_is_faster_for_each() -> None:
    """Eager replicas of unlike GPUs: the override makes the first one as fast as it says, and every one faster."""
    given = [*LARGE, "machine.gpus='h100,h200'", MOST, "runtime=eager"]
    plan = compile_plan(given)
    assert len(plan.each()) == 2
    for one in plan.each():
        assert [faster.overrides for faster in one.faster] == [["runtime=graphs"], ["runtime=compiled"]]
    faster = compile_plan([*given[:-1], "runtime=graphs"])
    for was, now in zip(plan.each(), faster.each(), strict=True):
        assert was.slots[0].index == now.slots[0].index
        assert now.estimates.seconds_per_image == pytest.approx(was.faster[0].seconds_per_image, abs=1e-4)
    values = json.loads(plan.to_json())
    values["replicas"][0].update(faster=[], exactness=None)
    assert digest_of(values) == plan.digest, "what was not taken, and what follows, are no decisions"


@pytest.mark.parametrize(("count", "replicas"), [("2", 2), ("3", 3), ("max", 3)])
def test_as_many_as_asked_for(count: str, replicas: int) -> None:
    plan = compile_plan([*LARGE, MIXED, f"hardware.replicas={count}"])
    assert len(plan.each()) == replicas
    assert plan.images_per_second == pytest.approx(sum(one.images_per_second or 0 for one in plan.each()), abs=1e-3)


def test_idle_gpus_are_named_with_the_reason() -> None:
    plan = compile_plan([*LARGE, H100, "hardware.replicas=6"])
    (idle,) = [remark for remark in plan.diagnostics if remark.type == "idle_gpus"]
    assert idle.message == "GPU 6, 7 stay idle: hardware.replicas=6 asks for no more"
    most = compile_plan([*LARGE, H100, "hardware.replicas=max"])
    assert (most.images_per_second or 0) > (plan.images_per_second or 0)


def test_use_keep_free_and_allow_bound_every_replica() -> None:
    used = compile_plan([*LARGE, H100, MOST, "hardware.use=[1,3,6]"])
    assert [slot.index for slot in used.all_slots] == [1, 3, 6]
    kept = compile_plan([*LARGE, "machine.gpus=4x24gb", MOST, "hardware.keep_free=14GiB"])
    free = compile_plan([*LARGE, "machine.gpus=4x24gb", MOST])
    assert len(kept.each()) < len(free.each()), "two GPUs hold what one did"
    assert all(slot.available_bytes <= 10 * GIB for slot in kept.all_slots)
    bare = compile_plan([*LARGE, H100, MOST, "hardware.allow=[]"])
    assert {tuple(one.knobs) for one in bare.each()} == {()}


def test_more_than_fit_are_refused_with_how_many_do_and_hints_that_hold() -> None:
    with pytest.raises(InfeasibleError) as caught:
        compile_plan([*LARGE, MIXED, "hardware.replicas=4"])
    problem = caught.value
    assert problem.message == "4 replicas do not fit, 3 do at most, on 4 of 4 GPUs"
    assert (problem.where, problem.facts["replicas"]) == ("hardware.replicas", 3)
    first, *others = problem.hint.removeprefix("this fits: ").split("; or ")
    assert first == "hardware.replicas=3"
    assert others
    for change in others:
        given = [*LARGE, MIXED, "hardware.replicas=4", *change.split(" (")[0].split()]
        assert len(compile_plan(given).each()) == 4, change


def test_what_the_next_replica_lacks_is_said() -> None:
    with pytest.raises(
        InfeasibleError, match=r"3 replicas do not fit, 2 do at most, on 2 of 3 GPUs; on what they leave"
    ):
        compile_plan([*LARGE, "machine.gpus='24GiB,24GiB,6GiB'", "hardware.replicas=3", "hardware.allow=[]"])


def test_replicas_need_gpus(small: Small, machine: Callable[..., Machine]) -> None:
    with pytest.raises(InfeasibleError, match=r"2 replicas do not fit, 0 do at most, without a GPU"):
        compile_spec(small("hardware.replicas=2"), machine())
    for asked in ("hardware.replicas=max", MOST):
        assert compile_spec(small(asked), machine()).device_map == dict.fromkeys(
            ("text_encoder", "vae", "transformer", "controlnet"), "cpu"
        )


@pytest.mark.parametrize("asked", ["hardware.replicas=2", "hardware.replicas=max", MOST])
def test_pins_are_for_one_pipeline(asked: str) -> None:
    with pytest.raises(InvalidSpecError, match=r"pin puts vae=1, and each of several replicas needs a GPU of its own"):
        compose_spec([*LARGE, H100, asked, "hardware.pin.vae=1"])
    compile_plan([*LARGE, H100, MOST, "hardware.pin.vae=1", "hardware.replicas=1"])


@pytest.mark.parametrize("count", ["0", "-1", "some", "1.5"])
def test_a_count_is_a_number_or_auto_or_max(count: str) -> None:
    with pytest.raises(InvalidSpecError, match="replicas"):
        compose_spec([*LARGE, H100, f"hardware.replicas={count}"])


def test_sixteen_gpus_that_differ_in_free_memory_are_dealt_without_every_group_being_planned() -> None:
    sizes = ",".join(f"{20 + number}GiB" for number in range(16))
    plan = compile_plan([*LARGE, f"machine.gpus='{sizes}'", MOST])
    assert len(plan.each()) == 16


def test_every_part_of_a_plan_is_of_one_replica_or_of_all() -> None:
    assert set(Plan.model_fields) == SHARED | set(Replica.model_fields)
    assert not SHARED & set(Replica.model_fields)


@pytest.fixture(scope="module")
def mixed() -> Plan:
    return compile_plan([*LARGE, MIXED, MOST, "hardware.split=none"])


def test_a_plan_of_replicas_is_saved_and_loaded(mixed: Plan, tmp_path: Path) -> None:
    assert Plan.load(mixed.save(tmp_path / "plan.json")) == mixed
    values = json.loads(mixed.to_json())
    assert digest_of(values) == mixed.digest
    assert digest_of({**values, "replicas": values["replicas"][:1]}) != mixed.digest
    asked = json.loads(mixed.to_json())
    asked["spec"]["hardware"]["replicas"] = 3
    assert digest_of(asked) == mixed.digest, "what was decided counts, not how it was asked for"


def test_each_quantity_of_a_replica_says_how_it_was_come_by() -> None:
    plan = compile_plan([*LARGE, "machine.gpus=2xh100", MOST])
    counts = {"replicas.*.slots.*.index", "replicas.*.slots.*.compute_capability.*", "replicas.*.home",
              "replicas.*.device_map.*", "replicas.*.components.*.slot", "replicas.*.transfers.*.src",
              "replicas.*.transfers.*.dst", "replicas.*.considered.*", "replicas.*.rejections.*.gpu",
              "replicas.*.rejections.*.count"}  # fmt: skip
    places = [f"replicas.*{place[1:]}" for place in numbers(json.loads(plan.to_json())["replicas"])]
    assert places
    assert [place for place in places if not any(fnmatch(place, one) for one in {*counts, *plan.basis})] == []
    assert plan.basis["images_per_second"] == "estimated"


def test_each_replica_is_a_plan_that_can_be_saved(mixed: Plan, tmp_path: Path) -> None:
    first, *others = mixed.each()
    assert first.model_copy(update={"digest": ""}) != mixed.model_copy(update={"digest": ""})
    for number, one in enumerate([first, *others]):
        assert Plan.load(one.save(tmp_path / f"{number}.json")) == one
        assert one.replicas == []
        assert one.images_per_second == one.estimates.images_per_second
        assert not [key for key in one.basis if key.startswith("replicas.")]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda one: one["replicas"][0].update(slots=one["slots"], home=one["home"], device_map=one["device_map"],
                                               components=one["components"]), "gives slot 0 to two replicas"),
        (lambda one: one["replicas"][0].update(home="cpu"), "home is cpu, the transformer is elsewhere"),
        (lambda one: one["replicas"][0].update(slots=[]), "which it lacks"),
        (lambda one: one.update(images_per_second=99.0), "says 99.0 images per second, its replicas draw"),
    ],
)  # fmt: skip
def test_a_plan_whose_replicas_contradict_each_other_is_refused(
    change: Callable[[dict[str, Any]], None], says: str
) -> None:
    values = json.loads(compile_plan([*LARGE, "machine.gpus=2xh100", MOST]).to_json())
    change(values)
    with pytest.raises(PlanError, match=says):
        Plan.from_values({**values, "digest": digest_of(values)}, "plan.json")


def test_all_slots_are_bound_together_each_gpu_once(small: Small, machine: Callable[..., Machine]) -> None:
    plan = compile_spec(small("hardware.replicas=3", "runtime=eager"), machine(8, 8, 8))
    resolved = plan.resolve(machine(8, 8, 8))
    assert [one.home for one in resolved.each()] == ["cuda:0", "cuda:1", "cuda:2"]
    assert [one.plan for one in resolved.each()] == plan.each()
    full = machine(8, 8, 8, 8)
    busy = replace(full, gpus=(full.gpus[0], replace(full.gpus[1], free_bytes=0), *full.gpus[2:]))
    moved = plan.resolve(busy)
    assert sorted(one.home for one in moved.each()) == ["cuda:0", "cuda:2", "cuda:3"]
    assert {one.type for one in moved.drift} == {"drift"}


def test_the_halves_of_every_replica_are_bound(small: Small, machine: Callable[..., Machine]) -> None:
    plan = compile_spec(small("hardware.replicas=2", "hardware.split=guidance"), machine(8, 8, 8, 8))
    resolved = plan.resolve(machine(8, 8, 8, 8))
    for one, own in zip(resolved.each(), plan.each(), strict=True):
        first, second = (f"cuda:{slot.index}" for slot in own.slots)
        assert set(one.device_map) == set(own.components)
        assert one.home == first
        assert one.unit_devices == {"transformer.1": second, "controlnet.1": second}
    (only,) = plan.resolve(machine()).each()
    assert only.unit_devices == {}, "on the CPU one unit of a component does it all"


def test_a_gpu_that_is_missing_is_named(small: Small, machine: Callable[..., Machine]) -> None:
    plan = compile_spec(small("hardware.replicas=3"), machine(8, 8, 8))
    with pytest.raises(PlanError, match=r"slot gpu2: was Test 8 GiB, 8.00 GiB free; no GPU is left here for it"):
        plan.resolve(machine(8, 8))


def test_fifteen_gpus_for_sixteen_slots_are_refused_at_once(small: Small, machine: Callable[..., Machine]) -> None:
    plan = compile_spec(small("hardware.replicas=max"), machine(*[8] * 16))
    assert len(plan.resolve(machine(*[8] * 16)).each()) == 16
    with pytest.raises(PlanError, match="no GPU is left here for it"):
        plan.resolve(machine(*[8] * 15))


def test_without_a_gpu_one_replica_runs_on_the_cpu(small: Small, machine: Callable[..., Machine]) -> None:
    plan = compile_spec(small("hardware.replicas=2"), machine(8, 8))
    resolved = plan.resolve(machine())
    (only,) = resolved.each()
    assert set(only.device_map.values()) == {"cpu"}
    assert "one replica of 2 runs on the CPU" in resolved.drift[-1].message


def test_replicas_that_are_alike_are_together(mixed: Plan) -> None:
    assert alike(compile_plan([*LARGE, H100, MOST]).each()) == [list(range(8))]
    assert alike(mixed.each()) == [[0], [1], [2]]


def test_a_comparison_names_replicas_and_the_images_of_the_machine() -> None:
    one, two = (compile_plan([*LARGE, "machine.gpus=2xh100", f"hardware.replicas={count}"]) for count in (1, 2))
    found = {difference.where: difference for difference in compare(one, two)}
    assert (found["replicas"].kind, found["replicas"].was, found["replicas"].now) == ("decided", 1, 2)
    assert "GPU 1" in found["replicas.1.device_map"].now
    halves = compile_plan([*LARGE, "machine.gpus=4xh100", "hardware.replicas=2", "hardware.split=guidance"])
    found_halves = {difference.where: difference for difference in compare(two, halves)}
    assert found_halves["replicas.1.split"].now == "guidance"
    assert "controlnet.1 GPU 3" in found_halves["replicas.1.device_map"].now
    assert found["images_per_second"].now == two.images_per_second
    assert f"{one.images_per_second:.2f} -> {two.images_per_second:.2f}" in render(list(found.values()))


def test_the_float32_plan_of_an_audit_is_of_one_pipeline() -> None:
    asked = [*LARGE, "machine.gpus=2xl4", "hardware.replicas=2", "precision.audit=true"]
    reference = in_float32(compose_spec(asked), compile_spec)
    assert reference.replicas == []
    assert {part.dtype for part in reference.components.values()} == {"float32"}
