"""Number formats of a component: the dtype that it computes in, and what its weights are kept in."""

from __future__ import annotations

from typing import Literal, NamedTuple

Dtype = Literal["float16", "bfloat16", "float32"]
DTYPE_BYTES: dict[Dtype, int] = {"float16": 2, "bfloat16": 2, "float32": 4}
Quantization = Literal["int8", "nf4"]
"""How the weights of linear layers are kept, where not in the component's dtype; see `run/quantize.py`."""


class Format(NamedTuple):
    """What a component computes in, and what the weights of its linear layers are kept in (None: the same)."""

    dtype: Dtype
    quantization: Quantization | None = None

    def __str__(self) -> str:
        return f"{self.dtype} + {self.quantization}" if self.quantization else self.dtype
