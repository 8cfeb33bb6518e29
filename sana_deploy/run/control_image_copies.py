"""Which images of a request are copies of each other, so that the VAE encodes each control image once.

With guidance, and for several images of one control image, the pipeline repeats the control image before the VAE
encodes it. Which rows are copies is read off how they were made, not off their values: nothing waits for a GPU, and a
rehearsal without data counts what a real run does. Equal images that the caller gives are different ones here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SanaControlNetPipeline

from .tensor_mark import TensorMark


@dataclass(frozen=True)
class Copies:
    """The control images that the pipeline prepared last, and for each row the number of the image it is a copy of."""

    images: TensorMark
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, images: torch.Tensor, numbers: Sequence[int]) -> Copies:
        """Remember how `images` of (rows, 3, height, width) were made, without keeping them alive."""
        return cls(TensorMark.of(images), tuple(numbers))

    def hold(self, images: object) -> bool:
        """Whether `images` are those, unchanged, and some row is a copy of another."""
        return self.images.holds(images) and len(set(self.numbers)) < len(self.numbers)

    def distinct(self, images: torch.Tensor) -> torch.Tensor:
        """One row of each image: a view where there is one image."""
        rows = [self.numbers.index(number) for number in dict.fromkeys(self.numbers)]
        return torch.cat([images[row : row + 1] for row in rows]) if len(rows) > 1 else images[rows[0] : rows[0] + 1]

    def repeated(self, output: Any) -> Any:
        """The VAE's output for `distinct`, a model output or a tuple, with its rows repeated as the images were."""
        if isinstance(output, tuple):
            return tuple(self._rows(latents) for latents in output)
        return type(output)(**{key: self._rows(latents) for key, latents in output.items()})

    def _rows(self, latents: torch.Tensor) -> torch.Tensor:
        order = list(dict.fromkeys(self.numbers))
        return torch.cat([latents[row : row + 1] for row in map(order.index, self.numbers)])


def watch_copies(pipeline: SanaControlNetPipeline, on_copies: Callable[[Copies], None]) -> Callable[[], object] | None:
    """Have `prepare_image` say which rows of its result are copies; the result itself is diffusers' own.

    Returns:
        What undoes it; None, with nothing done, for a pipeline whose `prepare_image` is not diffusers' own.
    """
    prepare: Any = getattr(pipeline, "prepare_image", None)
    if getattr(prepare, "__func__", None) is not SanaControlNetPipeline.prepare_image:
        return None
    signature = inspect.signature(prepare)

    @functools.wraps(prepare)
    def prepare_image(*args: Any, **kwargs: Any) -> torch.Tensor:
        given = signature.bind(*args, **kwargs).arguments
        if not isinstance(given["image"], torch.Tensor):
            size = {"height": given["height"], "width": given["width"]}
            given["image"] = pipeline.image_processor.preprocess(given["image"], **size)
        images: torch.Tensor = prepare(**given)
        # Numbers in the images' place come back as the images do.
        numbers = torch.arange(len(given["image"])).reshape(-1, 1, 1, 1)
        rows = prepare(**{**given, "image": numbers, "device": "cpu", "dtype": numbers.dtype})
        on_copies(Copies.of(images, rows.flatten().tolist()))
        return images

    pipeline.prepare_image = prepare_image
    return lambda: pipeline.__dict__.pop("prepare_image", None)
