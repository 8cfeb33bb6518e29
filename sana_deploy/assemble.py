"""Puts a plan's parts together from a placement that was chosen: pure bookkeeping, nothing is decided here."""

from __future__ import annotations

from .checkpoint import Checkpoint
from .cost import Placement, bytes_per_request, bytes_per_step, crossings_of, home_of, is_split, slot_use
from .machine import Gpu, Machine
from .plan import (
    CheckpointRecord,
    Considered,
    Diagnostic,
    Estimates,
    PlacedComponent,
    Plan,
    RejectionCount,
    RunnerUp,
    Slot,
    Transfer,
)
from .planner import Search
from .profile import PipelineProfile
from .spec import COMPONENTS, DeploySpec
from .units import human_bytes


def assemble(
    spec: DeploySpec,
    checkpoint: Checkpoint,
    profile: PipelineProfile,
    machine: Machine,
    placement: Placement,
    search: Search,
    diagnostics: list[Diagnostic],
) -> Plan:
    """Make the plan of a chosen `placement`, with what the search considered and rejected."""
    by_index = {gpu.index: gpu for gpu in machine.gpus}
    used = sorted({place for place in placement.values() if place != "cpu"})
    components = {
        name: PlacedComponent(
            class_name=part.class_name,
            dtype=part.dtype,
            weights_bytes=part.weights_bytes,
            activation_bytes=part.activation_bytes,
            slot=placement[name],
        )
        for name, part in ((name, profile.components[name]) for name in COMPONENTS)
    }
    return Plan.build(
        spec=spec,
        checkpoint=CheckpointRecord(
            kind=checkpoint.kind,
            source=checkpoint.source,
            revision=checkpoint.revision,
            fingerprint=checkpoint.fingerprint,
        ),
        slots=[_slot(profile, placement, by_index[index]) for index in used],
        home=home_of(placement),
        device_map={name: placement[name] for name in COMPONENTS},
        components=components,
        knobs=["split_controlnet"] if is_split(placement) else [],
        transfers=_transfers(profile, placement, spec.workload.batch),
        estimates=Estimates(
            worst_utilisation=round(search.best.worst_utilisation, 6) if search.best else 0.0,
            bytes_per_step=bytes_per_step(profile, placement),
            bytes_per_image=bytes_per_request(profile, placement) // spec.workload.batch,
        ),
        considered=_considered(search, spec.workload.batch),
        rejections=count_rejections(search),
        diagnostics=[*diagnostics, *_rough_remarks(profile), *_host_remarks(profile, placement, machine)],
    )


def _slot(profile: PipelineProfile, placement: Placement, gpu: Gpu) -> Slot:
    use = slot_use(profile, placement, gpu.index, gpu.total_bytes)
    return Slot(
        name=f"gpu{gpu.index}",
        index=gpu.index,
        gpu=gpu.name,
        compute_capability=list(gpu.capability),
        capacity_bytes=gpu.total_bytes,
        available_bytes=gpu.free_bytes,
        weights_bytes=use.weights_bytes,
        activation_bytes=use.activation_bytes,
        overhead_bytes=use.overhead_bytes,
        peak_bytes=use.peak_bytes,
        peak_phase=use.phase,
    )


def _transfers(profile: PipelineProfile, placement: Placement, batch: int) -> list[Transfer]:
    return [
        Transfer(
            src=placement[crossing.src],
            dst=placement[crossing.dst],
            tensor=crossing.tensor,
            bytes_per_step=crossing.bytes_each if crossing.per_step else 0,
            bytes_per_image=crossing.bytes_each * (profile.steps if crossing.per_step else 1) // batch,
        )
        for crossing in crossings_of(profile, placement)
    ]


def _rough_remarks(profile: PipelineProfile) -> list[Diagnostic]:
    if not profile.rough:
        return []
    message = f"activations of {', '.join(profile.rough)} are rules of thumb: no rehearsal was fitted to this shape"
    hint = "machine=virtual rehearses it and tells the true peaks"
    return [Diagnostic(type="rough_activations", severity="info", message=message, where="model", hint=hint)]


def _host_remarks(profile: PipelineProfile, placement: Placement, machine: Machine) -> list[Diagnostic]:
    use = slot_use(profile, placement, "cpu", machine.host_bytes)
    if use.peak_bytes <= machine.host_bytes:
        return []
    message = (
        f"the components on the CPU need about {human_bytes(use.peak_bytes)}, "
        f"this host has {human_bytes(machine.host_bytes)}"
    )
    return [Diagnostic(type="host_memory", severity="warning", message=message, where="machine")]


def _considered(search: Search, batch: int) -> Considered:
    runners_up = [
        RunnerUp(
            device_map={name: candidate.placement[name] for name in COMPONENTS},
            worst_utilisation=round(candidate.worst_utilisation, 6),
            bytes_per_image=candidate.bytes_per_request // batch,
        )
        for candidate in search.feasible[1:4]
    ]
    return Considered(placements=search.considered, feasible=len(search.feasible), runners_up=runners_up)


def count_rejections(search: Search) -> list[RejectionCount]:
    """Count the rejected placements by reason and GPU, most frequent first, each with its closest miss."""
    groups: dict[tuple[str, int], list[tuple[int, str]]] = {}
    for _, rejection in search.rejected:
        group = groups.setdefault((rejection.reason, rejection.gpu), [])
        group.append((rejection.shortfall_bytes, rejection.message))
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return [
        RejectionCount(
            reason=reason, gpu=gpu, count=len(misses), closest=min(misses)[1], closest_shortfall_bytes=min(misses)[0]
        )
        for (reason, gpu), misses in ordered
    ]
