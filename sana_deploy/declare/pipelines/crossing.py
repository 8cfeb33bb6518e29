"""The phases of a request, and the tensors that cross between components in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..formats import Dtype
from ..workload import Workload

Phase = Literal["encode", "prepare", "denoise", "decode"]
PHASES: tuple[Phase, ...] = ("encode", "prepare", "denoise", "decode")
"""Text encoding, control image into latents, the denoising loop, latents into pixels; one after the other."""


@dataclass(frozen=True)
class Crossing:
    """A tensor that leaves component `src` and enters `dst`: bytes each time it does, and the phase that waits for it.

    What the pipeline itself makes or keeps (latents, the prompt's tokens) is the denoiser's.

    Attributes:
        pieces: tensors of one size that it consists of, which `src` makes one after the other; 0 for a single tensor.
        needed: share of its work in a step that `dst` does before it needs the last piece.
        copies: that it takes each time, one after the other.
    """

    tensor: str
    src: str
    dst: str
    bytes_each: int
    per_step: bool
    phase: Phase = "denoise"
    pieces: int = 0
    needed: float = 0.0
    copies: int = 1

    def times(self, steps: int) -> int:
        """How often it crosses in a request of `steps` denoising steps."""
        return steps if self.per_step else 1


Configs = Mapping[str, Mapping[str, Any]]
"""Each component's config."""
Crossings = Callable[[Configs, Workload, Mapping[str, Dtype]], tuple[Crossing, ...]]
"""Tensors that cross between components for a workload, given configs and dtypes."""
