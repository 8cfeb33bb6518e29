"""Binds a plan's slots to the GPUs that are there, and lists what differs from what was planned for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .._models import Diagnostic
from .._units import human_bytes
from ..declare.pipelines import Component
from ..declare.spec import CustomMap, VirtualMachine
from ..errors import InfeasibleError, InvalidSpecError, PlanError
from ..facts.libraries import library_versions
from ..facts.machine import Gpu, Machine, is_native, probe_torch
from ..facts.virtual_machine import describe_machine
from .artifact import Plan, Slot
from .identity import CONTENT, drift_of


@dataclass(frozen=True)
class ResolvedPlan:
    """A plan bound to devices: `device_map` gives each component's torch device string, `slot_devices` each slot's.

    `home` is the device where the denoising loop lives; `drift` lists differences that do no harm; `allowed` names the
    staleness that was accepted.
    """

    plan: Plan
    machine: Machine
    device_map: Mapping[Component, str]
    slot_devices: Mapping[int, str]
    home: str
    drift: tuple[Diagnostic, ...] = ()
    allowed: tuple[str, ...] = ()


def resolve_plan(
    plan: Plan,
    machine: Machine | None = None,
    allow: Sequence[str] | None = None,
    bind: Mapping[str, str] | None = None,
    verify: bool | None = None,
) -> ResolvedPlan:
    """Bind every slot of `plan` to a device of `machine`: the described one for a virtual plan, else probed by torch.

    `allow`, `bind` and `verify` are the declaration's unless given; see `Plan.resolve`.

    Raises:
        PlanError: a GPU is missing, busier, smaller or older than its slot needs, or a library or the checkpoint
            changed; each difference is on a line of its own.
        InfeasibleError: a GPU of `bind` is not there.
    """
    if not plan.feasible:
        raise PlanError(
            "this plan shows the closest miss of something that does not fit: it can be read, not applied",
            where="resolve",
            hint="compile it again with one of its hints, or with hardware=custom_map hardware.force=true",
        )
    allowed = plan.spec.resolve.allow if allow is None else allow
    versions = _library_drift(plan)
    checkpoint = drift_of(plan, plan.spec.resolve.verify if verify is None else verify)
    refused = {"library_versions": versions, CONTENT: list(checkpoint.content)}
    refused = {name: lines for name, lines in refused.items() if lines and name not in allowed}
    stale = [*checkpoint.changed, *(line for lines in refused.values() for line in lines)]
    machine = machine or _declared(plan)
    if plan.slots and not machine.gpus and _may_fall_back(plan) and not stale:
        return _on_cpu(plan, machine, allowed)
    wanted = _bound(plan, machine, (plan.spec.resolve.bind if bind is None else bind) or {})
    matched = _match(sorted(plan.slots, key=lambda slot: -slot.peak_bytes), plan, machine, wanted, {})
    if matched is None or stale:
        problems = [*stale, *(_problems(plan, machine, wanted) if matched is None else [])]
        accept = f"; or accept that with resolve.allow=[{','.join(refused)}]" if refused else ""
        raise PlanError(
            "the plan is stale:\n  " + "\n  ".join(problems) + f"\n  ({machine.inventory()})",
            where="resolve",
            hint=f"compile it again on this machine{accept}",
        )
    kind = "vgpu" if machine.kind == "virtual" else "cuda"
    slots = {index: f"{kind}:{gpu.index}" for index, gpu in sorted(matched.items())}
    devices = {name: place if place == "cpu" else slots[place] for name, place in plan.device_map.items()}
    accepted = [*versions, *checkpoint.content]
    drift = [Diagnostic(type="drift", severity="info", message=text, where="resolve") for text in accepted]
    remarks = (*drift, *_drift(plan, matched))
    return ResolvedPlan(plan, machine, devices, slots, devices[plan.pipeline.denoiser], remarks, tuple(allowed))


def _library_drift(plan: Plan) -> list[str]:
    """Libraries of another version than the plan was compiled with, one line each."""
    now = library_versions(part.format for part in plan.components.values())
    return [f"{name}: was {was}, is {now.get(name)}" for name, was in plan.libraries.items() if now.get(name) != was]


def _bound(plan: Plan, machine: Machine, bind: Mapping[str, str]) -> dict[int, Gpu]:
    """The GPU that each slot of `bind` must get."""
    slots = {str(slot.index): slot.index for slot in plan.slots}
    by_uuid = {gpu.uuid.removeprefix("GPU-"): gpu for gpu in machine.gpus if gpu.uuid}
    found: dict[int, Gpu] = {}
    for key, uuid in bind.items():
        gpu = by_uuid.get(uuid.removeprefix("GPU-"))
        if key not in slots:
            known = ", ".join(slots) or "none"
            raise InvalidSpecError(f"the plan has no slot {key}", where=f"resolve.bind.{key}", hint=f"slots: {known}")
        if gpu is None:
            there = ", ".join(f"GPU-{known}" for known in by_uuid) or "none"
            raise InfeasibleError(
                f"no GPU here has the UUID {uuid}", where=f"resolve.bind.{key}", hint=f"UUIDs here: {there}"
            )
        found[slots[key]] = gpu
    return found


def _match(
    slots: Sequence[Slot], plan: Plan, machine: Machine, wanted: Mapping[int, Gpu], bound: dict[int, Gpu]
) -> dict[int, Gpu] | None:
    """Give every slot a GPU of its own that will do, the most alike first; None where there is no such matching."""
    if not slots:
        return bound
    first, *rest = slots
    taken = {gpu.index for index, gpu in {**wanted, **bound}.items() if index != first.index}
    choices = [wanted[first.index]] if first.index in wanted else machine.gpus
    for gpu in sorted(choices, key=lambda gpu: _unlike(first, gpu)):
        if gpu.index not in taken and not _lacks(first, plan, gpu):
            matched = _match(rest, plan, machine, wanted, {**bound, first.index: gpu})
            if matched is not None:
                return matched
    return None


def _unlike(slot: Slot, gpu: Gpu) -> tuple[bool, bool, int]:
    """Sort key: the GPU of the slot's own index, then of its own kind, then the emptiest."""
    return gpu.index != slot.index, gpu.name != slot.gpu, -gpu.free_bytes


