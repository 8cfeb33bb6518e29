"""Running a request: what is measured, and images that are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SanaControlNetPipeline
from PIL import Image

from sana_deploy import load_pipeline
from sana_deploy.api import compile_spec
from sana_deploy.declare.control_image import check_control_image, read_control_image
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.declare.workload import Request, Workload
from sana_deploy.errors import InputError, RunError, UsageError
from sana_deploy.run.generate import generate, save_images

Small = Callable[..., DeploySpec]
pytestmark = pytest.mark.usefixtures("short_prompts")


def asked(spec: DeploySpec) -> tuple[Workload, Request]:
    return spec.workload.bounds, spec.workload.request


@pytest.fixture(scope="module")
def pipeline(tiny: Path) -> SanaControlNetPipeline:
    from sana_deploy.declare.compose import compose_spec

    return load_pipeline(compile_spec(compose_spec(["precision=fp32"])))


def test_a_request_gives_images_phases_and_steps(pipeline: SanaControlNetPipeline, small: Small) -> None:
    steps: list[tuple[int, int]] = []
    spec = small("workload.batch=2", "workload.steps=3")
    images, measured = generate(pipeline, *asked(spec), lambda done, of: steps.append((done, of)))
    assert [image.size for image in images] == [(96, 64)] * 2
    assert steps == [(1, 3), (2, 3), (3, 3)]
    phases = ("encode", "prepare", "denoise", "decode")
    assert all(measured.seconds[phase] > 0 for phase in phases)
    assert sum(measured.seconds[phase] for phase in phases) <= measured.seconds["generate"] + 1e-5
    assert measured.bytes_moved == {}
    assert measured.host_peak_bytes > 0


def test_the_same_seed_gives_the_same_image_and_another_seed_another(
    pipeline: SanaControlNetPipeline, small: Small
) -> None:
    def image(seed: int) -> bytes:
        return generate(pipeline, *asked(small(f"workload.seed={seed}")))[0][0].tobytes()

    assert image(1) == image(1) != image(2)


@pytest.mark.parametrize(
    ("value", "says"),
    [(float("nan"), "the vae gave NaN or infinity in float32 during decode"), (0.0, "one flat colour")],
)
def test_nan_and_flat_images_are_failures(
    pipeline: SanaControlNetPipeline, small: Small, monkeypatch: pytest.MonkeyPatch, value: float, says: str
) -> None:
    decoder = pipeline.vae.decoder
    monkeypatch.setattr(decoder, "forward", lambda z: torch.full((1, 3, 64, 96), value))
    with pytest.raises(RunError, match=says) as caught:
        generate(pipeline, *asked(small()))
    assert caught.value.exit_code == 6


def test_out_of_memory_in_decode_is_named(
    pipeline: SanaControlNetPipeline, small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(pipeline.vae.decoder.conv_in, "forward", full)  # in bands and in tiles, too
    with pytest.raises(RunError, match=r"out of memory on cpu, in vae during decode \(tried to allocate\)"):
        generate(pipeline, *asked(small()))
    monkeypatch.undo()
    assert generate(pipeline, *asked(small()))[0], "the pipeline stays usable"


def test_guidance_that_the_workload_does_not_have_is_refused(pipeline: SanaControlNetPipeline, small: Small) -> None:
    workload, request = asked(small())
    for one, other in ((True, 1.0), (False, 4.5)):
        shape = workload.model_copy(update={"guided": one})
        with pytest.raises(UsageError, match=f"guidance, and the request's guidance_scale is {other:g}"):
            generate(pipeline, shape, request.model_copy(update={"guidance_scale": other}))


def test_an_unplaced_pipeline_is_refused(tiny: Path, small: Small) -> None:
    plain = SanaControlNetPipeline.from_pretrained(tiny)
    with pytest.raises(RunError, match="not placed"):
        generate(plain, *asked(small()))


def test_images_are_written_whole(tmp_path: Path) -> None:
    picture = Image.effect_noise((8, 8), 50).convert("RGB")
    paths = save_images([picture, picture], tmp_path)
    assert [path.name for path in paths] == ["image-000.png", "image-001.png"]
    assert np.array_equal(np.asarray(Image.open(paths[0])), np.asarray(picture))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image-000.png", "image-001.png"]


def test_the_drawn_control_image_is_deterministic_and_of_the_size_asked(small: Small) -> None:
    workload = small().workload
    picture = read_control_image(workload, workload.bounds)
    assert picture.size == (96, 64)
    assert picture.tobytes() == read_control_image(workload, workload.bounds).tobytes()
    assert len(set(picture.convert("L").tobytes())) > 1


def test_a_control_image_file_is_read_upright_and_resized(small: Small, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.new("L", (30, 10), 128).save(path)
    workload, request = asked(small(f"workload.control_image={path}"))
    picture = read_control_image(request, workload)
    assert (picture.size, picture.mode) == ((96, 64), "RGB")


@pytest.mark.parametrize(
    ("content", "says"), [(None, "no such file"), (b"", "no picture"), (b"text", "no picture"), (b"half", "cannot be")]
)
def test_a_control_image_that_cannot_be_read_is_named(
    small: Small, tmp_path: Path, content: bytes | None, says: str
) -> None:
    path = tmp_path / "photo.png"
    if content == b"half":
        Image.effect_noise((64, 64), 50).save(path)
        content = path.read_bytes()[:1000]
    if content is not None:
        path.write_bytes(content)
    workload, request = asked(small(f"workload.control_image={path}"))
    with pytest.raises(InputError, match=says) as caught:
        check_control_image(request, workload)
    assert caught.value.where == "workload.control_image"
