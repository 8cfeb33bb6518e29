"""Facts of a component that follow from its config and tensor shapes alone: buffers, and digests to compare them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..declare.formats import DTYPE_BYTES, Format, Quantization

BLOCK = 64
"""Elements of an nf4 block, which share one scale."""


def buffers(class_name: str, config: Mapping[str, Any]) -> tuple[int, int]:
    """Buffers that a module makes from its config and that no file holds: (elements cast, bytes kept).

    Gemma 2: the embedding scale follows the dtype, two copies of the rotary frequencies (head_dim / 2) stay
    float32. SANA's patch embedding: float32 sine positions (tokens x width), where `interpolation_scale` is set
    (2K and 4K models).
    """
    if class_name == "Gemma2Model":
        return 1, 4 * 2 * (int(config["head_dim"]) // 2)
    if config.get("interpolation_scale") is None:
        return 0, 0
    tokens = (int(config["sample_size"]) // int(config["patch_size"])) ** 2
    return 0, 4 * tokens * int(config["num_attention_heads"]) * int(config["attention_head_dim"])


@dataclass(frozen=True)
class Linears:
    """Weights of linear layers, which can be quantised: how many elements, rows, and blocks of 64 elements."""

    elements: int
    rows: int
    blocks: int

    def quantized_bytes(self, quantization: Quantization) -> int:
        """Bytes that they take. int8: a byte each, per row a float32 scale and an int8 zero point (torchao's
        `Int8Tensor`). nf4: half a byte each, per block a float32 maximum (bitsandbytes, without double quantization).
        """
        if quantization == "int8":
            return self.elements + self.rows * 5
        return (self.elements + 1) // 2 + self.blocks * 4


def is_linear(key: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the weight of a linear layer."""
    return len(shape) == 2 and key.endswith(".weight") and not key.endswith("embed_tokens.weight")


def tensor_bytes(key: str, shape: tuple[int, ...], form: Format) -> list[int]:
    """Bytes of the tensors that a floating-point parameter is held as in `form`: itself, or its quantised parts."""
    elements = math.prod(shape)
    if form.quantization is None or not is_linear(key, shape):
        return [elements * DTYPE_BYTES[form.dtype]]
    if form.quantization == "int8":
        return [elements, 4 * shape[0], shape[0]]
    return [(elements + 1) // 2, 4 * -(-elements // BLOCK)]


def linears(shapes: Mapping[str, tuple[int, ...]]) -> Linears:
    """Count the linear layers among a component's tensors: matrices named weight, but for the token embedding."""
    found = [shape for key, shape in shapes.items() if is_linear(key, shape)]
    sizes = [rows * columns for rows, columns in found]
    return Linears(sum(sizes), sum(rows for rows, _ in found), sum(-(-size // BLOCK) for size in sizes))


def shapes_digest(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Digest of tensor names and shapes, independent of order and dtype."""
    return digest({key: list(shape) for key, shape in shapes.items()})


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of `value`, in hexadecimal."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
