"""The control image: what a file of each kind becomes, what is said about it, and what is refused."""

from __future__ import annotations

import contextlib
import functools
import json
import random
import shlex
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL
from PIL import Image, ImageCms

from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.control_image import check_control_image, read_control_image
from sana_deploy.declare.workload import DeclaredWorkload, Request, Workload
from sana_deploy.errors import InputError
from sana_deploy.plan.artifact import Plan
from sana_deploy.plan.digest import digest_of

HEIGHT, WIDTH = 64, 96
RAMP = np.tile(np.linspace(0, 1, WIDTH), (HEIGHT, 1))
"""A depth map: black on the left, white on the right."""
EIGHT_BIT = np.rint(RAMP * 255).astype(np.uint8)
SIXTEEN_BIT = np.rint(RAMP * 65535).astype(np.uint16)


@functools.cache
def small_workload() -> DeclaredWorkload:
    return compose_spec(SMALL).workload


def asked(path: Path, **changes: Any) -> DeclaredWorkload:
    return small_workload().model_copy(update={"control_image": str(path), **changes})


def both(asked: DeclaredWorkload) -> tuple[Request, Workload]:
    return asked.request, asked.bounds


def pixels(path: Path, **changes: Any) -> np.ndarray:
    picture = read_control_image(*both(asked(path, **changes)))
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


def remarks(path: Path, **changes: Any) -> dict[str, str]:
    return {remark.type: remark.message for remark in check_control_image(*both(asked(path, **changes)))}


def saved(values: np.ndarray, path: Path, **options: Any) -> Path:
    Image.fromarray(values).save(path, **options)
    return path


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("depth.png", SIXTEEN_BIT),
        ("depth.tiff", SIXTEEN_BIT),
        ("big_endian.tiff", SIXTEEN_BIT.astype(">u2")),
        ("depth.pgm", SIXTEEN_BIT),
        ("depth.jp2", SIXTEEN_BIT),
        ("float.tiff", RAMP.astype(np.float32)),
    ],
)
def test_depth_of_more_than_8_bits_draws_the_picture_that_8_bits_draw(
    tmp_path: Path, name: str, values: np.ndarray
) -> None:
    options = {"irreversible": False} if name.endswith("jp2") else {}
    path = saved(values, tmp_path / name, **options)
    expected = pixels(saved(EIGHT_BIT, tmp_path / "plain.png"))
    assert np.ptp(expected) == 255
    assert np.abs(pixels(path) - expected).max() <= 1
    said = remarks(path)["control_scaled"]
    assert said.startswith(f"values of {name} go from 0 to ")
    assert said.endswith(f"{1 if name == 'float.tiff' else 65535} for white")


def test_a_tiff_of_12_bits_is_scaled_by_4095(tmp_path: Path) -> None:
    values = np.rint(RAMP * 4095).astype(np.uint16).reshape(-1, 2)
    packed = np.stack([values[:, 0] >> 4, (values[:, 0] & 15) << 4 | values[:, 1] >> 8, values[:, 1] & 255], 1)
    data = packed.astype(np.uint8).tobytes()
    tags = {
        256: WIDTH,
        257: HEIGHT,
        258: 12,
        259: 1,
        262: 1,
        273: 8 + 2 + 9 * 12 + 4,
        277: 1,
        278: HEIGHT,
        279: len(data),
    }
    entries = b"".join(
        tag.to_bytes(2, "little") + b"\x04\0\x01\0\0\0" + n.to_bytes(4, "little") for tag, n in tags.items()
    )
    path = tmp_path / "twelve.tiff"
    path.write_bytes(b"II*\0\x08\0\0\0\x09\0" + entries + b"\0\0\0\0" + data)
    assert np.abs(pixels(path) - EIGHT_BIT[..., None]).max() <= 1


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ((RAMP * 80).astype(np.float32), "its values go from 0 to 80; floating point numbers are taken where they lie"),
        ((RAMP - 0.5).astype(np.float32), "its values go from -0.5 to 0.5"),
        (np.where(RAMP == 1, np.nan, RAMP).astype(np.float32), "its values go from nan to nan"),
        ((RAMP * 70000).astype(np.int32), "its values go from 0 to 70000; 32-bit integers tell no value for white"),
    ],
)
def test_values_of_unknown_range_are_refused_with_the_values_found(
    tmp_path: Path, values: np.ndarray, says: str
) -> None:
    path = saved(values, tmp_path / "depth.tiff")
    with pytest.raises(InputError) as caught:
        read_control_image(*both(asked(path)))
    assert says in caught.value.message
    assert (caught.value.exit_code, caught.value.where) == (3, "workload.control_image")
    assert "grey of 16 bits, 0 for black and 65535 for white" in caught.value.hint


