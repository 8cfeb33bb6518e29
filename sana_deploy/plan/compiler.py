"""From a declaration to a plan: profile, search, and the plan's parts put together. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache, partial

from .._models import Diagnostic
from .._units import human_bytes
from ..declare.hardware import SPLITS, CustomMap, MultiGpuBalanced, SingleGpu
from ..declare.spec import DeploySpec, Overrides, VirtualMachine
from ..errors import InfeasibleError
from ..facts import machine as machines
from ..facts.checkpoint import Checkpoint, open_checkpoint, settled
from ..facts.machine import Machine
from ..facts.virtual_machine import describe_machine
from .artifact import Plan
from .assemble import assemble, replica_of
from .auto_precision import choose_precision
from .faster import faster_ways
from .grid import Candidate, Rules
from .needs import Measure
from .overlap import most_images
from .profile import PipelineProfile, profile_pipeline
from .records import Place, Replica
from .rejections import Rejection
from .remarks import cpu_remark, declaration_remarks, forced_remarks, idle_remarks
from .remedies import Fits, with_all_knobs, working_changes
from .replicas import Deals, Group, deals_of
from .row_split import RowSplit
from .search import Search, search_balanced, search_custom, search_host, search_single
from .setting import groups_of
from .splits import choose, least_of, open_ways, ways_of
from .ways import Choice, Ways


class WaysOn:
    """The ways to execute the request on some GPUs; those on the same GPUs are found once."""

    def __init__(self, measure: Measure, spec: DeploySpec, checkpoint: Checkpoint) -> None:
        bounds, formats = spec.workload.bounds, spec.precision.formats
        profile = profile_pipeline(checkpoint, bounds, formats, measure)
        self.rows = RowSplit(profile, checkpoint, bounds, formats, measure)

        @cache
        def on(part: Machine) -> Ways:
            return ways_of(spec, checkpoint, profile, part, measure, partial(_search, spec, part), self.rows)

        self._on = on

    def __call__(self, part: Machine) -> Ways:
        """The ways on the GPUs of `part`."""
        return self._on(part)


def compile_declaration(spec: DeploySpec, measure: Measure, machine: Machine | None = None) -> Plan:
    """Compile a validated declaration.

    Args:
        spec: the declaration.
        measure: measures what a checkpoint needs that is not shipped, and was not measured before; see `needs.py`.
        machine: the one to plan for; the declared one unless given.

    Raises:
        CheckpointError, InfeasibleError: see `sana_deploy.errors`.
    """
    fits, spec = partial(_fits, measure), settled(spec)
    checkpoint = open_checkpoint(spec.model)
    spec = _pinned(spec, checkpoint)
    machine = machine or machine_of(spec)
    _check_indices(spec, machine)
    offered = _offered(spec, machine)
    diagnostics: list[Diagnostic] = []
    if spec.precision.name == "auto":
        spec, reason = choose_precision(spec, checkpoint, machine, partial(fits, at_last=False), fits)
        diagnostics.append(reason)
    diagnostics += declaration_remarks(spec, checkpoint, machine)
    if not offered.gpus and not isinstance(spec.hardware, CustomMap):
        diagnostics.insert(0, cpu_remark(spec.hardware, offered))
    ways = WaysOn(measure, spec, checkpoint)
    groups = _groups(spec, offered, ways, partial(working_changes, spec, checkpoint, machine, fits))
    first, profile, search = groups[0], groups[0].choice.profile, groups[0].choice.search
    if search.best:
        remarks = [*_remarks_of(first, search.best, diagnostics), *idle_remarks(spec, offered, groups)]
        faster = faster_ways(spec, first.choice, ways(first.machine))
        others = [_replica(spec, group, ways(group.machine)) for group in groups[1:]]
        return assemble(spec, checkpoint, profile, first.machine, search.best, search, remarks, True, faster, others)
    problem = _infeasible(spec, checkpoint, machine, search, fits)
    if search.closest:
        remarks = [_refused(problem), *diagnostics, *first.choice.remarks]
        problem.plan = assemble(spec, checkpoint, profile, offered, search.closest, search, remarks, feasible=False)
    raise problem


def _refused(problem: InfeasibleError) -> Diagnostic:
    """The error as a remark of the plan of a closest miss."""
    return Diagnostic(
        type="infeasible", severity="warning", message=problem.message, where="hardware", hint=problem.hint
    )


def _groups(spec: DeploySpec, offered: Machine, ways: WaysOn, changes: Callable[[], str]) -> list[Group]:
    """The GPUs of each replica, and how it is planned on them; all of them where one is asked for, or nothing fits.

    A single one may be dealt by layers where nothing else fits.

    Args:
        changes: says what would fit where too few replicas do.

    Raises:
        InfeasibleError: fewer replicas fit than are asked for.
    """
    hardware = spec.hardware

    def planned(part: Machine) -> Choice:
        return choose(spec, ways(part), at_last=False)

    def alone() -> list[Group]:
        return [Group(offered, choose(spec, ways(offered)))]

    if isinstance(hardware, CustomMap) or not hardware.may_replicate:
        return alone()
    most_images = hardware.objective == "throughput" and not isinstance(hardware.replicas, int)
    sizes = _sizes(spec, offered, ways)
    if most_images:
        least = least_of(spec, ways(offered), ways.rows)
        deals = deals_of(offered, planned, sizes, "most images", least)
    else:
        deals = deals_of(offered, planned, sizes)
    if groups := deals.chosen(hardware.replicas):
        return groups
    if isinstance(hardware.replicas, int) and (deals.most or alone()[0].choice.search.best):
        raise _too_many(hardware.replicas, deals, sizes, changes())
    return alone()


def _sizes(spec: DeploySpec, offered: Machine, ways: WaysOn) -> range:
    """How many GPUs one replica can use: one for each unit at most, two at least where the image is split."""
    if isinstance(spec.hardware, SingleGpu):
        return range(1, 2)
    opened = list(open_ways(spec, ways(offered), at_last=False))
    units = max(len(groups_of(ways(offered).profile(way))) for way in opened)
    return range(min(SPLITS[way.split].least_gpus for way in opened), units + 1)


def _too_many(wanted: int, deals: Deals, sizes: range, changes: str) -> InfeasibleError:
    """Say how many replicas fit, what the next one lacks, and what would fit."""
    taken = {gpu.index for group in deals.chosen("max") for gpu in group.machine.gpus}
    left = replace(deals.machine, gpus=tuple(gpu for gpu in deals.machine.gpus if gpu.index not in taken))
    nearest = deals.planned(left).search.nearest() if len(left.gpus) >= sizes.start else None
    lack = f"; on what they leave, {nearest.message}" if nearest else ""
    if 0 < len(left.gpus) < sizes.start:
        lack = f"; they leave {len(left.gpus)}, each part of an image takes one"
    on = f"on {len(taken)} of {len(deals.machine.gpus)} GPUs" if deals.machine.gpus else "without a GPU"
    fewer = f"this fits: hardware.replicas={deals.most}" if deals.most else ""
    return InfeasibleError(
        f"{wanted} replicas do not fit, {deals.most} do at most, {on}{lack}",
        where="hardware.replicas",
        hint="; or ".join(filter(None, [fewer, changes.removeprefix("this fits: ") if fewer else changes])),
        replicas=deals.most,
    )


def _remarks_of(group: Group, best: Candidate, further: Iterable[Diagnostic] = ()) -> list[Diagnostic]:
    """What is to say of one replica."""
    return [*forced_remarks(group.choice.profile, best, group.machine), *further, *group.choice.remarks]


def _replica(spec: DeploySpec, group: Group, ways: Ways) -> Replica:
    """The record of one replica beside the first."""
    profile, search = group.choice.profile, group.choice.search
    assert search.best is not None
    remarks, faster = _remarks_of(group, search.best), faster_ways(spec, group.choice, ways)
    return replica_of(spec, profile, group.machine, search.best, search, remarks, faster)


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
    # A replica draws most images per second where each takes the fewest seconds, or where stages overlap best.
    objective = "latency" if hardware.objective == "throughput" else hardware.objective
    if not machine.gpus:
        return search_host(profile, Rules(hardware.allow, objective, emulated, hardware.force, host))
    rules = Rules(hardware.allow, objective, emulated, host_bytes=host)
    if isinstance(hardware, SingleGpu):
        return search_single(profile, machine.gpus, rules, hardware.gpu)
    units = {unit.name for unit in profile.units}
    pins = {name: place for name, place in hardware.pin.items() if place is not None and name in units}
    search = search_balanced(profile, machine.gpus, rules, {**pins, **profile.fixed})
    if hardware.objective == "throughput":
        search.ranked = most_images(profile, search.ranked, {gpu.index: gpu for gpu in machine.gpus})
    return search


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


def _fits(measure: Measure, spec: DeploySpec, checkpoint: Checkpoint, machine: Machine, at_last: bool = True) -> bool:
    """Whether some placement fits; `at_last` also by layers."""
    try:
        _check_indices(spec, machine)
    except InfeasibleError:
        return False
    offered, hardware, ways = _offered(spec, machine), spec.hardware, WaysOn(measure, spec, checkpoint)

    replicas = 1 if isinstance(hardware, CustomMap) or not isinstance(hardware.replicas, int) else hardware.replicas

    def planned(part: Machine) -> Choice:
        """The first way that fits, else the last."""
        for way in open_ways(spec, ways(part), at_last and replicas == 1):
            choice = ways(part).choice(way)
            if choice.search.best:
                break
        return choice

    if replicas == 1:
        return planned(offered).search.best is not None
    return deals_of(offered, planned, _sizes(spec, offered, ways), "most replicas").most >= replicas


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
