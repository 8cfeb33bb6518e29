"""Pure arithmetic: a profile, GPUs and a placement give bytes per GPU and bytes moved. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .profile import PHASES, Crossing, Phase, PipelineProfile
from .spec import Component
from .units import MIB

Place = int | Literal["cpu"]
"""A slot index, or the host."""
Placement = Mapping[Component, Place]

CONTEXT_BYTES = 450 * MIB
"""CUDA context with cuBLAS and cuDNN handles and workspaces, per GPU in use. Estimated; drivers differ."""
HEADROOM = 0.02
"""Fraction of a GPU left free for allocator rounding and fragmentation."""


@dataclass(frozen=True)
class SlotUse:
    """What one slot holds at its fullest moment, in bytes; `peak_bytes` includes context and headroom."""

    weights_bytes: int
    activation_bytes: int
    overhead_bytes: int
    phase: Phase

    @property
    def peak_bytes(self) -> int:
        """Weights, activations of the fullest phase, and overhead."""
        return self.weights_bytes + self.activation_bytes + self.overhead_bytes


def home_of(placement: Placement) -> Place:
    """Return where the denoising loop lives: with the transformer."""
    return placement["transformer"]


def is_split(placement: Placement) -> bool:
    """Whether ControlNet sits apart from the transformer."""
    return placement["controlnet"] != placement["transformer"]


def slot_use(profile: PipelineProfile, placement: Placement, slot: Place, capacity_bytes: int) -> SlotUse:
    """Work out what `slot` holds under `placement`.

    peak = sum of weights + max over phases of activations + context + headroom x capacity. Components of one phase
    work one after the other, so that the largest counts; what waits at home outside the denoising loop (prompt
    embeddings, the control image) is listed under the transformer and adds to whoever works there.
    """
    parts = [profile.components[name] for name, place in placement.items() if place == slot]
    by_phase: dict[Phase, int] = {}
    for phase in PHASES:
        working = [part.activations.get(phase, 0) for part in parts if part.name != "transformer" or phase == "denoise"]
        waiting = [
            part.activations.get(phase, 0) for part in parts if part.name == "transformer" and phase != "denoise"
        ]
        by_phase[phase] = max(working, default=0) + sum(waiting)
    phase = max(PHASES, key=lambda name: by_phase[name])
    return SlotUse(
        weights_bytes=sum(part.weights_bytes for part in parts),
        activation_bytes=by_phase[phase],
        overhead_bytes=0 if slot == "cpu" else CONTEXT_BYTES + int(HEADROOM * capacity_bytes),
        phase=phase,
    )


def crossings_of(profile: PipelineProfile, placement: Placement) -> list[Crossing]:
    """Return the tensors that change devices under `placement`."""
    return [c for c in profile.crossings if placement[c.src] != placement[c.dst]]


def bytes_per_step(profile: PipelineProfile, placement: Placement) -> int:
    """Bytes that cross between devices in one denoising step."""
    return sum(c.bytes_each for c in crossings_of(profile, placement) if c.per_step)


def bytes_per_request(profile: PipelineProfile, placement: Placement) -> int:
    """Bytes that cross between devices in one whole request."""
    return sum(c.bytes_each * (profile.steps if c.per_step else 1) for c in crossings_of(profile, placement))
