"""Binds a plan's slots to the GPUs that are there, and lists what differs from what was planned for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .describe import describe_machine
from .errors import InvalidSpecError, PlanError
from .machine import Gpu, Machine, probe_torch
from .plan import Diagnostic, Plan, Slot
from .precision import is_native
from .spec import Component, CustomMap, VirtualMachine
from .units import human_bytes, parse_bytes


@dataclass(frozen=True)
class ResolvedPlan:
    """A plan bound to devices: `device_map` gives each component's torch device string, `slot_devices` each slot's.

    `home` is the device where the denoising loop lives; `drift` lists differences that do no harm.
    """

    plan: Plan
    machine: Machine
    device_map: Mapping[Component, str]
    slot_devices: Mapping[int, str]
    home: str
    drift: tuple[Diagnostic, ...] = ()


def resolve_plan(plan: Plan, machine: Machine | None = None) -> ResolvedPlan:
    """Bind every slot of `plan` to a device of `machine`: the described one for a virtual plan, else probed by torch.

    Raises:
        PlanError: a GPU is missing, busier, smaller or older than its slot needs; each difference is named.
    """
    if not plan.feasible:
        raise PlanError(
            "this plan shows the closest miss of something that does not fit: it can be read, not applied",
            where="resolve",
            hint="compile it again with one of its hints, or with hardware=custom_map hardware.force=true",
        )
    if machine is None:
        machine = _declared(plan)
    if plan.slots and not machine.gpus and _may_fall_back(plan):
        return _on_cpu(plan, machine)
    bound: dict[int, Gpu] = {}
    problems: list[str] = []
    for slot in sorted(plan.slots, key=lambda slot: -slot.peak_bytes):
        gpu, why = _bind(slot, plan, machine, {g.index for g in bound.values()})
        if gpu is None:
            problems.append(why)
        else:
            bound[slot.index] = gpu
    if problems:
        raise PlanError(
            f"the plan does not fit the GPUs present: {'; '.join(problems)} ({machine.inventory()})",
            where="resolve",
            hint="compile it again on this machine",
        )
    kind = "vgpu" if machine.kind == "virtual" else "cuda"
    slots = {index: f"{kind}:{gpu.index}" for index, gpu in bound.items()}
    devices = {name: place if place == "cpu" else slots[place] for name, place in plan.device_map.items()}
    return ResolvedPlan(plan, machine, devices, slots, devices["transformer"], tuple(_drift(plan, bound)))


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


def _on_cpu(plan: Plan, machine: Machine) -> ResolvedPlan:
    remark = Diagnostic(
        type="no_gpu",
        severity="warning",
        message=f"the plan wants {len(plan.slots)} GPU(s), {machine.inventory()}; everything runs on the CPU",
        where="resolve",
        hint="hardware.on_shortfall=error makes this an error",
    )
    return ResolvedPlan(plan, machine, dict.fromkeys(plan.device_map, "cpu"), {}, "cpu", (remark,))


def _bind(slot: Slot, plan: Plan, machine: Machine, taken: set[int]) -> tuple[Gpu | None, str]:
    """Find a free GPU for `slot`: the one of the same index if it will do, else the emptiest that will."""
    free = [gpu for gpu in machine.gpus if gpu.index not in taken]
    if not free:
        return None, f"slot {slot.name} wants a GPU, none is left"
    for gpu in sorted(free, key=lambda gpu: (gpu.index != slot.index, -gpu.free_bytes)):
        if not _lacks(slot, plan, gpu):
            return gpu, ""
    nearest = min(free, key=lambda gpu: (gpu.index != slot.index, -gpu.free_bytes))
    return None, f"slot {slot.name} {_lacks(slot, plan, nearest)}"


def _lacks(slot: Slot, plan: Plan, gpu: Gpu) -> str:
    hardware = plan.spec.hardware
    try:
        kept = 0 if isinstance(hardware, CustomMap) else parse_bytes(hardware.keep_free, "hardware.keep_free")
    except InvalidSpecError as problem:
        raise PlanError(f"the plan's declaration is not valid: {problem}", where="plan_file") from problem
    forced = isinstance(hardware, CustomMap) and hardware.force
    if gpu.free_bytes < slot.peak_bytes + kept and not forced:
        wants, has = human_bytes(slot.peak_bytes + kept), human_bytes(gpu.free_bytes)
        return f"needs {wants}, GPU {gpu.index} ({gpu.name}) has {has} free"
    for name, part in plan.components.items():
        emulated = not plan.spec.precision.allow_emulated and not is_native(part.dtype, gpu)
        if part.slot == slot.index and emulated:
            return f"holds {name} in {part.dtype}, which GPU {gpu.index} ({gpu.name}) only emulates"
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
