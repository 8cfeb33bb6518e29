"""The tensor subclass of nf4 weights. It needs torchao and bitsandbytes: `quantize.py` imports it on first use."""

from __future__ import annotations

from typing import Any

import bitsandbytes  # noqa: F401  registers torch.ops.bitsandbytes
import torch
from torchao.utils import TorchAOBaseTensor

from ..facts.shapes import BLOCK

_library = torch.ops.bitsandbytes


class Nf4Tensor(TorchAOBaseTensor):  # type: ignore[misc]
    """A weight of `rows` x `columns` in nf4: `packed` two elements a byte, `maxima` one float32 per block."""

    tensor_data_names = ["packed", "maxima"]  # noqa: RUF012  the base class's interface
    tensor_attribute_names = ["rows", "columns", "dtype"]  # noqa: RUF012

    def __new__(
        cls, packed: torch.Tensor, maxima: torch.Tensor, rows: int, columns: int, dtype: torch.dtype
    ) -> Nf4Tensor:
        made: Nf4Tensor = torch.Tensor._make_wrapper_subclass(
            cls, (rows, columns), dtype=dtype, device=packed.device, requires_grad=False
        )
        return made

    def __init__(self, packed: torch.Tensor, maxima: torch.Tensor, rows: int, columns: int, dtype: torch.dtype) -> None:
        self.packed, self.maxima, self.rows, self.columns = packed, maxima, rows, columns

    @classmethod
    def from_weight(cls, weight: torch.Tensor) -> Nf4Tensor:
        """Quantise a weight of (rows, columns); the result computes in its dtype."""
        packed, maxima = _library.quantize_4bit(weight.contiguous(), BLOCK, "nf4", torch.uint8)
        rows, columns = weight.shape
        return cls(packed, maxima, rows, columns, weight.dtype)

    def dequantize(self) -> torch.Tensor:
        """The weight of (rows, columns) in its dtype."""
        shape = [self.rows, self.columns]
        made: torch.Tensor = _library.dequantize_4bit(self.packed, self.maxima, BLOCK, "nf4", shape, self.dtype)
        return made


def _linear(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
    weight = given["weight"].dequantize().to(given["input"].dtype)
    return torch.nn.functional.linear(given["input"], weight, given.get("bias"))


Nf4Tensor.implements_torch_function(torch.nn.functional.linear)(_linear)
