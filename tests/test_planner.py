"""The search is exact: it agrees with brute force, and keeps the order of preferences that the design fixes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sana_deploy._units import GIB, MIB
from sana_deploy.api import compile_spec
from sana_deploy.declare.formats import Format
from sana_deploy.declare.hardware import Objective
from sana_deploy.declare.knobs import BANDS, KNOBS, Knob
from sana_deploy.declare.pipelines import COMPONENTS, SANA_CONTROLNET, Component, Crossing, Phase
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import InfeasibleError, InvalidSpecError, PlanError
from sana_deploy.facts.known_gpus import KNOWN_GPUS
from sana_deploy.facts.machine import Gpu, Machine
from sana_deploy.plan.cost import bytes_per_request, slot_use
from sana_deploy.plan.execution import executed
from sana_deploy.plan.grid import Rules
from sana_deploy.plan.knobs import under
from sana_deploy.plan.passing import VaeMode, Work
from sana_deploy.plan.profile import ComponentProfile, PipelineProfile
from sana_deploy.plan.records import Place
from sana_deploy.plan.search import ROOMY, search_balanced
from sana_deploy.plan.seconds import phase_seconds
from sana_deploy.plan.units import Unit

sizes = st.integers(0, 60).map(lambda n: n * 100 * MIB)
counts = st.integers(0, 50)


@st.composite
def works(draw: st.DrawFn) -> Work:
    return Work(draw(counts), draw(counts) * 10**12, draw(counts) * 10**9, draw(counts) * 10**9)


@st.composite
def profiles(draw: st.DrawFn, further: Mapping[Component, int] = MappingProxyType({})) -> PipelineProfile:
    """A profile of random needs, with so many units of a component beyond the first."""
    phases: dict[str, list[Phase]] = {"text_encoder": ["encode"], "vae": ["prepare", "decode"]}

    def component(name: Component, weights: int) -> ComponentProfile:
        own = phases.get(name, ["denoise"])
        activations = {phase: draw(sizes) for phase in own}
        return ComponentProfile(
            name, "C", Format("float16"), weights, activations, {phase: draw(works()) for phase in own}
        )

    components = {name: component(name, draw(sizes)) for name in COMPONENTS}
    units = [Unit(name, number) for name, count in further.items() for number in range(1, count + 1)]
    beside = {unit: component(unit.component, draw(sizes)) for unit in units}
    crossings = (
        Crossing("prompt_embeds", "text_encoder", "transformer", draw(sizes) // 100, False, "encode"),
        Crossing("control_image", "transformer", "vae", draw(sizes) // 100, False, "prepare"),
        Crossing("controlnet_block_samples", "controlnet", "transformer", draw(sizes) // 100, True),
        Crossing("latents", "transformer", "vae", draw(sizes) // 100, False, "decode"),
        *(Crossing("noise_pred", unit.name, unit.component, draw(sizes) // 100, True) for unit in units),
    )
    vae = components["vae"].weights_bytes
    modes, rows = {mode: component("vae", vae) for mode in VaeMode.all()}, draw(st.sampled_from([1, 2]))
    modes |= {mode: in_bands(modes[replace(mode, bands=1)], mode.bands) for mode in VaeMode.all(BANDS)}
    return PipelineProfile(SANA_CONTROLNET, components, crossings, 20, rows, modes, further=beside)


def in_bands(whole: ComponentProfile, count: int) -> ComponentProfile:
    """Less memory and more kernels than the whole takes."""
    activations = {phase: size * (count + 2) // (3 * count) for phase, size in whole.activations.items()}
    work = {phase: replace(one, operations=one.operations * count) for phase, one in whole.work.items()}
    return replace(whole, activations=activations, work=work)


@st.composite
def gpu_lists(draw: st.DrawFn, most: int = 3) -> list[Gpu]:
    kind = st.tuples(st.integers(1, 16), st.sampled_from(["t4", "rtx3090", "a100"]))
    kinds = draw(st.lists(kind, min_size=1, max_size=most))
    rows = [(s, KNOWN_GPUS[name]) for s, name in kinds]
    return [Gpu(i, row.name, s * GIB, s * GIB, row.capability, row.multiprocessors) for i, (s, row) in enumerate(rows)]


TRIED: tuple[Knob, ...] = ("vae_slicing", "text_encoder_offload", "vae_tiling", "vae_bands")


def brute_force(profile: PipelineProfile, gpus: list[Gpu], rules: Rules) -> tuple[object, ...] | None:
    """Score every assignment under every set of knobs by the words of `search_balanced`, with nothing but `cost.py`."""
    by_index = {gpu.index: gpu for gpu in gpus}
    allowed = set(rules.allow)
    found = []
    for *chosen, bands in itertools.product([False, True], [False, True], [False, True], (1, *BANDS)):
        slicing, offload, tiling = chosen
        banded = bands > 1
        knobs = {knob for knob, on in zip(TRIED, (*chosen, banded), strict=True) if on}
        if (tiling and (banded or not slicing)) or not knobs <= allowed | (
            {"vae_slicing"} if "vae_tiling" in allowed else set()
        ):
            continue
        if profile.image_rows > 1 and "encode_once" in allowed:
            knobs.add("encode_once")
        changed = under(replace(profile, band_count=bands), knobs)
        for places in itertools.product(by_index, repeat=len(profile.units)):
            placement: dict[str, Place] = dict(zip([unit.name for unit in profile.units], places, strict=True))
            uses = {i: slot_use(changed, placement, i, by_index[i]) for i in set(places)}
            pairs = [(f"controlnet{number}", f"transformer{number}") for number in ("", ".1")]
            split = any(placement[one] != placement[other] for one, other in pairs if one in placement)
            if any(use.peak_bytes > by_index[i].free_bytes for i, use in uses.items()):
                continue
            if split and "split_controlnet" not in allowed:
                continue
            if any(placement[unit.name] == placement[unit.component] for unit in profile.further):
                continue
            worst = max(use.peak_bytes / by_index[i].free_bytes for i, use in uses.items())
            seconds = phase_seconds(changed, placement, by_index)
            assert seconds is not None
            moved, count = bytes_per_request(changed, placement), len(knobs) + split
            speed = tuple(-part for part in by_index[placement["transformer"]].speed)  # type: ignore[index]
            found.append(
                (tiling, offload, split, slicing, worst, moved, speed, sum(seconds.values()), count, len(uses), bands)
            )
    crowd = {row: max(row[4], ROOMY) for row in found}
    least = min((crowd[row] for row in found if not (row[0] or row[1] or row[3] or row[10] > 1)), default=math.inf)
    keys: dict[Objective, Callable[[Any], tuple[Any, ...]]] = {
        "balance": lambda r: (
            r[0],
            r[10] > 1,
            r[1],
            r[2],
            r[10],
            crowd[r] > least,
            r[3],
            crowd[r],
            round(r[7], 6),
            r[5],
            r[6],
            r[4],
        ),
        "latency": lambda r: (round(r[7], 6), r[8], r[4], r[5], r[6]),
        "fit": lambda r: (r[8], r[10], r[9], r[4], r[5], r[6]),
    }
    return min((keys[rules.objective](row) for row in found), default=None)


allowed = st.sets(st.sampled_from(list(KNOBS)))
objectives = st.sampled_from(["balance", "latency", "fit"])
SECOND_UNITS = {"transformer": 1, "controlnet": 1}


@settings(max_examples=120, deadline=None)
@given(profiles(), gpu_lists(), allowed, objectives)
def test_the_chosen_candidate_is_the_best_of_all(
    profile: PipelineProfile, gpus: list[Gpu], allow: set[Knob], objective: Objective
) -> None:
    check_the_best(profile, gpus, allow, objective)


@settings(max_examples=12, deadline=None)
@given(profiles(SECOND_UNITS), gpu_lists(2), allowed, objectives)
def test_the_chosen_candidate_is_the_best_of_all_where_components_have_two_units(
    profile: PipelineProfile, gpus: list[Gpu], allow: set[Knob], objective: Objective
) -> None:
    check_the_best(profile, gpus, allow, objective)


def check_the_best(profile: PipelineProfile, gpus: list[Gpu], allow: set[Knob], objective: Objective) -> None:
    rules = Rules(allow, objective)
    search, expected = search_balanced(profile, gpus, rules), brute_force(profile, gpus, rules)
    if search.best is None:
        assert expected is None
        return
    best = search.best
    assert expected is not None
    assert best.seconds is not None
    on = {knob: knob in best.knobs for knob in KNOBS}
    home = next(gpu for gpu in gpus if gpu.index == best.placement["transformer"])
    speed = tuple(-part for part in home.speed)
    ties = (best.worst_utilisation, best.bytes_per_request, speed)
    if objective == "balance":
        dear = on["vae_tiling"], on["vae_bands"], on["text_encoder_offload"], on["split_controlnet"]
        assert (*dear, best.bands) == expected[:5]
        seconds = round(sum(best.seconds.values()), 6)
        crowd = max(best.worst_utilisation, ROOMY)
        assert (on["vae_slicing"], crowd) == expected[6:8]
        assert seconds == pytest.approx(expected[8], abs=2e-6)
        assert (best.bytes_per_request, speed, best.worst_utilisation) == expected[9:] or seconds != expected[8]
    elif objective == "latency":
        assert sum(best.seconds.values()) == pytest.approx(expected[0], abs=2e-6)
    else:
        assert (len(best.knobs), best.bands, len(best.uses), *ties) == expected


@settings(max_examples=40, deadline=None)
@given(profiles(), gpu_lists(), allowed, objectives)
def test_the_chosen_candidate_is_the_best_of_all_where_a_step_is_graphs(
    profile: PipelineProfile, gpus: list[Gpu], allow: set[Knob], objective: Objective
) -> None:
    check_the_best(executed(profile, "graphs"), gpus, allow, objective)


@settings(max_examples=60, deadline=None)
@given(profiles(), gpu_lists())
def test_every_candidate_is_counted_once(profile: PipelineProfile, gpus: list[Gpu]) -> None:
    search = search_balanced(profile, gpus, Rules())
    assert search.feasible + sum(rejection.count for rejection in search.rejections) == search.considered


Describe = Callable[..., Machine]
Small = Callable[..., DeploySpec]
LARGE = "model=sana_1600m_controlnet"
AT_1024 = ("workload.height=1024", "workload.width=1024")
ON_ONE = "hardware.device_map={text_encoder: 0, vae: 0, transformer: 0, controlnet: 0}"


def test_controlnet_stays_beside_the_transformer_where_that_fits(small: Small, machine: Describe) -> None:
    plan = compile_spec(small(LARGE, *AT_1024), machine(12, 12))
    assert plan.device_map["controlnet"] == plan.device_map["transformer"] == plan.home
    assert plan.device_map["text_encoder"] != plan.home
    assert set(plan.knobs) <= {"encode_once", "vae_slicing"}
    assert plan.estimates.bytes_per_step == 0
    assert all(slot.peak_bytes <= slot.capacity_bytes for slot in plan.slots)


def test_two_8_gib_cards_hold_the_1600m_pipeline_at_1024_px(small: Small, machine: Describe) -> None:
    plan = compile_spec(small(LARGE, *AT_1024), machine(8, 8))
    home, other = plan.home, 1 - int(plan.home)
    assert plan.device_map == {"text_encoder": other, "vae": home, "transformer": home, "controlnet": home}
    assert plan.knobs == ["encode_once"]
    assert plan.estimates.bytes_per_step == 0
    unsliced = compile_spec(small(LARGE, *AT_1024, "hardware.allow=[split_controlnet]"), machine(8, 8))
    assert unsliced.knobs == ["split_controlnet"]
    assert unsliced.device_map["controlnet"] != unsliced.home


def test_slicing_goes_on_only_where_it_is_needed_to_keep_controlnet_at_home(small: Small, machine: Describe) -> None:
    plain = "hardware.allow=[vae_slicing,split_controlnet]"
    together = compile_spec(small(LARGE, *AT_1024, plain), machine(9, 9))
    split_off = compile_spec(
        small(
            LARGE,
            *AT_1024,
            "hardware=custom_map",
            "hardware.knobs=[]",
            "hardware.device_map={text_encoder: 0, vae: 1, transformer: 1, controlnet: 0}",
        ),
        machine(9, 9),
    )
    assert together.knobs == ["vae_slicing"]
    assert together.estimates.worst_utilisation <= split_off.estimates.worst_utilisation
    alone = compile_spec(small(LARGE, *AT_1024), machine(24))
    assert alone.knobs == ["encode_once"], "with nothing to split there is nothing to make up for"


def test_controlnet_is_split_off_only_when_nothing_else_fits(small: Small, machine: Describe) -> None:
    spec = small(LARGE)
    plan = compile_spec(spec, machine(5.6, 4.0, 4.0))
    assert plan.knobs == ["encode_once", "split_controlnet"]
    assert plan.estimates.bytes_per_step > 0
    forbidden = small(LARGE, "hardware.allow=[]", "hardware.split=none")
    with pytest.raises(InfeasibleError, match=r"0 of \d+ placements fit \(\d+ would split ControlNet ") as caught:
        compile_spec(forbidden, machine(5.6, 4.0, 4.0))
    assert "hardware.allow=[split_controlnet]" in caught.value.hint


def test_the_denoiser_goes_to_the_faster_of_two_gpus(small: Small) -> None:
    slow = Gpu(0, "old", 24 * GIB, 24 * GIB, (8, 0), 20)
    fast = Gpu(1, "new", 24 * GIB, 24 * GIB, (9, 0), 100)
    plan = compile_spec(small(), Machine("present", (slow, fast), 64 * GIB))
    assert plan.home == 1


def test_single_gpu_takes_the_fastest_that_fits_then_the_emptiest(small: Small) -> None:
    gpus = (
        Gpu(0, "fast but full", 24 * GIB, 1 * GIB, (9, 0), 100),
        Gpu(1, "slow", 24 * GIB, 24 * GIB, (8, 0), 50),
        Gpu(2, "slow, emptier", 48 * GIB, 48 * GIB, (8, 0), 50),
    )
    plan = compile_spec(small(LARGE, "hardware=single_gpu"), Machine("present", gpus, 64 * GIB))
    assert set(plan.device_map.values()) == {2}


def test_bfloat16_before_compute_capability_8_is_refused_with_what_works(small: Small, machine: Describe) -> None:
    turing = machine(15, 15, capability=(7, 5))
    recipe = "precision=mixed_bf16"
    with pytest.raises(InfeasibleError, match=r"bfloat16 .* is not native on GPU 0") as caught:
        compile_spec(small(LARGE, recipe), turing)
    assert caught.value.exit_code == 4
    override = caught.value.hint.removeprefix("this fits: ").split(";")[0]
    assert override == "precision=mixed_fp32"
    assert compile_spec(small(LARGE, override), turing).slots
    assert compile_spec(small(LARGE, recipe, "precision.allow_emulated=true"), turing).slots


def test_what_does_not_fit_says_how_much_is_missing(small: Small, machine: Describe) -> None:
    with pytest.raises(
        InfeasibleError, match=r"0 of 2 placements fit, each under 4 sets of knobs .* GiB too much"
    ) as caught:
        compile_spec(small(LARGE, "hardware=single_gpu"), machine(6, 6.5))
    assert caught.value.facts["shortfall_bytes"] > 0
    assert "hardware=multi_gpu_balanced" in caught.value.hint


def test_custom_map_is_taken_to_the_letter(small: Small, machine: Describe) -> None:
    override = "hardware.device_map={text_encoder: cpu, vae: 2, transformer: 1, controlnet: 1}"
    plan = compile_spec(small("hardware=custom_map", override), machine(8, 8, 8))
    assert plan.device_map == {"text_encoder": "cpu", "vae": 2, "transformer": 1, "controlnet": 1}
    assert [slot.index for slot in plan.slots] == [1, 2]


def test_a_gpu_that_is_not_there_is_an_error_with_the_inventory(small: Small, machine: Describe) -> None:
    with pytest.raises(InfeasibleError, match=r"GPU 1 is not there: this machine has GPU 0: Test 8 GiB") as caught:
        compile_spec(small("hardware=custom_map"), machine(8))
    assert caught.value.where == "hardware.device_map.text_encoder"
    with pytest.raises(InfeasibleError, match="GPU 7 is not there"):
        compile_spec(small("hardware=single_gpu", "hardware.gpu=7"), machine(8))


def test_without_gpus_the_cpu_is_taken_with_a_warning_or_refused(small: Small, machine: Describe) -> None:
    for hardware in ("single_gpu", "multi_gpu_balanced"):
        plan = compile_spec(small(f"hardware={hardware}"), machine())
        assert set(plan.device_map.values()) == {"cpu"}
        assert [remark.type for remark in plan.diagnostics] == ["no_gpu", "auto_precision"]
        assert [remark.type for remark in plan.diagnostics if remark.severity == "warning"] == ["no_gpu"]
        with pytest.raises(InfeasibleError, match="has no GPU"):
            compile_spec(small(f"hardware={hardware}", "hardware.on_shortfall=error"), machine())
    with pytest.raises(InfeasibleError, match="has no GPU"):
        compile_spec(small("hardware=custom_map"), machine())


def test_float16_for_fragile_components_warns_and_strict_refuses(small: Small, machine: Describe) -> None:
    plan = compile_spec(small("precision=fp16"), machine(8))
    assert [remark.type for remark in plan.diagnostics if remark.severity == "warning"] == ["fragile_dtype"]
    with pytest.raises(InfeasibleError, match="not to be safe for text_encoder and vae"):
        compile_spec(small("precision=fp16", "precision.strict=true"), machine(8))


def test_only_the_gpus_allowed_are_used_and_what_is_kept_free_stays_free(small: Small, machine: Describe) -> None:
    plan = compile_spec(small(LARGE, "hardware.use=[0,2]"), machine(24, 24, 24))
    assert {slot.index for slot in plan.slots} <= {0, 2}
    kept = compile_spec(small(LARGE, "hardware.keep_free=2GiB"), machine(8, 8, 8))
    assert all(slot.peak_bytes <= 6 * GIB for slot in kept.slots)
    with pytest.raises(InfeasibleError):
        compile_spec(small(LARGE, "hardware.keep_free=4GiB", "hardware.split=none"), machine(8, 8, 8))
    with pytest.raises(InfeasibleError, match="GPU 7 is not there") as caught:
        compile_spec(small(LARGE, "hardware.use=[0,7]"), machine(8, 8))
    assert caught.value.where == "hardware.use[1]"
    with pytest.raises(InvalidSpecError, match="no size in bytes"):
        compile_spec(small("hardware.keep_free=much"), machine(8))


def test_pinned_components_stay_where_they_are_pinned(small: Small, machine: Describe) -> None:
    for index in range(3):
        plan = compile_spec(small(LARGE, f"hardware.pin.vae={index}"), machine(24, 24, 24))
        assert plan.device_map["vae"] == index
    with pytest.raises(InfeasibleError, match="GPU 3 is not there") as caught:
        compile_spec(small(LARGE, "hardware.pin.vae=3"), machine(24, 24))
    assert caught.value.where == "hardware.pin.vae"
    with pytest.raises(InfeasibleError, match=r"GPU 1 is left out by hardware.use=\[0\]"):
        compile_spec(small(LARGE, "hardware.pin.vae=1", "hardware.use=[0]"), machine(24, 24))


def test_every_hint_fits_when_it_is_taken(small: Small, machine: Describe) -> None:
    for request, box in (
        ((*AT_1024, "hardware=single_gpu"), machine(8, 8)),
        ((*AT_1024, "hardware=single_gpu", "hardware.allow=[]"), machine(12)),
        (("workload.height=4096", "workload.width=4096"), machine(8, 8)),
        ((*AT_1024, "precision=fp32"), machine(16)),
        (AT_1024, machine(15, capability=(7, 5))),
        ((*AT_1024, "hardware=custom_map", ON_ONE), machine(12)),
    ):
        with pytest.raises(InfeasibleError) as caught:
            compile_spec(small(LARGE, *request), box)
        changes = caught.value.hint.removeprefix("this fits: ").split("; or ")
        assert 1 <= len(changes) <= 4, caught.value.hint
        for change in changes:
            overrides = change.partition(" (")[0].split()
            elsewhere = None if "machine=virtual" in overrides else box
            switched = any(override.startswith("hardware=") for override in overrides)
            kept = [one for one in request if not (switched and one == ON_ONE)]
            assert compile_spec(small(LARGE, *kept, *overrides), elsewhere).slots, change


def test_the_largest_image_offered_is_the_largest(small: Small, machine: Describe) -> None:
    with pytest.raises(InfeasibleError) as caught:
        compile_spec(small(LARGE, "workload.height=4096", "workload.width=4096"), machine(8, 8))
    side = int(caught.value.hint.partition("workload.height=")[2].split()[0])
    with pytest.raises(InfeasibleError):
        compile_spec(small(LARGE, f"workload.height={side + 32}", f"workload.width={side + 32}"), machine(8, 8))


@pytest.mark.parametrize(
    "chosen",
    [
        ["hardware.pin.vae=1", "hardware.split=none"],
        ["hardware=single_gpu", "hardware.gpu=1"],
        ["hardware.use=[1]"],
        ["hardware.keep_free=3GiB"],
    ],
)
def test_hints_keep_to_what_was_asked_of_the_gpus(small: Small, machine: Describe, chosen: list[str]) -> None:
    with pytest.raises(InfeasibleError) as caught:
        compile_spec(small(LARGE, *AT_1024, *chosen), machine(6, 6))
    for change in filter(None, caught.value.hint.removeprefix("this fits: ").split("; or ")):
        overrides = change.partition(" (")[0].split()
        elsewhere = None if "machine=virtual" in overrides else machine(6, 6)
        switched = any(override.startswith("hardware=") for override in overrides)
        kept = [one for one in chosen if not (switched and one.startswith(("hardware=", "hardware.gpu")))]
        assert compile_spec(small(LARGE, *AT_1024, *kept, *overrides), elsewhere).slots, change


def test_what_is_kept_free_is_taken_off_once_in_hints(small: Small, machine: Describe) -> None:
    request = [LARGE, *AT_1024, "hardware=single_gpu", "hardware.keep_free=2GiB", "hardware.allow=[]"]
    with pytest.raises(InfeasibleError) as caught:
        compile_spec(small(*request), machine(13))
    side = int(caught.value.hint.partition("workload.height=")[2].split()[0])
    with pytest.raises(InfeasibleError):
        compile_spec(small(*request, f"workload.height={side + 32}", f"workload.width={side + 32}"), machine(13))


def test_a_knob_that_would_help_is_told_from_what_never_fits(small: Small, machine: Describe) -> None:
    large = (LARGE, "workload.height=2048", "workload.width=2048", "hardware=single_gpu")
    whole = "hardware.allow=[encode_once,vae_slicing,split_controlnet,text_encoder_offload]"
    with pytest.raises(InfeasibleError) as caught:
        compile_spec(small(*large, whole), machine(12))
    assert caught.value.facts["fits_with_a_knob"] is True
    in_bands = whole.replace("]", ",vae_bands]")
    assert caught.value.hint.startswith(f"this fits: {in_bands}; or ")
    wanted = whole.replace("]", ",vae_tiling]")
    tiled = compile_spec(small(*large, wanted), machine(12))
    assert tiled.knobs == ["encode_once", "vae_slicing", "text_encoder_offload", "vae_tiling"]
    assert tiled.vae_band_count is None
    assert tiled.vae_tile is not None
    assert tuple(tiled.vae_tile.model_dump().values()) == (1024, 1024, 896, 896)
    with pytest.raises(InfeasibleError, match="No knob makes it fit on this machine") as caught:
        compile_spec(small(*large), machine(6))
    assert caught.value.facts["fits_with_a_knob"] is False


def test_every_knob_that_is_on_has_its_price(small: Small, machine: Describe) -> None:
    offloaded = compile_spec(small(LARGE, *AT_1024, "hardware=single_gpu"), machine(12))
    assert offloaded.knobs == ["encode_once", "text_encoder_offload"]
    price, part = offloaded.knob_prices["text_encoder_offload"], offloaded.components["text_encoder"]
    assert price.bytes_per_image == part.weights_bytes
    assert price.bytes_saved > 1.5 * GIB
    assert price.seconds_per_image is not None
    assert price.seconds_per_image > 0.1
    (upload,) = [moved for moved in offloaded.transfers if moved.src == "cpu"]
    assert (upload.tensor, upload.bytes_per_image) == ("text_encoder weights", part.weights_bytes)
    split = compile_spec(small(LARGE, *AT_1024, "hardware.allow=[split_controlnet]"), machine(8, 8))
    assert split.knob_prices["split_controlnet"].bytes_per_image == pytest.approx(
        split.estimates.bytes_per_image, rel=0.05
    )


def test_latency_puts_all_on_the_fastest_and_fit_uses_the_fewest_gpus(small: Small) -> None:
    slow, fast = KNOWN_GPUS["rtx3090"], KNOWN_GPUS["rtx4090"]
    gpus = tuple(
        Gpu(i, row.name, 14 * GIB, 14 * GIB, row.capability, row.multiprocessors) for i, row in enumerate((slow, fast))
    )
    box = Machine("present", gpus, 64 * GIB)
    quick = compile_spec(small(LARGE, *AT_1024, "hardware.objective=latency"), box)
    assert set(quick.device_map.values()) == {1}
    balanced = compile_spec(small(LARGE, *AT_1024), box)
    assert len(balanced.slots) == 2
    assert quick.estimates.seconds_per_image is not None
    assert balanced.estimates.seconds_per_image is not None
    assert quick.estimates.seconds_per_image < balanced.estimates.seconds_per_image
    few = compile_spec(small(LARGE, *AT_1024, "hardware.objective=fit"), box)
    assert (len(few.slots), few.knobs) == (1, ["encode_once"])


def test_a_map_that_cannot_fit_is_refused_like_any_other_unless_forced(small: Small, machine: Describe) -> None:
    request = (LARGE, *AT_1024, "hardware=custom_map", ON_ONE)
    with pytest.raises(
        InfeasibleError, match=r"0 of 1 placements fit \(1 lacks memory on GPU 0\). Closest: .* too much"
    ):
        compile_spec(small(*request), machine(12))
    forced = compile_spec(small(*request, "hardware.force=true"), machine(12))
    assert [remark.type for remark in forced.diagnostics if remark.severity == "warning"] == ["forced"]
    assert forced.resolve(machine(12)).device_map["vae"] == "cuda:0"
    helped = compile_spec(small(*request, "hardware.knobs=[text_encoder_offload]"), machine(12))
    assert helped.knobs == ["text_encoder_offload"]
    with pytest.raises(InvalidSpecError, match="needs the text encoder on a GPU"):
        small("hardware=custom_map", "hardware.knobs=[text_encoder_offload]", "hardware.device_map.text_encoder=cpu")


def test_what_does_not_fit_is_a_plan_to_read_but_not_to_apply(small: Small, machine: Describe) -> None:
    with pytest.raises(InfeasibleError) as caught:
        compile_spec(small(LARGE, *AT_1024, "hardware.split=none"), machine(6, 6))
    plan = caught.value.plan
    assert not plan.feasible
    assert plan.considered.closest.shortfall_bytes == caught.value.facts["shortfall_bytes"] > 0
    assert max(slot.peak_bytes - slot.available_bytes for slot in plan.slots) == plan.considered.closest.shortfall_bytes
    with pytest.raises(PlanError, match="can be read, not applied"):
        plan.resolve(machine(24, 24))
