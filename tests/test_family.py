"""SANA's pipelines besides the one with a ControlNet: found, planned and placed, with diffusers' own pictures."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL
from family import APART, CLASSES, GUIDED, MODELS, THREE, diffusers_own, planned
from repeating import RepeatingHost

from sana_deploy import load_pipeline, place, rehearse
from sana_deploy.api import compile_plan
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.hardware import CustomMap, MultiGpuBalanced
from sana_deploy.declare.pipelines import PIPELINES, SANA, SANA_CONTROLNET, SANA_SPRINT
from sana_deploy.errors import CheckpointError, InvalidSpecError, RunError
from sana_deploy.facts.checkpoint import open_checkpoint, settled
from sana_deploy.facts.tiny import ensure_tiny
from sana_deploy.plan.artifact import Plan
from sana_deploy.run.asked import arguments_of
from sana_deploy.run.generate import generate, run_request
from sana_deploy.run.request_state import RequestState

pytestmark = pytest.mark.usefixtures("short_prompts")
DTYPES = {"text_encoder": torch.bfloat16, "vae": torch.bfloat16, "transformer": torch.float16}


def drawn_by_diffusers(plan: Plan, **options: Any) -> bytes:
    """The first picture of a plan's request by diffusers' own pipeline."""
    pipeline, work = diffusers_own(plan.pipeline, **options), plan.spec.workload
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(**arguments_of(plan.pipeline, work.bounds, work.request)).images[0]
    return bytes(picture.tobytes())


def drawn(plan: Plan) -> bytes:
    work = plan.spec.workload
    return bytes(generate(load_pipeline(plan), work.bounds, work.request)[0][0].tobytes())


# Pictures


@pytest.mark.parametrize("model", MODELS)
def test_the_picture_is_diffusers_own_bit_for_bit_on_the_cpu_and_over_virtual_gpus(model: str) -> None:
    steps = ["workload.steps=3"] if model in GUIDED else []
    plan = planned(model, "precision=fp32", *steps)
    theirs = drawn_by_diffusers(plan)
    assert drawn(plan) == theirs
    apart = rehearse(planned(model, "precision=fp32", *steps, *APART))
    assert apart.report.fidelity == "numbers"
    assert len(apart.report.gpus) == 3
    assert apart.images[0].tobytes() == theirs


@pytest.mark.parametrize("model", MODELS)
def test_in_the_dtypes_of_the_documented_recipe_too(model: str) -> None:
    plan = planned(model, "precision=mixed_bf16", "workload.steps=2", "workload.batch=2", "workload.strength=0.5")
    assert {name: part.dtype for name, part in plan.components.items()} == {
        name: str(dtype).removeprefix("torch.") for name, dtype in DTYPES.items()
    }
    assert drawn(plan) == drawn_by_diffusers(plan, torch_dtype=DTYPES)


@pytest.mark.parametrize("model", GUIDED)
def test_without_guidance_too(model: str) -> None:
    plan = planned(model, "precision=fp32", "workload.steps=2", "workload.guidance_scale=1")
    assert drawn(plan) == drawn_by_diffusers(plan)


@pytest.mark.parametrize("model", MODELS)
def test_graphs_draw_the_bits_of_eager_execution_call_after_call(model: str) -> None:
    resolved = planned(model, "precision=fp32", "workload.steps=4").resolve()
    graphed = replace(resolved, plan=resolved.plan.model_copy(update={"runtime": "graphs"}))
    pipeline, eager = load_pipeline(graphed, host=RepeatingHost()), load_pipeline(resolved)
    work = resolved.plan.spec.workload
    for seed in (1, 2):
        request, state = work.request.model_copy(update={"seed": seed}), RequestState()
        pixels, _ = run_request(pipeline, work.bounds, request, state=state)
        assert torch.equal(pixels, run_request(eager, work.bounds, request)[0])
        assert not state.eager_calls
    assert pipeline.transformer._hf_hook.graphed.replays > 4


@pytest.mark.parametrize("model", MODELS)
def test_a_prompt_that_comes_again_is_not_encoded_again(model: str) -> None:
    plan = planned(model, "precision=mixed_bf16", "workload.steps=2")
    pipeline, work = load_pipeline(plan), plan.spec.workload
    states = [RequestState() for _ in range(2)]
    one, other = (run_request(pipeline, work.bounds, work.request, state=state)[0] for state in states)
    assert torch.equal(one, other)
    assert [state.prompt_cache_hits for state in states] == [0, 2 if model in GUIDED else 1]


@pytest.mark.parametrize(("model", "precision", "times"), [
    ("tiny_sana", "mixed_bf16", 1), ("tiny_pag", "mixed_bf16", 1), ("tiny_sprint", "bf16", 1),
    ("tiny_sprint", "mixed_bf16", 4),
])  # fmt: skip
def test_the_caption_is_projected_once_a_request_unless_guidance_has_the_dtype_of_the_prompt(
    model: str, precision: str, times: int
) -> None:
    plan = planned(model, f"precision={precision}", "workload.steps=4")
    pipeline, counts = load_pipeline(plan), Counter[str]()
    pipeline.transformer.caption_projection.linear_1.register_forward_pre_hook(lambda *_: counts.update(["caption"]))
    run_request(pipeline, plan.spec.workload.bounds, plan.spec.workload.request)
    assert counts["caption"] == times


# Which pipeline


@pytest.mark.parametrize(("model", "named"), CLASSES.items())
def test_a_checkpoint_is_of_the_class_that_its_index_names(model: str, named: str) -> None:
    folder = ensure_tiny(pipeline=PIPELINES[named])
    plan = compile_plan(["model=checkpoint", f"model.source={folder}", "precision=fp32", *SMALL])
    assert (plan.pipeline_class, plan.spec.pipeline) == (named, PIPELINES[named])
    assert list(plan.components) == ["text_encoder", "vae", "transformer"]
    assert set(plan.spec.precision.components) == set(plan.components)
    again = Plan.from_values(json.loads(plan.to_json()), "plan.json")
    assert again == plan
    assert type(load_pipeline(again)).__name__ == named


def test_a_class_that_shares_the_checkpoint_is_taken_by_name() -> None:
    plan = planned("tiny_sana", "model.pipeline=SanaPAGPipeline", "precision=fp32", "workload.steps=1")
    assert plan.pipeline_class == "SanaPAGPipeline"
    folder = ensure_tiny(pipeline=SANA)
    source = ["model=checkpoint", f"model.source={folder}", "model.pipeline=SanaPAGPipeline"]
    assert compile_plan([*source, *SMALL]).pipeline_class == "SanaPAGPipeline"


@pytest.mark.usefixtures("tiny")
def test_a_controlnet_from_elsewhere_makes_a_plain_checkpoint_the_controlnet_pipeline(tiny: Path) -> None:
    folder, net = ensure_tiny(pipeline=SANA), f"model.components.controlnet={tiny / 'controlnet'}"
    for model in (["model=checkpoint", f"model.source={folder}"], ["model=tiny_sana"]):
        plan = compile_plan([*model, net, "precision=fp32", *SMALL])
        assert plan.pipeline_class == "SanaControlNetPipeline"
        assert list(plan.components) == list(SANA_CONTROLNET.names)
        assert type(load_pipeline(plan)).__name__ == "SanaControlNetPipeline"
    with pytest.raises(CheckpointError, match="a SANA-Sprint pipeline has no controlnet") as caught:
        compile_plan(["model=tiny_sprint", net])
    assert caught.value.where == "model.components.controlnet"


def _copied(tmp_path: Path, **changes: Any) -> Path:
    copy = Path(shutil.copytree(ensure_tiny(pipeline=SANA), tmp_path / "copy"))
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, **changes}))
    return copy


@pytest.mark.parametrize("named", ["SanaVideoPipeline", "FluxPipeline"])
def test_another_pipeline_is_refused_by_name_with_those_that_are_supported(tmp_path: Path, named: str) -> None:
    copy = _copied(tmp_path, _class_name=named)
    with pytest.raises(CheckpointError, match=f"holds a {named}, which is not supported: SanaControlNetPipeline, Sana"):
        compile_plan(["model=checkpoint", f"model.source={copy}"])
    with pytest.raises(InvalidSpecError, match=rf"'{named}' is not one of .*SanaSprintImg2ImgPipeline") as caught:
        compile_plan(["model=tiny_sana", f"model.pipeline={named}"])
    assert caught.value.where == "model.pipeline"


def test_a_checkpoint_that_was_made_for_another_class_is_refused(tmp_path: Path) -> None:
    plain, sprint = ensure_tiny(pipeline=SANA), ensure_tiny(pipeline=SANA_SPRINT)
    with pytest.raises(CheckpointError, match=r"is DPMSolver\w+, a SANA-Sprint pipeline works with SCMScheduler"):
        open_checkpoint(_model(plain, "SanaSprintPipeline"))
    copy = _copied(tmp_path, scheduler=["diffusers", "SCMScheduler"])
    with pytest.raises(CheckpointError, match="guidance_embeds=False, a SANA-Sprint pipeline needs guidance_embeds=T"):
        open_checkpoint(_model(copy, "SanaSprintPipeline"))
    with pytest.raises(CheckpointError, match="guidance_embeds=True, a SANA pipeline needs guidance_embeds=False"):
        open_checkpoint(_model(sprint, "SanaPipeline"))


def _model(folder: Path, pipeline: str) -> Any:
    return compose_spec(["model=checkpoint", f"model.source={folder}", f"model.pipeline={pipeline}"]).model


def test_a_pipeline_of_another_class_than_planned_is_not_placed() -> None:
    plan = planned("tiny_sana", "precision=fp32", "workload.steps=1")
    with pytest.raises(RunError, match="the plan is for a SanaPipeline, the pipeline is a SanaPAGPipeline"):
        place(diffusers_own(PIPELINES["SanaPAGPipeline"]), plan)


# Declarations


@pytest.mark.parametrize(("model", "steps"), [("tiny", 20), ("tiny_sana", 20), ("tiny_sprint", 2)])
def test_steps_that_are_not_given_are_the_pipeline_s_own(tiny: Path, model: str, steps: int) -> None:
    assert planned(model).spec.workload.steps == steps
    assert planned(model, "workload.steps=3").spec.workload.steps == 3


def test_steps_of_a_checkpoint_are_those_of_the_class_that_its_index_names() -> None:
    spec = compose_spec(["model=checkpoint", f"model.source={ensure_tiny(pipeline=SANA_SPRINT)}"])
    assert settled(spec).workload.steps == 2


def test_what_is_said_of_a_controlnet_is_left_out_where_there_is_none() -> None:
    places = ["hardware.device_map.controlnet=1", "hardware.device_map.vae=1"]
    plan = planned("tiny_sana", *THREE, *places, "precision=bf16", "workload.steps=1")
    assert isinstance(plan.spec.hardware, CustomMap)
    assert plan.spec.hardware.device_map == plan.device_map
    assert set(plan.device_map) == {"text_encoder", "vae", "transformer"}
    assert plan.knobs == [], "there is no image to encode once"
    pinned = planned("tiny_sana", "machine=2xrtx3060", "hardware.pin.controlnet=1", "hardware.pin.transformer=1")
    assert pinned.device_map["transformer"] == 1
    assert isinstance(pinned.spec.hardware, MultiGpuBalanced)
    assert set(pinned.spec.hardware.pin) == {"text_encoder", "vae", "transformer"}
    missing = ["hardware=custom_map", "machine=2xrtx3060", "~hardware.device_map.transformer"]
    with pytest.raises(InvalidSpecError, match="device_map has no entry for transformer"):
        planned("tiny_sana", *missing)


def test_equal_decisions_have_equal_digests_whatever_is_said_that_nobody_reads() -> None:
    common = ["machine=2xrtx3060", "workload.steps=2"]
    one, other = (planned("tiny_sprint", *common, *more) for more in ([], ["workload.negative_prompt=fog"]))
    assert one.digest == other.digest
    read = ["workload.strength=0.5"]
    assert planned("tiny_sprint_img2img", *common).digest != planned("tiny_sprint_img2img", *common, *read).digest
    assert planned("tiny_sana", *common).digest == planned("tiny_sana", *common, *read).digest


# Requests


@pytest.mark.parametrize("model", MODELS)
def test_several_requests_are_drawn_in_one_call(model: str) -> None:
    from PIL import Image

    from sana_deploy.run.asked import Drawing

    plan = planned(model, "precision=fp32", "workload.steps=2", "workload.strength=0.5")
    pipeline, work = load_pipeline(plan), plan.spec.workload
    requests = [work.request.model_copy(update={"prompt": word, "seed": seed}) for seed, word in enumerate("ab")]
    images = [Image.new("RGB", (96, 64), colour) if plan.pipeline.image else None for colour in ("red", "blue")]
    asked = [Drawing(one, image) for one, image in zip(requests, images, strict=True)]
    together, _ = generate(pipeline, work.bounds.model_copy(update={"batch": 2}), asked)
    for one, picture in zip(asked, together, strict=True):
        (alone,), _ = generate(pipeline, work.bounds, [one])
        assert np.abs(np.asarray(alone, np.int16) - np.asarray(picture, np.int16)).max() <= 2, "of a level of 255"
    assert together[0].tobytes() != together[1].tobytes()
