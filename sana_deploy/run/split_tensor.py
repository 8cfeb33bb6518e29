"""A tensor whose rows are on two devices until somebody asks for the whole: a residual of both halves of guidance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

Fetch = Callable[[torch.Tensor], torch.Tensor]


class SplitTensor(torch.Tensor):
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

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"SplitTensor({tuple(self.shape)}, {self.dtype}, {self.device})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, _: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        parts = func.decompose(*args, **kwargs)  # inference mode leaves it to a subclass to take operations apart
        if parts is not NotImplemented:
            return parts
        source = args[0]
        if func is torch.ops.aten._to_copy.default and source.halves is not None and set(kwargs) == {"dtype"}:
            first, second = (half.to(**kwargs) for half in source.halves)
            return cls(first, second, source._fetch)
        owners: dict[int, SplitTensor] = {}  # operations in place return what they were given

        def plain(value: SplitTensor) -> torch.Tensor:
            owners[id(value.whole())] = value
            return value.whole()

        args, kwargs = pytree.tree_map_only(cls, plain, (args, kwargs))
        result = func(*args, **kwargs)
        return pytree.tree_map_only(torch.Tensor, lambda made: owners.get(id(made), made), result)


def as_whole(value: Any) -> Any:
    """`value` with every `SplitTensor` in its tuples, lists and dicts put together."""
    return pytree.tree_map_only(SplitTensor, SplitTensor.whole, value)
