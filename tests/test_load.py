"""Applying a plan: the numbers are diffusers' own, bit for bit, and diffusers' guards go on working."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SanaControlNetPipeline
from drawing import draw, encode_one_at_a_time

from sana_deploy import load_pipeline, place
from sana_deploy.api import compile_spec
from sana_deploy.declare.pipelines import COMPONENTS
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import CheckpointError, PlanError, RunError
from sana_deploy.plan.artifact import Plan
from sana_deploy.run.hook import BorderHook

Small = Callable[..., DeploySpec]


@pytest.mark.parametrize("precision", ["fp16", "mixed_bf16", "bf16", "fp32"])
def test_the_image_is_that_of_diffusers_own_pipeline_bit_for_bit(tiny: Path, small: Small, precision: str) -> None:
    spec = small(f"precision={precision}")
    ours = load_pipeline(compile_spec(spec))
    dtypes = {name: getattr(torch, dtype) for name, dtype in spec.precision.components.items()}
    theirs = SanaControlNetPipeline.from_pretrained(tiny, dtype=dtypes)
    for name in COMPONENTS:
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype == dtypes[name]
    assert np.array_equal(draw(ours, spec), draw(encode_one_at_a_time(theirs), spec))
    exact = load_pipeline(compile_spec(small(f"precision={precision}", "hardware.allow=[]")))
    assert np.array_equal(draw(exact, spec), draw(SanaControlNetPipeline.from_pretrained(tiny, dtype=dtypes), spec))


def test_it_is_the_ordinary_pipeline_with_one_hook_per_component(small: Small, tmp_path: Path) -> None:
    pipeline = load_pipeline(compile_spec(small()))
    assert type(pipeline) is SanaControlNetPipeline
    for name in COMPONENTS:
        modules = getattr(pipeline, name).modules()
        assert [type(module._hf_hook) for module in modules if hasattr(module, "_hf_hook")] == [BorderHook]
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "SanaControlNetPipeline"


def test_diffusers_guards_hold_and_reset_device_map_undoes(small: Small) -> None:
    spec = small()
    pipeline = load_pipeline(compile_spec(spec))
    before = draw(pipeline, spec)
    assert pipeline.hf_device_map == dict.fromkeys(COMPONENTS, "cpu")
    with pytest.raises(ValueError, match="device mapping strategy"):
        pipeline.to("cpu")
    with pytest.raises(ValueError, match="device mapping strategy"):
        pipeline.enable_model_cpu_offload()
    pipeline.reset_device_map()
    assert not any(hasattr(getattr(pipeline, name), "_hf_hook") for name in COMPONENTS)
    assert "encode" not in pipeline.vae.__dict__
    pipeline.to("cpu")
    assert np.array_equal(draw(encode_one_at_a_time(pipeline), spec), before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_pipeline_in_memory_is_placed_and_gives_the_same_image(tiny: Path, small: Small, precision: str) -> None:
    spec = small(f"precision={precision}")
    plan = compile_spec(spec)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    pipeline = SanaControlNetPipeline.from_pretrained(tiny, dtype=dtype)
    before = draw(encode_one_at_a_time(SanaControlNetPipeline.from_pretrained(tiny, dtype=dtype)), spec)
    assert place(pipeline, plan.resolve()) is pipeline
    assert np.array_equal(draw(pipeline, spec), before)
    with pytest.raises(RunError, match="already has a device map"):
        place(pipeline, plan.resolve())


def test_a_controlnet_published_apart_comes_under_the_same_map(tiny: Path, small: Small, tmp_path: Path) -> None:
    shutil.copytree(tiny / "controlnet", tmp_path / "apart")
    spec = small("precision=fp32", f"model.components.controlnet={tmp_path / 'apart'}")
    pipeline = load_pipeline(compile_spec(spec))
    assert isinstance(pipeline.controlnet._hf_hook, BorderHook)
    assert pipeline.hf_device_map["controlnet"] == "cpu"
    plain = load_pipeline(compile_spec(small("precision=fp32")))
    assert np.array_equal(draw(pipeline, spec), draw(plain, spec))


def test_the_control_image_steers_the_picture(small: Small) -> None:
    spec = small("precision=fp32")
    pipeline = load_pipeline(compile_spec(spec))
    steered, free = draw(pipeline, spec), draw(pipeline, spec, controlnet_conditioning_scale=0.0)
    assert np.abs(steered - free).mean() > 0.005


def test_callbacks_may_change_latents_and_embeddings_given_by_the_caller_work(small: Small) -> None:
    spec = small("precision=fp32")
    pipeline = load_pipeline(compile_spec(spec))
    before = draw(pipeline, spec)

    def zero(_: Any, step: int, __: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"latents": torch.zeros_like(values["latents"])}

    assert not np.array_equal(draw(pipeline, spec, callback_on_step_end=zero), before)
    embeds, mask, negative, negative_mask = pipeline.encode_prompt(
        spec.workload.prompt, complex_human_instruction=[], max_sequence_length=32
    )
    given = draw(
        pipeline, spec, prompt=None, negative_prompt=None, prompt_embeds=embeds, prompt_attention_mask=mask,
        negative_prompt_embeds=negative, negative_prompt_attention_mask=negative_mask,
    )  # fmt: skip
    assert np.array_equal(given, draw(pipeline, spec, complex_human_instruction=[]))


def test_a_pipeline_that_nobody_holds_gives_its_memory_back_also_where_another_was_loaded_since(small: Small) -> None:
    plan = compile_spec(small())
    first = load_pipeline(plan)
    module = weakref.ref(first.transformer)
    second = load_pipeline(plan)
    del first
    gc.collect()
    assert module() is None
    assert second.transformer is not None


def test_a_checkpoint_that_changed_since_compiling_is_refused(tiny: Path, small: Small, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "copy"))
    plan = compile_spec(small("model=checkpoint", f"model.source={folder}"))
    config = folder / "vae" / "config.json"
    config.write_text(config.read_text().replace("0.41407", "0.5"))
    with pytest.raises(PlanError, match="changed since the plan was compiled"):
        load_pipeline(plan)


def test_weights_that_are_not_published_are_said_so(small: Small) -> None:
    with pytest.raises(CheckpointError, match="no weights of sana_1600m_controlnet"):
        load_pipeline(compile_spec(small("model=sana_1600m_controlnet")))


def test_a_saved_plan_loads_the_same_pipeline(small: Small, tmp_path: Path) -> None:
    spec = small()
    plan = compile_spec(spec)
    again = Plan.load(plan.save(tmp_path / "plan.json"))
    assert np.array_equal(draw(load_pipeline(again), spec), draw(load_pipeline(plan), spec))


def test_pickled_weights_load_where_they_are_accepted_and_run_no_code(tiny: Path, small: Small, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = Path(shutil.copytree(tiny, tmp_path / "copy"))
    path = folder / "controlnet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    chosen = ["precision=fp32", "model=checkpoint", f"model.source={folder}"]
    with pytest.raises(CheckpointError, match="only pickled weights") as caught:
        compile_spec(small(*chosen))
    assert "model.allow_pickle=true" in caught.value.hint
    spec = small(*chosen, "model.allow_pickle=true")
    pipeline = load_pipeline(compile_spec(spec))
    assert np.array_equal(draw(pipeline, spec), draw(load_pipeline(compile_spec(small("precision=fp32"))), spec))

    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return (tmp_path / "ran").touch, ()

    torch.save({"weight": Malicious()}, path.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match="holds more than tensors, or is damaged"):
        compile_spec(spec)
    assert not (tmp_path / "ran").exists()
