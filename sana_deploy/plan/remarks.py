"""What a person should know of a declaration or a plan although it holds: remarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .._models import Diagnostic
from .._units import human_bytes
from ..declare.hardware import CustomMap, Planned
from ..declare.policies import fragile_components, overflowing_components
from ..declare.spec import DeploySpec
from ..errors import InfeasibleError
from ..facts.checkpoint import Checkpoint
from ..facts.machine import Machine, is_native
from .cost import host_bytes
from .grid import Candidate
from .knobs import under
from .profile import PipelineProfile
from .rejections import host_sentence
from .replicas import Group


def declaration_remarks(spec: DeploySpec, checkpoint: Checkpoint, machine: Machine) -> list[Diagnostic]:
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


def cpu_remark(hardware: Planned, machine: Machine) -> Diagnostic:
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


def forced_remarks(profile: PipelineProfile, chosen: Candidate, machine: Machine) -> list[Diagnostic]:
    """A remark for a placement that is taken although it is short of memory."""
    free = {gpu.index: gpu.free_bytes for gpu in machine.gpus}
    short = [
        f"GPU {i} needs {human_bytes(use.peak_bytes)} in {use.phase}, {human_bytes(free[i])} are free"
        for i, use in chosen.uses.items()
        if use.peak_bytes > free[i]
    ]
    needed = host_bytes(under(replace(profile, band_count=chosen.bands), chosen.knobs), chosen.placement)
    if needed > machine.host_bytes and machine.kind != "virtual":
        short.append(host_sentence(needed, machine.host_bytes))
    if not short:
        return []
    message = f"expected to run out of memory, and forced: {'; '.join(short)}"
    return [Diagnostic(type="forced", severity="warning", message=message, where="hardware.force")]


def idle_remarks(spec: DeploySpec, machine: Machine, groups: Sequence[Group]) -> list[Diagnostic]:
    """Say which GPUs have nothing to do beside replicas, and why."""
    taken = {
        place for group in groups if group.choice.search.best for place in group.choice.search.best.placement.values()
    }
    idle = [str(gpu.index) for gpu in machine.gpus if gpu.index not in taken]
    hardware = spec.hardware
    if isinstance(hardware, CustomMap) or not hardware.may_replicate or not idle:
        return []
    asked = isinstance(hardware.replicas, int)
    why = f"hardware.replicas={hardware.replicas} asks for no more" if asked else "no further replica fits there"
    message = f"GPU {', '.join(idle)} {'stays' if len(idle) == 1 else 'stay'} idle: {why}"
    hint = "hardware.replicas=max plans as many as fit" if asked else ""
    return [Diagnostic(type="idle_gpus", severity="info", message=message, where="hardware.replicas", hint=hint)]
