"""What diffusers' own tests of SANA's other pipelines demand holds for placed ones, each component on a GPU of its own.

The reference is diffusers' pipeline on the CPU. `test_behaviours.py` is of the pipeline with a ControlNet.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from around import STRIPES
from family import GUIDED, MODELS, Placed, call, diffusers_own, place_apart

from sana_deploy import unplace


@pytest.fixture(params=MODELS, scope="module")
def placed(request: Any) -> Placed:
    """One for all tests here: none changes it for good."""
    return place_apart(request.param)


@pytest.fixture(scope="module")
def image(placed: Placed) -> np.ndarray:
    return placed.same()


@pytest.fixture(autouse=True)
def as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "placed" not in request.fixturenames:
        return
    host = request.getfixturevalue("placed").host
    left = [held - host.pools[gpu] for gpu, held in enumerate(host.ledger.activations)]
    assert all(one < 2**18 for one in left), "live bytes are back to the weights and what graphs keep"


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def test_inference_gives_a_lively_picture(image: np.ndarray) -> None:
    assert image.shape == (1, 64, 96, 3)
    assert (image.min() >= 0, image.max() <= 1) == (True, True)
    assert image.std() > 0.05, "not flat"


def test_a_tuple_holds_what_the_output_class_holds(placed: Placed, image: np.ndarray) -> None:
    (plain,) = placed.images(return_dict=False)
    assert np.array_equal(plain, image)


@pytest.mark.parametrize("options", [
    dict(prompt=["a lighthouse", "a red fox"]),
    dict(num_images_per_prompt=2),
    dict(prompt=["a lighthouse", "a red fox"], num_images_per_prompt=2),
    dict(guidance_scale=1.0),
    dict(output_type="latent"),
    dict(output_type="pt"),
    dict(num_inference_steps=3, complex_human_instruction=None, max_sequence_length=64),
    dict(num_inference_steps=1),
], ids=lambda options: ",".join(options))  # fmt: skip
def test_requests_of_all_kinds_give_the_images_of_the_cpu(placed: Placed, options: dict[str, Any]) -> None:
    if "strength" in options or (placed.model == "tiny_sprint_img2img" and options.get("num_inference_steps") == 1):
        options = {**options, "strength": 1.0}
    placed.same(**options, generator=torch.Generator().manual_seed(3))


def test_a_batch_has_as_many_images_as_prompts_and_each_is_the_image_alone(placed: Placed) -> None:
    prompts = ["a lighthouse", "a red fox"]
    together = placed.same(prompt=prompts, generator=seeds(4, 5))
    assert together.shape == (2, 64, 96, 3)
    for number, prompt in enumerate(prompts):
        alone = placed.images(prompt=prompt, generator=seeds(4 + number))
        assert np.abs(together[number] - alone[0]).max() < 1e-3, "but for the last places"


def test_a_callback_sees_every_tensor_that_diffusers_promises_and_changes_them(placed: Placed) -> None:
    seen: set[str] = set()

    def change(pipeline: Any, step: int, _: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.update(values)
        found = {"latents": values["latents"] * 0.5, "prompt_embeds": values["prompt_embeds"] * 0.9}
        return found if step == 0 else {}

    names = placed.pipeline._callback_tensor_inputs
    options = dict(num_inference_steps=3, callback_on_step_end=change, callback_on_step_end_tensor_inputs=names)
    if placed.model == "tiny_sprint_img2img":
        options["strength"] = 1.0
    changed = placed.same(**options)
    assert seen == set(names)
    assert not np.array_equal(changed, placed.images(**{**options, "callback_on_step_end": None}))
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        placed.images(callback_on_step_end=change, callback_on_step_end_tensor_inputs=["sigmas"])


def test_an_interrupt_ends_the_loop_as_in_diffusers(placed: Placed) -> None:
    done: list[int] = []

    def stop(pipeline: Any, step: int, _: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        done.append(step)
        pipeline._interrupt = True
        return values

    options = dict(num_inference_steps=4, callback_on_step_end=stop, strength=1.0)
    if placed.model != "tiny_sprint_img2img":
        del options["strength"]
    placed.same(**options)
    assert done == [0, 0], "ours and theirs"


def test_prompts_are_encoded_in_isolation(placed: Placed, image: np.ndarray) -> None:
    with placed.host:
        found = placed.pipeline.encode_prompt("a lighthouse", max_sequence_length=32, complex_human_instruction=[])
    assert found[0].device.type == "vgpu"
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    given = dict(zip(names, found, strict=False), prompt=None)
    if placed.model in GUIDED:
        given["negative_prompt"] = None
    assert np.array_equal(placed.images(**given), image)


def test_latents_of_the_caller_are_taken(placed: Placed) -> None:
    latents = torch.randn(1, 32, 2, 3, generator=torch.Generator().manual_seed(5))
    there = placed.host.put(latents, torch.device("vgpu", 2))
    assert np.array_equal(placed.images(latents=there), call(placed.reference, latents=latents))


def test_the_whole_pipeline_is_not_moved_or_cast_past_its_map(placed: Placed) -> None:
    for target in ("cpu", torch.float16, "vgpu:1"):
        with placed.host, pytest.raises(ValueError, match=r"device mapping strategy.*reset_device_map"):
            placed.pipeline.to(target)


def test_the_components_make_another_pipeline(placed: Placed, image: np.ndarray) -> None:
    other = type(placed.pipeline)(**placed.pipeline.components)
    with placed.host:
        assert np.array_equal(call(other), image)


def test_tiles_of_the_vae_are_those_of_diffusers(placed: Placed) -> None:
    sides = (placed.pipeline, placed.reference)
    for pipeline in sides:
        pipeline.vae.enable_tiling(64, 64, 32, 32)
    placed.same(width=192)
    for pipeline in sides:
        pipeline.vae.disable_tiling()


def test_an_error_in_the_middle_leaves_the_pipeline_usable(placed: Placed, image: np.ndarray) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("made to fail")

    handle = placed.pipeline.transformer.proj_out.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="made to fail"):
        placed.images()
    handle.remove()
    if placed.model == "tiny_pag":  # diffusers leaves its processors where a call ends in an error
        placed.pipeline.transformer.set_attn_processor(placed.reference.transformer.attn_processors)
    assert np.array_equal(placed.images(), image)


@pytest.mark.parametrize("model", MODELS)
def test_float16_is_equal_to_diffusers_and_unplacing_gives_the_class_s_own_methods_back(model: str) -> None:
    other = place_apart(model, "precision=fp16")
    theirs = diffusers_own(other.plan.pipeline, torch_dtype=torch.float16)
    assert np.array_equal(other.images(), call(theirs))
    unplace(other.pipeline)
    assert other.pipeline.hf_device_map is None
    assert not {"encode_prompt", "prepare_image"} & set(vars(other.pipeline))


def test_perturbed_attention_is_switched_off_and_applied_elsewhere_as_in_diffusers() -> None:
    placed = place_apart("tiny_pag")
    perturbed, off = placed.same(), placed.same(pag_scale=0.0)
    assert not np.array_equal(perturbed, off)
    assert np.array_equal(off, call(diffusers.SanaPipeline(**placed.reference.components))), "it is plain SANA then"
    for pipeline in (placed.pipeline, placed.reference):
        pipeline.set_pag_applied_layers(["transformer_blocks.[12]"], pag_attn_processors=pipeline._pag_attn_processors)
    assert not np.array_equal(placed.same(), perturbed)
    assert not np.array_equal(placed.same(pag_adaptive_scale=0.001), placed.images())


def test_the_image_and_its_strength_steer_an_image_to_image_pipeline() -> None:
    placed = place_apart("tiny_sprint_img2img")
    base = placed.same()
    assert not np.array_equal(base, placed.same(image=STRIPES.rotate(180)))
    pixels = torch.linspace(0, 1, 3 * 64 * 96).reshape(1, 3, 64, 96)
    assert not np.array_equal(base, placed.same(image=pixels))
    many = dict(prompt=["a lighthouse", "a red fox"], image=[STRIPES, STRIPES.rotate(180)])
    assert placed.same(**many).shape == (2, 64, 96, 3)
    drawn = [placed.same(num_inference_steps=4, strength=strength) for strength in (0.25, 0.5, 0.75, 1.0)]
    assert len({one.tobytes() for one in drawn}) == 4
    with pytest.raises(ValueError, match="strength should in"):
        placed.images(strength=1.5)


def test_a_sprint_takes_its_own_timesteps_and_refuses_what_its_scheduler_does_not_take() -> None:
    placed = place_apart("tiny_sprint")
    assert not np.array_equal(placed.same(max_timesteps=1.2), placed.same())
    assert not np.array_equal(placed.same(intermediate_timesteps=0.9), placed.same())
    with pytest.raises(ValueError, match="Intermediate timesteps for SCM"):
        placed.images(num_inference_steps=3, intermediate_timesteps=1.3)
    assert not np.array_equal(placed.same(guidance_scale=7.0), placed.same()), "guidance is an input"
