"""Rows of an image on several devices: the call gives the picture of one device, whatever is done around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from halved import apart, drawn

from sana_deploy.api import compile_spec
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import RunError
from sana_deploy.plan.artifact import ResolvedPlan
from sana_deploy.run.audit import Recorder, audit, in_float32
from sana_deploy.run.generate import generate
from sana_deploy.run.hook import border_of
from sana_deploy.run.load import load_pipeline
from sana_deploy.run.place import unplace
from sana_deploy.run.request_state import RequestState
from sana_deploy.run.row_split import RowForward
from sana_deploy.run.split_tensor import SplitTensor

Small = Callable[..., DeploySpec]
pytestmark = pytest.mark.usefixtures("short_prompts")
ROUNDING = 2e-6
"""Of pixels in float32: sums over all rows are added in another order."""


def dealt(spec: DeploySpec, *rows: int) -> ResolvedPlan:
    """A plan for the CPU with units for so many rows each; whole where none are named."""
    resolved = compile_spec(spec).resolve()
    if not rows:
        return resolved
    plan = resolved.plan.model_copy(update={"split": "rows", "rows": list(rows)})
    units = {f"{name}.{i}": "cpu" for i in range(1, len(rows)) for name in ("transformer", "controlnet")}
    return replace(resolved, plan=plan, unit_devices=units)


@pytest.fixture
def spec(tiny: Path, small: Small) -> DeploySpec:
    return small("precision=fp32", "workload.height=160", "workload.width=64")


@pytest.fixture
def pipeline(spec: DeploySpec) -> DiffusionPipeline:
    return load_pipeline(dealt(spec, 2, 2, 1))


@pytest.fixture
def whole(spec: DeploySpec) -> DiffusionPipeline:
    return load_pipeline(dealt(spec))


def told(pipeline: DiffusionPipeline, spec: DeploySpec, **shape: Any) -> list[str]:
    """The remarks of a request."""
    state = RequestState()
    drawn(pipeline, spec, state, **shape)
    return state.remarks


def test_pictures_of_any_shape_are_those_of_one_device(
    pipeline: DiffusionPipeline, whole: DiffusionPipeline, spec: DeploySpec
) -> None:
    shapes: list[dict[str, Any]] = [{}, {"batch": 2}, {"height": 96}, {"height": 64, "width": 96}, {"guided": False}]
    for shape in shapes:
        assert apart(drawn(pipeline, spec, **shape), drawn(whole, spec, **shape)) < ROUNDING, shape
        assert told(pipeline, spec, **shape) == []


def test_residuals_stay_with_the_rows_they_were_made_of(pipeline: DiffusionPipeline, spec: DeploySpec) -> None:
    state, seen = RequestState(), []
    state.on_inputs.append(
        lambda name, _, args, kwargs: seen.append(kwargs["controlnet_block_samples"]) if name == "transformer" else None
    )
    drawn(pipeline, spec, state)
    assert len(seen) == 2
    for residual in (residual for residuals in seen for residual in residuals):
        assert isinstance(residual, SplitTensor)
        assert residual.parts is not None, "nobody asked for the whole"
        assert [part.shape[1] for part in residual.parts] == [2 * 2, 2 * 2, 1 * 2]
    assert state.calls["transformer"] == state.calls["controlnet"] == 2


def test_an_image_of_one_row_is_computed_whole_and_the_remark_says_why(
    pipeline: DiffusionPipeline, whole: DiffusionPipeline, spec: DeploySpec
) -> None:
    assert torch.equal(drawn(pipeline, spec, height=32), drawn(whole, spec, height=32))
    for name in ("controlnet", "transformer"):
        why = f"the {name} computed all rows of the image on one device: the image has one row of tokens"
        assert why in told(pipeline, spec, height=32)


def lora(pipeline: DiffusionPipeline) -> None:
    """LoRA on attention and on convolutions of both, that shows."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    targets = ["to_q", "to_v", "conv_inverted", "conv_depth", "conv_point"]
    for name in ("transformer", "controlnet"):
        module = getattr(pipeline, name)
        depthwise = module.transformer_blocks[0].ff.conv_depth.groups
        ranks = {"rank_pattern": {"conv_depth": depthwise}, "alpha_pattern": {"conv_depth": depthwise}}
        config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=targets, init_lora_weights=False, **ranks)
        module.add_adapter(config, "style")


def in_place(pipeline: DiffusionPipeline) -> None:
    with torch.no_grad():
        pipeline.transformer.proj_out.weight.mul_(0.8)


def through_data(pipeline: DiffusionPipeline) -> None:
    pipeline.transformer.proj_out.weight.data.mul_(0.8)


@pytest.mark.parametrize("change", [lora, in_place, through_data])
def test_copies_follow_what_is_done_to_the_component(
    pipeline: DiffusionPipeline, whole: DiffusionPipeline, spec: DeploySpec, change: Callable[[Any], None]
) -> None:
    plain = drawn(pipeline, spec)
    for one in (pipeline, whole):
        change(one)
    picture = drawn(pipeline, spec)
    assert apart(picture, drawn(whole, spec)) < 2 * ROUNDING
    assert apart(picture, plain) > 1e-4, "the change is one that shows"
    assert told(pipeline, spec) == []


