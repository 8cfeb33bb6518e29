"""What is done to a component of the denoising loop reaches both of its units, or keeps it on one device."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import PAGIdentitySanaLinearAttnProcessor2_0, SanaLinearAttnProcessor2_0
from halved import ROUNDING, UNITS, apart, called, drawn, resolved_plan
from repeating import RepeatingHost

from sana_deploy.declare.spec import DeploySpec
from sana_deploy.run.load import load_pipeline
from sana_deploy.run.request_state import RequestState
from sana_deploy.run.traffic import floating

Change = Callable[[DiffusionPipeline], object]
Small = Callable[..., DeploySpec]
pytestmark = pytest.mark.usefixtures("short_prompts")


@pytest.fixture
def spec(tiny: Path, small: Small) -> DeploySpec:
    return small("precision=fp32", "workload.steps=2")


@pytest.fixture
def pipeline(spec: DeploySpec) -> DiffusionPipeline:
    return load_pipeline(resolved_plan(spec))


@pytest.fixture
def whole(spec: DeploySpec) -> DiffusionPipeline:
    return load_pipeline(resolved_plan(spec, split=False))


def lora(pipeline: DiffusionPipeline) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    for name in ("transformer", "controlnet"):
        config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_k"], init_lora_weights=False)
        getattr(pipeline, name).add_adapter(config, "style")


def fused(pipeline: DiffusionPipeline) -> None:
    lora(pipeline)
    pipeline.transformer.fuse_lora(lora_scale=0.7)


def scaled(pipeline: DiffusionPipeline) -> None:
    lora(pipeline)
    pipeline.transformer.set_adapters("style", 0.25)


def new_state(pipeline: DiffusionPipeline) -> None:
    for name in ("transformer", "controlnet"):
        module = getattr(pipeline, name)
        module.load_state_dict({key: value * 0.9 for key, value in module.state_dict().items()})


def in_place(pipeline: DiffusionPipeline) -> None:
    with torch.no_grad():
        pipeline.transformer.proj_out.weight.mul_(0.8)


def through_data(pipeline: DiffusionPipeline) -> None:
    pipeline.controlnet.controlnet_blocks[0].weight.data.add_(0.1)
    pipeline.transformer.proj_out.weight.data.mul_(0.8)


def other_layer(pipeline: DiffusionPipeline) -> None:
    torch.manual_seed(5)
    old = pipeline.transformer.proj_out
    pipeline.transformer.proj_out = torch.nn.Linear(old.in_features, old.out_features).requires_grad_(False)


def other_attention(pipeline: DiffusionPipeline) -> None:
    for block in pipeline.transformer.transformer_blocks:
        block.attn1.set_processor(SanaLinearAttnProcessor2_0())
        block.attn1.to_v.weight = torch.nn.Parameter(block.attn1.to_v.weight * 1.5)


CHANGES: list[Change] = [lora, scaled, fused, new_state, in_place, through_data, other_layer, other_attention]


@pytest.mark.parametrize(
    ("change", "runtime"),
    [*((change, "graphs") for change in CHANGES), (scaled, "eager"), (through_data, "eager")],
)
def test_both_halves_follow_what_is_done_to_the_component(
    whole: DiffusionPipeline, spec: DeploySpec, change: Change, runtime: str
) -> None:
    host = RepeatingHost()
    pipeline = load_pipeline(resolved_plan(spec, runtime=runtime), host=host)
    plain = drawn(pipeline, spec)
    for one in (pipeline, whole):
        change(one)
    picture = drawn(pipeline, spec)
    assert apart(picture, drawn(whole, spec)) < ROUNDING
    assert apart(picture, plain) > 1e-4, "the change is one that shows"
    assert {*UNITS} <= {*called(pipeline, spec)}, "and both units work on"


def test_a_change_between_two_steps_reaches_the_copy_in_the_next(
    pipeline: DiffusionPipeline, whole: DiffusionPipeline, spec: DeploySpec
) -> None:
    def weaken(one: DiffusionPipeline, name: str, *_: Any) -> None:
        if name == "transformer":
            in_place(one)

    plain, pictures = drawn(pipeline, spec), []
    for one in (pipeline, whole):
        state = RequestState()
        state.on_outputs.append(functools.partial(weaken, one))
        pictures.append(drawn(one, spec, state))
    assert apart(*pictures) < ROUNDING
    assert apart(pictures[0], plain) > 1e-4


def test_adapters_may_be_turned_off_and_taken_away_again(pipeline: DiffusionPipeline, spec: DeploySpec) -> None:
    plain = drawn(pipeline, spec)
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_k"], init_lora_weights=False)
    pipeline.transformer.add_adapter(config, "style")
    styled = drawn(pipeline, spec)
    pipeline.transformer.disable_adapters()
    assert torch.equal(drawn(pipeline, spec), plain)
    pipeline.transformer.enable_adapters()
    assert torch.equal(drawn(pipeline, spec), styled)
    assert apart(styled, plain) > 1e-4
    pipeline.transformer.delete_adapters("style")
    assert torch.equal(drawn(pipeline, spec), plain)


def test_a_cast_of_one_component_reaches_its_copy(
    pipeline: DiffusionPipeline, whole: DiffusionPipeline, spec: DeploySpec
) -> None:
    for one in (pipeline, whole):
        one.transformer.to(torch.bfloat16)  # residuals in float32 are cast by the pipeline
    state = RequestState()
    seen: dict[str, set[torch.dtype]] = {}
    state.on_outputs.append(
        lambda name, _, output: seen.setdefault(name, set()).update(one.dtype for one in floating(output))
    )
    picture = drawn(pipeline, spec, state)
    assert seen["transformer"] == seen["transformer.1"] == {torch.bfloat16}
    assert apart(picture, drawn(whole, spec)) < 0.05, "bfloat16 rounds"
    assert state.remarks == []


class RowsTogether(SanaLinearAttnProcessor2_0):  # type: ignore[misc]
    """An attention processor from elsewhere: it lets the second half of the rows see the first."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        made: torch.Tensor = super().__call__(attn, hidden_states, *args, **kwargs)
        return made + made.mean(dim=0, keepdim=True)


