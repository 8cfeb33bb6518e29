"""A tensor whose rows are on two devices until somebody asks for the whole: a residual of both halves of guidance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .stand_in_tensor import StandInTensor

Fetch = Callable[[torch.Tensor], torch.Tensor]


class SplitTensor(StandInTensor):
    """The rows of two tensors, one after the other, each where it was made.

    It has the shape of the whole and the device of its first half. A cast casts both halves; any other operation puts
    the whole together on that device and works on it, so that whoever changes the tensor finds what any other would
    hold. From then on there are no halves.

    Attributes:
        halves: both, of the same shape but for the rows; None once the whole was put together.
    """

    halves: tuple[torch.Tensor, torch.Tensor] | None
    _fetch: Fetch
    _whole: torch.Tensor | None

    @staticmethod
    def __new__(cls: type[SplitTensor], first: torch.Tensor, second: torch.Tensor, fetch: Fetch) -> SplitTensor:
        """Join two tensors; `fetch` brings `second` to the device of `first`."""
        shape = (first.shape[0] + second.shape[0], *first.shape[1:])
        made: SplitTensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=first.dtype, device=first.device)
        made.halves, made._fetch, made._whole = (first, second), fetch, None
        return made

    def whole(self) -> torch.Tensor:
        """All rows in an ordinary tensor, which from now on stands for this one."""
        if self.halves is not None:
            first, second = self.halves
            self._whole, self.halves = torch.cat([first, self._fetch(second)]), None
        assert self._whole is not None
        return self._whole

    def plain(self, func: Any) -> torch.Tensor:
        """The whole, whatever is done with it."""
        return self.whole()

    @classmethod
    def instead(cls, func: Any, args: Any, kwargs: Any) -> Any:
        """A cast, of both halves."""
        source = args[0]
        if func is not torch.ops.aten._to_copy.default or source.halves is None or set(kwargs) != {"dtype"}:
            return NotImplemented
        first, second = (half.to(**kwargs) for half in source.halves)
        return cls(first, second, source._fetch)


def as_whole(value: Any) -> Any:
    """`value` with every `SplitTensor` in its tuples, lists and dicts put together."""
    return pytree.tree_map_only(SplitTensor, SplitTensor.whole, value)
