"""The rehearsal of a whole plan: every replica on virtual GPUs, those that are alike once and counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from diffusers import DiffusionPipeline

from ..declare.spec import Fidelity
from ..declare.workload import DeclaredWorkload
from ..plan.artifact import Plan, ResolvedPlan
from ..plan.replicas import alike
from ..run.generate import StepDone
from ..run.load import load_pipeline
from ..run.outcome import Measured, RehearsedGpu
from ..run.place import resolved_plan
from ..run.request_state import RequestState
from ..run.weights import Progress
from .host import VirtualHost
from .rehearse import Rehearsed, open_host, rehearse_request


@dataclass(frozen=True)
class Staged:
    """One replica, loaded to virtual GPUs of its own, and those that are alike, which do what it does."""

    resolved: ResolvedPlan
    alike: tuple[ResolvedPlan, ...]
    host: VirtualHost
    pipeline: DiffusionPipeline


def rehearse(plan: Plan | ResolvedPlan, fidelity: Fidelity | None = None) -> Rehearsed:
    """Deploy `plan` on the virtual GPUs that it was compiled for and run its request once.

    Args:
        plan: compiled with `machine=virtual`.
        fidelity: overrides the plan's choice of `shapes` or `numbers`.

    Raises:
        RunError: a virtual GPU runs out of memory, or devices are mixed.
        InfeasibleError: the plan is not for virtual GPUs.
    """
    return rehearse_each(stage(resolved_plan(plan, "rehearse(plan)"), fidelity))


def stage(resolved: ResolvedPlan, fidelity: Fidelity | None = None, progress: Progress | None = None) -> list[Staged]:
    """Load the replicas of a plan that differ, the first one first; see `rehearse`."""
    each = resolved.each()
    staged = []
    for first, *others in alike([one.plan for one in each]):
        host = open_host(each[first], fidelity)
        pipeline = load_pipeline(each[first], progress, host)
        staged.append(Staged(each[first], tuple(each[number] for number in others), host, pipeline))
    return staged


def rehearse_each(
    staged: Sequence[Staged],
    workload: DeclaredWorkload | None = None,
    on_step: StepDone | None = None,
    states: Sequence[RequestState] | None = None,
) -> Rehearsed:
    """Run the plan's request on every replica that is loaded.

    Args:
        staged: what `stage` gave.
        workload: another request within the plan's bounds.
        on_step: called after every denoising step of the first replica.
        states: what the request of each one gathers in.

    Returns:
        Traffic, timeline, work and images of the first replica, and the GPUs of all.

    Raises:
        RunError: see `rehearse`.
    """
    states, ended = states or [RequestState() for _ in staged], []
    for one, state in zip(staged, states, strict=True):
        stepped = on_step if one is staged[0] else None
        ended.append(rehearse_request(one.pipeline, _asked(one.resolved, workload), one.host, stepped, state))
    if len(staged) == 1 and not staged[0].alike:
        return ended[0]
    gpus = [gpu for one, found in zip(staged, ended, strict=True) for gpu in _of_all(one, found.report.gpus)]
    gpus.sort(key=lambda gpu: int(gpu.device.partition(":")[2]))
    count = sum(1 + len(one.alike) for one in staged)
    report = ended[0].report.model_copy(update={"gpus": gpus, "replicas": count, "replicas_rehearsed": len(staged)})
    return replace(ended[0], report=report, measured=_measured(ended, gpus))


def _asked(resolved: ResolvedPlan, workload: DeclaredWorkload | None) -> ResolvedPlan:
    """The same plan for another request."""
    if workload is None:
        return resolved
    spec = resolved.plan.spec.model_copy(update={"workload": workload})
    return replace(resolved, plan=resolved.plan.model_copy(update={"spec": spec}))


def _of_all(staged: Staged, gpus: Sequence[RehearsedGpu]) -> list[RehearsedGpu]:
    """The GPUs of a replica, and those of its likes: the slots of the same rank were as full."""
    own = list(staged.resolved.slot_devices.values())
    found = list(gpus)
    for other in staged.alike:
        names = dict(zip(own, other.slot_devices.values(), strict=True))
        found += [gpu.model_copy(update={"device": names[gpu.device]}) for gpu in gpus]
    return found


def _measured(ended: Sequence[Rehearsed], gpus: Sequence[RehearsedGpu]) -> Measured:
    seconds = sum(one.measured.seconds["rehearse"] for one in ended)
    update = {"peak_bytes": {gpu.device: gpu.peak_bytes for gpu in gpus}, "seconds": {"rehearse": round(seconds, 6)}}
    return ended[-1].measured.model_copy(
        update={
            **update,
            "bytes_moved": ended[0].measured.bytes_moved,
            "bytes_per_step": ended[0].measured.bytes_per_step,
        }
    )
