"""What PyTorch's CUDA allocator and cuBLAS take of a GPU beyond the bytes of tensors; arithmetic only, no torch.

Source of the rules: c10/cuda/CUDACachingAllocator.cpp and aten/src/ATen/cuda/CublasHandlePool.cpp of PyTorch 2.11.
Checked against two H100s (docs/measured.md).
"""

from __future__ import annotations

from collections.abc import Iterable

from .._units import KIB, MIB

SMALL = MIB
"""Larger tensors come from the pool of large blocks, where at most so much is left at a block's end unsplit."""
SEGMENT = 20 * MIB
"""What the pool asks the driver for when a tensor of less than LARGE needs a block; it is shared out."""
LARGE = 10 * MIB
"""From here on a tensor gets a segment of its own, rounded up to ROUNDING."""
ROUNDING = 2 * MIB
_GRAIN = 512

ENCODE_WORKSPACE = 496
"""Bytes per pixel that cuDNN takes while a float32 VAE encodes; none in 16 bit, none in decode. Measured on an H100."""

HOPPER = (9, 0)
"""Compute capability from which cuBLAS is given a larger workspace."""


def unsplit_bytes(tensors: Iterable[int]) -> int:
    """Bytes that blocks have beyond the tensors in them, for tensors that are allocated once and stay.

    A tensor of 1 to 10 MiB shares a segment of 20 MiB with others of its size; what is left at the end of the segment
    is split off where it exceeds 1 MiB, else it belongs to the last of them. A larger one has a segment of its own, and
    the same holds for its end.

    Args:
        tensors: bytes of each.
    """
    return round(sum(_block(size) - size for size in tensors if size))


def _block(size: int) -> float:
    """Bytes of the block of a tensor of `size` bytes, in the mean over those that share a segment."""
    rounded = -(-size // _GRAIN) * _GRAIN
    if rounded <= SMALL:
        return rounded
    if rounded < LARGE:
        count, left = divmod(SEGMENT, rounded)
        return rounded + left / count if left <= SMALL else rounded
    segment = -(-rounded // ROUNDING) * ROUNDING
    return segment if segment - rounded <= SMALL else rounded


def workspace_bytes(capability: tuple[int, int]) -> int:
    """Bytes that cuBLAS and cuBLASLt keep for products on one stream of a GPU of this compute capability."""
    cublas = 32 * MIB if capability >= HOPPER else 8 * MIB + 128 * KIB
    return cublas + MIB


def context_bytes(capability: tuple[int, int]) -> int:
    """Bytes of a process's CUDA context, outside the allocator: libraries' kernels and the driver's own.

    Measured on H100 and H200: 695 to 723 MiB. Other kinds are estimated at 450 MiB until they are measured.
    """
    return (730 if capability == HOPPER else 450) * MIB
