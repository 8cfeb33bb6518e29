"""How units execute: what that changes in a profile, and the memory that graphs keep."""

from __future__ import annotations

from dataclasses import replace

from .._units import MIB
from ..declare.pipelines import Component
from ..declare.runtime import RUNTIMES, Execution
from .profile import ComponentProfile, PipelineProfile

_POOL_SHARE = 1.1
_POOL_CONSTANT = 70 * MIB
"""Calibrated on the graphs of both SANA models on an H100, 512 to 2048 px, batch 1 and 4: up to 40 MiB above the pool
that was measured, and less than 1 % below it."""


def executed(profile: PipelineProfile, execution: Execution) -> PipelineProfile:
    """Return `profile` with each unit executed so, as far as its description says that it can be."""
    runtime = RUNTIMES[execution]
    executing: dict[Component, Execution] = {
        part.name: "compiled" if runtime.compiles and part.compiled else "graphs"
        for part in profile.pipeline.components
        if (runtime.graphs and part.graphed) or (runtime.compiles and part.compiled)
    }

    def changed(name: Component, part: ComponentProfile) -> ComponentProfile:
        chosen = executing.get(name, "eager")
        # Weights that travel are new memory in each request, which no graph can read.
        return replace(part, execution="eager" if chosen == "graphs" and not part.resident else chosen)

    return replace(
        profile,
        components={name: changed(name, part) for name, part in profile.components.items()},
        further={unit: changed(unit.component, part) for unit, part in profile.further.items()},
        vae_under={mode: changed(part.name, part) for mode, part in profile.vae_under.items()},
    )


def pool_bytes(activation_bytes: int) -> int:
    """Bytes of the memory pool that the graphs of one GPU share.

    Args:
        activation_bytes: the largest that one of the graphed units there takes in its own phase.
    """
    return round(_POOL_SHARE * activation_bytes) + _POOL_CONSTANT
