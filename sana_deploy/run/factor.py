"""A number that the results of a call are multiplied by, as a graph reads it: from memory, so that any will do."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch


class Factor:
    """Stands for the number where the work is recorded: `tensor * factor` has the bits of `tensor * number`.

    PyTorch multiplies 16-bit numbers by a Python number in float32 and rounds once. A tensor without dimensions would
    be rounded to 16 bits first; one with a dimension, and an output of the other's dtype, gives the same product.

    Args:
        written: where the number is, of one element in float64.
        number: the one that comes first.
    """

    def __init__(self, written: torch.Tensor, number: float) -> None:
        self.written = written
        self.take(number)

    def take(self, number: float) -> None:
        """Write the number that the next replay reads."""
        self.written.fill_(number)

    def __rmul__(self, tensor: torch.Tensor) -> torch.Tensor:
        number = self.written.to(torch.promote_types(tensor.dtype, torch.float32))
        return torch.mul(tensor, number, out=torch.empty_like(tensor))

    __mul__ = __rmul__


class Number(float):
    """A number in a call that a graph reads from memory: its value is no part of the call's form."""


def marked(arguments: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The named arguments of a call, with those of `names` that are numbers marked as such."""
    return {
        name: Number(value) if name in names and type(value) in (int, float) else value
        for name, value in arguments.items()
    }
