"""Pictures as bytes: control images that clients send, and answers that say what they were made of."""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .._models import Diagnostic
from ..declare.control_image import sent_control_image
from ..declare.workload import Workload
from ..errors import InputError
from .openai import ApiError, ImagesRequest, PictureFormat, request_of

if TYPE_CHECKING:
    from PIL.Image import Image

MEDIA_TYPES: Mapping[PictureFormat, str] = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}
KEY = "sana_deploy"
"""The text chunk of a PNG that holds plan, seed and request; EXIF's image description in other formats."""
_DESCRIPTION = 0x010E
_PNG_EFFORT = 1
"""Of 0 to 9: 53 ms instead of 103 for a picture of 1024 px with Pillow's default of 6, a file a third larger."""
_MOST_EXIF_TEXT = 2000
"""Characters of a text in EXIF; each may take 12 bytes."""


def sent_bytes(text: str, param: str) -> bytes:
    """Decode a picture that stands in JSON: base64, or a data URL of it. Nothing is fetched.

    Raises:
        ApiError: 400, it is another URL, a path, or not base64.
    """
    head, comma, body = text.partition(",")
    if comma and head.startswith("data:") and head.endswith(";base64"):
        text = body
    elif "://" in text[:32] or text.startswith("data:"):
        message = (
            f"{param} must hold the picture itself, in base64 or as a data URL in base64; nothing is fetched or read"
        )
        raise ApiError(400, message, "invalid_image", param)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, f"{param} is not base64", "invalid_image", param) from None


def control_image(
    content: bytes, asked: ImagesRequest, shape: Workload, most_pixels: int, param: str
) -> tuple[Image, list[Diagnostic]]:
    """The control image of a request, checked as the command line checks its files and fitted to the shape.

    Raises:
        ApiError: 400, with the sentence of the check.
    """
    try:
        return sent_control_image(content, request_of(asked), shape, most_pixels)
    except InputError as problem:
        raise ApiError(400, problem.message, "invalid_image", param) from None
    except Exception as problem:  # decoders end in whatever a damaged file leads them to
        message = f"the image cannot be used: it is damaged ({type(problem).__name__})"
        raise ApiError(400, message, "invalid_image", param) from None


def no_control_image(shape: Workload) -> Image:
    """What stands for a control image where none is given; the ControlNet is off then."""
    from PIL import Image as Images

    return Images.new("RGB", (shape.width, shape.height))


def encoded(picture: Image, form: PictureFormat, compression: int, facts: Mapping[str, Any]) -> bytes:
    """A picture as a file that says what it was made of.

    Args:
        picture: RGB.
        form: the file's format.
        compression: quality of WebP and JPEG, 0 to 100; WebP of 100 is lossless.
        facts: what is written into its metadata, as JSON.
    """
    from PIL import Image as Images
    from PIL.PngImagePlugin import PngInfo

    buffer = io.BytesIO()
    if form == "png":
        info, text = PngInfo(), json.dumps(facts)  # ASCII, which every format's metadata takes
        info.add_text(KEY, text, zip=len(text) > 1024)
        picture.save(buffer, "PNG", pnginfo=info, compress_level=_PNG_EFFORT)
        return buffer.getvalue()
    exif = Images.Exif()
    exif[_DESCRIPTION] = json.dumps(_shortened(facts))
    if form == "webp":
        picture.save(buffer, "WEBP", exif=exif, lossless=compression == 100, quality=compression)
    else:
        picture.save(buffer, "JPEG", exif=exif, quality=max(1, compression), subsampling=0)
    return buffer.getvalue()


def _shortened(facts: Any) -> Any:
    """The same with long texts cut: the segment of a JPEG that holds them has 64 KiB."""
    if isinstance(facts, Mapping):
        return {key: _shortened(value) for key, value in facts.items()}
    return facts[:_MOST_EXIF_TEXT] if isinstance(facts, str) else facts


def as_data_url(content: bytes, form: PictureFormat) -> str:
    """A URL that holds the picture itself, so that it works wherever the answer is read."""
    return f"data:{MEDIA_TYPES[form]};base64,{base64.b64encode(content).decode()}"


def as_data(contents: Sequence[bytes], asked: ImagesRequest) -> list[dict[str, str]]:
    """The pictures of an answer."""
    if asked.response_format == "url":
        return [{"url": as_data_url(content, asked.output_format)} for content in contents]
    return [{"b64_json": base64.b64encode(content).decode()} for content in contents]
