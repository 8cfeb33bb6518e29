"""The VAE's slicing and tiling for one call: decoding again in tiles where memory ran out, encoding one at a time."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..declare.workload import VAE_FACTOR
from ..plan.profile import VAE_TILE
from .request_state import RequestState

log = logging.getLogger(__name__)
Tile = tuple[int, int, int, int]
"""Height and width of a tile, and the strides, in pixels."""
SMALL_TILE: Tile = (512, 512, 384, 384)
"""Tiles for an image that one large tile covers, with a wide overlap."""
_SWITCHES = ("use_slicing", "use_tiling")


def vae_settings(vae: Any) -> dict[str, Any]:
    """The VAE's slicing and tiling attributes, to be put back into its `__dict__`."""
    return {key: value for key, value in vae.__dict__.items() if key.startswith("tile_") or key in _SWITCHES}


@contextlib.contextmanager
def one_at_a_time(vae: Any) -> Iterator[None]:
    """Have the VAE take one image at a time while the block runs."""
    settings = vae_settings(vae)
    vae.enable_slicing()
    try:
        yield
    finally:
        vae.__dict__.update(settings)


def retry_tile(vae: Any, latents: torch.Tensor) -> Tile | None:
    """The tile to decode `latents` in once memory ran out; None where it would change nothing."""
    if vae.use_tiling:
        return None
    side = max(latents.shape[-2:]) * VAE_FACTOR
    chosen = VAE_TILE if side > VAE_TILE[0] else SMALL_TILE
    return chosen if side > chosen[0] else None


def attempt(
    work: Callable[[], Any], vae: Any, tile: Tile | None, state: RequestState, release: Callable[[], None]
) -> Any:
    """Do `work` with the VAE; where memory runs out and there is a `tile`, do it once more in tiles and say so.

    Args:
        work: calls a method of the VAE.
        vae: the module.
        tile: what to try again with; None gives up.
        state: gets the remark, and what the error says where there is no result.
        release: gives cached memory back before the second attempt.

    Raises:
        torch.OutOfMemoryError: memory ran out, in tiles too if there were any.
    """
    try:
        return work()
    except torch.OutOfMemoryError as problem:
        if tile is None:
            state.failure = str(problem)
            raise
    # Outside of `except`, whose traceback keeps the activations alive.
    risk = "; tiles this small may show in flat areas" if tile == SMALL_TILE else ""
    remark = f"the VAE ran out of memory in decode: decoded again in tiles of {tile[0]} px, stride {tile[2]}{risk}"
    log.warning(remark)
    state.remark(remark)
    release()
    settings = vae_settings(vae)
    vae.enable_slicing()
    vae.enable_tiling(*tile)
    try:
        return work()
    except torch.OutOfMemoryError as problem:
        state.failure = str(problem)
        raise
    finally:
        vae.__dict__.update(settings)
