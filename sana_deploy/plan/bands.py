"""The VAE in bands of rows on one GPU: what it needs as functions of the image, the batch and the number of bands.

A band is of whole rows of latents. All bands hold what they work on, while one after the other has temporaries, the
first and largest one first. So the peak is of four parts, each of its own coefficient: pixels of the batch, pixels of
one band, a row of pixels, and such a row at each edge between bands. Work is of the batch's pixels, and a part of it
comes again with every band: weights are read, and rows at its edges are copied and computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..declare.pipelines import Phase
from ..declare.workload import VAE_FACTOR

WORK = ("flops", "product_bytes", "other_bytes")
"""Quantities of work, each with coefficients of `work_terms`."""

COPIED: Mapping[Phase, float] = {"prepare": 0.0, "decode": 0.35}
"""What a byte that bands touch beyond those of the whole counts for, in encode and in decode.

Rows are copied to stand beside their halo, at nearly three times the bandwidth of what else the VAE does: a decode of
4096 px took 1.02 s in 8 bands on an H100, and 0.965 s whole. An encode took 0.73 s, and 0.80 s whole. Why is not known,
and other sizes were not measured, so that copies count for nothing there, and not for less.
"""


def bands_in(height: int, count: int) -> int:
    """How many bands an image of `height` pixels is cut into where `count` are wanted: one row of latents at least."""
    return min(count, height // VAE_FACTOR)


def band_height(height: int, count: int) -> int:
    """Pixels of the largest band, which is the first."""
    return -(-(height // VAE_FACTOR) // bands_in(height, count)) * VAE_FACTOR


def memory_terms(height: int, width: int, batch: float, count: int) -> tuple[float, ...]:
    """What the coefficients of `activation_bytes` are of."""
    edges = bands_in(height, count) - 1
    return (batch * height * width, batch * band_height(height, count) * width, batch * width, batch * width * edges)


def work_terms(height: int, width: int, batch: float, count: int) -> tuple[float, ...]:
    """What the coefficients of each quantity of `WORK` are of."""
    bands = bands_in(height, count)
    return (batch * height * width, bands, bands * batch, bands * batch * width)


def banded_bytes(needs: Mapping[str, Any], height: int, width: int, batch: float, count: int) -> float:
    """Peak of activations in bytes.

    Args:
        needs: the `banded` ones of the VAE in one phase.
        height, width: of the image, in pixels.
        batch: images that pass in one go.
        count: the bands that are wanted.
    """
    return _of(needs["activation_bytes"], memory_terms(height, width, batch, count))


def banded_work(needs: Mapping[str, Any], height: int, width: int, batch: float, count: int) -> dict[str, int]:
    """Quantities of `WORK` and the operations, of images that pass in one go; see `banded_bytes`."""
    terms = work_terms(height, width, batch, count)
    once, each = needs["operations"]
    found = {key: round(_of(needs[key], terms)) for key in WORK}
    return {**found, "operations": round(once + each * bands_in(height, count))}


def _of(coefficients: Sequence[float], terms: Sequence[float]) -> float:
    return sum(one * other for one, other in zip(coefficients, terms, strict=True))
