"""The arguments of a call cut into the halves of guidance, and what one call of a pipeline keeps of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .split_tensor import SplitTensor
from .tensor_mark import TensorMark

Pair = tuple[Any, Any]
"""What the first and the second half get."""
Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments."""


class UncutError(Exception):
    """The rows of a call cannot be dealt out; the message says why."""


@dataclass
class Halves:
    """What a call of the pipeline with guidance keeps from step to step.

    Attributes:
        kept: halves of arguments that stay the same, by component and argument, with a mark of the whole.
        seen: units whose weights were looked at.
        told: remarks that were made.
    """

    kept: dict[tuple[str, str], tuple[TensorMark, Pair]] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    told: set[str] = field(default_factory=set)

    def cut(
        self,
        component: str,
        names: Sequence[str],
        steady: Sequence[str],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> tuple[Call, Call]:
        """Cut the arguments of a call; those that are the same from step to step are the same halves again.

        Args:
            component: whose call it is.
            names: of the parameters, the first of which has the rows.
            steady: names of arguments that stay the same from step to step.
            args, kwargs: as they were given.

        Raises:
            UncutError: the rows are odd, or it is not clear how an argument goes with them.
        """
        given = [*zip(names, args, strict=False), *kwargs.items()]
        rows = _rows(dict(given).get(names[0]))
        pairs = [self._pair(component, name, value, rows, name in steady) for name, value in given]
        count = len(args)
        first, second = (
            (
                tuple(pair[side] for pair in pairs[:count]),
                {name: pairs[count + i][side] for i, name in enumerate(kwargs)},
            )
            for side in (0, 1)
        )
        return first, second

    def _pair(self, component: str, name: str, value: Any, rows: int, steady: bool) -> Pair:
        if not steady or not isinstance(value, torch.Tensor) or value.is_inference():
            return cut(value, rows, name)
        known = self.kept.get((component, name))
        if known is None or not known[0].holds(value):
            known = self.kept[component, name] = TensorMark.of(value), cut(value, rows, name)
        return known[1]


def _rows(value: Any) -> int:
    rows = value.shape[0] if isinstance(value, torch.Tensor) and value.dim() else 1
    if rows % 2:
        raise UncutError(f"the call has {rows} rows")
    return int(rows)


def cut(value: Any, rows: int, name: str) -> Pair:
    """Cut an argument of a call with `rows` rows: tensors, and lists of them, by their first dimension.

    What has no rows of its own goes to both halves: numbers, and tensors of one value or one row.

    Raises:
        UncutError: naming the argument.
    """
    if isinstance(value, SplitTensor) and value.parts is not None and value.along == 0 and value.shape[0] == rows:
        first, second = value.parts
        return first, second
    if isinstance(value, torch.Tensor):
        if value.dim() == 0 or value.shape[0] == 1:
            return value, value
        if value.shape[0] != rows:
            raise UncutError(f"{name} has {value.shape[0]} rows, the call has {rows}")
        return value[: rows // 2], value[rows // 2 :]
    if type(value) in (list, tuple):
        pairs = [cut(item, rows, name) for item in value]
        return type(value)(pair[0] for pair in pairs), type(value)(pair[1] for pair in pairs)
    if any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value)):
        raise UncutError(f"{name} is a {type(value).__name__} with tensors")
    return value, value