def _transparent(mode: str) -> Image.Image:
    """Black where it is opaque, on the left; what is transparent hides black too."""
    alpha = Image.fromarray(np.where(RAMP < 0.5, 255, 0).astype(np.uint8))
    picture = Image.new("RGBA", alpha.size, "black")
    picture.putalpha(alpha)
    return picture.convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix"), [("RGBA", "png"), ("LA", "png"), ("RGBA", "tiff"), ("RGBA", "webp"), ("P", "png")]
)
def test_what_is_transparent_is_white(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"edges.{suffix}"
    picture = _transparent("RGBA").quantize(4) if mode == "P" else _transparent(mode)
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    picture.save(path, **options)
    with Image.open(path) as opened:
        assert opened.mode == mode
    expected = np.where(RAMP < 0.5, 0, 255)[..., None]
    assert np.abs(pixels(path) - expected).max() == 0


def test_a_colour_that_stands_for_transparent_is_white(tmp_path: Path) -> None:
    Image.fromarray(EIGHT_BIT).save(tmp_path / "grey.png", transparency=0)
    Image.fromarray(SIXTEEN_BIT).save(tmp_path / "deep.png", transparency=0)
    for name in ("grey.png", "deep.png"):
        row = pixels(tmp_path / name)[0, :, 0]
        assert row[0] > 200, name
        assert row[3] < 30, name


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LAB"])
def test_every_mode_of_8_bits_keeps_its_look(tmp_path: Path, mode: str) -> None:
    left = np.where(RAMP < 0.5, 0, 255).astype(np.uint8)
    picture = Image.fromarray(np.stack([left] * 3, -1))
    if mode == "LAB":
        made = ImageCms.profileToProfile(
            picture, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
        assert made is not None
    else:
        made = picture.convert(mode)
    path = tmp_path / ("picture.jpg" if mode == "YCbCr" else "picture.tiff")
    made.save(path)
    assert np.abs(pixels(path) - left[..., None])[:, [0, 20, -20, -1]].max() <= 8


def test_exif_orientation_is_applied_before_anything_else(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    sideways = Image.fromarray(np.rot90(SIXTEEN_BIT))
    sideways.save(tmp_path / "phone.png", exif=exif)
    assert np.abs(pixels(tmp_path / "phone.png") - EIGHT_BIT[..., None]).max() <= 1
    assert "control_fit" not in remarks(tmp_path / "phone.png"), "upright, it has the picture's proportions"


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_an_animation_is_refused_with_a_command_that_takes_one_frame(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("red", "lime", "blue")]
    path = tmp_path / f"it's a walk.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match="it has 3 frames, a control image is one picture") as caught:
        read_control_image(*both(asked(path)))
    command = caught.value.hint.partition(": ")[2]
    subprocess.run([sys.executable, *shlex.split(command)[1:]], cwd=tmp_path, check=True)
    assert np.abs(pixels(tmp_path / "frame.png") - [255, 0, 0]).max() <= 2


def test_a_camera_s_photo_with_previews_is_the_photo(tmp_path: Path) -> None:
    photo = Image.fromarray(EIGHT_BIT)
    photo.save(tmp_path / "photo.jpg", format="MPO", save_all=True, append_images=[Image.new("L", (8, 8))])
    with Image.open(tmp_path / "photo.jpg") as opened:
        assert (opened.format, getattr(opened, "n_frames", 1)) == ("MPO", 2)
    assert np.abs(pixels(tmp_path / "photo.jpg") - EIGHT_BIT[..., None]).max() <= 4


def _circle(path: Path, width: int = 192, height: int = 64) -> Path:
    rows, columns = np.mgrid[:height, :width]
    white = np.hypot(rows - height / 2 + 0.5, columns - width / 2 + 0.5) < 20
    return saved(np.where(white, 255, 0).astype(np.uint8) + np.uint8(0), path)


@pytest.mark.parametrize(
    ("fit", "shape", "says"),
    [
        ("stretch", (40, 20), "wide.png of 192x64 px is stretched to 96x64 px: things in it become 0.50 times as wide"),
        ("crop", (40, 40), "the middle 96x64 px of wide.png of 192x64 px are taken and resized to 96x64 px"),
        ("pad", (20, 20), "wide.png of 192x64 px is resized to 96x32 px and padded with black to 96x64 px"),
    ],
)
def test_a_picture_of_other_proportions_is_fitted_as_asked_and_that_is_said(
    tmp_path: Path, fit: str, shape: tuple[int, int], says: str
) -> None:
    path = _circle(tmp_path / "wide.png")
    white = pixels(path, control_fit=fit)[..., 0] > 127
    assert (white.any(1).sum(), white.any(0).sum()) == shape
    assert says in remarks(path, control_fit=fit)["control_fit"]


@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
def test_the_same_proportions_are_only_resized(tmp_path: Path, fit: str) -> None:
    chance = np.random.default_rng(0)
    path = saved(chance.integers(0, 256, (2 * HEIGHT, 2 * WIDTH, 3), dtype=np.uint8), tmp_path / "double.png")
    with Image.open(path) as picture:
        expected = np.asarray(picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS))
    assert (pixels(path, control_fit=fit) == expected).all()
    assert remarks(path, control_fit=fit) == {}


def test_how_a_control_image_is_fitted_changes_no_plan(tmp_path: Path) -> None:
    released = Plan.load(Path(__file__).parent / "plans" / "1.2.json")
    assert Plan.load(released.save(tmp_path / "again.json")).digest == released.digest
    values = json.loads(released.to_json())
    values["spec"]["workload"]["control_fit"] = "crop"
    assert digest_of(values) == released.digest


def test_what_was_done_is_in_the_outcome_and_in_the_log(
    here: Callable[..., subprocess.CompletedProcess[str]], tiny: Path, tmp_path: Path
) -> None:
    _circle(tmp_path / "wide.png")
    done = here(*SMALL, "workload.control_image=wide.png", "workload.steps=1", "hydra.run.dir=out")
    assert done.returncode == 0, done.stderr
    assert "warning: workload.control_fit: wide.png of 192x64 px is stretched to 96x64 px" in " ".join(
        done.stderr.split()
    )
    for name in ("outcome.json", "sana_deploy.log"):
        assert "stretched to 96x64 px" in (tmp_path / "out" / name).read_text(encoding="utf-8")
    again = here(
        "plan_file=out/plan.json", "workload.control_image=wide.png", "workload.control_fit=pad", "until=compile"
    )
    assert again.returncode == 0, again.stderr
    assert "padded with black" in " ".join(again.stderr.split())


def test_a_decompression_bomb_is_refused_with_a_sentence(tmp_path: Path) -> None:
    head = (30000).to_bytes(4, "big") + (30000).to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    chunks = [len(d).to_bytes(4, "big") + k + d + zlib.crc32(k + d).to_bytes(4, "big") for k, d in parts]
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    with pytest.raises(InputError, match=r"it unpacks to 900,000,000 pixels, more than the [0-9,]+ that are read"):
        check_control_image(*both(asked(path)))


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "gif", "webp", "bmp", "ppm"])
def test_a_damaged_file_is_refused_or_read_and_nothing_else(tmp_path: Path, suffix: str) -> None:
    whole, path, chance = tmp_path / f"whole.{suffix}", tmp_path / f"damaged.{suffix}", random.Random(0)
    Image.fromarray(np.stack([EIGHT_BIT] * 3, -1)).save(whole)
    content, read = whole.read_bytes(), 0
    for _ in range(150):
        start = chance.randrange(len(content))
        path.write_bytes(content[:start] + chance.randbytes(chance.choice((0, 1, 8))) + content[start + 3 :])
        with contextlib.suppress(InputError):  # code 3; anything else fails the test
            read_control_image(*both(asked(path)))
            read += 1
    assert 0 < read < 150


def test_a_folder_is_no_control_image(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be used: Is a directory"):
        check_control_image(*both(asked(tmp_path)))
