"""The control image of a request: a file that is checked before anything is loaded, or a drawing made by code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .errors import InputError
from .spec import Workload

if TYPE_CHECKING:
    from PIL.Image import Image


def check_control_image(workload: Workload) -> None:
    """Read the control image's file once, whole.

    Raises:
        InputError: it is missing, no picture, or damaged.
    """
    if workload.control_image is not None:
        read_control_image(workload)


def read_control_image(workload: Workload) -> Image:
    """Return the control image as RGB, (height, width) as the workload asks.

    Raises:
        InputError: the file is missing, no picture, or damaged.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    size = (workload.width, workload.height)
    if workload.control_image is None:
        return _drawing(*size)
    path = Path(workload.control_image).expanduser()
    try:
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture).convert("RGB")
    except FileNotFoundError:
        raise _unreadable(path, "there is no such file") from None
    except UnidentifiedImageError:
        raise _unreadable(path, "it is no picture that Pillow can read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as problem:
        raise _unreadable(path, str(problem)) from problem
    return upright.resize(size, Image.Resampling.LANCZOS)


def _unreadable(path: Path, why: str) -> InputError:
    return InputError(
        f"{path} cannot be used: {why}",
        where="workload.control_image",
        hint="workload.control_image=null takes a drawing made by code",
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