def test_the_scale_of_attention_kwargs_reaches_the_lora_of_all_units(
    pipeline: DiffusionPipeline, whole: DiffusionPipeline, spec: DeploySpec
) -> None:
    for one in (pipeline, whole):
        lora(one)
    request, bounds, pictures = spec.workload.request, spec.workload.bounds, {}
    for scale in (1.0, 0.3):
        for one in (pipeline, whole):
            call = type(one).__call__
            made = call(
                one, request.prompt, control_image=torch.full((1, 3, 160, 64), 0.5), height=160, width=64,
                num_inference_steps=bounds.steps, attention_kwargs={"scale": scale}, output_type="pt",
                use_resolution_binning=False, generator=torch.Generator().manual_seed(1),
            )  # fmt: skip
            pictures[scale, one is whole] = made.images
        assert apart(pictures[scale, True], pictures[scale, False]) < 1e-5, "random LoRA makes rounding larger"
    assert apart(pictures[1.0, True], pictures[0.3, True]) > 1e-3


def test_a_callback_may_change_the_latents(
    pipeline: DiffusionPipeline, whole: DiffusionPipeline, spec: DeploySpec
) -> None:
    pictures = []
    for one in (pipeline, whole):
        made = one(
            "a lamp", control_image=torch.full((1, 3, 160, 64), 0.5), height=160, width=64, num_inference_steps=2,
            callback_on_step_end=lambda _, __, ___, kwargs: {"latents": kwargs["latents"] * 0.5}, output_type="pt",
            use_resolution_binning=False, generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        pictures.append(made.images)
    assert apart(*pictures) < ROUNDING


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda model: model.transformer_blocks[0].register_forward_hook(lambda *_: None), "has hooks"),
        (
            lambda model: model.transformer_blocks[0].attn1.set_processor(
                type("Mine", (SanaLinearAttnProcessor2_0,), {})()
            ),
            "has the attention processor Mine",
        ),
        (lambda model: model.train(), "training mode"),
    ],
)
def test_what_rows_cannot_do_is_done_whole_and_the_remark_says_why(
    pipeline: DiffusionPipeline, whole: DiffusionPipeline, spec: DeploySpec, change: Callable[[Any], Any], why: str
) -> None:
    change(pipeline.transformer)
    assert apart(drawn(pipeline, spec), drawn(whole, spec)) < ROUNDING, "with residuals of the ControlNet's units"
    (remark,) = told(pipeline, spec)
    assert remark.startswith("the transformer computed all rows of the image on one device: ")
    assert why in remark


def test_nan_is_named_by_its_component(pipeline: DiffusionPipeline, spec: DeploySpec) -> None:
    with torch.no_grad():
        pipeline.controlnet.controlnet_blocks[0].weight[0, 0] = float("nan")
    with pytest.raises(RunError, match="the controlnet gave NaN or infinity in float32 during denoise"):
        generate(pipeline, spec.workload.bounds, spec.workload.request)


def test_an_audit_compares_both_components_with_float32(small: Small, tiny: Path) -> None:
    spec = small("precision=bf16", "workload.height=96")
    recorder, state = Recorder(), RequestState()
    recorder.attach(state)
    resolved = dealt(spec, 2, 1)
    pipeline = load_pipeline(resolved)
    images, _ = generate(pipeline, spec.workload.bounds, spec.workload.request, state=state)
    found = audit(recorder, images, resolved.plan, in_float32(spec, compile_spec), spec.workload)
    errors = {border.component: border.relative_error for border in found.borders}
    assert 0 < errors["transformer"] < 0.05
    assert 0 < errors["controlnet"] < 0.05


def test_unplace_gives_the_modules_back_as_they_were(
    pipeline: DiffusionPipeline, whole: DiffusionPipeline, spec: DeploySpec
) -> None:
    assert isinstance(pipeline.transformer.forward, RowForward)
    mirrors = [*pipeline.transformer.forward.mirrors, *pipeline.controlnet.forward.mirrors]
    assert len(mirrors) == 4
    unplace(pipeline)
    assert "forward" not in vars(pipeline.transformer)
    assert "encode_prompt" not in vars(pipeline)
    assert all(mirror._copy is None for mirror in mirrors), "copies give their memory back"


def test_a_call_by_hand_has_the_form_of_the_module_s_own_result(
    pipeline: DiffusionPipeline, whole: DiffusionPipeline
) -> None:
    config = pipeline.transformer.config
    latents = torch.randn(2, config.in_channels, 5, 3)
    given = dict(
        hidden_states=latents, encoder_hidden_states=torch.randn(2, 4, config.caption_channels),
        timestep=torch.tensor([500, 500]),
    )  # fmt: skip
    for return_dict in (False, True):
        with torch.no_grad():
            residuals = [one.controlnet(**given, controlnet_cond=latents, return_dict=return_dict)[0]
                         for one in (pipeline, whole)]  # fmt: skip
            one, other = (
                placed.transformer(**given, controlnet_block_samples=tuple(samples), return_dict=return_dict)
                for placed, samples in zip((pipeline, whole), residuals, strict=True)
            )
        assert type(one) is type(other)
        assert apart(one[0], other[0]) < 1e-5 * float(other[0].abs().max())
        assert apart(residuals[0][0] + 0, residuals[1][0]) < 1e-5
    pipeline.transformer(**given)[0].sum()  # gradients are recorded: whole
    remarks = border_of(pipeline).state.remarks
    assert remarks == ["the transformer computed all rows of the image on one device: gradients are recorded"]
