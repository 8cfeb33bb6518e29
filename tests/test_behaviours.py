"""What diffusers' own tests of this pipeline demand holds for a placed one, each component on a GPU of its own.

Changed weights, saving and offloads are in `test_changes.py`, kinds of requests in `test_around.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from around import STRIPES, Placed, Small, call, diffusers_own, place_apart, same
from diffusers import SanaControlNetPipeline

from sana_deploy.declare.compose import compose_spec


@pytest.fixture(scope="module")
def placed(tiny: Path) -> Placed:
    """One for all tests here: none changes it."""
    from conftest import SMALL

    return place_apart(tiny, lambda *overrides: compose_spec([*SMALL, *overrides]))


@pytest.fixture(scope="module")
def image(placed: Placed) -> np.ndarray:
    drawn: np.ndarray = placed.images()
    return drawn


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def test_inference_gives_a_lively_picture_that_the_control_image_steers(placed: Placed, image: np.ndarray) -> None:
    assert image.shape == (1, 64, 96, 3)
    assert image.min() >= 0
    assert image.max() <= 1
    assert image.std() > 0.05, "not flat"
    assert np.abs(image - placed.images(controlnet_conditioning_scale=0.0)).mean() > 0.005
    assert np.abs(image - placed.images(control_image=STRIPES.rotate(180))).mean() > 0


def test_a_tuple_holds_what_the_output_class_holds(placed: Placed, image: np.ndarray) -> None:
    (plain,) = placed.images(return_dict=False)
    assert same(plain, image)


@pytest.mark.parametrize("size", [2, 3])
def test_a_batch_has_as_many_images_as_prompts(placed: Placed, size: int) -> None:
    prompts = ["a lighthouse", "a red fox", "a very long prompt " * 9][:size]
    drawn = placed.images(prompt=prompts, generator=seeds(*range(size)))
    assert drawn.shape == (size, 64, 96, 3)
    assert not same(drawn[0], drawn[1])


def test_an_image_of_a_batch_is_the_image_alone(placed: Placed) -> None:
    prompts = ["a lighthouse", "a red fox"]
    together = placed.images(prompt=prompts, generator=seeds(4, 5))
    for number, prompt in enumerate(prompts):
        alone = placed.images(prompt=prompt, generator=seeds(4 + number))
        assert np.abs(together[number] - alone[0]).max() < 1e-3, "but for the last places"


def test_guidance_is_off_at_1_and_a_callback_that_raises_it_does_what_it_does_in_diffusers(
    placed: Placed, image: np.ndarray
) -> None:
    raised: list[float] = []

    def more(pipeline: Any, _: int, __: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        pipeline._guidance_scale += 1.0
        raised.append(pipeline.guidance_scale)
        return values

    steered = placed.images(num_inference_steps=3, callback_on_step_end=more)
    assert raised == [5.5, 6.5, 7.5]
    assert same(steered, call(placed.reference, num_inference_steps=3, callback_on_step_end=more))
    assert not same(placed.images(guidance_scale=1.0), image)
    assert not placed.pipeline.do_classifier_free_guidance


def test_a_callback_may_not_ask_for_other_tensors(placed: Placed) -> None:
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        placed.images(callback_on_step_end=lambda *_: {}, callback_on_step_end_tensor_inputs=["sigmas"])


def test_prompts_are_encoded_in_isolation(placed: Placed, image: np.ndarray) -> None:
    with placed.host:
        embeds, mask, negative, negative_mask = placed.pipeline.encode_prompt(
            "a lighthouse", max_sequence_length=32, complex_human_instruction=[]
        )
    assert embeds.device.type == "vgpu"
    given = placed.images(
        prompt=None, negative_prompt=None, prompt_embeds=embeds, prompt_attention_mask=mask,
        negative_prompt_embeds=negative, negative_prompt_attention_mask=negative_mask,
    )  # fmt: skip
    assert same(given, image)


def test_the_components_make_another_pipeline(placed: Placed, image: np.ndarray) -> None:
    other = SanaControlNetPipeline(**placed.pipeline.components)
    with placed.host:
        assert np.abs(call(other) - image).max() < 1e-4, "but for the last places: it encodes the control image twice"


@pytest.mark.parametrize("target", ["cpu", torch.float16, "vgpu:1"])
def test_the_whole_pipeline_is_not_moved_or_cast_past_its_map(placed: Placed, image: np.ndarray, target: Any) -> None:
    with placed.host, pytest.raises(ValueError, match=r"device mapping strategy.*reset_device_map"):
        placed.pipeline.to(target)
    assert same(placed.images(), image)


@pytest.mark.parametrize("sliced", [1, "auto"])
def test_attention_slicing_changes_nothing(tiny: Path, small: Small, image: np.ndarray, sliced: Any) -> None:
    other = place_apart(tiny, small)
    other.pipeline.enable_attention_slicing(slice_size=sliced)
    assert np.abs(other.images() - image).max() < 1e-3


def test_float16_is_close_to_float32_and_equal_to_diffusers(tiny: Path, small: Small, image: np.ndarray) -> None:
    other = place_apart(tiny, small, "precision=fp16")
    drawn = other.images()
    assert same(drawn, call(diffusers_own(tiny, dtype=torch.float16)))
    assert not same(drawn, image)
    assert np.abs(drawn - image).max() < 0.05