def looking_at_rows_together(pipeline: DiffusionPipeline) -> None:
    pipeline.transformer.transformer_blocks[0].attn1.set_processor(RowsTogether())


def perturbed(pipeline: DiffusionPipeline) -> None:
    pipeline.transformer.transformer_blocks[0].attn1.set_processor(PAGIdentitySanaLinearAttnProcessor2_0())


def inference_weights(pipeline: DiffusionPipeline) -> None:
    with torch.inference_mode():
        layer = pipeline.transformer.proj_out
        layer.weight = torch.nn.Parameter(layer.weight * 0.9, requires_grad=False)


def hook_inside(pipeline: DiffusionPipeline) -> None:
    pipeline.transformer.transformer_blocks[0].register_forward_hook(
        lambda _, __, output: output + output.mean(dim=0, keepdim=True)
    )


def forward_inside(pipeline: DiffusionPipeline) -> None:
    block = pipeline.transformer.transformer_blocks[0]
    inner = block.forward
    block.forward = lambda *args, **kwargs: inner(*args, **kwargs) * 1.1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            looking_at_rows_together,
            "transformer_blocks.0.attn1 has the attention processor RowsTogether, which may look",
        ),
        (perturbed, "transformer_blocks.0.attn1 has the attention processor PAGIdentitySanaLinearAttnProcessor2_0"),
        (inference_weights, "its weights were made in inference mode"),
        (hook_inside, "transformer_blocks.0 has hooks"),
        (forward_inside, "transformer_blocks.0 has another forward than its class"),
        (lambda pipeline: pipeline.transformer.train(), "the module is in training mode"),
    ],
)
def test_what_may_need_all_rows_gets_them_and_the_outcome_says_so(
    pipeline: DiffusionPipeline, whole: DiffusionPipeline, spec: DeploySpec, change: Change, why: str
) -> None:
    for one in (pipeline, whole):
        one.transformer.eval()
        change(one)
    state = RequestState()
    picture = drawn(pipeline, spec, state)
    assert apart(picture, drawn(whole, spec)) < ROUNDING
    assert state.calls["transformer.1"] == 0
    assert state.calls["controlnet.1"] == 2, "the other component is split as before"
    (remark,) = state.remarks
    assert remark.startswith(f"the transformer computed both halves of guidance on one device: {why}")


def test_a_module_that_cannot_be_copied_runs_whole(
    pipeline: DiffusionPipeline, whole: DiffusionPipeline, spec: DeploySpec
) -> None:
    pipeline.transformer.guard = threading.Lock()
    for one in (pipeline, whole):
        in_place(one)
    state = RequestState()
    assert apart(drawn(pipeline, spec, state), drawn(whole, spec)) < ROUNDING
    assert state.remarks == [
        "the transformer computed both halves of guidance on one device: it cannot be copied: "
        "cannot pickle '_thread.lock' object"
    ]
    del pipeline.transformer.guard
    in_place(pipeline)
    assert called(pipeline, spec)["transformer.1"] == 2, "until it can"
