"""How much of a request passes a component in one phase, in which mode of the VAE, and what that takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..declare.pipelines import Phase, PipelineDescription
from ..declare.workload import Workload
from .bands import COPIED, WORK, band_height, banded_bytes, banded_work, bands_in

VAE_TILE = (1024, 1024, 896, 896)
"""Height and width of a tile and its strides in pixels, as `AutoencoderDC.enable_tiling` takes them. Tiles of 512
left artifacts in flat areas (https://github.com/huggingface/diffusers/issues/10510)."""


@dataclass(frozen=True)
class VaeMode:
    """How images pass the VAE: all at once, or one at a time (`sliced`), and then in tiles (`tiled`).

    What passes at once does so whole, or in so many `bands` of rows. A control image that is repeated passes as often
    as there are copies, or `once`.
    """

    once: bool = False
    sliced: bool = False
    tiled: bool = False
    bands: int = 1

    @classmethod
    def all(cls, bands: Iterable[int] = ()) -> tuple[VaeMode, ...]:
        """Every mode; tiling is never without slicing, and there are no bands of tiles."""
        whole = [(sliced, False, count) for sliced in (False, True) for count in (1, *bands)]
        return tuple(cls(once, *way) for once in (False, True) for way in (*whole, (True, True, 1)))


@dataclass(frozen=True)
class Work:
    """What a component computes in one phase (in denoise: in one step).

    Attributes:
        operations: kernels launched, by all calls.
        flops: floating point operations, 2 per multiply-add.
        product_bytes: read and written by the operations that have FLOPs.
        other_bytes: read and written by all others.
        calls: passes one after the other that this is cut into.
    """

    operations: int = 0
    flops: int = 0
    product_bytes: int = 0
    other_bytes: int = 0
    calls: int = 1


def linear(coefficients: Sequence[float], batch: float, pixels: int) -> float:
    """constant + per_image x batch + per_pixel x pixels + per_image_pixel x batch x pixels."""
    constant, per_image, per_pixel, per_image_pixel = coefficients
    return constant + per_image * batch + per_pixel * pixels + per_image_pixel * batch * pixels


def tiles(side: int) -> list[int]:
    """Lengths in pixels of the tiles that cover `side`, as `AutoencoderDC.tiled_decode` cuts them."""
    return [min(VAE_TILE[0], side - start) for start in range(0, side, VAE_TILE[2])]


def covered_pixels(height: int, width: int) -> int:
    """Pixels that the tiles of one image have together: more than it has, since tiles overlap."""
    return sum(tiles(height)) * sum(tiles(width))


@dataclass(frozen=True)
class Passing:
    """How much of a request passes a component in one phase, and how; only the VAE works otherwise than plainly.

    Attributes:
        batch: images, in those that the needs count: with guidance they count a control image as two rows.
        rows: images that really pass.
        shared: the batch has one image together, which is what passes.
        copied: what a byte counts for that only bands touch.
    """

    height: int
    width: int
    batch: float
    rows: int
    mode: VaeMode
    shared: bool = False
    copied: float = 1.0

    @classmethod
    def of(
        cls, pipeline: PipelineDescription, workload: Workload, phase: Phase, mode: VaeMode, share: float = 1.0
    ) -> Passing:
        """What passes in a phase; `share` is that of the rows of a request."""
        rows, images = workload.batch, float(workload.batch)
        shared = phase == "prepare" and pipeline.image is not None and not pipeline.image.each_row
        if phase == "prepare":
            whole = pipeline.image_rows(workload)
            rows = 1 if mode.once else whole
            images = workload.batch * rows / whole
        mode = replace(mode, bands=bands_in(workload.height, mode.bands))
        return cls(workload.height, workload.width, share * images, rows, mode, shared, COPIED.get(phase, 1.0))

    @property
    def batch_at_once(self) -> float:
        """The part of `batch` that passes in one go."""
        return self.batch / self.rows if self.mode.sliced else self.batch

    @property
    def banded_batch(self) -> float:
        """What the needs of bands count as `batch`."""
        return 1.0 if self.shared else self.batch_at_once

    @property
    def pixels_at_once(self) -> int:
        """Pixels of an image that pass in one go: all of them, or those of a tile or of a band."""
        if self.mode.bands > 1:
            return band_height(self.height, self.mode.bands) * self.width
        if self.mode.tiled:
            return min(self.height, VAE_TILE[0]) * min(self.width, VAE_TILE[1])
        return self.height * self.width


def activation_bytes(needs: Mapping[str, Any], call: Passing) -> int:
    """Peak in bytes. Sliced, one image at a time; tiled, one tile of it, and what collecting the tiles adds."""
    height, width, pixels = call.height, call.width, call.height * call.width
    sliced = call.mode.sliced and call.rows > 1
    if call.mode.bands > 1:
        peak = banded_bytes(needs["banded"], height, width, call.banded_batch, call.mode.bands)
        if sliced:  # beside them, what is kept of the other images
            peak += linear(needs["sliced_bytes"], call.batch, pixels)
            peak -= linear(needs["activation_bytes"], call.batch_at_once, pixels)
        return max(0, round(peak))
    tile = call.pixels_at_once
    peak = linear(needs["sliced_bytes" if sliced else "activation_bytes"], call.batch, tile)
    if tile < pixels:
        constant, per_pixel, per_image_pixel = needs["tiling_bytes"]
        images = max(1, call.batch)
        collected = constant + (per_pixel + per_image_pixel * images) * covered_pixels(height, width)
        peak += collected * call.batch / images
    return max(0, round(peak))


def work_of(needs: Mapping[str, Any], call: Passing) -> Work:
    """FLOPs and bytes grow with the pixels computed (tiles overlap), operations with the number of calls."""
    pixels, calls = call.height * call.width, 1
    if call.mode.sliced:
        calls = call.rows
    if call.mode.bands > 1:
        each = banded_work(needs["banded"], call.height, call.width, call.banded_batch, call.mode.bands)
        whole = linear(needs["other_bytes"], call.batch_at_once, pixels)
        each["other_bytes"] = round(whole + call.copied * max(0, each["other_bytes"] - whole))
        total = {key: value * calls for key, value in each.items()}
        return Work(calls=calls * call.mode.bands, **total)
    if call.mode.tiled and max(call.height, call.width) > VAE_TILE[0]:
        pixels = covered_pixels(call.height, call.width)
        calls *= len(tiles(call.height)) * len(tiles(call.width))
    counts = {key: round(linear(needs[key], call.batch, pixels)) for key in WORK}
    return Work(operations=needs["operations"] * calls, calls=calls, **counts)
