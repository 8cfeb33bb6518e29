"""A tensor whose parts stay on several devices until somebody asks for the whole: a residual of a split denoiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .stand_in_tensor import StandInTensor

Fetch = Callable[[torch.Tensor], torch.Tensor]


class SplitTensor(StandInTensor):
    """Several tensors, one after the other along a dimension, each where it was made.

    It has the shape of the whole and the device of its first part. A cast casts each part; any other operation puts
    the whole together on that device and works on it, so that whoever changes the tensor finds what any other would
    hold. From then on there are no parts.

    Attributes:
        parts: in order, of the same shape but for one dimension; None once the whole was put together.
        along: this dimension.
    """

    parts: tuple[torch.Tensor, ...] | None
    along: int
    _fetch: Fetch
    _whole: torch.Tensor | None

    @staticmethod
    def __new__(cls: type[SplitTensor], parts: Sequence[torch.Tensor], fetch: Fetch, along: int = 0) -> SplitTensor:
        """Join tensors; `fetch` brings one to the device of the first."""
        first, shape = parts[0], list(parts[0].shape)
        shape[along] = sum(part.shape[along] for part in parts)
        made: SplitTensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=first.dtype, device=first.device)
        made.parts, made.along, made._fetch, made._whole = tuple(parts), along, fetch, None
        return made

    def whole(self) -> torch.Tensor:
        """All of it in an ordinary tensor, which from now on stands for this one."""
        if self.parts is not None:
            first, *others = map(as_whole, self.parts)
            self._whole, self.parts = torch.cat([first, *map(self._fetch, others)], self.along), None
        assert self._whole is not None
        return self._whole

    def plain(self, func: Any) -> torch.Tensor:
        """The whole, whatever is done with it."""
        return self.whole()

    @classmethod
    def instead(cls, func: Any, args: Any, kwargs: Any) -> Any:
        """A cast, of all parts."""
        source = args[0]
        if func is not torch.ops.aten._to_copy.default or source.parts is None or set(kwargs) != {"dtype"}:
            return NotImplemented
        return cls([part.to(**kwargs) for part in source.parts], source._fetch, source.along)


def as_whole(value: Any) -> Any:
    """`value` with every `SplitTensor` in its tuples, lists and dicts put together."""
    return pytree.tree_map_only(SplitTensor, SplitTensor.whole, value)
