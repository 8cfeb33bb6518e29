"""`hardware.split=layers`: what the units of a dealt component take, where it is cut, and when it is chosen."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sana_deploy import rehearse
from sana_deploy._models import Diagnostic
from sana_deploy._units import GIB
from sana_deploy.api import compile_plan
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import InfeasibleError, PlanError
from sana_deploy.facts.checkpoint import open_checkpoint
from sana_deploy.facts.machine import Gpu, Machine
from sana_deploy.plan import compiler
from sana_deploy.plan.admission import Admission
from sana_deploy.plan.artifact import Plan
from sana_deploy.plan.cost import slot_use
from sana_deploy.plan.diff import compare
from sana_deploy.plan.digest import digest_of
from sana_deploy.plan.grid import Rules
from sana_deploy.plan.knobs import under
from sana_deploy.plan.layer_cuts import best_layers, fitting_cuts, may_fit
from sana_deploy.plan.layers import LayerSplit
from sana_deploy.plan.profile import PipelineProfile, profile_pipeline
from sana_deploy.plan.row_split import RowSplit
from sana_deploy.plan.search import search_balanced
from sana_deploy.plan.seconds import crossing_seconds, phase_seconds, step_seconds
from sana_deploy.plan.splits import choose, ways_of
from sana_deploy.report.wording import runtime_words

CARDS = "machine=virtual"
SMALL_CARDS = ("model=sana_600m", CARDS, "machine.gpus=2x5GiB")
LARGEST = ("model=sana15_4800m", CARDS, "machine.gpus=2x8GiB")
LAYERS = "hardware.split=layers"


def measure(*_: object) -> Any:
    raise AssertionError("all needs are shipped")


@cache
def planned(*overrides: str) -> Plan:
    return compile_plan([*overrides])


def remarks(plan: Plan, kind: str) -> list[Diagnostic]:
    return [one for one in plan.diagnostics if one.type == kind]


@cache
def declared(*overrides: str) -> DeploySpec:
    return compose_spec([*overrides])


@cache
def split_of(*overrides: str) -> LayerSplit:
    spec = compose_spec([*overrides])
    checkpoint, bounds, formats = open_checkpoint(spec.model), spec.workload.bounds, spec.precision.formats
    return LayerSplit(profile_pipeline(checkpoint, bounds, formats, measure), checkpoint, bounds, formats)


def gpu(index: int, gib: float) -> Gpu:
    return Gpu(index, f"Test {gib} GiB", int(gib * GIB), int(gib * GIB), (8, 6), 30)


cards = st.lists(st.sampled_from([2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0]), min_size=2, max_size=3)


def searched_on(gpus: Sequence[Gpu]) -> Callable[[PipelineProfile], Any]:
    return partial(search_balanced, gpus=gpus, rules=Rules(["vae_slicing", "text_encoder_offload"]))


# what units take


@pytest.mark.parametrize("precision", ["bf16", "fp32", "int8", "nf4"])
@pytest.mark.parametrize("name", ["text_encoder", "transformer"])
def test_the_weights_of_both_units_are_those_of_the_component(name: str, precision: str) -> None:
    split = split_of("model=sana_600m", f"precision={precision}")
    for cut in split.blocks[name].cuts:
        dealt = split.dealt({name: cut})
        units = [dealt.parts[name], dealt.parts[f"{name}.1"]]
        assert sum(one.weights_bytes for one in units) == split.profile.components[name].weights_bytes
        assert units[1].weights_bytes == sum(split.blocks[name].weights[cut:]) > 0
        assert dealt.split == "layers"


def test_units_share_the_work_by_blocks_and_work_in_turn() -> None:
    split, gpus = split_of("model=sana_600m", "precision=bf16"), {i: gpu(i, 8) for i in range(2)}
    dealt, whole = split.dealt({"transformer": 7}), split.profile
    parts = [dealt.parts["transformer"], dealt.parts["transformer.1"]]
    assert [part.work["denoise"].operations for part in parts] == [
        round(whole.components["transformer"].work["denoise"].operations * share) for share in (7 / 28, 21 / 28)
    ]
    places = {**dict.fromkeys(dealt.parts, 0), "transformer.1": 1}
    found = phase_seconds(dealt, places, gpus)
    between = [one for one in dealt.crossings if {one.src, one.dst} == {"transformer", "transformer.1"}]
    step = sum(step_seconds(part, gpus[0].rates) for part in parts)
    step += sum(crossing_seconds(one, gpus[0].rates, gpus[1].rates) for one in between)
    assert found is not None
    assert found["denoise"] == pytest.approx(dealt.steps * step)
    before = phase_seconds(whole, dict.fromkeys(whole.parts, 0), gpus)
    assert before is not None
    assert found["denoise"] > before["denoise"], "no seconds are saved"


@pytest.mark.parametrize(("cut", "late"), [(1, 7), (4, 4), (7, 1), (8, 0)])
def test_residuals_that_are_added_to_other_blocks_cross_too(cut: int, late: int) -> None:
    split = split_of("model=sana_1600m_controlnet", "precision=bf16")
    crossings = split.dealt({"transformer": cut}).crossings
    hidden, again = (
        one for one in crossings if one.tensor == "hidden_states" and "transformer.1" in (one.src, one.dst)
    )
    assert hidden.bytes_each == again.bytes_each == 2 * 32 * 32 * 2240 * 2
    found = sum(one.bytes_each for one in crossings
                if one.tensor == "controlnet_block_samples" and one.dst == "transformer.1")  # fmt: skip
    assert found == late * hidden.bytes_each


def test_a_dealt_text_encoder_is_not_offloaded() -> None:
    dealt = split_of("model=sana_600m", "precision=bf16").dealt({"text_encoder": 9})
    assert under(dealt, ["text_encoder_offload"]) == dealt


# where it is cut


@settings(max_examples=8, deadline=None)
@given(sizes=cards, name=st.sampled_from(["text_encoder", "transformer"]))
def test_a_cut_is_found_exactly_where_one_fits(sizes: list[float], name: str) -> None:
    split, gpus = split_of("model=sana_600m", "precision=bf16"), [gpu(*one) for one in enumerate(sizes)]
    searched = searched_on(gpus)
    found = fitting_cuts(split, [name], searched)
    knobs = [len(best.knobs) for cut in split.blocks[name].cuts if (best := searched(split.dealt({name: cut})).best)]
    assert (found is not None) == bool(knobs)
    if found is not None:
        best = searched(split.dealt(found)).best
        assert best is not None
        assert len(best.knobs) == min(knobs)
    if not may_fit(split.dealt({name: 9}), gpus):
        assert found is None


@settings(max_examples=8, deadline=None)
@given(sizes=cards)
def test_no_other_cut_leaves_the_fullest_gpu_emptier(sizes: list[float]) -> None:
    split, gpus = split_of("model=sana_600m", "precision=bf16"), [gpu(*one) for one in enumerate(sizes)]
    searched = searched_on(gpus)
    chosen = best_layers(split, gpus, searched)
    best = searched(chosen).best
    if best is None:
        return

    def fullest(profile: PipelineProfile) -> float:
        profile = under(profile, best.knobs)
        return max(slot_use(profile, best.placement, one.index, one).peak_bytes / one.free_bytes for one in gpus)

    for name, cut in chosen.dealt.items():
        every = {one: fullest(split.dealt({**chosen.dealt, name: one})) for one in split.blocks[name].cuts}
        assert every[cut] == min(every.values())


# when it is chosen


@settings(max_examples=6, deadline=None)
@given(sizes=cards, objective=st.sampled_from(["balance", "fit"]))
def test_it_is_chosen_only_where_nothing_else_fits(sizes: list[float], objective: str) -> None:
    machine = Machine("virtual", tuple(gpu(*one) for one in enumerate(sizes)), 64 * GIB)
    split = split_of("model=sana_600m", "precision=bf16")

    def chosen(wanted: str) -> tuple[str, bool]:
        spec = declared("model=sana_600m", "precision=bf16", "hardware.allow=[text_encoder_offload]",
                        f"hardware.split={wanted}", f"hardware.objective={objective}")  # fmt: skip
        searched = partial(compiler._search, spec, machine)
        rows = RowSplit(split.profile, split.checkpoint, spec.workload.bounds, spec.precision.formats, measure)
        choice = choose(spec, ways_of(spec, split.checkpoint, split.profile, machine, measure, searched, rows))
        return choice.way.split, choice.search.best is not None

    found, fits = chosen("auto")
    if found == "layers":
        others = ["none"] if objective == "fit" else ["none", "guidance", "rows"]
        assert fits
        assert [chosen(one)[1] for one in others] == [False] * len(others)
    elif not fits:
        assert not chosen("layers")[1]


def test_the_text_encoder_is_dealt_over_cards_that_are_too_small_for_it_and_says_so() -> None:
    plan = planned(*SMALL_CARDS)
    assert (plan.split, plan.exactness, plan.runtime, plan.knobs) == ("layers", "bitwise", "eager", [])
    assert plan.layers == {"text_encoder": 13}
    assert {plan.components["text_encoder"].slot, plan.units["text_encoder.1"].slot} == {0, 1}
    assert remarks(plan, "auto_split")[0].message == (
        "auto chose layers: nothing fits without; the first 13 blocks of the text_encoder on GPU 0 and the others on "
        "GPU 1, 9.52 MB a request cross between them; they work in turn, eagerly"
    )
    assert "split layers after block 13 of the text_encoder (bitwise)" in runtime_words(plan)
    assert plan.estimates.bytes_per_step == 0


def test_the_largest_sana_fits_two_cards_of_8_gib_in_16_bit() -> None:
    plan = planned(*LARGEST)
    assert (plan.split, plan.knobs) == ("layers", ["text_encoder_offload"])
    assert {part.dtype for part in plan.components.values()} <= {"float16", "bfloat16"}
    assert plan.estimates.bytes_per_step == sum(one.bytes_per_step for one in plan.transfers) > 2 * 9_000_000


@pytest.mark.parametrize(
    ("overrides", "split"),
    [
        (["machine.gpus=3x8GiB"], "layers"),
        (["machine.gpus=2x10GiB"], "none"),
        (["machine.gpus=2x8GiB", "precision.quantization.text_encoder=nf4"], "layers"),
        (["machine.gpus=2x8GiB", "precision=int8"], "none"),
    ],
)
def test_where_the_largest_sana_is_dealt(overrides: list[str], split: str) -> None:
    assert planned("model=sana15_4800m", CARDS, *overrides).split == split


@pytest.mark.parametrize("objective", ["throughput", "fit", "latency"])
def test_every_objective_takes_it_last(objective: str) -> None:
    assert planned(*SMALL_CARDS, f"hardware.objective={objective}").split == "layers"


def test_two_replicas_are_of_whole_components() -> None:
    plan = planned("model=sana_600m", CARDS, "machine.gpus=4x5GiB", "hardware.objective=throughput")
    assert (plan.split, plan.replicas) == ("layers", [])
    with pytest.raises(InfeasibleError, match="2 replicas do not fit, 0 do at most"):
        planned("model=sana_600m", CARDS, "machine.gpus=4x5GiB", "hardware.replicas=2")


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["hardware=single_gpu", "machine.gpus=24GiB"], ""),
        (
            ["machine.gpus=24GiB", LAYERS],
            "the blocks of a component are split between two GPUs, one may be taken: no component is dealt",
        ),
    ],
)
def test_where_it_cannot_be_a_remark_says_why(more: list[str], why: str) -> None:
    plan = planned("model=sana_600m", CARDS, *more)
    assert plan.split == "none"
    assert [one.message for one in remarks(plan, "no_split")] == ([why] if why else [])


@pytest.mark.parametrize("mode", ["graphs", "compiled"])
def test_a_runtime_that_records_whole_calls_is_refused_with_it(mode: str) -> None:
    with pytest.raises(InfeasibleError, match=f"runtime.mode={mode} records whole calls") as caught:
        planned(*SMALL_CARDS, LAYERS, f"runtime={mode}")
    assert caught.value.hint == "runtime=eager"


def test_where_it_was_forbidden_the_hint_is_to_allow_it() -> None:
    with pytest.raises(InfeasibleError) as caught:
        planned(*SMALL_CARDS, "hardware.split=none")
    assert "hardware.split=auto" in str(caught.value.hint)


def test_asked_for_where_all_would_fit_it_is_planned_and_nothing_slower_is_called_faster() -> None:
    plan = planned("model=sana_600m", "machine=2xrtx4090", LAYERS)
    assert plan.split == "layers"
    assert remarks(plan, "layers")[0].message.startswith("the first ")
    whole = planned("model=sana_600m", "machine=2xrtx4090")
    assert all(one.split != "layers" for one in whole.faster)


# plans and rehearsals


@pytest.mark.parametrize(
    "overrides",
    [("model=sana_1600m_controlnet", CARDS, "machine.gpus=2x6GiB"), LARGEST],
    ids=["the text encoder over 6 GiB", "4.8B over 8 GiB"],
)
def test_rehearsed_peaks_and_traffic_are_those_of_the_plan(overrides: tuple[str, ...]) -> None:
    plan = planned(*overrides)
    assert plan.split == "layers"
    report = rehearse(plan).report
    assert [abs(one.planned_error) < 0.005 for one in report.gpus] == [True, True]
    ours = {(f"vgpu:{one.src}", f"vgpu:{one.dst}", one.tensor): one.bytes_per_step for one in plan.transfers
            if one.bytes_per_step}  # fmt: skip
    theirs = {(one.src, one.dst, one.tensor): one.bytes_per_step for one in report.transfers if one.bytes_per_step}
    assert ours == theirs


def test_a_plan_of_layers_is_saved_compared_and_refused_where_it_contradicts_itself(tmp_path: Path) -> None:
    plan = planned(*SMALL_CARDS)
    again = Plan.load(plan.save(tmp_path / "plan.json"))
    assert again == plan
    assert again.resolve().unit_devices == {"text_encoder.1": f"vgpu:{plan.units['text_encoder.1'].slot}"}
    values = json.loads(plan.to_json())
    values["layers"] = {"text_encoder": 12}
    assert digest_of(values) != plan.digest
    other = plan.model_copy(update={"layers": {"text_encoder": 12}})
    assert any("layers" in str(line) for line in compare(plan, other))
    values["layers"] = {}
    values["digest"] = digest_of(values)
    with pytest.raises(PlanError, match="contradicts itself about what is dealt by layers"):
        Plan.from_values(values, "it")


def test_requests_of_other_shapes_are_costed_by_the_same_cut() -> None:
    resolved = planned(*SMALL_CARDS).resolve()
    admission = Admission(resolved, open_checkpoint(resolved.plan.model))
    bounds = resolved.plan.spec.workload.bounds
    larger = bounds.model_copy(update={"height": 2048, "width": 2048})
    assert admission.need(bounds).lacking_bytes <= 0 < admission.need(larger).lacking_bytes


def test_both_are_dealt_where_one_alone_does_not_do() -> None:
    plan = planned("model=sana_1600m", CARDS, "machine.gpus=4x3328MiB")
    assert set(plan.layers) == {"text_encoder", "transformer"}
