"""Puts a plan's parts together from a placement that was chosen: pure bookkeeping, nothing is decided here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .._models import Diagnostic
from .._units import fullness
from ..declare.hardware import SPLITS
from ..declare.knobs import KNOBS, least_exact
from ..declare.pipelines import Component
from ..declare.runtime import RUNTIMES
from ..declare.spec import DeploySpec
from ..facts.checkpoint import Checkpoint
from ..facts.machine import Gpu, Machine
from .artifact import Plan
from .call_graphs import graphed_calls
from .cost import (
    Placement,
    bytes_per_request,
    bytes_per_step,
    crossings_of,
    slot_use,
)
from .grid import Candidate
from .identity import record_of
from .knobs import price_of, under
from .overlap import overlap_of
from .passing import VAE_TILE
from .profile import PipelineProfile
from .records import (
    Considered,
    Estimates,
    Faster,
    Miss,
    Place,
    PlacedComponent,
    PlacedUnit,
    RejectionCount,
    Replica,
    RunnerUp,
    Slot,
    Tile,
    Transfer,
)
from .search import Search


def assemble(
    spec: DeploySpec,
    checkpoint: Checkpoint,
    profile: PipelineProfile,
    machine: Machine,
    chosen: Candidate,
    search: Search,
    diagnostics: list[Diagnostic],
    feasible: bool = True,
    faster: Sequence[Faster] = (),
    replicas: Sequence[Replica] = (),
) -> Plan:
    """Make the plan of the `chosen` candidate, with what the search considered and rejected.

    Args:
        profile: without any knob.
        feasible: False for a closest miss, which can be read but not applied.
        faster: other ways for the same request.
        replicas: those beside it.
    """
    first = replica_of(spec, profile, machine, chosen, search, diagnostics, faster)
    return Plan.build(
        spec=spec,
        pipeline_class=profile.pipeline.class_name,
        checkpoint=record_of(checkpoint, spec.resolve.verify),
        feasible=feasible,
        replicas=list(replicas),
        **{name: getattr(first, name) for name in Replica.model_fields},
    )


def replica_of(
    spec: DeploySpec,
    profile: PipelineProfile,
    machine: Machine,
    chosen: Candidate,
    search: Search,
    diagnostics: list[Diagnostic],
    faster: Sequence[Faster],
) -> Replica:
    """Make what of a plan belongs to one replica; see `assemble`."""
    gpus = {gpu.index: gpu for gpu in machine.gpus}
    placement, batch = chosen.placement, spec.workload.batch
    used = [gpus[index] for index in sorted({place for place in placement.values() if place != "cpu"})]
    plain = replace(profile, band_count=chosen.bands)
    profile = under(plain, chosen.knobs)
    return Replica(
        slots=[_slot(profile, placement, gpu) for gpu in used],
        **_placed(profile, placement),
        **_turned_on(profile, chosen),
        faster=list(faster),
        transfers=[*_uploads(profile, placement, batch), *_transfers(profile, placement, batch)],
        estimates=_estimates(profile, chosen, batch),
        considered=_considered(search, profile, batch, gpus),
        rejections=_rejections(search),
        diagnostics=[*diagnostics, *_rate_remarks(used)],
        knob_prices={knob: price_of(knob, plain, chosen.knobs, placement, gpus, batch) for knob in chosen.knobs},
        vae_tile=Tile(**dict(zip(Tile.model_fields, VAE_TILE, strict=True))) if profile.vae_mode.tiled else None,
        vae_band_count=chosen.bands if chosen.bands > 1 else None,
        overlap=overlap_of(profile, chosen, gpus, batch),
    )


def _turned_on(profile: PipelineProfile, chosen: Candidate) -> dict[str, Any]:
    """The knobs that are on, and what all that was chosen does to the picture together."""
    knobs = (KNOBS[knob].exactness for knob in chosen.knobs)
    all_of_it = least_exact((RUNTIMES[profile.execution].exactness, SPLITS[profile.split].exactness, *knobs))
    return {"knobs": list(chosen.knobs), "exactness": all_of_it}


def _placed(profile: PipelineProfile, placement: Placement) -> dict[str, Any]:
    """What is where, and how it executes."""
    return {
        "home": placement[profile.pipeline.denoiser],
        "device_map": _device_map(profile, placement),
        "components": _components(profile, placement),
        "units": _units(profile, placement),
        "runtime": profile.execution,
        "split": profile.split,
        "rows": list(profile.rows),
        "graphed_calls": graphed_calls(profile, placement),
        "layers": dict(profile.dealt),
    }


def _device_map(profile: PipelineProfile, placement: Placement) -> dict[Component, Place]:
    """The place of the first unit of each component."""
    return {name: placement[name] for name in profile.pipeline.names}


def _unit_map(profile: PipelineProfile, placement: Placement) -> dict[str, Place]:
    """The places of the other units."""
    return {unit.name: placement[unit.name] for unit in profile.further}


def _components(profile: PipelineProfile, placement: Placement) -> dict[Component, PlacedComponent]:
    return {
        name: PlacedComponent(
            class_name=part.class_name,
            dtype=part.format.dtype,
            quantization=part.format.quantization,
            weights_bytes=part.weights_bytes,
            activation_bytes=part.activation_bytes,
            slot=placement[name],
        )
        for name, part in ((name, profile.components[name]) for name in profile.pipeline.names)
    }


def _units(profile: PipelineProfile, placement: Placement) -> dict[str, PlacedUnit]:
    return {
        unit.name: PlacedUnit(
            component=unit.component,
            weights_bytes=part.weights_bytes,
            activation_bytes=part.activation_bytes,
            slot=placement[unit.name],
        )
        for unit, part in profile.further.items()
    }


def _estimates(profile: PipelineProfile, chosen: Candidate, batch: int) -> Estimates:
    seconds: dict[str, float] = {phase: round(value, 4) for phase, value in (chosen.seconds or {}).items()}
    return Estimates(
        worst_utilisation=round(chosen.worst_utilisation, 6),
        bytes_per_step=bytes_per_step(profile, chosen.placement),
        bytes_per_image=bytes_per_request(profile, chosen.placement) // batch,
        seconds=seconds,
        seconds_per_image=_per_image(chosen, batch),
    )


def _per_image(candidate: Candidate, batch: int) -> float | None:
    return None if candidate.seconds is None else round(sum(candidate.seconds.values()) / batch, 4)


def _slot(profile: PipelineProfile, placement: Placement, gpu: Gpu) -> Slot:
    use = slot_use(profile, placement, gpu.index, gpu)
    return Slot(
        name=f"gpu{gpu.index}",
        index=gpu.index,
        gpu=gpu.name,
        compute_capability=list(gpu.capability),
        capacity_bytes=gpu.total_bytes,
        available_bytes=gpu.free_bytes,
        weights_bytes=use.weights_bytes,
        activation_bytes=use.activation_bytes,
        overhead_bytes=use.overhead_bytes + use.allocator_bytes,
        allocator_bytes=use.allocator_bytes,
        peak_bytes=use.peak_bytes,
        peak_phase=use.phase,
        pool_bytes=use.pool_bytes,
        first_pool_bytes=use.first_pool_bytes if use.first_pool_bytes != use.pool_bytes else None,
    )


def _uploads(profile: PipelineProfile, placement: Placement, batch: int) -> list[Transfer]:
    """Weights that wait on the CPU: once per request."""
    return [
        Transfer(
            src="cpu",
            dst=placement[name],
            tensor=f"{name} weights",
            bytes_per_step=0,
            bytes_per_image=part.weights_bytes // batch,
        )
        for name, part in profile.parts.items()
        if not part.resident
    ]


def _transfers(profile: PipelineProfile, placement: Placement, batch: int) -> list[Transfer]:
    return [
        Transfer(
            src=placement[crossing.src],
            dst=placement[crossing.dst],
            tensor=crossing.tensor,
            bytes_per_step=crossing.bytes_each if crossing.per_step else 0,
            bytes_per_image=crossing.bytes_each * crossing.times(profile.steps) // batch,
        )
        for crossing in crossings_of(profile, placement)
    ]


def _rate_remarks(gpus: list[Gpu]) -> list[Diagnostic]:
    """Say whose speed was assumed for GPUs that are not in the table."""
    scaled = dict.fromkeys(
        f"{gpu.name} are {gpu.rates.source}" for gpu in gpus if gpu.rates.source.startswith("scaled")
    )
    if not scaled:
        return []
    message = f"seconds for {', for '.join(scaled)}"
    return [Diagnostic(type="assumed_rates", severity="info", message=message, where="machine")]


def _considered(search: Search, profile: PipelineProfile, batch: int, gpus: dict[int, Gpu]) -> Considered:
    runners_up = [
        RunnerUp(
            device_map=_device_map(profile, candidate.placement),
            worst_utilisation=round(candidate.worst_utilisation, 6),
            bytes_per_image=candidate.bytes_per_request // batch,
            knobs=list(candidate.knobs),
            seconds_per_image=_per_image(candidate, batch),
            fullness=_fullness(candidate, gpus),
            units=_unit_map(profile, candidate.placement),
        )
        for candidate in search.ranked[1:]
    ]
    return Considered(
        placements=search.placements,
        feasible=search.feasible,
        runners_up=runners_up,
        settings=search.settings,
        closest=_miss(search, profile),
    )


def _fullness(candidate: Candidate, gpus: dict[int, Gpu]) -> float | None:
    shares = [fullness(use.peak_bytes, gpus[i].free_bytes, gpus[i].total_bytes) for i, use in candidate.uses.items()]
    return round(max(shares), 6) if shares else None


def _miss(search: Search, profile: PipelineProfile) -> Miss | None:
    nearest = search.nearest()
    if search.closest is None or nearest is None:
        return None
    return Miss(
        device_map=_device_map(profile, search.closest.placement),
        knobs=list(search.closest.knobs),
        shortfall_bytes=nearest.shortfall_bytes,
        message=nearest.message,
        units=_unit_map(profile, search.closest.placement),
    )


def _rejections(search: Search) -> list[RejectionCount]:
    return [
        RejectionCount(
            reason=rejection.reason,
            gpu=rejection.gpu,
            count=rejection.count,
            closest=rejection.message,
            closest_shortfall_bytes=rejection.shortfall_bytes,
        )
        for rejection in search.rejections
    ]
