"""Units get places: enumerated canonically, in blocks that bound the memory, and costed by one critical path."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_planner import SECOND_UNITS, allowed, gpu_lists, objectives, profiles

from sana_deploy._units import GIB, MIB
from sana_deploy.declare.hardware import Objective
from sana_deploy.declare.knobs import Knob
from sana_deploy.declare.pipelines import Crossing
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import PlanError
from sana_deploy.facts.checkpoint import open_checkpoint
from sana_deploy.facts.machine import Gpu, Machine
from sana_deploy.plan.artifact import Plan
from sana_deploy.plan.assemble import assemble
from sana_deploy.plan.cost import bytes_per_request, slot_use
from sana_deploy.plan.diff import compare
from sana_deploy.plan.digest import digest_of
from sana_deploy.plan.grid import FITS, PlacementGrid, Rules
from sana_deploy.plan.knobs import of_placement, parted, under
from sana_deploy.plan.placements import canonical_placements
from sana_deploy.plan.profile import PipelineProfile, profile_pipeline
from sana_deploy.plan.search import Search, search_balanced, search_custom, search_host, search_single
from sana_deploy.plan.seconds import component_phases, critical_path, phase_seconds
from sana_deploy.plan.setting import Tried
from sana_deploy.plan.units import Unit, component_of

Small = Callable[..., DeploySpec]
LETTERS = ("a", "b", "c", "d", "e", "f")


def host(kinds: Sequence[int]) -> list[Gpu]:
    """GPUs that are alike where their numbers are equal."""
    return [Gpu(i, f"kind {kind}", 8 * GIB, 8 * GIB, (8, 6), uuid=str(i)) for i, kind in enumerate(kinds)]


def renamed(row: Sequence[int], gpus: Sequence[Gpu], pinned: set[int]) -> Iterator[tuple[int, ...]]:
    """All that `row` becomes when GPUs that are alike, and not pinned, change names."""
    groups: dict[str, list[int]] = {}
    for i, gpu in enumerate(gpus):
        groups.setdefault(f"pinned {i}" if i in pinned else gpu.name, []).append(i)
    for orders in itertools.product(*(itertools.permutations(group) for group in groups.values())):
        names = {was: now for group, order in zip(groups.values(), orders, strict=True)
                 for was, now in zip(group, order, strict=True)}  # fmt: skip
        yield tuple(names[place] for place in row)


@st.composite
def searches(draw: st.DrawFn) -> tuple[tuple[str, ...], list[Gpu], dict[str, int], int]:
    units = LETTERS[: draw(st.integers(1, 4))]
    gpus = host(draw(st.lists(st.integers(0, 2), min_size=1, max_size=4)))
    pins = draw(st.dictionaries(st.sampled_from(units), st.integers(0, len(gpus) - 1), max_size=2))
    return units, gpus, pins, draw(st.integers(1, 9))


@settings(max_examples=80, deadline=None)
@given(searches())
def test_of_placements_that_only_rename_alike_gpus_the_first_one_is_enumerated(
    given_: tuple[tuple[str, ...], list[Gpu], dict[str, int], int],
) -> None:
    units, gpus, pins, chunk = given_
    everything = itertools.product(*([pins[name]] if name in pins else range(len(gpus)) for name in units))
    expected = [row for row in everything if row == min(renamed(row, gpus, set(pins.values())))]
    blocks = list(canonical_placements(units, gpus, pins, chunk))
    assert [tuple(row) for block in blocks for row in block.tolist()] == expected
    assert max(map(len, blocks)) <= max(chunk, len(gpus))


@pytest.mark.parametrize(("units", "partitions"), [(4, 15), (6, 203)])
def test_alike_gpus_are_not_counted_twice(units: int, partitions: int) -> None:
    def count(gpus: list[Gpu]) -> int:
        return sum(map(len, canonical_placements(LETTERS[:units], gpus, {})))

    assert count(host([0] * 16)) == partitions, "the partitions of so many units"
    assert count(host(range(5))) == 5**units


@settings(max_examples=60, deadline=None)
@given(searches(), st.data())
def test_of_all_placements_those_are_left_out_that_put_units_together_which_must_be_apart(
    given_: tuple[tuple[str, ...], list[Gpu], dict[str, int], int], data: st.DataObject
) -> None:
    units, gpus, pins, chunk = given_
    apart = {
        one: data.draw(st.sampled_from(units[:i])) for i, one in enumerate(units) if i and data.draw(st.booleans())
    }
    blocks = list(canonical_placements(units, gpus, pins, chunk, apart))
    everything = [row for block in canonical_placements(units, gpus, pins) for row in block.tolist()]
    pairs = [(units.index(one), units.index(other)) for one, other in apart.items()]
    assert [row for block in blocks for row in block.tolist()] == [
        row for row in everything if all(row[i] != row[j] for i, j in pairs)
    ]


def test_without_gpus_there_is_no_placement() -> None:
    assert sum(map(len, canonical_placements(LETTERS, [], {}))) == 0


@settings(max_examples=30, deadline=None)
@given(profiles(SECOND_UNITS), gpu_lists(), allowed, objectives, st.integers(1, 60), st.integers(0, 40))
def test_a_search_in_blocks_finds_what_the_whole_search_finds(
    profile: PipelineProfile, gpus: list[Gpu], allow: set[Knob], objective: Objective, chunk: int, host_gib: int
) -> None:
    rules = Rules(allow, objective, host_bytes=host_gib * GIB)
    assert search_balanced(profile, gpus, rules, chunk=chunk) == search_balanced(profile, gpus, rules)


@settings(max_examples=25, deadline=None)
@given(profiles(SECOND_UNITS), gpu_lists(), allowed)
def test_what_is_worked_out_in_arrays_is_what_one_placement_is_worked_out_to(
    profile: PipelineProfile, gpus: list[Gpu], allow: set[Knob]
) -> None:
    tried = [Tried((), profile), Tried(("vae_slicing",), profile)]
    grid = PlacementGrid(profile, gpus, Rules(allow, force=True, allow_emulated=True), tried)
    (places,) = canonical_placements(grid.units, gpus, {})
    block, setting = grid.block(places[::7]), grid.settings[1]
    sheet = grid.cost(block, setting)
    fits = sheet.fits(np.arange(len(block.places)))
    for row, place in enumerate(block.places):
        one = grid.candidate(place, setting)
        assert one.seconds is not None
        assert fits.seconds[row] == pytest.approx(sum(one.seconds.values()), abs=1.1e-6)
        assert fits.moved[row] == one.bytes_per_request
        assert fits.worst[row] == one.worst_utilisation
        apart = fits.parted["split_controlnet"][row]
        assert apart == ("split_controlnet" in one.knobs)
        assert of_placement(profile.pipeline, one.placement) == (["split_controlnet"] if apart else [])
        short = {i: use.peak_bytes - grid.by_index[i].free_bytes for i, use in one.uses.items()}
        assert sheet.short[row] == max(short.values())
        assert gpus[sheet.tightest(np.array([row]))[0]].index == max(sorted(short), key=lambda i: short[i])
        assert (sheet.code[row] == FITS) == ("split_controlnet" in allow or not apart)


def whole(small: Small) -> PipelineProfile:
    spec = small("model=sana_1600m_controlnet", "workload.height=1024", "workload.width=1024", "precision=mixed_bf16")
    return profile_pipeline(open_checkpoint(spec.model), spec.workload.bounds, spec.precision.formats, lambda *_: {})


@pytest.fixture
def six(small: Small) -> PipelineProfile:
    """SANA 1.6B whose transformer and ControlNet have a second unit each, with the result of its own."""
    profile = whole(small)
    pipeline = profile.pipeline
    home, controlnet = pipeline.denoiser, pipeline.of("controlnet")
    further = {Unit(name, 1): profile.components[name] for name in (home, controlnet)}
    residuals = next(one for one in profile.crossings if one.src == controlnet)
    second = replace(residuals, src=f"{controlnet}.1", dst=f"{home}.1")
    between = Crossing("noise_pred", f"{home}.1", home, MIB, True)
    return replace(profile, further=further, crossings=(*profile.crossings, second, between))


def test_the_first_unit_has_the_component_s_name_and_the_next_is_numbered(six: PipelineProfile) -> None:
    names = [unit.name for unit in six.units]
    home, controlnet = six.pipeline.denoiser, six.pipeline.of("controlnet")
    assert names == [*six.pipeline.names, f"{home}.1", f"{controlnet}.1"]
    assert [component_of(name) for name in names] == [*six.pipeline.names, home, controlnet]
    assert set(six.parts) == set(names)
    assert under(six, ["encode_once"]).units == six.units


def test_steps_of_one_thing_are_done_at_once_unless_the_same_gpu_is_busy_with_them() -> None:
    assert critical_path([]) == 0
    assert critical_path([("a", (0,), 1.0), ("b", (0,), 2.0), ("c", (1,), 4.0)]) == 7.0
    assert critical_path([("a", (0,), 1.0), ("a", (1,), 2.0), ("c", (1,), 4.0)]) == 6.0
    assert critical_path([("a", (0,), 1.0), ("a", (0,), 2.0), ("a", (1,), 2.5)]) == 3.0
    assert critical_path([("a", (0, 1), 1.0), ("a", (0, 2), 2.0)]) == 2.0, "two links"


def test_two_units_of_a_component_share_a_phase_on_two_gpus_and_wait_for_each_other_on_one(
    six: PipelineProfile,
) -> None:
    gpus = {gpu.index: gpu for gpu in _cards(2)}
    home, controlnet = six.pipeline.denoiser, six.pipeline.of("controlnet")
    together = dict.fromkeys(six.parts, 0)
    apart = {**together, f"{home}.1": 1, f"{controlnet}.1": 1}
    one, two = phase_seconds(six, together, gpus), phase_seconds(six, apart, gpus)
    assert one is not None
    assert two is not None
    alone = [component_phases(six.components[name], six.steps, gpus[0].rates) for name in (home, controlnet)]
    parts = [seconds["denoise"] for seconds in alone]
    assert one["denoise"] == pytest.approx(2 * sum(parts))
    moved = two["denoise"] - sum(parts)
    assert 0 < moved < 0.1 * sum(parts), "what crosses between the two"
    assert one["decode"] == two["decode"]
    assert bytes_per_request(six, together) == 0
    assert bytes_per_request(six, apart) == MIB * six.steps
    assert of_placement(six.pipeline, {**apart, f"{controlnet}.1": 0}) == ["split_controlnet"]
    assert of_placement(six.pipeline, apart) == [], "each ControlNet is beside its own transformer"


def test_two_units_on_one_gpu_hold_their_activations_at_once(six: PipelineProfile) -> None:
    (gpu,) = _cards(1)
    home = six.pipeline.denoiser
    single, both = (slot_use(six, dict.fromkeys(names, 0), 0, gpu) for names in ((home,), (home, f"{home}.1")))
    assert both.weights_bytes == 2 * single.weights_bytes
    assert (single.phase, both.phase) == ("denoise", "denoise")
    assert both.activation_bytes == 2 * single.activation_bytes


def _cards(count: int, used: int = 0) -> list[Gpu]:
    """GPUs that are alike, or differ by `used` bytes each."""
    return [Gpu(i, "NVIDIA A100-SXM4-80GB", 80 * GIB, 80 * GIB - i * used, (8, 0), 108) for i in range(count)]


def test_a_second_unit_is_placed_where_it_saves_seconds_and_is_pinned_by_its_name(six: PipelineProfile) -> None:
    found = search_balanced(six, _cards(2), Rules(objective="latency"))
    assert found.best is not None
    home = six.pipeline.denoiser
    assert found.best.placement[home] != found.best.placement[f"{home}.1"]
    pinned = search_balanced(six, _cards(2), Rules(objective="latency"), {home: 1, f"{home}.1": 0})
    assert pinned.best is not None
    assert (pinned.best.placement[home], pinned.best.placement[f"{home}.1"]) == (1, 0)
    assert pinned.placements == 2**3, "the ControlNet's units are on two GPUs as well"


def test_every_strategy_places_every_unit(six: PipelineProfile) -> None:
    single, cpu = search_single(six, _cards(2), Rules(), 1), search_host(six, Rules())
    assert single.best is not None
    assert single.best.placement == dict.fromkeys(six.parts, 1)
    assert cpu.best is not None
    assert cpu.best.placement == dict.fromkeys(six.parts, "cpu")
    assert cpu.best.seconds is None
    map_ = {name: i % 2 for i, name in enumerate(six.parts)}
    custom = search_custom(six, _cards(2), Rules(), map_)
    assert custom.best is not None
    assert custom.best.placement == map_
    assert search_single(six, _cards(2), Rules(), 7) == Search(), "no GPU has this index"


def memory_of(search: Callable[[], Search]) -> tuple[Search, float]:
    """The result of a search and the most MiB that it allocated."""
    tracemalloc.start()
    try:
        found = search()
        return found, tracemalloc.get_traced_memory()[1] / MIB
    finally:
        tracemalloc.stop()


def test_sixteen_alike_gpus_and_six_units_are_few_placements(six: PipelineProfile) -> None:
    found, mib = memory_of(lambda: search_balanced(six, _cards(16), Rules()))
    assert found.placements == 203 - 2 * 52 + 15, "partitions of six without those that join two units of a component"
    assert mib < 8


def test_half_a_million_placements_take_no_more_memory_than_a_block_of_them(six: PipelineProfile) -> None:
    found, mib = memory_of(lambda: search_balanced(six, _cards(9, used=MIB), Rules()))
    assert found.placements == 9**4 * 8**2
    assert found.feasible == found.considered
    assert mib < 128, "all at once they would take more than 256 MiB"


def made(six: PipelineProfile, small: Small) -> Plan:
    """The plan of a profile with two units of a component."""
    spec = small("model=sana_1600m_controlnet", "workload.height=1024", "workload.width=1024", "precision=mixed_bf16")
    found = search_balanced(six, _cards(2), Rules(objective="latency"))
    assert found.best is not None
    machine = Machine("present", tuple(_cards(2)), 64 * GIB)
    return assemble(spec, open_checkpoint(spec.model), six, machine, found.best, found, [])


def test_a_plan_says_where_further_units_are_and_is_read_back(
    six: PipelineProfile, small: Small, tmp_path: Path
) -> None:
    plan = made(six, small)
    home, controlnet = six.pipeline.denoiser, six.pipeline.of("controlnet")
    assert list(plan.units) == [f"{home}.1", f"{controlnet}.1"]
    second = plan.units[f"{home}.1"]
    assert (second.component, second.weights_bytes) == (home, six.components[home].weights_bytes)
    assert second.slot != plan.device_map[home]
    assert set(plan.device_map) == set(plan.components) == set(six.pipeline.names)
    assert sum(slot.weights_bytes for slot in plan.slots) == sum(part.weights_bytes for part in six.parts.values())
    assert plan.basis["units.*.weights_bytes"] == "exact"
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan


def test_units_are_decisions(six: PipelineProfile, small: Small) -> None:
    plan = made(six, small)
    values = plan.model_dump(mode="json")
    home = six.pipeline.denoiser
    found = {one.where: one for one in compare(plan, plan.model_copy(update={"units": {}}))}
    line = found[f"units.{home}.1.slot"]
    assert (line.kind, line.was, line.now) == ("decided", plan.units[f"{home}.1"].slot, None)
    assert digest_of({**values, "units": {}}) != plan.digest


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda units: units.update({"lora.1": units["transformer.1"]}), "lora.1 belongs to no component"),
        (lambda units: units["transformer.1"].update(slot=7), "transformer.1 on slot 7, which it lacks"),
        (lambda units: units["transformer.1"].update(component="vae"), "transformer.1 belongs to no component"),
    ],
)
def test_units_that_contradict_the_rest_of_a_plan_are_refused(
    six: PipelineProfile, small: Small, change: Callable[[dict[str, Any]], None], says: str
) -> None:
    values = made(six, small).model_dump(mode="json")
    change(values["units"])
    with pytest.raises(PlanError, match=says):
        Plan.from_values({**values, "digest": digest_of(values)}, "a plan")


def test_a_pipeline_without_controlnet_has_nothing_to_split(six: PipelineProfile) -> None:
    description = six.pipeline
    parts = tuple(part for part in description.components if part.role != "controlnet")
    alone = replace(description, components=parts)
    assert parted(alone, alone.names) == {}
    assert of_placement(alone, {name: i for i, name in enumerate(alone.names)}) == []


def test_on_one_gpu_latency_takes_the_fastest_and_fit_the_fewest_knobs(six: PipelineProfile) -> None:
    fast = Gpu(1, "NVIDIA H100 80GB HBM3", 80 * GIB, 80 * GIB, (9, 0), 132)
    gpus = [*_cards(1), fast]
    quick, few = (search_single(six, gpus, Rules(objective=objective), None) for objective in ("latency", "fit"))
    assert quick.best is not None
    assert few.best is not None
    assert set(quick.best.placement.values()) == {1}
    assert quick.best.seconds is not None
    others = [sum(one.seconds.values()) for one in quick.ranked if one.seconds is not None]
    assert others == sorted(others)
    assert [len(one.knobs) for one in few.ranked] == sorted(len(one.knobs) for one in few.ranked)


def test_what_the_host_cannot_hold_is_counted_as_such_in_every_block(six: PipelineProfile) -> None:
    found = search_host(six, Rules(host_bytes=GIB))
    assert found.best is None
    assert [(one.reason, one.gpu, one.count) for one in found.rejections] == [("host memory", -1, found.settings)]
    assert found.rejections[0].shortfall_bytes > 0
    assert found.closest is not None
    assert found.closest.placement == dict.fromkeys(six.parts, "cpu")
