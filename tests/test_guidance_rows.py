"""Rows of both halves of guidance on four GPUs and more: the picture of one GPU, what crosses, when it is taken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from halved import apart, drawn
from test_row_plan import planned, profile_of, remarks
from test_row_split import lora
from test_row_split_rehearsed import ROUNDING, all_gpus, moved, pixels_of, rehearsed, vae_too
from test_rows import without

from sana_deploy.api import compile_plan, compile_spec
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import InfeasibleError
from sana_deploy.facts.checkpoint import open_checkpoint
from sana_deploy.plan.admission import Admission
from sana_deploy.plan.artifact import Plan, ResolvedPlan
from sana_deploy.rehearsal.rehearse import open_host
from sana_deploy.run.generate import run_request
from sana_deploy.run.load import load_pipeline
from sana_deploy.run.place import unplace
from sana_deploy.run.request_state import RequestState
from sana_deploy.run.rows.exchange import Ask, Halo, Sum
from sana_deploy.run.split_tensor import SplitTensor

__all__ = ["all_gpus", "vae_too"]
Small = Callable[..., DeploySpec]
BOTH = "hardware.split=guidance+rows"
VIRTUAL = ("machine=virtual", "precision=fp32")
WHOLE = (*VIRTUAL, "hardware.split=none", "runtime=eager", "machine.gpus=1xrtx4090")
CASES: dict[str, list[str]] = {
    "4 GPUs": ["machine.gpus=4xrtx4090", "workload.height=160"],
    "6 unlike GPUs": ["machine.gpus=[2xh100,2xt4,2xl4]", "workload.height=128"],
    "4 GPUs, no ControlNet": ["model=tiny_sana", "machine.gpus=4xrtx4090", "workload.height=96"],
}


# over virtual GPUs


@pytest.mark.usefixtures("vae_too", "short_prompts")
@pytest.mark.parametrize("more", CASES.values(), ids=list(CASES))
def test_the_picture_is_that_of_one_gpu(small: Small, more: list[str]) -> None:
    plan = compile_spec(small(*VIRTUAL, BOTH, *more))
    size = len(plan.rows) // 2
    assert (plan.split, 2 * size) == ("guidance+rows", len(plan.slots))
    assert sum(plan.rows[:size]) == sum(plan.rows[size:]) == plan.spec.workload.height // 32
    assert any(unit.component == "vae" for unit in plan.units.values())
    rounding = ROUNDING * size / 2  # more sums, of more parts
    assert apart(pixels_of(plan), pixels_of(compile_spec(small(*more, *WHOLE)))) < rounding


@pytest.mark.usefixtures("all_gpus", "short_prompts")
@pytest.mark.parametrize("kind", [Halo, Sum])
def test_a_picture_without_an_exchange_is_another_one(small: Small, kind: type[Ask]) -> None:
    more = CASES["4 GPUs, no ControlNet"]
    whole = pixels_of(compile_spec(small(*more, *WHOLE)))
    with without(kind):
        assert apart(pixels_of(compile_spec(small(*VIRTUAL, BOTH, *more))), whole) > 100 * ROUNDING


@pytest.mark.usefixtures("all_gpus", "short_prompts")
def test_a_transformer_that_has_to_be_whole_gets_the_residuals_of_all_units(small: Small) -> None:
    resolved, state = compile_spec(small(*VIRTUAL, BOTH, *CASES["4 GPUs"])).resolve(), RequestState()
    host, workload = open_host(resolved, "numbers"), resolved.plan.spec.workload
    pipeline = load_pipeline(resolved, host=host)
    pipeline.transformer.transformer_blocks[0].register_forward_hook(lambda *_: None)
    with host:
        pixels, _ = run_request(pipeline, workload.bounds, workload.request, state=state)
        pixels = pixels.cpu()
    assert state.remarks
    assert apart(pixels, pixels_of(compile_spec(small(*CASES["4 GPUs"], *WHOLE)))) < ROUNDING


@pytest.mark.usefixtures("vae_too")
def test_every_byte_that_crosses_is_planned(small: Small) -> None:
    plan = compile_spec(small("machine=virtual", BOTH, *CASES["4 GPUs"], "precision=mixed_bf16"))
    done, _, _ = rehearsed(plan)
    found = Counter({(one.src, one.dst, one.tensor): one.bytes_per_image for one in done.report.transfers})
    assert found == moved(plan)
    teams = {(one.src, one.dst) for one in done.report.transfers if one.tensor == "attention_sums"}
    assert teams == {("vgpu:0", "vgpu:1"), ("vgpu:1", "vgpu:0"), ("vgpu:2", "vgpu:3"), ("vgpu:3", "vgpu:2")}
    assert "controlnet_block_samples" not in {tensor for _, _, tensor in found}, "they stay where they are made"


@pytest.mark.slow
@pytest.mark.usefixtures("all_gpus")
@pytest.mark.parametrize("model", ["sana_1600m_controlnet", "sana_600m"])
def test_peaks_are_planned_within_half_a_percent(model: str) -> None:
    shape = ["workload.height=2048", "workload.width=1024", "workload.steps=2"]
    done, _, _ = rehearsed(compile_plan([f"model={model}", "machine=virtual", "machine.gpus=4xh100", BOTH, *shape]))
    for gpu in done.report.gpus:
        assert abs(gpu.planned_error) < 0.005, gpu


# around it, on one CPU


@pytest.fixture
def spec(tiny: Path, small: Small) -> DeploySpec:
    return small("precision=fp32", "workload.height=160", "workload.width=64")


def dealt(spec: DeploySpec, *rows: int) -> ResolvedPlan:
    resolved = compile_spec(spec).resolve()
    plan = resolved.plan.model_copy(update={"split": "guidance+rows", "rows": list(rows)})
    units = {f"{name}.{i}": "cpu" for i in range(1, len(rows)) for name in ("transformer", "controlnet")}
    return replace(resolved, plan=plan, unit_devices=units)


@pytest.fixture
def pipeline(spec: DeploySpec) -> DiffusionPipeline:
    return load_pipeline(dealt(spec, 3, 2, 4, 1))


@pytest.fixture
def whole(spec: DeploySpec) -> DiffusionPipeline:
    return load_pipeline(compile_spec(spec).resolve())


def test_pictures_of_any_shape_are_those_of_one_device(
    pipeline: DiffusionPipeline, whole: DiffusionPipeline, spec: DeploySpec
) -> None:
    for shape in ({}, {"batch": 2}, {"height": 64, "width": 96}, {"guided": False}):
        state = RequestState()
        assert apart(drawn(pipeline, spec, state, **shape), drawn(whole, spec, **shape)) < ROUNDING, shape
        assert state.remarks == []
    state = RequestState()
    assert torch.equal(drawn(pipeline, spec, state, height=32), drawn(whole, spec, height=32))
    assert all("the image has one row of tokens" in remark for remark in state.remarks)
    assert len(state.remarks) == 2


def test_residuals_stay_with_the_half_and_the_rows_they_were_made_of(
    pipeline: DiffusionPipeline, spec: DeploySpec
) -> None:
    state, seen = RequestState(), []
    state.on_inputs.append(
        lambda name, _, args, kwargs: seen.extend(kwargs["controlnet_block_samples"]) if name == "transformer" else None
    )
    drawn(pipeline, spec, state)
    assert seen
    for residual in seen:
        assert isinstance(residual, SplitTensor)
        assert residual.parts is not None
        halves = [half.parts for half in residual.parts if isinstance(half, SplitTensor) and half.parts is not None]
        assert [[part.shape[1] for part in parts] for parts in halves] == [[6, 4], [8, 2]]


def test_copies_follow_lora_and_give_their_memory_back(
    pipeline: DiffusionPipeline, whole: DiffusionPipeline, spec: DeploySpec
) -> None:
    plain = drawn(pipeline, spec)
    for one in (pipeline, whole):
        lora(one)
    picture = drawn(pipeline, spec)
    assert apart(picture, drawn(whole, spec)) < 2 * ROUNDING
    assert apart(picture, plain) > 1e-4, "it is one that shows"
    mirrors = [*pipeline.transformer.forward.mirrors, *pipeline.controlnet.forward.mirrors]
    assert len(mirrors) == 6
    unplace(pipeline)
    assert all(mirror._copy is None for mirror in mirrors)


# what is planned

TALL = ("workload.height=4096", "workload.width=4096")


def test_each_half_has_all_rows_on_gpus_as_fast_as_the_other_s() -> None:
    plan = planned("machine.gpus=[2xh100,2xa100]", BOTH, *TALL)
    places = [plan.home, *(plan.units[f"transformer.{i}"].slot for i in (1, 2, 3))]
    assert {frozenset(places[:2]), frozenset(places[2:])} == {frozenset({0, 2}), frozenset({1, 3})} or {
        *map(frozenset, (places[:2], places[2:]))
    } == {frozenset({0, 3}), frozenset({1, 2})}
    assert sum(plan.rows[:2]) == sum(plan.rows[2:]) == 128
    assert plan.rows[0] > plan.rows[1]
    pinned = planned("machine.gpus=4xh100", BOTH, *TALL, "hardware.pin={transformer: 3, transformer.1: 1}")
    assert (pinned.home, pinned.units["transformer.1"].slot) == (3, 1)


@pytest.mark.parametrize(("teams", "rows"), [(1, (16, 16)), (2, (16, 16, 16, 16))])
def test_units_of_a_half_have_half_of_the_work_and_of_what_is_exchanged(teams: int, rows: tuple[int, ...]) -> None:
    parted = profile_of().with_rows(rows, teams)
    sums = [one for one in parted.crossings if one.tensor == "attention_sums" and one.src == "transformer"]
    assert [(one.dst, one.bytes_each) for one in sums] == [("transformer.1", 20 * 2 // teams * 70 * 32 * 33 * 4)]
    share = parted.parts["transformer.1"].work["denoise"].flops / profile_of().profile.parts["transformer"].work[
        "denoise"
    ].flops  # fmt: skip
    assert share == pytest.approx(1 / len(rows), rel=0.1)


def test_latency_compares_it_with_the_other_splits() -> None:
    slow = ("machine.gpus=8xl4", "hardware.objective=latency", *TALL)
    plan = planned(*slow)
    each = {split: planned(*slow, f"hardware.split={split}") for split in ("none", "guidance", "rows", "guidance+rows")}
    seconds = {split: one.estimates.seconds_per_image or 0 for split, one in each.items()}
    assert plan.split in seconds
    assert seconds[plan.split] <= min(seconds.values()) / 0.95
    assert seconds["guidance+rows"] < 0.6 * seconds["guidance"]


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["machine.gpus=3xh100"], "the rows of both halves of guidance are split between four or more GPUs, three may"),
        (["machine.gpus=4xh100", "workload.guidance_scale=1"], "there is no guidance to split with"),
        (["machine.gpus=4xh100", "workload.height=32"], "an image of workload.height=32 has one row of tokens"),
    ],
)
def test_where_it_cannot_be_one_gpu_computes_whole_steps_and_a_remark_says_why(more: list[str], why: str) -> None:
    plan = planned(BOTH, *more)
    (remark,) = remarks(plan, "no_split")
    assert (plan.split, remark.message.startswith(why)) == ("none", True), remark.message


@pytest.mark.parametrize(
    ("model", "why"),
    [("tiny_pag", "computes the rows of a step together in perturbed attention"), ("tiny_sprint", "embeds guidance")],
)
def test_pipelines_without_halves_say_why(model: str, why: str) -> None:
    plan = compile_plan([f"model={model}", "machine=virtual", "machine.gpus=4xh100", BOTH])
    (remark,) = remarks(plan, "no_split")
    assert why in remark.message


def test_graphs_are_refused() -> None:
    with pytest.raises(InfeasibleError, match="mode=graphs records whole calls"):
        planned("machine.gpus=4xh100", BOTH, "runtime=graphs")


@pytest.mark.usefixtures("vae_too")
def test_a_plan_is_saved_and_requests_of_other_shapes_are_costed(small: Small, tmp_path: Path) -> None:
    plan = compile_spec(small(*VIRTUAL, BOTH, *CASES["4 GPUs"]))
    loaded = Plan.load(plan.save(tmp_path / "plan.json"))
    assert (loaded.digest, loaded.rows, loaded.split) == (plan.digest, plan.rows, "guidance+rows")
    admission, bounds = Admission(plan.resolve(), open_checkpoint(plan.spec.model)), plan.spec.workload.bounds
    assert admission.seconds(bounds) == pytest.approx(sum(plan.estimates.seconds.values()), rel=1e-3)
    for shape in ({"height": 32}, {"height": 64}, {"height": 96}, {"height": 320}, {"guided": False}):
        assert admission.seconds(bounds.model_copy(update=shape))
