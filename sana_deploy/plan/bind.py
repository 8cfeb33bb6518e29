"""Binds a plan's slots to the GPUs that are there, and lists what differs from what was planned for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .._models import Diagnostic
from .._units import human_bytes
from ..declare.hardware import CustomMap
from ..declare.pipelines import Component
from ..declare.spec import DeploySpec, Model, VirtualMachine
from ..errors import InfeasibleError, InvalidSpecError, PlanError
from ..facts.libraries import library_versions
from ..facts.machine import Gpu, Machine, is_native, probe_torch
from ..facts.virtual_machine import describe_machine
from .identity import CONTENT, PlannedComponents, drift_of
from .records import CheckpointRecord, Slot

LIBRARIES = "library_versions"
"""The name that accepts libraries of other versions."""


@dataclass(frozen=True)
class Staleness:
    """What differs from what a plan was compiled with, a line each.

    Attributes:
        changed: differences that are always refused.
        by_name: differences that are refused unless their name is among `allowed`.
        allowed: names that are accepted.
    """

    changed: tuple[str, ...]
    by_name: Mapping[str, tuple[str, ...]]
    allowed: tuple[str, ...]

    @property
    def to_accept(self) -> tuple[str, ...]:
        """Names that would have to be accepted, and are not."""
        return tuple(name for name, lines in self.by_name.items() if lines and name not in self.allowed)

    @property
    def refused(self) -> tuple[str, ...]:
        """All lines that are not accepted."""
        return (*self.changed, *(line for name in self.to_accept for line in self.by_name[name]))

    @property
    def remarks(self) -> tuple[Diagnostic, ...]:
        """What may be accepted by name, as remarks."""
        return tuple(_remark(line) for lines in self.by_name.values() for line in lines)


@dataclass(frozen=True)
class Binding:
    """Slots and components on devices; the fields are those of `ResolvedPlan`."""

    machine: Machine
    device_map: Mapping[Component, str]
    slot_devices: Mapping[int, str]
    home: str
    drift: tuple[Diagnostic, ...] = ()


def staleness_of(
    libraries: Mapping[str, str],
    checkpoint: CheckpointRecord,
    components: PlannedComponents,
    model: Model,
    allowed: Sequence[str],
    verify: bool,
) -> Staleness:
    """Compare libraries and checkpoint with those that a plan was compiled with.

    Args:
        libraries: versions at that time.
        checkpoint: the one that the plan was made for.
        components: the plan's.
        model: where the plan's declaration says that the checkpoint is.
        allowed: names of differences that are accepted.
        verify: read every byte of the weights; else samples.
    """
    now = library_versions(part.format for part in components.values())
    versions = (f"{name}: was {was}, is {now.get(name)}" for name, was in libraries.items() if now.get(name) != was)
    drift = drift_of(checkpoint, model, components, verify)
    return Staleness(drift.changed, {LIBRARIES: tuple(versions), CONTENT: drift.content}, tuple(allowed))


def planned_machine(spec: DeploySpec) -> Machine:
    """Return the machine that a plan names: described, or this host's, probed by torch.

    Raises:
        PlanError: the description is not valid.
    """
    if not isinstance(spec.machine, VirtualMachine):
        return probe_torch()
    try:
        return describe_machine(spec.machine)
    except InvalidSpecError as problem:
        raise PlanError(f"the plan's machine is not valid: {problem}", where="plan_file") from problem


def bind_slots(
    replicas: Sequence[tuple[Sequence[Slot], PlannedComponents]],
    spec: DeploySpec,
    machine: Machine,
    bind: Mapping[str, str],
    stale: Staleness,
) -> list[Binding]:
    """Bind every slot to a GPU of `machine` of its own.

    Args:
        replicas: slots and components of each.
        bind: slot index -> UUID of the GPU that it must get.
        stale: what else differs; it is refused together with what the GPUs lack.

    Raises:
        PlanError: a GPU is missing, busier, smaller or older than its slot needs, or `stale` is refused; each
            difference is on a line of its own.
        InfeasibleError: a GPU of `bind` is not there.

    Returns:
        A binding for each replica, with the drift of all in the first; one on the CPU where it falls back to that.
    """
    slots = [slot for own, _ in replicas for slot in own]
    if slots and not machine.gpus and _may_fall_back(spec) and not stale.refused:
        return [_on_cpu(len(slots), len(replicas), replicas[0][1], machine)]
    components = [parts for _, parts in replicas]
    matching = _Matching(slots, components, spec, machine, _fixed(slots, machine, bind))
    matched = matching.find()
    if matched is None or stale.refused:
        raise _stale_plan([*stale.refused, *(matching.problems() if matched is None else [])], stale, machine)
    kind = "vgpu" if machine.kind == "virtual" else "cuda"
    names = {index: f"{kind}:{gpu.index}" for index, gpu in sorted(matched.items())}
    remarks = (*stale.remarks, *_other_gpus(slots, matched))
    found: list[Binding] = []
    for own, parts in replicas:
        devices = {name: "cpu" if part.slot == "cpu" else names[part.slot] for name, part in parts.items()}
        bound = {index: names[index] for index in sorted(slot.index for slot in own)}
        found.append(Binding(machine, devices, bound, devices[spec.pipeline.denoiser], () if found else remarks))
    return found


def _stale_plan(problems: Sequence[str], stale: Staleness, machine: Machine) -> PlanError:
    accept = f"; or accept that with resolve.allow=[{','.join(stale.to_accept)}]" if stale.to_accept else ""
    return PlanError(
        "the plan is stale:\n  " + "\n  ".join(problems) + f"\n  ({machine.inventory()})",
        where="resolve",
        hint=f"compile it again on this machine{accept}",
    )


def _fixed(slots: Sequence[Slot], machine: Machine, bind: Mapping[str, str]) -> dict[int, Gpu]:
    """The GPU that each slot of `bind` must get."""
    indices = {str(slot.index): slot.index for slot in slots}
    by_uuid = {gpu.uuid.removeprefix("GPU-"): gpu for gpu in machine.gpus if gpu.uuid}
    found: dict[int, Gpu] = {}
    for key, uuid in bind.items():
        gpu = by_uuid.get(uuid.removeprefix("GPU-"))
        if key not in indices:
            known = ", ".join(indices) or "none"
            raise InvalidSpecError(f"the plan has no slot {key}", where=f"resolve.bind.{key}", hint=f"slots: {known}")
        if gpu is None:
            there = ", ".join(f"GPU-{known}" for known in by_uuid) or "none"
            raise InfeasibleError(
                f"no GPU here has the UUID {uuid}", where=f"resolve.bind.{key}", hint=f"UUIDs here: {there}"
            )
        found[indices[key]] = gpu
    return found


@dataclass(frozen=True)
class _Matching:
    """The slots of a plan beside the GPUs of a machine.

    Attributes:
        components: those of each replica.
        fixed: the GPUs that slots must get.
    """

    slots: Sequence[Slot]
    components: Sequence[PlannedComponents]
    spec: DeploySpec
    machine: Machine
    fixed: Mapping[int, Gpu]

    def find(self) -> dict[int, Gpu] | None:
        """Give each slot a GPU of its own that will do, fullest slots their most alike; None where that cannot be."""
        fitting: dict[int, list[Gpu]] = {}
        order = sorted(self.slots, key=lambda slot: -slot.peak_bytes)
        for slot in order:
            choices = [self.fixed[slot.index]] if slot.index in self.fixed else self.machine.gpus
            able = [gpu for gpu in choices if not self._lacks(slot, gpu)]
            fitting[slot.index] = sorted(able, key=lambda gpu: _unlike(slot, gpu))
        for slot in order:
            for gpu in fitting[slot.index]:
                tried = {**fitting, slot.index: [gpu]}
                if _all_matched(tried):
                    fitting = tried
                    break
            else:
                return None
        return {index: gpus[0] for index, gpus in fitting.items()}

    def problems(self) -> list[str]:
        """What each slot lacks on the GPU that is most like its own; GPUs are given out once."""
        taken: set[int] = set()
        found = []
        for slot in self.slots:
            left = [gpu for gpu in self.machine.gpus if gpu.index not in taken]
            free = [self.fixed[slot.index]] if slot.index in self.fixed else left
            was = f"slot {slot.name}: was {slot.gpu}, {human_bytes(slot.available_bytes)} free"
            if not free:
                found.append(f"{was}; no GPU is left here for it")
                continue
            gpu = min(free, key=lambda gpu: _unlike(slot, gpu))
            taken.add(gpu.index)
            if why := self._lacks(slot, gpu):
                found.append(f"{was}, is GPU {gpu.index} ({gpu.name}), {human_bytes(gpu.free_bytes)} free: {why}")
        return found

    def _lacks(self, slot: Slot, gpu: Gpu) -> str:
        """Why `gpu` cannot be `slot`; empty where it can."""
        hardware = self.spec.hardware
        needed = slot.peak_bytes + hardware.keep_free_bytes
        forced = isinstance(hardware, CustomMap) and hardware.force
        if gpu.free_bytes < needed and not forced:
            return f"it needs {human_bytes(needed)}"
        for name, part in (item for parts in self.components for item in parts.items()):
            emulated = not self.spec.precision.allow_emulated and not is_native(part.dtype, gpu)
            if part.slot == slot.index and emulated:
                return f"it holds {name} in {part.dtype}, which this GPU only emulates"
        return ""


def _all_matched(fitting: Mapping[int, Sequence[Gpu]]) -> bool:
    """Whether every slot can get one of its GPUs, none twice; by augmenting paths, since there may be many of both."""
    holder: dict[int, int] = {}

    def place(slot: int, seen: set[int]) -> bool:
        for gpu in fitting[slot]:
            if gpu.index not in seen:
                seen.add(gpu.index)
                if gpu.index not in holder or place(holder[gpu.index], seen):
                    holder[gpu.index] = slot
                    return True
        return False

    return all(place(slot, set()) for slot in fitting)


def _unlike(slot: Slot, gpu: Gpu) -> tuple[bool, bool, int]:
    """Sort key: the GPU of the slot's own index, then of its own kind, then the emptiest."""
    return gpu.index != slot.index, gpu.name != slot.gpu, -gpu.free_bytes