def _problems(plan: Plan, machine: Machine, wanted: Mapping[int, Gpu]) -> list[str]:
    """What each slot lacks on the GPU that is most like its own; GPUs are given out once."""
    taken: set[int] = set()
    found = []
    for slot in plan.slots:
        free = [wanted[slot.index]] if slot.index in wanted else [g for g in machine.gpus if g.index not in taken]
        was = f"slot {slot.name}: was {slot.gpu}, {human_bytes(slot.available_bytes)} free"
        if not free:
            found.append(f"{was}; no GPU is left here for it")
            continue
        gpu = min(free, key=lambda gpu: _unlike(slot, gpu))
        taken.add(gpu.index)
        if why := _lacks(slot, plan, gpu):
            found.append(f"{was}, is GPU {gpu.index} ({gpu.name}), {human_bytes(gpu.free_bytes)} free: {why}")
    return found


def _declared(plan: Plan) -> Machine:
    """The machine that the plan names: described, or this host's."""
    declared = plan.spec.machine
    if not isinstance(declared, VirtualMachine):
        return probe_torch()
    try:
        return describe_machine(declared)
    except InvalidSpecError as problem:
        raise PlanError(f"the plan's machine is not valid: {problem}", where="plan_file") from problem


def _may_fall_back(plan: Plan) -> bool:
    hardware = plan.spec.hardware
    return not isinstance(hardware, CustomMap) and hardware.on_shortfall == "cpu"


def _on_cpu(plan: Plan, machine: Machine, allowed: Sequence[str]) -> ResolvedPlan:
    remark = Diagnostic(
        type="no_gpu",
        severity="warning",
        message=f"the plan wants {len(plan.slots)} GPU(s), {machine.inventory()}; everything runs on the CPU",
        where="resolve",
        hint="hardware.on_shortfall=error makes this an error",
    )
    return ResolvedPlan(plan, machine, dict.fromkeys(plan.device_map, "cpu"), {}, "cpu", (remark,), tuple(allowed))


def _lacks(slot: Slot, plan: Plan, gpu: Gpu) -> str:
    hardware = plan.spec.hardware
    needed = slot.peak_bytes + hardware.keep_free_bytes
    forced = isinstance(hardware, CustomMap) and hardware.force
    if gpu.free_bytes < needed and not forced:
        return f"it needs {human_bytes(needed)}"
    for name, part in plan.components.items():
        emulated = not plan.spec.precision.allow_emulated and not is_native(part.dtype, gpu)
        if part.slot == slot.index and emulated:
            return f"it holds {name} in {part.dtype}, which this GPU only emulates"
    return ""


def _drift(plan: Plan, bound: Mapping[int, Gpu]) -> list[Diagnostic]:
    remarks = []
    for slot in plan.slots:
        gpu = bound[slot.index]
        planned = f"GPU {slot.index}: {slot.gpu}, {human_bytes(slot.capacity_bytes)}"
        found = f"GPU {gpu.index}: {gpu.name}, {human_bytes(gpu.total_bytes)}"
        if planned != found:
            message = f"slot {slot.name} was {planned}, is {found}"
            remarks.append(Diagnostic(type="drift", severity="info", message=message, where="resolve"))
    return remarks
