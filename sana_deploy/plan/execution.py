"""How the units of the denoising loop execute: what that changes in a profile, and the memory that graphs keep."""

from __future__ import annotations

from dataclasses import replace

from .._units import MIB
from ..declare.runtime import Execution
from .profile import PipelineProfile

_POOL_SHARE = 1.1
_POOL_CONSTANT = 70 * MIB
"""Calibrated on the graphs of both SANA models on an H100, 512 to 2048 px, batch 1 and 4: up to 40 MiB above the pool
that was measured, and less than 1 % below it."""


def executed(profile: PipelineProfile, execution: Execution) -> PipelineProfile:
    """Return `profile` with the units of denoiser and ControlNet executed so in denoise."""
    looped = profile.pipeline.looped
    components = {
        name: replace(part, execution=execution) if name in looped else part
        for name, part in profile.components.items()
    }
    further = {
        unit: replace(part, execution=execution) if unit.component in looped else part
        for unit, part in profile.further.items()
    }
    return replace(profile, components=components, further=further)


def pool_bytes(activation_bytes: int) -> int:
    """Bytes of the memory pool that the graphs of one GPU share.

    Args:
        activation_bytes: the largest that one of the graphed units there takes in denoise.
    """
    return round(_POOL_SHARE * activation_bytes) + _POOL_CONSTANT
