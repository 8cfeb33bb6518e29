"""Recognises a tensor that comes again and was not written to since, without keeping it alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class TensorMark:
    """A tensor as it was: its identity, and its version, which PyTorch raises when it is written to.

    An inference tensor has no version: only its identity is compared.
    """

    source: weakref.ref[torch.Tensor]
    version: int | None

    @classmethod
    def of(cls, tensor: torch.Tensor, on_end: Callable[[Any], None] | None = None) -> TensorMark:
        """Mark `tensor` as it is now; `on_end` is called with `source` when the tensor is gone."""
        return cls(weakref.ref(tensor, on_end), version_of(tensor))

    def holds(self, value: object) -> bool:
        """Whether `value` is that tensor, unchanged."""
        return isinstance(value, torch.Tensor) and self.source() is value and version_of(value) == self.version


def version_of(tensor: torch.Tensor) -> int | None:
    """How often `tensor` was written to; None for an inference tensor, which does not count."""
    return None if tensor.is_inference() else tensor._version
