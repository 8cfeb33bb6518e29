"""The search is exact: it agrees with brute force, and keeps the order of preferences that the design fixes."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sana_deploy.compile import compile_spec
from sana_deploy.cost import bytes_per_request, home_of, is_split
from sana_deploy.errors import InfeasibleError, InvalidSpecError
from sana_deploy.machine import Gpu, Machine
from sana_deploy.planner import Checker, Rules, placements, search_balanced
from sana_deploy.profile import ComponentProfile, Crossing, PipelineProfile
from sana_deploy.spec import COMPONENTS, DeploySpec
from sana_deploy.units import GIB, MIB

sizes = st.integers(0, 60).map(lambda n: n * 100 * MIB)


@st.composite
def profiles(draw: st.DrawFn) -> PipelineProfile:
    phases = {"text_encoder": ["encode"], "vae": ["prepare", "decode"]}
    components = {
        name: ComponentProfile(
            name, "C", "float16", draw(sizes), {phase: draw(sizes) for phase in phases.get(name, ["denoise"])}
        )
        for name in COMPONENTS
    }
    crossings = (
        Crossing("prompt_embeds", "text_encoder", "transformer", draw(sizes) // 100, False),
        Crossing("controlnet_block_samples", "controlnet", "transformer", draw(sizes) // 100, True),
        Crossing("latents", "transformer", "vae", draw(sizes) // 100, False),
    )
    return PipelineProfile(components, crossings, 20)


@st.composite
def gpu_lists(draw: st.DrawFn) -> list[Gpu]:
    kinds = draw(st.lists(st.tuples(st.integers(1, 16), st.integers(6, 9)), min_size=1, max_size=3))
    return [Gpu(i, f"{s} GiB", s * GIB, s * GIB, (cc, 0)) for i, (s, cc) in enumerate(kinds)]


def brute_force(profile: PipelineProfile, gpus: list[Gpu]) -> tuple[object, ...] | None:
    """Score every assignment by the design's words, without the planner's shortcuts."""
    speeds = {gpu.index: gpu.speed for gpu in gpus}
    best, checker = None, Checker(profile, gpus, Rules())
    for places in itertools.product([gpu.index for gpu in gpus], repeat=4):
        placement = dict(zip(COMPONENTS, places, strict=True))
        why, uses = checker.check(placement)
        if why:
            continue
        worst = max(use.peak_bytes / gpus[i].free_bytes for i, use in uses.items())
        home = speeds[home_of(placement)]
        score = (is_split(placement), worst, bytes_per_request(profile, placement), tuple(-part for part in home))
        best = score if best is None or score < best else best
    return best


@settings(max_examples=150, deadline=None)
@given(profiles(), gpu_lists())
def test_the_chosen_placement_is_the_best_of_all(profile: PipelineProfile, gpus: list[Gpu]) -> None:
    search = search_balanced(profile, gpus, Rules())
    expected = brute_force(profile, gpus)
    if search.best is None:
        assert expected is None
    else:
        home = next(gpu for gpu in gpus if gpu.index == home_of(search.best.placement))
        chosen = (
            is_split(search.best.placement),
            search.best.worst_utilisation,
            search.best.bytes_per_request,
            tuple(-part for part in home.speed),
        )
        assert chosen == expected


def test_alike_gpus_are_not_counted_twice() -> None:
    alike = [Gpu(i, "T4", 15 * GIB, 15 * GIB, (7, 5)) for i in range(8)]
    unlike = [Gpu(i, f"GPU {i}", 15 * GIB, 15 * GIB, (7, 5)) for i in range(8)]
    assert len(list(placements(alike, {}))) == 15  # the partitions of four components
    assert len(list(placements(unlike, {}))) == 8**4


Describe = Callable[..., Machine]
Small = Callable[..., DeploySpec]
LARGE = "model=sana_1600m_controlnet"
AT_1024 = ("workload.height=1024", "workload.width=1024")


def test_controlnet_stays_beside_the_transformer_where_that_fits(small: Small, machine: Describe) -> None:
    plan = compile_spec(small(LARGE, *AT_1024), machine(12, 12))
    assert plan.device_map["controlnet"] == plan.device_map["transformer"] == plan.home
    assert plan.device_map["text_encoder"] != plan.home
    assert plan.knobs == []
    assert plan.estimates.bytes_per_step == 0
    assert all(slot.peak_bytes <= slot.capacity_bytes for slot in plan.slots)


def test_two_8_gib_cards_hold_the_1600m_pipeline_at_1024_px(small: Small, machine: Describe) -> None:
    plan = compile_spec(small(LARGE, *AT_1024), machine(8, 8))
    home, other = plan.home, 1 - int(plan.home)
    assert plan.device_map == {"text_encoder": other, "vae": home, "transformer": home, "controlnet": other}
    assert plan.knobs == ["split_controlnet"]


def test_controlnet_is_split_off_only_when_nothing_else_fits(small: Small, machine: Describe) -> None:
    spec = small(LARGE)
    plan = compile_spec(spec, machine(5.6, 4.0, 4.0))
    assert plan.knobs == ["split_controlnet"]
    assert plan.estimates.bytes_per_step > 0
    forbidden = small(LARGE, "hardware.allow=[]")
    with pytest.raises(InfeasibleError, match=r"split|memory"):
        compile_spec(forbidden, machine(5.6, 4.0, 4.0))


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
    with pytest.raises(InfeasibleError, match=r"bfloat16 .* is not native on GPU 0") as caught:
        compile_spec(small(LARGE), turing)
    assert caught.value.exit_code == 4
    override = caught.value.hint.removeprefix("this fits: ").split(";")[0]
    assert override == "precision=mixed_fp32"
    assert compile_spec(small(LARGE, override), turing).slots
    assert compile_spec(small(LARGE, "precision.allow_emulated=true"), turing).slots


def test_what_does_not_fit_says_how_much_is_missing(small: Small, machine: Describe) -> None:
    with pytest.raises(InfeasibleError, match=r"0 of 2 placements fit .* GiB too much") as caught:
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
        assert [remark.type for remark in plan.diagnostics] == ["no_gpu"]
        with pytest.raises(InfeasibleError, match="has no GPU"):
            compile_spec(small(f"hardware={hardware}", "hardware.on_shortfall=error"), machine())
    with pytest.raises(InfeasibleError, match="has no GPU"):
        compile_spec(small("hardware=custom_map"), machine())


def test_float16_for_fragile_components_warns_and_strict_refuses(small: Small, machine: Describe) -> None:
    plan = compile_spec(small("precision=fp16"), machine(8))
    assert [remark.type for remark in plan.diagnostics] == ["fragile_dtype"]
    with pytest.raises(InfeasibleError, match="not to be safe for text_encoder and vae"):
        compile_spec(small("precision=fp16", "precision.strict=true"), machine(8))


def test_only_the_gpus_allowed_are_used_and_what_is_kept_free_stays_free(small: Small, machine: Describe) -> None:
    plan = compile_spec(small(LARGE, "hardware.use=[0,2]"), machine(24, 24, 24))
    assert {slot.index for slot in plan.slots} <= {0, 2}
    kept = compile_spec(small(LARGE, "hardware.keep_free=2GiB"), machine(8, 8, 8))
    assert all(slot.peak_bytes <= 6 * GIB for slot in kept.slots)
    with pytest.raises(InfeasibleError):
        compile_spec(small(LARGE, "hardware.keep_free=4GiB"), machine(8, 8, 8))
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
        ((*AT_1024, "hardware=single_gpu"), machine(12)),
        (("workload.height=2048", "workload.width=1024"), machine(8, 8)),
        ((*AT_1024, "precision=fp32"), machine(16)),
        (AT_1024, machine(15, capability=(7, 5))),
    ):
        with pytest.raises(InfeasibleError) as caught:
            compile_spec(small(LARGE, *request), box)
        changes = caught.value.hint.removeprefix("this fits: ").split("; or ")
        assert 1 <= len(changes) <= 3, caught.value.hint
        for change in changes:
            overrides = change.partition(" (")[0].split()
            elsewhere = None if "machine=virtual" in overrides else box
            assert compile_spec(small(LARGE, *request, *overrides), elsewhere).slots, change


def test_the_largest_image_offered_is_the_largest(small: Small, machine: Describe) -> None:
    with pytest.raises(InfeasibleError) as caught:
        compile_spec(small(LARGE, "workload.height=2048", "workload.width=2048"), machine(8, 8))
    side = int(caught.value.hint.partition("workload.height=")[2].split()[0])
    with pytest.raises(InfeasibleError):
        compile_spec(small(LARGE, f"workload.height={side + 32}", f"workload.width={side + 32}"), machine(8, 8))


@pytest.mark.parametrize(
    "chosen",
    [
        ["hardware.pin.vae=1"],
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
    request = [LARGE, *AT_1024, "hardware=single_gpu", "hardware.keep_free=2GiB"]
    with pytest.raises(InfeasibleError) as caught:
        compile_spec(small(*request), machine(13))
    side = int(caught.value.hint.partition("workload.height=")[2].split()[0])
    with pytest.raises(InfeasibleError):
        compile_spec(small(*request, f"workload.height={side + 32}", f"workload.width={side + 32}"), machine(13))