def _may_fall_back(spec: DeploySpec) -> bool:
    return not isinstance(spec.hardware, CustomMap) and spec.hardware.on_shortfall == "cpu"


def _on_cpu(wanted: int, replicas: int, components: PlannedComponents, machine: Machine) -> Binding:
    what = f"one replica of {replicas}" if replicas > 1 else "everything"
    remark = Diagnostic(
        type="no_gpu",
        severity="warning",
        message=f"the plan wants {wanted} GPU(s), {machine.inventory()}; {what} runs on the CPU",
        where="resolve",
        hint="hardware.on_shortfall=error makes this an error",
    )
    return Binding(machine, dict.fromkeys(components, "cpu"), {}, "cpu", (remark,))


def _other_gpus(slots: Sequence[Slot], bound: Mapping[int, Gpu]) -> list[Diagnostic]:
    """Remarks on slots whose GPU is another one than planned."""
    remarks = []
    for slot in slots:
        gpu = bound[slot.index]
        planned = f"GPU {slot.index}: {slot.gpu}, {human_bytes(slot.capacity_bytes)}"
        found = f"GPU {gpu.index}: {gpu.name}, {human_bytes(gpu.total_bytes)}"
        if planned != found:
            remarks.append(_remark(f"slot {slot.name} was {planned}, is {found}"))
    return remarks


def _remark(message: str) -> Diagnostic:
    return Diagnostic(type="drift", severity="info", message=message, where="resolve")
