"""Knobs are really applied: numbers stay where they must, memory is what the plan says, and all is undone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL.Image import Image

from sana_deploy import rehearse
from sana_deploy.api import compile_spec
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import RunError
from sana_deploy.rehearsal.rehearse import open_host, rehearse_request
from sana_deploy.run.generate import generate
from sana_deploy.run.hook import border_of
from sana_deploy.run.load import load_pipeline

Small = Callable[..., DeploySpec]
TWO = ["machine=virtual", "machine.gpus=2xrtx4090"]
APART = ["hardware=custom_map", "hardware.device_map={text_encoder: 0, vae: 0, transformer: 1, controlnet: 1}"]
LARGE = ["model=sana_1600m_controlnet", "workload.height=1024", "workload.width=1024"]


def most_levels(one: Sequence[Image], other: Sequence[Image]) -> int:
    """The largest difference of two sequences of images, of 255 levels."""
    pairs = zip(one, other, strict=True)
    return max(int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max()) for a, b in pairs)


@pytest.mark.usefixtures("short_prompts")
@pytest.mark.parametrize("precision", ["fp32", "mixed_bf16"])
@pytest.mark.parametrize(("knob", "levels"), [("encode_once", 1), ("vae_slicing", 1), ("text_encoder_offload", 0)])
def test_offload_changes_no_bit_of_the_image_and_one_image_at_a_time_rounds(
    small: Small, knob: str, levels: int, precision: str
) -> None:
    request = [f"precision={precision}", "workload.batch=2", *TWO, *APART]
    plain = rehearse(compile_spec(small(*request, "hardware.knobs=[]")), "numbers")
    saved = rehearse(compile_spec(small(*request, f"hardware.knobs=[{knob}]")), "numbers")
    assert most_levels(saved.images, plain.images) <= levels
    peaks = [run.report.gpus[0].phase_peaks["prepare"] for run in (saved, plain)]
    assert peaks[0] < peaks[1]


@pytest.mark.usefixtures("short_prompts")
def test_tiles_are_those_of_the_plan_and_change_little(small: Small) -> None:
    request = ["precision=fp32", "workload.height=64", "workload.width=1056", "workload.steps=1"]
    plan = compile_spec(small(*request, *TWO, *APART, "hardware.knobs=[vae_tiling]"))
    resolved = plan.resolve()
    pipeline = load_pipeline(resolved, host=open_host(resolved, "shapes"))
    vae = pipeline.vae
    assert vae.use_tiling
    assert (vae.tile_sample_min_height, vae.tile_sample_min_width) == (1024, 1024)
    assert (vae.tile_sample_stride_height, vae.tile_sample_stride_width) == (896, 896)
    tiled = rehearse(plan, "numbers").images[0]
    whole = rehearse(compile_spec(small(*request, *TWO, *APART)), "numbers").images[0]
    pixels, others = (np.asarray(image, float) for image in (tiled, whole))
    assert others.std() > 20, "a picture, not a flat colour"
    apart = np.abs(pixels - others).mean(axis=(0, 2))
    assert apart.max() > 0
    assert apart[:800].mean() < 1, "of 255 levels, away from the seam"
    assert apart.mean() < 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpus", "knobs", "size"),
    [
        ("1xrtx3060", ["encode_once", "text_encoder_offload"], 1024),
        ("2x8GiB", ["encode_once"], 1024),
        ("2xrtx3060", ["encode_once"], 2048),
        ("2xrtx3060", ["encode_once", "vae_slicing", "vae_tiling"], 4096),
    ],
)
def test_plans_with_knobs_hold_in_rehearsal_within_3_percent(
    small: Small, gpus: str, knobs: list[str], size: int
) -> None:
    side = [f"workload.height={size}", f"workload.width={size}"]
    every = "hardware.allow=[encode_once,vae_slicing,split_controlnet,text_encoder_offload,vae_tiling]"
    plan = compile_spec(small(*LARGE, *side, "machine=virtual", f"machine.gpus={gpus}", every))
    assert plan.knobs == knobs
    report = rehearse(plan).report
    for gpu in report.gpus:
        assert abs(gpu.planned_error) < 0.03
        assert gpu.peak_bytes <= gpu.capacity_bytes
    planned = {(moved.dst, moved.tensor): moved.bytes_per_image for moved in plan.transfers if moved.bytes_per_image}
    rehearsed = {(int(m.dst[-1]), m.tensor): m.bytes_per_image for m in report.transfers}
    assert {key: value for key, value in rehearsed.items() if key[1] == "text_encoder weights"} == {
        key: value for key, value in planned.items() if key[1] == "text_encoder weights"
    }


def test_a_map_with_tiling_alone_takes_one_image_at_a_time_as_its_plan_counts(small: Small) -> None:
    spec = small(*TWO, *APART, "hardware.knobs=[vae_tiling]", "workload.batch=2")
    resolved = compile_spec(spec).resolve()
    pipeline = load_pipeline(resolved, host=open_host(resolved, "shapes"))
    assert (pipeline.vae.use_slicing, pipeline.vae.use_tiling) == (True, True)


def test_offloaded_weights_come_once_per_request_and_leave_again(small: Small) -> None:
    plan = compile_spec(small(*TWO, *APART, "hardware.knobs=[text_encoder_offload]"))
    resolved = plan.resolve()
    host = open_host(resolved, "shapes")
    pipeline = load_pipeline(resolved, host=host)
    before = dict(pipeline.text_encoder.named_parameters())
    assert host.ledger.weights[0] == pytest.approx(plan.components["vae"].weights_bytes, rel=0.2)
    for _ in range(2):
        rehearsed = rehearse_request(pipeline, resolved, host)
        weights = plan.components["text_encoder"].weights_bytes
        assert rehearsed.measured.bytes_moved["cpu->vgpu:0"] == weights
    after = dict(pipeline.text_encoder.named_parameters())
    assert all(after[name] is value for name, value in before.items()), "the module's own parameters are back"
    assert host.ledger.activations[0] < 2**20


@pytest.mark.usefixtures("short_prompts")
def test_an_error_while_weights_visit_leaves_the_pipeline_usable(small: Small, tiny: Path) -> None:
    spec = small("precision=fp32", *TWO, *APART, "hardware.knobs=[text_encoder_offload]")
    resolved = compile_spec(spec).resolve()
    host = open_host(resolved)
    pipeline = load_pipeline(resolved, host=host)
    border = border_of(pipeline)

    def fail(event: str, place: str) -> None:
        if (event, place) == ("leave", "text_encoder.forward"):
            raise RuntimeError("made to fail")

    border.observers.append(fail)
    with pytest.raises(RunError, match="made to fail"):
        rehearse_request(pipeline, resolved, host)
    border.observers.remove(fail)
    again = rehearse_request(pipeline, resolved, host).images[0]
    assert again.tobytes() == rehearse(compile_spec(spec)).images[0].tobytes()
    pipeline.reset_device_map()
    assert all(value.device == torch.device("cpu") for value in pipeline.text_encoder.parameters())


@pytest.mark.usefixtures("short_prompts")
def test_sliced_latents_are_equal_to_the_last_places(small: Small) -> None:
    spec = small("precision=fp32", "workload.batch=2")
    pipeline = load_pipeline(compile_spec(spec))
    plain, _ = generate(pipeline, spec.workload.bounds, spec.workload.request)
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = pipeline.vae.encode(pixels).latent
        pipeline.vae.enable_slicing()
        torch.testing.assert_close(pipeline.vae.encode(pixels).latent, whole, rtol=1e-4, atol=1e-4)
    sliced, _ = generate(pipeline, spec.workload.bounds, spec.workload.request)
    assert most_levels(sliced, plain) <= 1
