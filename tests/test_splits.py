"""`hardware.split`: when the halves of guidance get GPUs of their own, what that takes, and what would be faster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_planner import gpu_lists

from sana_deploy._models import Diagnostic
from sana_deploy.api import compile_plan, compile_spec
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.hardware import SPLITS
from sana_deploy.declare.knobs import EXACTNESSES, least_exact
from sana_deploy.declare.pipelines import SANA_CONTROLNET
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import InfeasibleError, InvalidSpecError, PlanError, SanaDeployError
from sana_deploy.facts.checkpoint import open_checkpoint
from sana_deploy.facts.machine import Gpu, Machine
from sana_deploy.plan import compiler
from sana_deploy.plan.artifact import Plan
from sana_deploy.plan.cost import bytes_per_step, slot_use
from sana_deploy.plan.diff import compare
from sana_deploy.plan.digest import digest_of
from sana_deploy.plan.execution import executed
from sana_deploy.plan.grid import Rules
from sana_deploy.plan.guidance_split import split_guidance
from sana_deploy.plan.profile import PipelineProfile, profile_pipeline
from sana_deploy.plan.search import search_balanced
from sana_deploy.plan.seconds import (
    LAUNCH_SECONDS,
    STEP_WAIT,
    component_phases,
    crossing_seconds,
    phase_seconds,
    step_seconds,
)
from sana_deploy.report.terminal import render_plan
from sana_deploy.report.wording import faster_sentence

Small = Callable[..., DeploySpec]
LARGE = "model=sana_1600m_controlnet"
TWO = ["machine=virtual", "machine.gpus=2xh100"]
GUIDANCE, LATENCY = "hardware.split=guidance", "hardware.objective=latency"
SECOND = ("transformer.1", "controlnet.1")


def remarks(plan: Plan, kind: str) -> list[Diagnostic]:
    return [one for one in plan.diagnostics if one.type == kind]


@cache
def planned(*overrides: str) -> Plan:
    """The plan of SANA 1.6B with overrides."""
    return compile_plan([LARGE, *overrides])


@cache
def profiles(*overrides: str) -> tuple[PipelineProfile, PipelineProfile]:
    """A profile as a whole, and by halves."""
    spec = compose_spec([LARGE, "precision=mixed_bf16", *overrides])
    checkpoint, formats = open_checkpoint(spec.model), spec.precision.formats
    whole = profile_pipeline(checkpoint, spec.workload.bounds, formats, lambda *_: {})
    return whole, split_guidance(whole, checkpoint, spec.workload.bounds, formats, lambda *_: {})


# what is chosen


@pytest.mark.parametrize(
    ("chosen", "split"),
    [
        ([], "none"),
        ([GUIDANCE], "guidance"),
        ([LATENCY], "guidance"),
        ([LATENCY, "hardware.split=none"], "none"),
        (["hardware.objective=fit"], "none"),
        (["hardware.objective=fit", GUIDANCE], "guidance"),
    ],
)
def test_balance_and_fit_split_where_they_are_asked_to_and_latency_where_it_pays(chosen: list[str], split: str) -> None:
    plan = planned(*TWO, *chosen)
    assert plan.split == split
    assert tuple(plan.units) == (SECOND if split == "guidance" else ())
    for name in plan.units:
        assert plan.units[name].slot != plan.device_map[plan.units[name].component]
    auto = GUIDANCE not in chosen and "hardware.split=none" not in chosen
    assert bool(remarks(plan, "auto_split")) == (auto and LATENCY in chosen)


def test_latency_takes_the_halves_for_fewer_seconds_and_says_how_many() -> None:
    halves, whole = planned(*TWO, LATENCY), planned(*TWO, LATENCY, "hardware.split=none")
    assert halves.estimates.seconds_per_image is not None
    assert whole.estimates.seconds_per_image is not None
    assert halves.estimates.seconds_per_image < 0.95 * whole.estimates.seconds_per_image
    assert "split_controlnet" in whole.knobs, "two GPUs are of use without halves too"
    one = planned(*TWO, LATENCY, "hardware.split=none", "hardware.use=[0]")
    seconds = [plan.estimates.seconds["denoise"] for plan in (halves, whole, one)]
    assert seconds[0] < 0.8 * seconds[1] < 0.8 * 0.8 * seconds[2]
    (remark,) = remarks(halves, "auto_split")
    assert remark.message == (
        f"auto chose guidance: ~{halves.estimates.seconds_per_image:.2f} s an image with half of guidance each on "
        f"GPU 0 and GPU 1, ~{whole.estimates.seconds_per_image:.2f} s without; last places differ"
    )


def test_latency_stays_whole_where_python_launches_both_halves_anyway() -> None:
    plan = planned(*TWO, LATENCY, "runtime=eager", "workload.height=512", "workload.width=512")
    assert plan.split == "none"
    (remark,) = remarks(plan, "auto_split")
    assert remark.message.startswith("auto chose none: ~")
    assert plan.faster[0].runtime == "graphs"


def test_balance_splits_where_nothing_fits_without() -> None:
    pins = "hardware.pin={text_encoder: 0, vae: 0, transformer: 1, controlnet: 1}"
    tight = ["machine=virtual", "machine.gpus=[h100,8GiB,8GiB]", pins, "precision=mixed_bf16", "runtime=eager",
             "workload.height=2048", "workload.width=2048", "workload.batch=4"]  # fmt: skip
    plan = planned(*tight)
    assert (plan.split, plan.home) == ("guidance", 1)
    assert remarks(plan, "auto_split")[0].message == "auto chose guidance: nothing fits without"
    with pytest.raises(InfeasibleError):
        planned(*tight, "hardware.split=none")
    assert planned(*tight, "hardware.objective=fit").split == "layers", "where nothing whole fits"
    assert planned(*tight, "workload.batch=1").split == "none"


def test_latency_stays_whole_where_the_halves_do_not_fit() -> None:
    plan = planned("machine=2x8gb", LATENCY)
    assert plan.split == "none"
    assert remarks(plan, "auto_split")[0].message == (
        "auto chose none: the halves of guidance and the rows of an image do not fit these GPUs"
    )
    assert not [one for one in plan.faster if one.split == "guidance"]


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("tiny_sprint", "a SANA-Sprint pipeline embeds guidance, so that a step has no rows to split"),
        ("tiny_pag", "a SANA PAG pipeline computes the rows of a step together in perturbed attention"),
    ],
)
def test_a_pipeline_whose_guidance_is_no_row_of_its_own_has_nothing_to_split(model: str, why: str) -> None:
    plan = compile_plan([f"model={model}", *TWO, GUIDANCE])
    assert (plan.split, dict(plan.units)) == ("none", {})
    assert remarks(plan, "no_split")[0].message == f"{why}: one GPU computes whole steps"
    with pytest.raises(InvalidSpecError, match=why) as caught:
        compile_plan(
            [f"model={model}", "machine=2x8gb", "hardware=custom_map", "hardware.device_map={transformer.1: 1}"]
        )
    assert caught.value.where == "hardware"


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["workload.guidance_scale=1"], "there is no guidance to split with workload.guidance_scale=1"),
        (["machine.gpus=1xh100"], "guidance is split between two GPUs, one may be taken"),
        (["hardware.use=[1]"], "guidance is split between two GPUs, one may be taken"),
    ],
)
def test_where_guidance_cannot_be_split_one_gpu_computes_it_and_a_remark_says_why(more: list[str], why: str) -> None:
    plan = planned(*TWO, GUIDANCE, *more)
    assert (plan.split, dict(plan.units)) == ("none", {})
    (remark,) = remarks(plan, "no_split")
    assert (remark.message, remark.where) == (f"{why}: one GPU computes whole steps", "hardware.split")
    assert not remarks(planned(*TWO, *more), "no_split"), "nobody asked for it"


def test_without_a_gpu_everything_is_whole_on_the_cpu(small: Small, machine: Callable[..., Machine]) -> None:
    plan = compile_spec(small(GUIDANCE), machine())
    assert (plan.split, plan.home, dict(plan.units)) == ("none", "cpu", {})
    assert remarks(plan, "no_split")[0].message.startswith("guidance is split between two GPUs, none may be taken")


def test_a_plan_whose_gpus_are_gone_runs_whole_on_the_cpu(small: Small, machine: Callable[..., Machine]) -> None:
    plan = compile_spec(small(GUIDANCE), machine(8, 8))
    assert plan.split == "guidance"
    bound, gone = plan.resolve(machine(8, 8)), plan.resolve(machine())
    assert dict(bound.unit_devices) == {name: f"cuda:{plan.units[name].slot}" for name in SECOND}
    assert set(bound.device_map) == set(plan.components)
    assert (set(gone.device_map.values()), dict(gone.unit_devices)) == ({"cpu"}, {})


def test_a_slot_must_compute_natively_in_what_its_second_unit_has(
    small: Small, machine: Callable[..., Machine]
) -> None:
    plan = compile_spec(small(GUIDANCE, "precision=bf16", "hardware.pin.transformer=0"), machine(8, 8))
    there = machine(8, 8)
    old = replace(there, gpus=(there.gpus[0], replace(there.gpus[1], capability=(7, 5))))
    with pytest.raises(PlanError, match=r"it holds transformer\.1 in bfloat16, which this GPU only emulates"):
        plan.resolve(old)


# the commands that must be planned


@pytest.mark.parametrize("name", ["2x8gb", "2xt4"])
def test_small_cards_hold_both_halves_with_the_text_encoder_in_nf4(name: str) -> None:
    nf4 = "precision.quantization.text_encoder=nf4"
    plan, whole = (planned(f"machine={name}", nf4, *more) for more in ([GUIDANCE], []))
    assert (plan.split, whole.split) == ("guidance", "none")
    assert plan.estimates.seconds["denoise"] < 0.56 * whole.estimates.seconds["denoise"]
    assert all(slot.peak_bytes <= slot.available_bytes for slot in plan.slots)
    (faster,) = whole.faster
    assert faster.split != "none", "halves compiled, or rows with those of the VAE"
    with pytest.raises(InfeasibleError) as refused:
        planned("machine=2x8gb", GUIDANCE)
    assert refused.value.hint == "this fits: precision.quantization.text_encoder=int8; or hardware.split=auto"
    for hint in ("precision.quantization.text_encoder=int8", "hardware.split=auto"):
        assert planned("machine=2x8gb", GUIDANCE, hint).feasible


@pytest.mark.parametrize(
    "more",
    [
        ["precision=nf4"],
        ["precision=int8"],
        ["machine.gpus=[a100,t4]", "precision=mixed_fp32"],
        ["hardware.use=[0,1]"],
        ["machine.gpus=2x16GiB", "hardware.allow=[encode_once,vae_slicing,text_encoder_offload]"],
        ["model=sana_600m_controlnet"],
    ],
)
def test_every_precision_unlike_gpus_and_knobs_go_with_it(more: list[str]) -> None:
    plan = planned(*TWO, GUIDANCE, *more)
    assert plan.split == "guidance"
    parts = plan.parts
    for name in SECOND:
        first = plan.components[plan.units[name].component]
        assert (parts[name].format, parts[name].weights_bytes) == (first.format, first.weights_bytes)


# pins and maps


def test_the_second_half_is_pinned_by_its_unit_s_name() -> None:
    for index in (0, 1):
        plan = planned(*TWO, GUIDANCE, f"hardware.pin.transformer.1={index}")
        assert (plan.units["transformer.1"].slot, plan.home) == (index, 1 - index)
    whole = planned(*TWO, "hardware.pin={controlnet.1: 1}")
    assert whole.split == "none", "a pin asks for nothing"


MAP = "hardware.device_map={text_encoder: 1, vae: 0, transformer: 0, controlnet: 0"


def test_a_map_that_names_the_second_units_is_the_split() -> None:
    plan = planned(*TWO, "hardware=custom_map", f"{MAP}, transformer.1: 1, controlnet.1: 1}}")
    assert plan.split == "guidance"
    assert {name: unit.slot for name, unit in plan.units.items()} == dict.fromkeys(SECOND, 1)
    assert plan.considered.placements == 1
    dotted = [f"hardware.device_map.{name}=1" for name in SECOND]
    assert planned(*TWO, "hardware=custom_map", *dotted).device_map == plan.device_map
    assert planned(*TWO, "hardware=custom_map").split == "none"
    alone = planned(*TWO, "hardware=custom_map", *dotted, "workload.guidance_scale=1")
    assert alone.split == "none"
    assert remarks(alone, "no_split")[0].where == "hardware.device_map"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hardware=custom_map", f"{MAP}, transformer.1: 1}}"], "device_map has transformer.1 and no entry for "),
        (["hardware=custom_map", f"{MAP}, transformer.1: cpu, controlnet.1: 1}}"], "keeps transformer.1 on the CPU"),
        (
            ["hardware=custom_map", f"{MAP}, transformer.1: 0, controlnet.1: 1}}"],
            "has transformer and transformer.1 on",
        ),
        (["hardware.pin={controlnet: 1, controlnet.1: 1}"], "pin has controlnet and controlnet.1 on one GPU"),
        (["hardware.pin.transformer.2=1"], "'transformer.2' is not a component"),
        (["hardware.pin.vae.1=1"], "'vae.1' is not a component"),
        (["hardware=custom_map", "hardware.device_map.transformer.1=x"], "must be a valid integer (got 'x')"),
        (["hardware=single_gpu", "hardware.split=guidance"], "there is no such key"),
        (["hardware.split=columns"], "'columns' is not one of auto, none, guidance, rows, guidance+rows"),
    ],
)
def test_a_second_half_that_cannot_be_is_refused_with_the_rule(overrides: list[str], message: str) -> None:
    with pytest.raises(SanaDeployError) as refused:
        compose_spec(overrides)
    assert message in str(refused.value)


def test_a_unit_on_a_gpu_that_is_not_there_is_refused_by_its_key() -> None:
    with pytest.raises(InfeasibleError) as refused:
        planned(*TWO, "hardware=custom_map", f"{MAP}, transformer.1: 5, controlnet.1: 1}}")
    assert refused.value.where == "hardware.device_map.transformer.1"
    with pytest.raises(InvalidSpecError):
        compose_spec(["hardware=custom_map", f"{MAP}, transformer.1: 2000, controlnet.1: 1}}"])


# what halves take


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_half_has_half_of_what_passes_and_all_of_the_weights(batch: int) -> None:
    whole, halves = profiles(f"workload.batch={batch}")
    assert (whole.split, halves.split) == ("none", "guidance")
    assert [unit.name for unit in halves.further] == list(SECOND)
    for name in SANA_CONTROLNET.looped:
        first, second, all_rows = halves.parts[name], halves.parts[f"{name}.1"], whole.parts[name]
        assert first.weights_bytes == second.weights_bytes == all_rows.weights_bytes
        assert second.work["denoise"].flops == pytest.approx(all_rows.work["denoise"].flops / 2, rel=0.01)
        assert first.work["denoise"] == second.work["denoise"]
        assert second.activations["denoise"] == pytest.approx(all_rows.activations["denoise"] / 2, rel=0.02)
        assert first.activations["denoise"] >= second.activations["denoise"]
    assert halves.components["vae"] == whole.components["vae"]
    outside = [one for one in whole.crossings if one.phase != "denoise"]
    assert [one for one in halves.crossings if one.phase != "denoise"] == outside


def test_what_crosses_for_a_half_is_half_of_the_rows_and_the_prediction_comes_back() -> None:
    whole, halves = profiles()
    moved = Counter[tuple[str, str, str]]()
    for one in halves.crossings:
        moved[one.tensor, one.src, one.dst] += one.bytes_each
    for one in whole.crossings:
        if one.phase == "denoise":
            beside = f"{one.src}.1" if one.src == "controlnet" else one.src
            assert moved[one.tensor, one.src, one.dst] == moved[one.tensor, beside, f"{one.dst}.1"]
            assert 2 * moved[one.tensor, one.src, one.dst] == one.bytes_each
    latents = 32 * 32 * 32 * 2
    assert moved["noise_pred", "transformer.1", "transformer"] == latents
    assert moved["hidden_states", "transformer", "transformer.1"] == latents
    apart = {**dict.fromkeys(halves.parts, 0), "transformer.1": 1, "controlnet.1": 1}
    assert bytes_per_step(halves, apart) == 3 * latents + 2 * 8, "latents to both, timesteps, the prediction"


def test_residuals_wait_where_their_half_was_made() -> None:
    whole, halves = profiles()
    residuals = next(one.bytes_each for one in whole.crossings if one.tensor == "controlnet_block_samples")
    first, second = (halves.parts[name].activations["decode"] for name in ("transformer", "transformer.1"))
    assert whole.parts["transformer"].activations["decode"] - first == residuals // 2 == second
    place = {"transformer.1": 1, "vae": 1}
    alone, beside = (slot_use(halves, dict.fromkeys(names, 1), 1) for names in (["vae"], place))
    decode = halves.components["vae"].activations["decode"] + second
    assert beside.activation_bytes >= decode > alone.activation_bytes or beside.phase != "decode"


# seconds


def cards(*names: str) -> dict[int, Gpu]:
    spec = compose_spec(["machine=virtual", f"machine.gpus=[{','.join(names)}]"])
    return {gpu.index: gpu for gpu in compiler.machine_of(spec).gpus}


@pytest.mark.parametrize("names", [("a100", "a100"), ("a100", "t4"), ("t4", "a100")])
def test_halves_on_two_gpus_take_the_longer_of_the_two_sums(names: tuple[str, str]) -> None:
    _, plain = profiles("precision=mixed_fp32")
    halves, gpus = executed(plain, "graphs"), cards(*names)
    apart = {**dict.fromkeys(halves.parts, 0), "transformer.1": 1, "controlnet.1": 1}
    sums = [
        sum(
            component_phases(halves.parts[f"{name}{number}"], 1, gpu.rates)["denoise"]
            for name in SANA_CONTROLNET.looped
        )
        for number, gpu in zip(("", ".1"), gpus.values(), strict=True)
    ]
    between = [one for one in halves.crossings if one.phase == "denoise" and apart[one.src] != apart[one.dst]]
    rates = {name: gpus[place].rates for name, place in apart.items()}
    crossing = sum(one.times(halves.steps) * crossing_seconds(one, rates[one.src], rates[one.dst]) for one in between)
    seconds = phase_seconds(halves, apart, gpus)
    assert seconds is not None
    assert seconds["denoise"] == pytest.approx(halves.steps * (max(sums) + STEP_WAIT) + crossing)


def test_one_thread_launches_the_kernels_of_both_halves_and_a_graph_none() -> None:
    whole, halves = profiles("workload.height=512", "workload.width=512")
    (gpu,) = cards("h100").values()
    for name in SANA_CONTROLNET.looped:
        kernels = halves.parts[name].work["denoise"].operations
        assert step_seconds(whole.parts[name], gpu.rates) == pytest.approx(kernels * LAUNCH_SECONDS)
        assert step_seconds(halves.parts[name], gpu.rates) == pytest.approx(2 * kernels * LAUNCH_SECONDS)
        assert step_seconds(executed(halves, "graphs").parts[name], gpu.rates) < kernels * LAUNCH_SECONDS


MEASURED = {(1024, 1): 17.9, (1024, 4): 65.0, (512, 1): 9.05}
"""Milliseconds of a step of SANA 1.6B with its halves in graphs on two H100s: those of loops in docs/speed.md, of one
image, and of four without the scheduler."""


@pytest.mark.parametrize("key", MEASURED)
def test_the_seconds_of_halves_are_those_measured_within_a_tenth(key: tuple[int, int]) -> None:
    side, batch = key
    shape = [f"workload.height={side}", f"workload.width={side}", f"workload.batch={batch}"]
    plan = planned(*TWO, GUIDANCE, "runtime=graphs", "precision=fp16", *shape)
    step = 1e3 * plan.estimates.seconds["denoise"] / plan.spec.workload.steps
    assert step / MEASURED[key] == pytest.approx(1, abs=0.1)


@settings(max_examples=15, deadline=None)
@given(gpu_lists(3), st.sampled_from(["balance", "latency", "fit"]))
def test_the_halves_are_never_placed_on_one_gpu(gpus: list[Gpu], objective: Any) -> None:
    _, halves = profiles()
    found = search_balanced(halves, gpus, Rules(objective=objective, allow_emulated=True))
    assert (found.placements == 0) == (len(gpus) < 2)
    for one in found.ranked:
        assert all(one.placement[name] != one.placement[name.removesuffix(".1")] for name in SECOND)


# ways, exactness, and what would be faster


@pytest.mark.parametrize("chosen", [[], [LATENCY], [GUIDANCE], [LATENCY, "hardware.split=none", "runtime=graphs"]])
def test_every_way_is_searched_at_most_once(chosen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[tuple[str, str, int]] = []
    search = search_balanced

    def count(profile: PipelineProfile, *args: Any) -> Any:
        searched.append((profile.execution, profile.split, len(profile.units)))  # rows with the VAE, and without
        return search(profile, *args)

    monkeypatch.setattr(compiler, "search_balanced", count)
    compile_plan([LARGE, *TWO, "precision=mixed_bf16", *chosen])
    assert len(searched) == len(set(searched))
    assert {split for _, split, _ in searched} <= set(SPLITS)


FASTER: dict[str, list[str]] = {
    "eager": [*TWO, "runtime=eager"],
    "balance": TWO,
    "512 px": [*TWO, "runtime=eager", "workload.height=512", "workload.width=512"],
    "one GPU": ["machine=virtual", "machine.gpus=h100", "runtime=eager"],
    "whole": [*TWO, LATENCY, "hardware.split=none", "runtime=eager"],
    "map": [*TWO, "runtime=eager", "hardware=custom_map"],
}


@pytest.mark.parametrize("chosen", FASTER.values(), ids=list(FASTER))
def test_what_is_said_to_be_faster_is_planned_so_by_its_overrides(chosen: list[str]) -> None:
    plan = planned(*chosen)
    assert plan.faster
    assert plan.estimates.seconds_per_image is not None
    order = [EXACTNESSES.index(one.exactness) for one in plan.faster]
    assert order == sorted(set(order)), "one of each exactness, the most exact first"
    seconds = [one.seconds_per_image for one in plan.faster]
    assert seconds == sorted(seconds, reverse=True), "the less exact one is faster"
    for one in plan.faster:
        kept = [
            word for word in chosen if word.partition("=")[0] not in {key.partition("=")[0] for key in one.overrides}
        ]
        other = planned(*kept, *one.overrides)
        assert (other.runtime, other.split) == (one.runtime, one.split)
        assert other.estimates.seconds_per_image == pytest.approx(one.seconds_per_image, abs=1e-4)
        assert one.times_faster == pytest.approx(plan.estimates.seconds_per_image / one.seconds_per_image, abs=0.006)
        assert one.times_faster >= 1 / 0.95 - 0.01


def test_the_fastest_plan_names_nothing_faster_and_the_cpu_nothing(
    small: Small, machine: Callable[..., Machine]
) -> None:
    fastest = planned(*TWO, LATENCY)
    assert not [one for one in fastest.faster if one.exactness == "bitwise"]
    assert all(one.seconds_per_image < 0.96 * fastest.estimates.seconds_per_image for one in fastest.faster)  # type: ignore[operator]
    assert compile_spec(small(), machine()).faster == []


def test_a_plan_says_what_all_that_was_chosen_does_to_the_picture() -> None:
    def exactness(*chosen: str) -> str | None:
        return planned(*TWO, *chosen).exactness

    plain = "hardware.allow=[]"
    assert exactness(plain, "runtime=eager") == exactness(plain, "runtime=graphs") == "bitwise"
    assert exactness(plain, GUIDANCE) == SPLITS["guidance"].exactness == "rounding"
    assert exactness("runtime=eager") == "rounding", "encode_once"
    tiled = ["hardware=custom_map", "hardware.knobs=[vae_tiling]", "workload.height=2048", "workload.width=2048"]
    assert exactness(*tiled) == "changes"
    assert least_exact(()) == "bitwise"
    assert least_exact(("rounding", "bitwise")) == "rounding"


def test_the_split_is_a_decision_that_the_digest_covers_and_advice_is_not() -> None:
    whole, halves = planned(*TWO), planned(*TWO, GUIDANCE)
    values = halves.model_dump(mode="json")
    assert digest_of({**values, "split": "none"}) != halves.digest
    assert digest_of({**values, "faster": [], "exactness": None}) == halves.digest
    declared = whole.model_dump(mode="json")
    declared["spec"]["hardware"]["split"] = "none"
    assert digest_of(declared) == whole.digest, "what was decided counts"
    lines = {one.where: (one.kind, one.was, one.now) for one in compare(whole, halves)}
    assert lines["split"] == ("decided", "none", "guidance")


def test_people_read_of_the_halves_and_of_what_is_faster() -> None:
    from rich.console import Console

    def shown(plan: Plan) -> str:
        out = Console(width=200, no_color=True)
        with out.capture() as caught:
            out.print(render_plan(plan))
        return caught.get()

    halves, whole = shown(planned(*TWO, GUIDANCE)), planned(*TWO, "runtime=eager")
    assert "runtime graphs (bitwise), split guidance (rounding): ~" in halves
    assert all(f"\n  {name} " in halves for name in SECOND)
    assert "s per image, rounding\n" in halves
    lines = [faster_sentence(one) for one in whole.faster]
    assert lines[0] == f"{whole.faster[0].times_faster:.1f}x faster: runtime=graphs (same pixels)"
    assert "pixels differ in the last places" in lines[1]
    assert all(f"\n{line}\n" in shown(whole) for line in lines)
    assert "knob encode_once saves ~" in halves
    assert " (rounding)\n" in halves
