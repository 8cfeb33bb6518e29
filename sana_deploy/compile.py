"""From a declaration to a plan: profile, search, and the plan's parts put together. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from . import machine as machines
from .checkpoint import Checkpoint, open_checkpoint
from .compose import compose_spec
from .cost import Placement, bytes_per_request, bytes_per_step, crossings_of, home_of, is_split, slot_use
from .describe import describe_machine
from .errors import InfeasibleError
from .machine import Gpu, Machine
from .plan import (
    CheckpointRecord,
    Considered,
    Diagnostic,
    Estimates,
    Place,
    PlacedComponent,
    Plan,
    RejectionCount,
    RunnerUp,
    Slot,
    Transfer,
)
from .planner import Rules, Search, search_balanced, search_custom, search_single
from .precision import FRAGILE, fragile_components
from .profile import PipelineProfile, profile_pipeline
from .spec import COMPONENTS, CustomMap, DeploySpec, Dtype, MultiGpuBalanced, SingleGpu, VirtualMachine
from .units import human_bytes, parse_bytes


def compile_plan(overrides: Sequence[str] = ()) -> Plan:
    """Compile the declaration that Hydra `overrides` give, e.g. `["hardware=single_gpu", "precision=fp32"]`.

    Raises:
        ComposeError, InvalidSpecError, CheckpointError, InfeasibleError: see `sana_deploy.errors`.
    """
    return compile_spec(compose_spec(overrides))


def compile_spec(spec: DeploySpec, machine: Machine | None = None) -> Plan:
    """Compile a validated declaration for `machine` (probed unless given)."""
    diagnostics = _precision_remarks(spec)
    checkpoint = open_checkpoint(spec.model)
    profile = profile_pipeline(checkpoint, spec.workload, spec.precision.components)
    machine = machine or machine_of(spec)
    _check_indices(spec, machine)
    machine = _offered(spec, machine)
    if not machine.gpus and not isinstance(spec.hardware, CustomMap):
        return _cpu_plan(spec, checkpoint, profile, machine, diagnostics)
    search = _search(spec, profile, machine)
    if search.best is None:
        raise _infeasible(spec, checkpoint, machine, search)
    return _assemble(spec, checkpoint, profile, machine, search.best.placement, search, diagnostics)


def machine_of(spec: DeploySpec) -> Machine:
    """Return the machine that `spec` plans for: described, or probed without torch."""
    if isinstance(spec.machine, VirtualMachine):
        return describe_machine(spec.machine)
    return machines.probe()


def _offered(spec: DeploySpec, machine: Machine) -> Machine:
    """The part of `machine` that the planner may take: `hardware.use` and `hardware.keep_free`."""
    hardware = spec.hardware
    if isinstance(hardware, CustomMap):
        return machine
    kept = parse_bytes(hardware.keep_free, "hardware.keep_free")
    chosen = [gpu for gpu in machine.gpus if hardware.use is None or gpu.index in hardware.use]
    gpus = tuple(replace(gpu, free_bytes=max(0, gpu.free_bytes - kept)) for gpu in chosen)
    return replace(machine, gpus=gpus)


def _search(spec: DeploySpec, profile: PipelineProfile, machine: Machine) -> Search:
    hardware = spec.hardware
    allow_split = not isinstance(hardware, MultiGpuBalanced) or "split_controlnet" in hardware.allow
    rules = Rules(allow_split=allow_split, allow_emulated=spec.precision.allow_emulated)
    if isinstance(hardware, SingleGpu):
        return search_single(profile, machine.gpus, rules, hardware.gpu)
    if isinstance(hardware, CustomMap):
        return search_custom(profile, machine.gpus, rules, dict(hardware.device_map))
    pins = {name: place for name, place in hardware.pin.items() if place is not None}
    return search_balanced(profile, machine.gpus, rules, pins)


def _check_indices(spec: DeploySpec, machine: Machine) -> None:
    """Refuse indices of GPUs that are not there, or that `hardware.use` leaves out."""
    hardware = spec.hardware
    present = {gpu.index for gpu in machine.gpus}
    if isinstance(hardware, CustomMap):
        _check_present(hardware.device_map.items(), "hardware.device_map.", present, machine)
        return
    if not present:
        return
    used = hardware.use or sorted(present)
    _check_present([(f"[{i}]", index) for i, index in enumerate(used)], "hardware.use", present, machine)
    named = hardware.pin.items() if isinstance(hardware, MultiGpuBalanced) else [("gpu", hardware.gpu)]
    prefix = "hardware.pin." if isinstance(hardware, MultiGpuBalanced) else "hardware."
    _check_present(named, prefix, present, machine)
    for name, index in named:
        if index is not None and index not in used:
            raise InfeasibleError(f"GPU {index} is left out by hardware.use={used}", where=f"{prefix}{name}")


def _check_present(named: Iterable[tuple[str, Place | None]], prefix: str, present: set[int], machine: Machine) -> None:
    for name, index in named:
        if index not in (None, "cpu", *present):
            hint = f"use {_range(present)}" if present else "hardware=single_gpu runs on the CPU here"
            message = f"GPU {index} is not there: {machine.inventory()}"
            raise InfeasibleError(message, where=f"{prefix}{name}", hint=hint, gpu=index)


def _range(indices: set[int]) -> str:
    return f"an index from 0 to {max(indices)}" if len(indices) > 1 else "0"


def _precision_remarks(spec: DeploySpec) -> list[Diagnostic]:
    fragile = fragile_components(spec.precision.components)
    if not fragile:
        return []
    reasons = "; ".join(f"{name}: {FRAGILE[name]}" for name in fragile)
    message = f"float16 is documented not to be safe for {' and '.join(fragile)} ({reasons})"
    hint = "precision=mixed_bf16, or precision=fp32 where bfloat16 is not native"
    if spec.precision.strict:
        raise InfeasibleError(message, where="precision.components", hint=hint)
    remark = Diagnostic(
        type="fragile_dtype", severity="warning", message=message, where="precision.components", hint=hint
    )
    return [remark]


def _cpu_plan(
    spec: DeploySpec,
    checkpoint: Checkpoint,
    profile: PipelineProfile,
    machine: Machine,
    diagnostics: list[Diagnostic],
) -> Plan:
    if not isinstance(spec.hardware, CustomMap) and spec.hardware.on_shortfall == "error":
        raise InfeasibleError(
            f"{machine.inventory()}, and hardware.on_shortfall=error refuses the CPU",
            where="hardware.on_shortfall",
            hint="hardware.on_shortfall=cpu",
        )
    remark = Diagnostic(
        type="no_gpu",
        severity="warning",
        message=f"{machine.inventory()}; every component runs on the CPU",
        where="machine",
        hint="hardware.on_shortfall=error makes this an error",
    )
    placement: Placement = dict.fromkeys(COMPONENTS, "cpu")
    return _assemble(spec, checkpoint, profile, machine, placement, Search(), [remark, *diagnostics])


def _assemble(
    spec: DeploySpec,
    checkpoint: Checkpoint,
    profile: PipelineProfile,
    machine: Machine,
    placement: Placement,
    search: Search,
    diagnostics: list[Diagnostic],
) -> Plan:
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


def _infeasible(spec: DeploySpec, checkpoint: Checkpoint, machine: Machine, search: Search) -> InfeasibleError:
    closest = search.closest()
    reasons = "; ".join(f"{row.count} {row.reason}" + (f" on GPU {row.gpu}" if row.gpu >= 0 else "")
                        for row in count_rejections(search))  # fmt: skip
    detail = closest.message if closest else "there is nothing to place on"
    short = f", {human_bytes(closest.shortfall_bytes)} too much" if closest and closest.shortfall_bytes else ""
    return InfeasibleError(
        f"0 of {search.considered} placements fit ({reasons}). Closest: {detail}{short}",
        where="hardware",
        hint=_checked_hint(spec, checkpoint, machine),
        placements=search.considered,
        shortfall_bytes=closest.shortfall_bytes if closest else 0,
    )


def _checked_hint(spec: DeploySpec, checkpoint: Checkpoint, machine: Machine) -> str:
    """Return a change that was planned and does fit, or nothing."""
    policies: dict[str, Dtype] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    for hardware in (spec.hardware, MultiGpuBalanced(strategy="multi_gpu_balanced")):
        for policy, dtype in {"": None, **policies}.items():
            dtypes = dict.fromkeys(COMPONENTS, dtype) if dtype else spec.precision.components
            precision = spec.precision.model_copy(update={"components": dtypes})
            changed = spec.model_copy(update={"hardware": hardware, "precision": precision})
            profile = profile_pipeline(checkpoint, spec.workload, precision.components)
            if _search(changed, profile, machine).best:
                parts = [f"precision={policy}"] if policy else []
                if hardware != spec.hardware:
                    parts.insert(0, "hardware=multi_gpu_balanced")
                return f"this fits here: {' '.join(parts)}"
    return ""
