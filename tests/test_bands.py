"""The VAE in bands of rows: planned before tiles, as few as fit, with the bytes that it takes and the same pixels."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC
from hypothesis import given, settings
from hypothesis import strategies as st

from sana_deploy import load_pipeline, rehearse, unplace
from sana_deploy.api import compile_spec
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.formats import Dtype, Format
from sana_deploy.declare.knobs import BANDS
from sana_deploy.declare.pipelines import COMPONENTS
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import InfeasibleError
from sana_deploy.facts.checkpoint import open_checkpoint
from sana_deploy.plan.admission import Admission
from sana_deploy.plan.artifact import Plan
from sana_deploy.plan.bands import band_height, bands_in
from sana_deploy.plan.passing import VaeMode
from sana_deploy.plan.profile import profile_pipeline
from sana_deploy.rehearsal.calibrate import calibrate
from sana_deploy.rehearsal.measure import Point, Profiler
from sana_deploy.rehearsal.rehearse import open_host
from sana_deploy.report.wording import knob_sentence
from sana_deploy.run.rows.exchange import Group
from sana_deploy.run.rows.one_device import METHODS, bands_of, use_bands

Small = Callable[..., DeploySpec]
LARGE = ("model=sana_1600m_controlnet", "machine=virtual")
ALONE = ("hardware=custom_map", "hardware.device_map={text_encoder: 0, vae: 1, transformer: 0, controlnet: 0}")
TWO = ("machine=virtual", "machine.gpus=2xrtx4090")


def sized(height: int, width: int | None = None) -> tuple[str, str]:
    return f"workload.height={height}", f"workload.width={width or height}"


@cache
def profiler(model: str, dtype: Dtype) -> Profiler:
    checkpoint = open_checkpoint(compose_spec([f"model={model}"]).model)
    single = {name: 1 for name in COMPONENTS if name != "vae"}
    return Profiler(checkpoint, dict.fromkeys(COMPONENTS, Format(dtype)), single)


def check_needs(model: str, dtype: Dtype, point: Point, guided: bool) -> None:
    """Measure the VAE at a point and compare it with what is planned."""
    scale = f"workload.guidance_scale={4.5 if guided else 1.0}"
    sides = sized(point.side, point.width)
    spec = compose_spec([f"model={model}", *sides, f"workload.batch={point.batch}", scale])
    checkpoint = open_checkpoint(spec.model)
    formats = dict.fromkeys(COMPONENTS, Format(dtype))
    profile = profile_pipeline(checkpoint, spec.workload.bounds, formats, calibrate)
    vae = profile.with_vae(sliced=point.mode.sliced, bands=point.mode.bands).components["vae"]
    measured = profiler(model, dtype).run(point, guided)
    for phase in ("prepare", "decode"):
        found = measured["vae", phase]
        assert vae.activations[phase] == pytest.approx(found.activation_bytes, rel=0.005, abs=2**17), phase
        assert vae.work[phase].flops == pytest.approx(found.work.flops, rel=0.01, abs=1e6), phase
        assert vae.work[phase].operations == pytest.approx(found.work.operations, rel=0.15), phase


@settings(max_examples=4, deadline=None)
@given(
    st.builds(VaeMode, sliced=st.booleans(), bands=st.sampled_from(BANDS)),
    st.integers(2, 20), st.integers(1, 12), st.integers(1, 3), st.sampled_from(["float32", "bfloat16"]), st.booleans(),
)  # fmt: skip
def test_the_bytes_of_bands_are_planned_within_half_a_percent_whatever_the_size(
    tiny: object, mode: VaeMode, rows: int, columns: int, batch: int, dtype: Dtype, guided: bool
) -> None:
    check_needs("tiny", dtype, Point(32 * rows, batch, mode, width=32 * columns), guided)


@pytest.mark.parametrize(("rows", "columns", "bands"), [(13, 7, 2), (33, 20, 8)])
def test_the_bytes_of_the_published_autoencoder_are_planned_within_half_a_percent(
    rows: int, columns: int, bands: int
) -> None:
    check_needs("sana_1600m_controlnet", "bfloat16", Point(32 * rows, 1, VaeMode(bands=bands), 32 * columns), False)


def test_bands_are_dealt_as_they_are_planned() -> None:
    for rows, count in itertools.product(range(1, 70), BANDS):
        bands = Group([torch.device("cpu")] * count).bands(rows)
        assert len(bands) == bands_in(32 * rows, count)
        assert bands[0].rows * 32 == band_height(32 * rows, count) == 32 * max(band.rows for band in bands)


def far(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(("height", "width", "batch"), [(5, 3, 1), (4, 7, 2), (9, 2, 3)])
def test_float32_differs_in_last_places_and_16_bits_no_more_than_the_whole_does(
    tiny: Path, height: int, width: int, batch: int
) -> None:
    vae = AutoencoderDC.from_pretrained(tiny, subfolder="vae").eval()
    half, make = copy.deepcopy(vae).bfloat16(), torch.Generator().manual_seed(height)
    latents = torch.randn(batch, vae.config.latent_channels, height, width, generator=make)
    pixels = torch.rand(batch, 3, 32 * height, 32 * width, generator=make) * 2 - 1

    def taken(by: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            return [by.decode(latents.to(by.dtype))[0], by.encode(pixels.to(by.dtype))[0]]

    exact, rounded = taken(vae), taken(half)
    for count in (2, 3, 8):
        use_bands(vae, count)
        use_bands(half, count)
        for one, other, whole, wanted in zip(taken(vae), taken(half), rounded, exact, strict=True):
            assert far(one, wanted) < 2e-6
            assert far(other, wanted) < 1.25 * far(whole, wanted)


@pytest.mark.usefixtures("short_prompts")
def test_a_placed_pipeline_draws_the_picture_in_bands_and_is_as_before_when_they_are_undone(small: Small) -> None:
    request = ["precision=fp32", "workload.batch=2", *sized(160, 96), *TWO, *ALONE]
    plan = compile_spec(small(*request, "hardware.knobs=[vae_bands]"))
    assert (plan.knobs, plan.vae_band_count, plan.exactness) == (["vae_bands"], 2, "rounding")
    found, plain = (rehearse(one, "numbers") for one in (plan, compile_spec(small(*request, "hardware.knobs=[]"))))
    for one, other in zip(found.images, plain.images, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
    assert any(one.tobytes() for one in found.images)
    for phase in ("prepare", "decode"):
        assert found.report.gpus[1].phase_peaks[phase] < plain.report.gpus[1].phase_peaks[phase]
    assert abs(found.report.gpus[1].planned_error) < 0.005
    resolved = plan.resolve()
    pipeline = load_pipeline(resolved, host=open_host(resolved, "shapes"))
    assert bands_of(pipeline.vae) == 2
    unplace(pipeline)
    assert not set(METHODS) & set(vars(pipeline.vae))


def test_the_fewest_bands_that_fit_are_planned_before_tiles_and_in_the_plan_file(small: Small, tmp_path: Any) -> None:
    every = "hardware.allow=[encode_once,vae_slicing,vae_bands,vae_tiling]"
    counts = []
    for memory in (24, 20, 18, 17):
        plan = compile_spec(small(*LARGE, *sized(3072), f"machine.gpus={memory}GiB", "hardware=single_gpu", every))
        assert "vae_tiling" not in plan.knobs
        assert plan.vae_tile is None
        assert plan.vae_band_count is not None
        counts.append(plan.vae_band_count)
        price = plan.knob_prices["vae_bands"]
        assert price.bytes_saved > 2**30
        assert knob_sentence(plan, "vae_bands").startswith(f"vae_bands of {plan.vae_band_count} saves ~")
        assert price.seconds_per_image is not None
        assert 0 < price.seconds_per_image < 0.25 * sum(plan.estimates.seconds[one] for one in ("prepare", "decode"))
    assert counts == sorted(counts), "more of them where there is less memory"
    assert counts[0] < counts[-1]
    saved = Plan.load(plan.save(tmp_path / "plan.json"))
    assert saved == plan
    assert (saved.each()[0].vae_band_count, saved.schema_version) == (counts[-1], "1.5")
    whole = compile_spec(small(*LARGE, *sized(1024), "machine.gpus=24GiB", every))
    assert (whole.vae_band_count, "vae_bands" in whole.knobs) == (None, False)


def test_a_forced_map_takes_as_few_bands_as_fit_and_the_most_where_none_does(small: Small) -> None:
    where = "hardware.device_map={text_encoder: 0, vae: 0, transformer: 0, controlnet: 0}"
    request = [*LARGE, *sized(4096), "hardware=custom_map", where, "hardware.knobs=[encode_once,vae_bands]"]
    fits = compile_spec(small(*request, "machine.gpus=rtx3090", "hardware.force=true"))
    assert fits.vae_band_count == compile_spec(small(*request, "machine.gpus=rtx3090")).vae_band_count == 4
    assert compile_spec(small(*request, "machine.gpus=16GiB", "hardware.force=true")).vae_band_count == BANDS[-1]


def test_requests_of_other_sizes_are_admitted_by_the_bands_of_the_plan(small: Small) -> None:
    def most(*overrides: str) -> int:
        spec = small(*LARGE, *sized(2048), "machine.gpus=rtx3090", "hardware=single_gpu", "runtime=eager", *overrides)
        plan = compile_spec(spec)
        admission = Admission(plan.resolve(), open_checkpoint(spec.model))
        found = admission.largest(spec.workload.bounds.model_copy(update={"height": 6144, "width": 6144}))
        assert found is not None
        with pytest.raises(InfeasibleError, match="needs") as caught:
            admission.check(found.model_copy(update={"height": found.height + 64, "width": found.width + 64}))
        assert caught.value.hint == f"{found.width}x{found.height} fits"
        return found.height

    where = "hardware.device_map={text_encoder: 0, vae: 0, transformer: 0, controlnet: 0}"
    in_bands = most("hardware=custom_map", where, "hardware.knobs=[encode_once,vae_bands]")
    assert in_bands > 1.15 * most("hardware.allow=[encode_once]")


@pytest.mark.slow
@pytest.mark.parametrize("gpus", ["rtx3090", "2xrtx4090"])
def test_4096_px_of_the_large_model_fit_24_gib_without_tiles_and_keep_to_the_plan(small: Small, gpus: str) -> None:
    plan = compile_spec(small(*LARGE, *sized(4096), f"machine.gpus={gpus}"))
    assert plan.knobs == ["encode_once", "vae_bands"]
    assert plan.exactness == "rounding"
    report = rehearse(plan, "shapes").report
    assert all(abs(gpu.planned_error) < 0.005 and gpu.peak_bytes <= gpu.capacity_bytes for gpu in report.gpus)


def test_tiles_that_are_turned_on_later_go_before_bands(tiny: Path) -> None:
    vae = AutoencoderDC.from_pretrained(tiny, subfolder="vae").eval()
    latents = torch.randn(1, vae.config.latent_channels, 5, 3, generator=torch.Generator().manual_seed(0))
    vae.enable_tiling(64, 64, 32, 32)
    with torch.no_grad():
        tiled = vae.decode(latents)[0]
        use_bands(vae, 2)
        assert torch.equal(vae.decode(latents)[0], tiled)
        vae.disable_tiling()
        assert not torch.allclose(vae.decode(latents)[0], tiled)
