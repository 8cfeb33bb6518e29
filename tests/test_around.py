"""What people do with a pipeline goes on working once it is placed: the same images, on GPUs that all differ.

Every component sits on a virtual GPU of its own, in numbers; the reference is diffusers' pipeline on the CPU, which
encodes control images one at a time as the plan does. The cases follow what diffusers' own tests of it check.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from around import EACH_ALONE, FOUR, STRIPES, Placed, Small, call, diffusers_own, place_apart, same
from diffusers import FlowMatchEulerDiscreteScheduler, SanaControlNetPipeline

from sana_deploy import load_pipeline, place, unplace
from sana_deploy.api import compile_spec
from sana_deploy.declare.pipelines import COMPONENTS
from sana_deploy.errors import RunError
from sana_deploy.rehearsal.rehearse import open_host
from sana_deploy.run.hook import border_of
from sana_deploy.run.traffic import by_pair

INSTRUCTION = inspect.signature(SanaControlNetPipeline.__call__).parameters["complex_human_instruction"].default
SWAPPED = "hardware.device_map={text_encoder: 3, vae: 2, transformer: 1, controlnet: 0}"


@pytest.fixture
def placed(tiny: Path, small: Small) -> Iterator[Placed]:
    apart = place_apart(tiny, small)
    yield apart
    host = apart.host
    left = [held - host.pools[gpu] for gpu, held in enumerate(host.ledger.activations)]
    assert all(one < 2**18 for one in left), "live bytes are back to the weights and what graphs keep"


@pytest.mark.parametrize(
    "options",
    [
        dict(prompt=["a lighthouse", "a red fox"]),
        dict(num_images_per_prompt=2),
        dict(prompt=["a lighthouse", "a red fox"], num_images_per_prompt=2, control_image=[STRIPES, STRIPES]),
        dict(guidance_scale=1.0),
        dict(negative_prompt="fog", controlnet_conditioning_scale=0.5),
        dict(output_type="latent"),
        dict(output_type="pt"),
        dict(output_type="pil"),
        dict(control_image=torch.ones(1, 3, 64, 96)),
        dict(timesteps=None, num_inference_steps=3, max_sequence_length=64, complex_human_instruction=None),
        dict(max_sequence_length=300, complex_human_instruction=INSTRUCTION),
    ],
    ids=lambda options: ",".join(options),
)
def test_requests_of_all_kinds_give_the_images_of_the_cpu(placed: Placed, options: dict[str, Any]) -> None:
    def seeded() -> dict[str, Any]:
        return {**options, "generator": torch.Generator().manual_seed(3)}

    assert same(placed.images(**seeded()), call(placed.reference, **seeded()))


def test_a_generator_per_image(placed: Placed) -> None:
    def seeds() -> dict[str, Any]:
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        return dict(prompt=["a lighthouse", "a red fox"], generator=generators)

    assert same(placed.images(**seeds()), call(placed.reference, **seeds()))


def test_embeddings_and_latents_of_the_caller(placed: Placed) -> None:
    reference = placed.reference
    embeds, mask, negative, negative_mask = reference.encode_prompt("a red fox", complex_human_instruction=[])
    given = dict(
        prompt=None, prompt_embeds=embeds, prompt_attention_mask=mask, negative_prompt=None,
        negative_prompt_embeds=negative, negative_prompt_attention_mask=negative_mask,
        latents=torch.randn(1, 32, 2, 3, generator=torch.Generator().manual_seed(5)),
    )  # fmt: skip
    there = {
        key: placed.host.put(value, torch.device("vgpu", 2)) if isinstance(value, torch.Tensor) else value
        for key, value in given.items()
    }
    assert same(placed.images(**there), call(reference, **given))


def test_callbacks_change_latents_and_embeddings_between_steps(placed: Placed) -> None:
    def change(_: Any, step: int, __: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if step == 0:
            return {"latents": values["latents"] * 0.5, "prompt_embeds": values["prompt_embeds"] * 0.9}
        return {}

    options = dict(
        num_inference_steps=3, callback_on_step_end=change,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )  # fmt: skip
    changed = placed.images(**options)
    assert same(changed, call(placed.reference, **{**options, "generator": torch.Generator().manual_seed(0)}))
    assert not same(changed, call(placed.reference, num_inference_steps=3))


def test_callbacks_see_every_tensor_that_diffusers_promises(placed: Placed) -> None:
    seen: set[str] = set()

    def look(pipeline: Any, step: int, __: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.update(values)
        if step == pipeline.num_timesteps - 1:
            values["latents"] = torch.zeros_like(values["latents"])
        return values

    options = dict(callback_on_step_end=look,
                   callback_on_step_end_tensor_inputs=placed.pipeline._callback_tensor_inputs)  # fmt: skip
    assert same(placed.images(**options), call(placed.reference, **options))
    assert seen == set(placed.pipeline._callback_tensor_inputs)


def test_attention_slicing_and_a_plain_tuple(placed: Placed) -> None:
    for pipeline in (placed.pipeline, placed.reference):
        pipeline.enable_attention_slicing(slice_size=1)
    ours = placed.images(num_inference_steps=1, return_dict=False)
    assert type(ours) is tuple
    assert len(ours) == 1
    assert same(ours[0], call(placed.reference, num_inference_steps=1))


def test_a_placed_pipeline_saves_what_it_was_loaded_from(tiny: Path, small: Small, tmp_path: Path) -> None:
    pipeline = load_pipeline(compile_spec(small("precision=fp32")))
    pipeline.save_pretrained(tmp_path)
    assert same(call(diffusers_own(tmp_path)), call(pipeline))


def test_embeddings_changed_in_place_cross_anew(placed: Placed) -> None:
    def change(_: Any, step: int, __: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        values["prompt_embeds"].mul_(0.5)
        return {}

    options = dict(num_inference_steps=3, callback_on_step_end=change,
                   callback_on_step_end_tensor_inputs=["prompt_embeds"])  # fmt: skip
    assert same(placed.images(**options), call(placed.reference, **options))


def test_lora_on_the_transformer_loads_and_unloads(placed: Placed) -> None:
    width = placed.reference.transformer.config.num_attention_heads * 32
    generator = torch.Generator().manual_seed(1)
    weights = {
        f"transformer.transformer_blocks.0.attn1.to_q.lora_{side}.weight": torch.randn(*shape, generator=generator)
        for side, shape in (("A", (2, width)), ("B", (width, 2)))
    }
    before = placed.images()
    placed.reference.load_lora_weights(dict(weights))
    with placed.host:
        placed.pipeline.load_lora_weights(dict(weights))
    steered = placed.images()
    assert same(steered, call(placed.reference))
    assert not same(steered, before)
    with placed.host:
        placed.pipeline.unload_lora_weights()
    placed.reference.unload_lora_weights()
    assert same(placed.images(), call(placed.reference))


def test_another_scheduler_and_vae_tiling(placed: Placed) -> None:
    for pipeline in (placed.pipeline, placed.reference):
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        pipeline.vae.enable_tiling(64, 64, 32, 32)
    wide = dict(width=192, control_image=STRIPES.resize((192, 64)))
    assert same(placed.images(**wide), call(placed.reference, **wide))


@pytest.mark.slow
def test_a_hundredth_call_takes_no_more_than_the_second(small: Small) -> None:
    resolved = compile_spec(small("precision=fp32", *FOUR, EACH_ALONE)).resolve()
    host = open_host(resolved, "shapes")
    pipeline = load_pipeline(resolved, host=host)
    live = []
    with host:
        embeds, mask, negative, negative_mask = pipeline.encode_prompt("a lighthouse", max_sequence_length=8)
        for _ in range(100):
            call(pipeline, height=32, width=32, num_inference_steps=1, prompt=None, prompt_embeds=embeds,
                 prompt_attention_mask=mask, negative_prompt=None, negative_prompt_embeds=negative,
                 negative_prompt_attention_mask=negative_mask, output_type="latent")  # fmt: skip
            live.append([host.ledger.live(gpu) for gpu in range(4)])
    assert live[1] == live[-1]


def test_two_pipelines_in_one_process(placed: Placed, small: Small) -> None:
    resolved = compile_spec(small("precision=fp32", *FOUR, SWAPPED)).resolve()
    host = open_host(resolved)
    other = load_pipeline(resolved, host=host)
    first = placed.images()
    with host:
        second = call(other)
    assert same(first, second)
    assert same(placed.images(), first)
    one, two = border_of(placed.pipeline), border_of(other)
    assert set(by_pair(one.state.traffic.moved)) != set(by_pair(two.state.traffic.moved))


@pytest.mark.parametrize("where", ["text_encoder", "vae", "controlnet", "transformer"])
def test_an_error_in_the_middle_leaves_the_pipeline_usable(placed: Placed, where: str) -> None:
    before = placed.images()
    module = getattr(placed.pipeline, where)
    inner = next(child for child in module.modules() if not list(child.children()))

    def fail(*_: Any) -> None:
        raise RuntimeError("made to fail")

    handle = inner.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="made to fail"):
        placed.images()
    handle.remove()
    assert same(placed.images(), before)


def test_unplacing_gives_back_the_untouched_pipeline(tiny: Path, small: Small) -> None:
    pipeline = SanaControlNetPipeline.from_pretrained(tiny)
    before = {name: dict(getattr(pipeline, name).__dict__) for name in COMPONENTS}
    own, image = set(pipeline.__dict__), call(pipeline)
    resolved = compile_spec(small("precision=fp32", "hardware.allow=[]")).resolve()
    assert unplace(place(pipeline, resolved)) is pipeline
    assert type(pipeline) is SanaControlNetPipeline
    assert pipeline.hf_device_map is None
    assert not {"encode_prompt", "vae"} & (set(pipeline.__dict__) - own)
    for name, attributes in before.items():
        after = getattr(pipeline, name).__dict__
        assert {key: value for key, value in after.items() if key != "hf_device_map"} == attributes, name
    assert same(call(pipeline), image)
    with pytest.raises(RunError, match="is not placed"):
        unplace(pipeline)
    assert call(place(pipeline, resolved)).shape == image.shape, "and it can be placed again"


def test_a_pipeline_offloaded_otherwise_is_not_placed_over(tiny: Path, small: Small) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    pipeline = SanaControlNetPipeline.from_pretrained(tiny)
    add_hook_to_module(pipeline.vae.decoder, ModelHook())
    with pytest.raises(RunError, match="vae has hooks of another placement"):
        place(pipeline, compile_spec(small("precision=fp32")).resolve())


def test_compiled_blocks_give_the_same_image(small: Small) -> None:
    pipeline = load_pipeline(compile_spec(small("precision=fp32")))
    before = call(pipeline)
    for block in pipeline.transformer.transformer_blocks:
        block.compile(backend="eager", fullgraph=True)
    assert same(call(pipeline), before)
