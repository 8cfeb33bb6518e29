"""The control image of a request, a file that is checked before anything is loaded, a drawing, or bytes of a client;
and its seed."""

from __future__ import annotations

import io
import logging
import re
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .._models import Diagnostic
from ..errors import InputError
from .workload import Request, Workload

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

_WHERE = "workload.control_image"
_WHOLE_FIRST = ("MPO", "PSD")
"""Formats whose first picture is the whole one: the others are a camera's previews, or layers."""
_SENT = ("PNG", "JPEG", "WEBP")
"""Formats that are read of a client: each has one decoder, and none of them starts another program."""
_SIXTEEN_BIT = ("PNG", "PPM")
"""Formats whose grey of more than 8 bits Pillow scales to 65535, also where it calls the mode `I`."""


def drawn_seed(request: Request, overrides: Sequence[str]) -> list[Diagnostic]:
    """Name the seed that `workload.seed=random` drew, with the override that draws the same picture again."""
    if "workload.seed=random" not in [one.lstrip("+") for one in overrides]:
        return []
    message, hint = f"random drew {request.seed}", f"workload.seed={request.seed} draws the same picture again"
    return [Diagnostic(type="seed_drawn", severity="info", message=message, where="workload.seed", hint=hint)]


def check_control_image(request: Request, workload: Workload) -> list[Diagnostic]:
    """Read the control image's file once, whole, and return what was done to it.

    Raises:
        InputError: see `read_control_image`.
    """
    return [] if request.control_image is None else _read(request, workload)[1]


def read_control_image(request: Request, workload: Workload) -> Image:
    """Return the control image as RGB, (height, width) as the workload asks.

    EXIF orientation is applied, what is transparent is white, values of 16 bits and floats in 0..1 are scaled to 8
    bits, and `control_fit` says what becomes of a picture of other proportions.

    Raises:
        InputError: the file is missing, no picture, damaged, too large or an animation, or the range of its values is
            not clear.
    """
    if request.control_image is None:
        return _drawing(workload.width, workload.height)
    picture, remarks = _read(request, workload)
    for remark in remarks:
        log.info("%s: %s", remark.where, remark.message)
    return picture


def sent_control_image(
    content: bytes, request: Request, workload: Workload, most_pixels: int
) -> tuple[Image, list[Diagnostic]]:
    """Read a control image that came as bytes: PNG, JPEG or WebP; no file is opened.

    Args:
        content: the file's bytes.
        most_pixels: pixels that it may unpack to; its size is read before anything is unpacked.

    Returns:
        The image as `read_control_image` gives it, and what was done to it.

    Raises:
        InputError: as in `read_control_image`, or it has more pixels.
    """
    return _read(request, workload, content, most_pixels)


