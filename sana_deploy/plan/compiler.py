"""From a declaration to a plan: profile, search, and the plan's parts put together. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from .._models import Diagnostic
from .._units import human_bytes
from ..declare.hardware import CustomMap, MultiGpuBalanced, SingleGpu
from ..declare.spec import DeploySpec, Overrides, VirtualMachine
from ..errors import InfeasibleError
from ..facts import machine as machines
from ..facts.checkpoint import Checkpoint, open_checkpoint
from ..facts.machine import Machine
from ..facts.virtual_machine import describe_machine
from .artifact import Plan
from .assemble import assemble
from .auto_precision import choose_precision
from .faster import faster_ways
from .grid import Rules
from .needs import Measure
from .profile import PipelineProfile, profile_pipeline
from .records import Place
from .rejections import Rejection
from .remarks import cpu_remark, declaration_remarks, forced_remarks
from .remedies import Fits, with_all_knobs, working_changes
from .search import Search, search_balanced, search_custom, search_host, search_single
from .splits import choose, open_ways, ways_of
from .ways import Ways


def compile_declaration(spec: DeploySpec, measure: Measure, machine: Machine | None = None) -> Plan:
    """Compile a validated declaration.

    Args:
        spec: the declaration.
        measure: measures what a checkpoint needs that is not shipped, and was not measured before; see `needs.py`.
        machine: the one to plan for; the declared one unless given.

    Raises:
        CheckpointError, InfeasibleError: see `sana_deploy.errors`.
    """
    fits = partial(_fits, measure)
    checkpoint = open_checkpoint(spec.model)
    spec = _pinned(spec, checkpoint)
    machine = machine or machine_of(spec)
    _check_indices(spec, machine)
    offered = _offered(spec, machine)
    diagnostics: list[Diagnostic] = []
    if spec.precision.name == "auto":
        spec, reason = choose_precision(spec, checkpoint, machine, fits)
        diagnostics.append(reason)
    diagnostics += declaration_remarks(spec, checkpoint, machine)
    if not offered.gpus and not isinstance(spec.hardware, CustomMap):
        diagnostics.insert(0, cpu_remark(spec.hardware, offered))
    ways = _ways(measure, spec, checkpoint, offered)
    choice = choose(spec, offered, ways)
    profile, search, diagnostics = choice.profile, choice.search, [*diagnostics, *choice.remarks]
    if search.best:
        remarks = [*forced_remarks(profile, search.best, offered), *diagnostics]
        faster = faster_ways(spec, choice, ways)
        return assemble(spec, checkpoint, profile, offered, search.best, search, remarks, faster=faster)
    problem = _infeasible(spec, checkpoint, machine, search, fits)
    if search.closest:
        refused = Diagnostic(
            type="infeasible", severity="warning", message=problem.message, where="hardware", hint=problem.hint
        )
        remarks = [refused, *diagnostics]
        problem.plan = assemble(spec, checkpoint, profile, offered, search.closest, search, remarks, feasible=False)
    raise problem


def _ways(measure: Measure, spec: DeploySpec, checkpoint: Checkpoint, offered: Machine) -> Ways:
    """The ways to execute the request on the GPUs that are offered."""
    profile = profile_pipeline(checkpoint, spec.workload.bounds, spec.precision.formats, measure)
    return ways_of(spec, checkpoint, profile, offered, measure, partial(_search, spec, offered))


def _pinned(spec: DeploySpec, checkpoint: Checkpoint) -> DeploySpec:
    """Name components from other hub repositories at the commit that was planned for."""
    apart = Overrides(**checkpoint.apart)
    return spec.model_copy(update={"model": spec.model.model_copy(update={"components": apart})})


def machine_of(spec: DeploySpec) -> Machine:
    """Return the machine that `spec` plans for: described, or probed without torch."""
    if isinstance(spec.machine, VirtualMachine):
        return describe_machine(spec.machine)
    return machines.probe()


def _offered(spec: DeploySpec, machine: Machine) -> Machine:
    """The part of `machine` that the planner may take: its GPUs less `hardware.keep_free`."""
    if isinstance(spec.hardware, CustomMap):
        return machine
    kept, usable = spec.hardware.keep_free_bytes, machine.named(spec.hardware.gpu_indices)
    gpus = tuple(replace(gpu, free_bytes=max(0, gpu.free_bytes - kept)) for gpu in usable)
    return replace(machine, gpus=gpus)


def _search(spec: DeploySpec, machine: Machine, profile: PipelineProfile) -> Search:
    """Search what the strategy leaves open; a virtual machine is described without its host's memory."""
    hardware = spec.hardware
    emulated = spec.precision.allow_emulated
    host = None if machine.kind == "virtual" else machine.host_bytes
    if isinstance(hardware, CustomMap):
        rules = Rules(allow_emulated=emulated, force=hardware.force, host_bytes=host)
        return search_custom(profile, machine.gpus, rules, dict(hardware.device_map), hardware.knobs)
    if not machine.gpus:
        return search_host(profile, Rules(hardware.allow, hardware.objective, emulated, hardware.force, host))
    rules = Rules(hardware.allow, hardware.objective, emulated, host_bytes=host)
    if isinstance(hardware, SingleGpu):
        return search_single(profile, machine.gpus, rules, hardware.gpu)
    units = {unit.name for unit in profile.units}
    pins = {name: place for name, place in hardware.pin.items() if place is not None and name in units}
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


def _fits(measure: Measure, spec: DeploySpec, checkpoint: Checkpoint, machine: Machine) -> bool:
    try:
        _check_indices(spec, machine)
    except InfeasibleError:
        return False
    offered = _offered(spec, machine)
    ways = _ways(measure, spec, checkpoint, offered)
    return any(ways.search(way).best for way in open_ways(spec, offered, ways))


def _infeasible(
    spec: DeploySpec, checkpoint: Checkpoint, machine: Machine, search: Search, fits: Fits
) -> InfeasibleError:
    nearest = search.nearest()
    reasons = "; ".join(_count(rejection) for rejection in search.rejections)
    detail = nearest.message if nearest else "there is nothing to place on"
    short = f", {human_bytes(nearest.shortfall_bytes)} too much" if nearest and nearest.shortfall_bytes else ""
    under = f", each under {search.settings} sets of knobs" if search.settings > 1 else ""
    helped = fits(with_all_knobs(spec), checkpoint, machine)
    short_of_memory = nearest is not None and nearest.reason in ("memory", "host memory")
    never = ". No knob makes it fit on this machine" if short_of_memory and not helped else ""
    hints = [working_changes(spec, checkpoint, machine, fits)]
    if nearest and nearest.reason == "host memory":
        hints.append("hardware.force=true goes on all the same")
    return InfeasibleError(
        f"0 of {search.placements} placements fit{under} ({reasons}). Closest: {detail}{short}{never}",
        where="hardware",
        hint="; ".join(filter(None, hints)),
        placements=search.placements,
        candidates=search.considered,
        shortfall_bytes=nearest.shortfall_bytes if nearest else 0,
        fits_with_a_knob=helped,
    )


def _count(rejection: Rejection) -> str:
    count, gpu = rejection.count, rejection.gpu
    return {
        "memory": f"{count} {'lack' if count > 1 else 'lacks'} memory on GPU {gpu}",
        "host memory": f"{count} {'lack' if count > 1 else 'lacks'} memory on the host",
        "dtype": f"{count} {'have' if count > 1 else 'has'} a dtype that GPU {gpu} only emulates",
        "split": f"{count} would split ControlNet from the transformer",
    }[rejection.reason]
