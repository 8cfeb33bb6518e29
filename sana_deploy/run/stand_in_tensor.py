"""A tensor that stands for one which is not at hand yet: operations get an ordinary tensor in its place."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree


class StandInTensor(torch.Tensor):
    """Any operation works on what `plain` gives for it; one in place returns the stand-in that it was given."""

    def plain(self, func: Any) -> torch.Tensor:
        """The ordinary tensor that `func` works on."""
        raise NotImplementedError

    @classmethod
    def instead(cls, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of an operation that needs no ordinary tensor; NotImplemented for any other."""
        return NotImplemented

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({tuple(self.shape)}, {self.dtype}, {self.device})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, _: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        parts = func.decompose(*args, **kwargs)  # inference mode leaves it to a subclass to take operations apart
        if parts is NotImplemented:
            parts = cls.instead(func, args, kwargs)
        if parts is not NotImplemented:
            return parts
        owners: dict[int, StandInTensor] = {}  # operations in place return what they were given

        def taken(value: StandInTensor) -> torch.Tensor:
            found = value.plain(func)
            owners[id(found)] = value
            return found

        args, kwargs = pytree.tree_map_only(cls, taken, (args, kwargs))
        result = func(*args, **kwargs)
        return pytree.tree_map_only(torch.Tensor, lambda made: owners.get(id(made), made), result)
