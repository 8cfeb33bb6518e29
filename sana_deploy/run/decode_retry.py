"""The VAE's slicing, bands and tiling for one call: decoding again where memory ran out, encoding one at a time."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..declare.hardware import OnDecodeOom
from ..declare.knobs import BANDS
from ..declare.workload import VAE_FACTOR
from ..plan.passing import VAE_TILE
from .request_state import RequestState
from .rows.one_device import METHODS, bands_of, use_bands

log = logging.getLogger(__name__)
Tile = tuple[int, int, int, int]
"""Height and width of a tile, and the strides, in pixels."""
SMALL_TILE: Tile = (512, 512, 384, 384)
"""Tiles for an image that one large tile covers, with a wide overlap."""
_SWITCHES = ("use_slicing", "use_tiling", *METHODS)


@dataclass(frozen=True)
class Retry:
    """A way to decode that takes less memory: in words, and what sets the VAE up for it."""

    words: str
    enable: Callable[[], object]


def vae_settings(vae: Any) -> dict[str, Any]:
    """What slicing, bands and tiling are in the VAE's `__dict__`, for `put_back`."""
    return {key: value for key, value in vae.__dict__.items() if key.startswith("tile_") or key in _SWITCHES}


def put_back(vae: Any, settings: dict[str, Any]) -> None:
    """Give the VAE back what `vae_settings` found."""
    for key in METHODS:
        vae.__dict__.pop(key, None)
    vae.__dict__.update(settings)


def parts_taken(vae: Any, args: Sequence[Any]) -> str | None:
    """Why the images of a call would pass the VAE in parts; None where all pass together, and whole."""
    if not args:
        return "the call is not one that the pipeline makes"
    if vae.use_tiling:
        return "the VAE takes tiles"
    if any(name in vars(vae) for name in METHODS):
        return "the VAE takes bands of rows"
    return "the VAE takes one image at a time" if vae.use_slicing and len(args[0]) > 1 else None


@contextlib.contextmanager
def one_at_a_time(vae: Any) -> Iterator[None]:
    """Have the VAE take one image at a time while the block runs."""
    settings = vae_settings(vae)
    vae.enable_slicing()
    try:
        yield
    finally:
        put_back(vae, settings)


def retries_of(vae: Any, latents: torch.Tensor, wanted: OnDecodeOom) -> list[Retry]:
    """Ways to decode `latents` once memory ran out that would change something, those that keep pixels first."""
    if wanted == "raise" or vae.use_tiling:
        return []
    found = []
    count = min(BANDS[-1], latents.shape[-2:][0])
    if count > bands_of(vae):
        found.append(Retry(f"{count} bands of rows", partial(use_bands, vae, count)))
    side = max(latents.shape[-2:]) * VAE_FACTOR
    tile = VAE_TILE if side > VAE_TILE[0] else SMALL_TILE
    if wanted == "tile" and side > tile[0]:
        risk = "; tiles this small may show in flat areas" if tile == SMALL_TILE else ""
        found.append(Retry(f"tiles of {tile[0]} px, stride {tile[2]}{risk}", partial(vae.enable_tiling, *tile)))
    return found


def attempt(
    work: Callable[[], Any], vae: Any, retries: Sequence[Retry], state: RequestState, release: Callable[[], None]
) -> Any:
    """Do `work` with the VAE; where memory runs out, do it again in the ways of `retries`, and say so.

    Args:
        work: calls a method of the VAE.
        vae: the module.
        retries: what to try again with, one after the other; without any, running out of memory is the end.
        state: gets the remarks, and what the error says where there is no result.
        release: gives cached memory back before another attempt.

    Raises:
        torch.OutOfMemoryError: memory ran out in every way.
    """
    settings, left = vae_settings(vae), list(retries)
    try:
        while True:
            try:
                return work()
            except torch.OutOfMemoryError as problem:
                if not left:
                    state.failure = str(problem)
                    raise
            # Outside of `except`, whose traceback keeps the activations alive.
            retry = left.pop(0)
            remark = f"the VAE ran out of memory in decode: decoded again in {retry.words}"
            log.warning(remark)
            state.remark(remark)
            release()
            put_back(vae, settings)
            vae.enable_slicing()
            retry.enable()
    finally:
        put_back(vae, settings)
