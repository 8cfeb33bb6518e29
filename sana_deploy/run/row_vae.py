"""The VAE over GPUs: its encode and decode of an image, each unit some rows of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .border import Border
from .mirror import Mirror
from .not_copied import NotCopied
from .row_group import CountedGroup, UndealtError, named, tell, units_of
from .rows.autoencoder import decode, encode
from .rows.exchange import Group


@dataclass(frozen=True)
class _Way:
    """How one of the methods works over bands; `method` is the call that it belongs to."""

    work: Callable[[Sequence[Any], Group, Tensor], Tensor]
    method: str


_WAYS = {"_encode": _Way(encode, "encode"), "_decode": _Way(decode, "decode")}


class DealtCoder(NotCopied):
    """One of an AutoencoderDC's methods that take what passes in one go, over its units."""

    def __init__(self, name: str, vae: Any, mirrors: Sequence[Mirror], shares: Sequence[int], border: Border) -> None:
        self.name, self.vae, self.mirrors, self.shares, self.border = name, vae, mirrors, shares, border
        self.component = border.pipeline.of("vae")
        self.call = border.pipeline.by_name[self.component].call(_WAYS[name].method)

    def __call__(self, x: Tensor) -> Tensor:
        """Compute what the class's own method does."""
        way, unit = _WAYS[self.name], self.vae.spatial_compression_ratio if self.name == "_encode" else 1
        try:
            rows, odd = divmod(x.shape[2], unit)
            if odd or rows < 2:
                raise UndealtError(f"its height of {x.shape[2]} is not two rows of latents or more")
            modules = units_of(self.vae, self.mirrors[: rows - 1], self.border)
        except UndealtError as problem:
            tell(self.border, self.component, str(problem))
            whole: Tensor = getattr(type(self.vae), self.name)(self.vae, x)
            return whole
        group = CountedGroup(
            [x.device, *(self.border.units[mirror.unit] for mirror in self.mirrors)],
            self.shares,
            traffic=self.border.state.traffic,
            names=named(self.call.exchanges),
            tensor=self.call.input,
            result=self.call.output,
        )
        return way.work(modules, group, x)


def deal_vae(vae: Any, mirrors: Sequence[Mirror], shares: Sequence[int], border: Border) -> None:
    """Have an AutoencoderDC encode and decode over itself and its `mirrors`; undone with its other settings."""
    for name in _WAYS:
        vars(vae)[name] = DealtCoder(name, vae, mirrors, shares, border)