def _read(
    request: Request, workload: Workload, content: bytes | None = None, most_pixels: int | None = None
) -> tuple[Image, list[Diagnostic]]:
    from PIL import Image, UnidentifiedImageError

    path = Path(str(request.control_image)).expanduser() if content is None else Path("the image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # a poster is read, a bomb is an error
            if content is None:
                return _opened(Image.open(path), path, request, workload)
            sent = Image.open(io.BytesIO(content), formats=_SENT)
            return _opened(sent, path, request, workload, most_pixels)
    except FileNotFoundError:
        raise _unreadable(path, "there is no such file") from None
    except UnidentifiedImageError:
        readable = "Pillow can read" if content is None else "is read here: send PNG, JPEG or WebP"
        raise _unreadable(path, f"it is no picture that {readable}") from None
    except Image.DecompressionBombError as problem:
        count, limit = re.search(r"\d+", str(problem)), 2 * (Image.MAX_IMAGE_PIXELS or 0)
        why = f"it unpacks to {int(count[0]) if count else 0:,} pixels, more than the {limit:,} that are read"
        hint = f"save it smaller; {workload.width}x{workload.height} px are used"
        raise _unreadable(path, why, hint) from None
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as problem:
        why = (isinstance(problem, OSError) and problem.strerror) or str(problem) or type(problem).__name__
        raise _unreadable(path, why) from problem


def _opened(
    opened: Image, path: Path, request: Request, workload: Workload, most_pixels: int | None = None
) -> tuple[Image, list[Diagnostic]]:
    from PIL import ImageOps

    with opened as picture:
        if most_pixels is not None and (pixels := picture.width * picture.height) > most_pixels:
            size = f"its {picture.width}x{picture.height} are {pixels:,} pixels"
            raise _unreadable(path, f"{size}, more than the {most_pixels:,} that are read")
        frames = getattr(picture, "n_frames", 1)
        if frames > 1 and picture.format not in _WHOLE_FIRST:
            code = f"from PIL import Image; f = Image.open({str(path)!r}); f.seek(0); f.save('frame.png')"
            hint = f"save the one you want as a picture of its own: python -c {shlex.quote(code)}"
            raise _unreadable(path, f"it has {frames} frames, a control image is one picture", hint)
        greatest = _greatest_of(picture)
        upright = ImageOps.exif_transpose(picture)
    coloured, remarks = _in_colours(upright, greatest, path)
    fitted, remark = _fitted(coloured, request, workload, path)
    return fitted, [*remarks, *([remark] if remark else [])]


def _unreadable(path: Path, why: str, hint: str = "") -> InputError:
    drawing = "workload.control_image=null takes a drawing made by code"
    return InputError(f"{path} cannot be used: {why}", where=_WHERE, hint=hint or drawing)


def _greatest_of(picture: Image) -> int | None:
    """The value that stands for white, of a file whose grey has more than 8 bits; None where its mode has none."""
    if picture.mode.startswith("I;16"):
        bits = getattr(picture, "tag_v2", {}).get(258, 16)  # BitsPerSample of a TIFF: Pillow does not scale 12 bits
        return 4095 if bits in (12, (12,)) else 65535
    return 65535 if picture.mode == "I" and picture.format in _SIXTEEN_BIT else None


def _in_colours(picture: Image, greatest: int | None, path: Path) -> tuple[Image, list[Diagnostic]]:
    """Return the picture in 8 bits per colour; transparency shows white, as on a page.

    Raises:
        InputError: the values have no known range.
    """
    from PIL import Image

    if picture.mode == "F" or picture.mode.startswith("I"):
        return _scaled(picture, greatest, path)
    if "transparency" in picture.info or picture.mode in ("LA", "PA", "RGBA", "RGBa"):
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB"), []


def _scaled(picture: Image, greatest: int | None, path: Path) -> tuple[Image, list[Diagnostic]]:
    """Scale grey values of (height, width) from 0..greatest to 0..255; floats from 0..1."""
    import numpy as np
    from PIL import Image

    values = np.asarray(picture).astype(np.float64)
    least, most = float(values.min()), float(values.max())
    if picture.mode == "F" and least >= 0 and most <= 1:  # False where a value is NaN
        greatest = 1
    if greatest is None:
        kind = "floating point numbers" if picture.mode == "F" else "32-bit integers"
        rule = "are taken where they lie within 0 and 1" if picture.mode == "F" else "tell no value for white"
        hint = "save it as grey of 16 bits, 0 for black and 65535 for white, or of 8 bits"
        raise _unreadable(path, f"its values go from {least:g} to {most:g}; {kind} {rule}", hint)
    if (clear := picture.info.get("transparency")) is not None:
        values[values == clear] = greatest
    grey = Image.fromarray(np.rint(values * (255 / greatest)).astype(np.uint8))
    message = f"values of {path.name} go from {least:g} to {most:g}; 0 is taken for black, {greatest} for white"
    return grey.convert("RGB"), [Diagnostic(type="control_scaled", severity="info", message=message, where=_WHERE)]


def _fitted(picture: Image, request: Request, workload: Workload, path: Path) -> tuple[Image, Diagnostic | None]:
    """Bring the picture to the workload's size as `control_fit` says; a remark where its proportions are others."""
    from PIL import Image, ImageOps

    (width, height), size = picture.size, (workload.width, workload.height)
    contained = ImageOps.contain(Image.new("1", picture.size), size).size
    if contained == size:
        return picture.resize(size, Image.Resampling.LANCZOS), None
    shape, wanted = f"{path.name} of {width}x{height} px", f"{size[0]}x{size[1]} px"
    severity: Literal["info", "warning"] = "info"
    hint = ""
    match request.control_fit:
        case "crop":
            fitted = ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
            scale = max(size[0] / width, size[1] / height)
            middle = f"{round(size[0] / scale)}x{round(size[1] / scale)} px"
            message = f"the middle {middle} of {shape} are taken and resized to {wanted}"
        case "pad":
            fitted = ImageOps.pad(picture, size, Image.Resampling.LANCZOS, color="black")
            message = f"{shape} is resized to {contained[0]}x{contained[1]} px and padded with black to {wanted}"
        case "stretch":
            fitted = picture.resize(size, Image.Resampling.LANCZOS)
            wider = size[0] * height / (size[1] * width)
            severity, hint = "warning", "workload.control_fit=crop or workload.control_fit=pad keeps its proportions"
            message = (
                f"{shape} is stretched to {wanted}: things in it become {wider:.2f} times as wide for their height"
            )
    return fitted, Diagnostic(
        type="control_fit", severity=severity, message=message, where="workload.control_fit", hint=hint
    )


def _drawing(width: int, height: int) -> Image:
    """Draw a lighthouse in white lines on black, like an edge map; coordinates are fractions of the picture."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (width, height), "black")
    pen = ImageDraw.Draw(picture)
    stroke = max(1, min(width, height) // 128)

    def line(*points: tuple[float, float]) -> None:
        pen.line([(x * width, y * height) for x, y in points], fill="white", width=stroke, joint="curve")

    line((0.0, 0.72), (0.2, 0.69), (0.42, 0.74), (0.62, 0.7), (1.0, 0.75))
    line((0.3, 0.72), (0.36, 0.3), (0.48, 0.3), (0.54, 0.72))
    line((0.34, 0.3), (0.34, 0.22), (0.5, 0.22), (0.5, 0.3))
    line((0.33, 0.22), (0.42, 0.13), (0.51, 0.22))
    line((0.34, 0.45), (0.5, 0.45))
    line((0.32, 0.58), (0.52, 0.58))
    line((0.52, 0.24), (0.95, 0.14))
    line((0.52, 0.27), (0.95, 0.34))
    box = [(0.75 * width, 0.42 * height), (0.9 * width, 0.57 * height)]
    pen.ellipse(box, outline="white", width=stroke)
    return picture
