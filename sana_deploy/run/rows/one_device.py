"""An autoencoder that takes images in bands on its own device: less memory, the same picture up to the last places."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .autoencoder import decode, encode
from .exchange import Group

_WORKS = {"_encode": encode, "_decode": decode}
METHODS = tuple(_WORKS)
"""Methods of an AutoencoderDC that take what passes in one go, whether images are sliced or not."""


def use_bands(autoencoder: Any, count: int) -> None:
    """Have an AutoencoderDC encode and decode in `count` bands of rows; one is the class's own way.

    An image of fewer rows of latents is cut into as many bands as it has rows. One whose height is not a whole number
    of them is encoded whole. Tiles that are turned on later go before bands. The weights, and what wraps layers, are
    looked up in each call.
    """
    for name in METHODS:
        vars(autoencoder).pop(name, None)
        if count > 1:
            vars(autoencoder)[name] = _Banded(autoencoder, name, count)


def bands_of(autoencoder: Any) -> int:
    """The bands that an AutoencoderDC takes an image in."""
    found = vars(autoencoder).get(METHODS[0])
    return found.count if isinstance(found, _Banded) else 1


class _Banded:
    """One of the methods, in bands."""

    def __init__(self, autoencoder: Any, name: str, count: int) -> None:
        self.autoencoder, self.name, self.count = autoencoder, name, count

    def __call__(self, x: Tensor) -> Tensor:
        vae, unit = self.autoencoder, self.autoencoder.spatial_compression_ratio
        if vae.use_tiling or (self.name == "_encode" and x.shape[2] % unit):
            whole: Tensor = getattr(type(vae), self.name)(vae, x)
            return whole
        group = Group([x.device] * self.count)
        return _WORKS[self.name]([vae] * self.count, group, x)
