"""From a declaration to a plan: profile, search, and the plan's parts put together. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from .._models import Diagnostic
from .._units import human_bytes
from ..declare.policies import fragile_components, overflowing_components
from ..declare.spec import CustomMap, DeploySpec, MultiGpuBalanced, Overrides, Planned, SingleGpu, VirtualMachine
from ..errors import InfeasibleError
from ..facts import machine as machines
from ..facts.checkpoint import Checkpoint, open_checkpoint
from ..facts.machine import Machine, is_native
from ..facts.virtual_machine import describe_machine
from .artifact import Plan
from .assemble import assemble
from .auto_precision import choose_precision
from .cost import host_bytes
from .execution import executed
from .grid import Candidate, Rules
from .knobs import under
from .needs import Measure
from .profile import PipelineProfile, profile_pipeline
from .records import Place
from .rejections import Rejection, host_sentence
from .remedies import Fits, with_all_knobs, working_changes
from .runtimes import choose_runtime
from .search import Search, search_balanced, search_custom, search_host, search_single


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
    diagnostics += _remarks(spec, checkpoint, machine)
    profile = profile_pipeline(checkpoint, spec.workload.bounds, spec.precision.formats, measure)
    if not offered.gpus and not isinstance(spec.hardware, CustomMap):
        diagnostics.insert(0, _on_cpu(spec.hardware, offered))
    choice = choose_runtime(spec.runtime.mode, profile, offered, lambda one: _search(spec, one, offered))
    profile, search, diagnostics = choice.profile, choice.search, [*diagnostics, *choice.remarks]
    if search.best:
        remarks = [*_forced(profile, search.best, offered), *diagnostics]
        return assemble(spec, checkpoint, profile, offered, search.best, search, remarks)
    problem = _infeasible(spec, checkpoint, machine, search, fits)
    if search.closest:
        refused = Diagnostic(
            type="infeasible", severity="warning", message=problem.message, where="hardware", hint=problem.hint
        )
        remarks = [refused, *diagnostics]
        problem.plan = assemble(spec, checkpoint, profile, offered, search.closest, search, remarks, feasible=False)
    raise problem


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


def _search(spec: DeploySpec, profile: PipelineProfile, machine: Machine) -> Search:
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


def _remarks(spec: DeploySpec, checkpoint: Checkpoint, machine: Machine) -> list[Diagnostic]:
    """What is to say of the precision, whatever is placed where."""
    return [
        *_precision_remarks(spec, machine),
        *_overflow_remarks(spec),
        *_stored_remarks(spec, checkpoint, machine),
    ]


def _precision_remarks(spec: DeploySpec, machine: Machine) -> list[Diagnostic]:
    fragile = fragile_components(spec.precision.components, spec.pipeline)
    if not fragile:
        return []
    reasons = "; ".join(f"{name}: {spec.pipeline.by_name[name].fragile}" for name in fragile)
    message = f"float16 is documented not to be safe for {' and '.join(fragile)} ({reasons})"
    hint = f"precision={'mixed_bf16' if _has_bfloat16(spec, machine) else 'mixed_fp32'} keeps them out of float16"
    if spec.precision.strict:
        raise InfeasibleError(message, where="precision.components", hint=hint)
    remark = Diagnostic(
        type="fragile_dtype", severity="warning", message=message, where="precision.components", hint=hint
    )
    return [remark]


def _overflow_remarks(spec: DeploySpec) -> list[Diagnostic]:
    """Say where int8 products are summed in float16, which has little range for them."""
    names = overflowing_components(spec.precision.formats)
    if not names:
        return []
    message = (
        f"int8 weights of {' and '.join(names)} in float16: torchao sums products before it scales them, "
        "up to 127 times larger, and float16 ends at 65504"
    )
    where, hint = f"precision.components.{names[0]}", "bfloat16 or float32 there, or nf4, which scales first"
    return [Diagnostic(type="fragile_dtype", severity="warning", message=message, where=where, hint=hint)]


def _has_bfloat16(spec: DeploySpec, machine: Machine) -> bool:
    """Whether every GPU that may be taken computes natively in bfloat16; a CPU emulates it."""
    gpus = machine.named(spec.hardware.gpu_indices)
    return bool(gpus) and all(is_native("bfloat16", gpu) for gpu in gpus)


def _stored_remarks(spec: DeploySpec, checkpoint: Checkpoint, machine: Machine) -> list[Diagnostic]:
    """Say where bfloat16 files are loaded in float16, which has less range; rounding is what a policy asks for."""
    narrowed = [
        name
        for name, facts in checkpoint.components.items()
        if facts.stored.get("BF16") and spec.precision.components[name] == "float16"
    ]
    if not narrowed:
        return []
    verb = "is" if len(narrowed) == 1 else "are"
    subject = f"{' and '.join(narrowed)} {verb}"
    message = f"{subject} stored in bfloat16 and loaded in float16, which has less range"
    policy = "bf16" if _has_bfloat16(spec, machine) else "fp32"
    hint = f"values out of range are counted at load; precision={policy} keeps them"
    return [Diagnostic(type="lossy_dtype", severity="info", message=message, where="precision.components", hint=hint)]


def _on_cpu(hardware: Planned, machine: Machine) -> Diagnostic:
    """Say that everything runs on the CPU, or refuse it, where there is no GPU."""
    if hardware.on_shortfall == "error":
        raise InfeasibleError(
            f"{machine.inventory()}, and hardware.on_shortfall=error refuses the CPU",
            where="hardware.on_shortfall",
            hint="hardware.on_shortfall=cpu",
        )
    return Diagnostic(
        type="no_gpu",
        severity="warning",
        message=f"{machine.inventory()}; every component runs on the CPU",
        where="machine",
        hint="hardware.on_shortfall=error makes this an error",
    )


def _forced(profile: PipelineProfile, chosen: Candidate, machine: Machine) -> list[Diagnostic]:
    """A remark for a placement that is taken although it is short of memory."""
    free = {gpu.index: gpu.free_bytes for gpu in machine.gpus}
    short = [
        f"GPU {i} needs {human_bytes(use.peak_bytes)} in {use.phase}, {human_bytes(free[i])} are free"
        for i, use in chosen.uses.items()
        if use.peak_bytes > free[i]
    ]
    needed = host_bytes(under(profile, chosen.knobs), chosen.placement)
    if needed > machine.host_bytes and machine.kind != "virtual":
        short.append(host_sentence(needed, machine.host_bytes))
    if not short:
        return []
    message = f"expected to run out of memory, and forced: {'; '.join(short)}"
    return [Diagnostic(type="forced", severity="warning", message=message, where="hardware.force")]


def _fits(measure: Measure, spec: DeploySpec, checkpoint: Checkpoint, machine: Machine) -> bool:
    try:
        _check_indices(spec, machine)
    except InfeasibleError:
        return False
    profile = profile_pipeline(checkpoint, spec.workload.bounds, spec.precision.formats, measure)
    if spec.runtime.mode == "graphs":
        profile = executed(profile, "graphs")
    return _search(spec, profile, _offered(spec, machine)).best is not None


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
