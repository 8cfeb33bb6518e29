"""Rehearsal: one pipeline on virtual GPUs through the same code as on real ones, and what it tells."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

from diffusers import DiffusionPipeline
from PIL.Image import Image

from .._units import MIB, human_bytes
from ..declare.pipelines import PipelineDescription
from ..declare.spec import Fidelity, VirtualMachine
from ..errors import InfeasibleError
from ..facts.allocator import context_bytes
from ..plan.artifact import Plan, ResolvedPlan
from ..plan.records import Slot
from ..plan.units import component_call
from ..run.generate import StepDone, host_peak, run_request, to_images
from ..run.hook import border_of
from ..run.outcome import Measured, Rehearsal, RehearsedGpu, RehearsedMoment, RehearsedTransfer, RehearsedWork
from ..run.request_state import Event, RequestState
from ..run.traffic import Movement, by_pair
from .host import VirtualHost, check_virtual
from .ledger import Ledger

NUMBERS_LIMIT = 256 * MIB
"""Up to this many bytes of weights, `fidelity=auto` does real arithmetic."""
SHAPE_STEPS = 2
"""Denoising steps that a rehearsal in shapes runs: every later one repeats the last, byte for byte."""


def fidelity_of(plan: Plan) -> Fidelity:
    """Choose shapes or numbers: what the user asked for, else numbers for small models only."""
    machine = plan.spec.machine
    wanted = machine.fidelity if isinstance(machine, VirtualMachine) else "auto"
    if wanted == "auto":
        weights = sum(part.weights_bytes for part in plan.wholes.values())
        return "numbers" if weights <= NUMBERS_LIMIT and plan.checkpoint.kind != "catalogue" else "shapes"
    if wanted == "numbers" and plan.checkpoint.kind == "catalogue":
        raise InfeasibleError(
            "numbers need weights, and a catalogued model has none here",
            where="machine.fidelity",
            hint="machine.fidelity=shapes, or model=checkpoint model.source=FOLDER",
        )
    return wanted


def open_host(resolved: ResolvedPlan, fidelity: Fidelity | None = None) -> VirtualHost:
    """Make the virtual GPUs that a plan was resolved to.

    What a CUDA context takes is taken off the memory of each, and what the plan says that the allocator takes.

    Raises:
        InfeasibleError: the plan is not for virtual GPUs, or a GPU is smaller than a CUDA context.
    """
    check_virtual(resolved)
    capacities, pools, first_pools = [], {}, {}
    for gpu in resolved.machine.gpus:
        context = context_bytes(gpu.capability)
        if gpu.free_bytes <= context:
            raise InfeasibleError(
                f"GPU {gpu.index} offers {human_bytes(gpu.free_bytes)}, a CUDA context alone takes "
                f"{human_bytes(context)}",
                where="machine",
            )
        slot = _slot_of(resolved, gpu.index)
        capacities.append(max(0, gpu.free_bytes - context - (slot.allocator_bytes if slot else 0)))
        pools[gpu.index] = slot.pool_bytes if slot else 0
        if slot and slot.first_pool_bytes is not None:
            first_pools[gpu.index] = slot.first_pool_bytes
    return VirtualHost(capacities, fidelity or fidelity_of(resolved.plan), pools, first_pools)


def _slot_of(resolved: ResolvedPlan, index: int) -> Slot | None:
    """The slot that was bound to a virtual GPU."""
    for one in (resolved, *resolved.others):
        for slot in one.plan.slots:
            if one.slot_devices.get(slot.index) == f"vgpu:{index}":
                return slot
    return None


class LedgerClock:
    """Border observer that tells the ledger which component, or unit of one, works in which phase."""

    def __init__(self, ledger: Ledger, pipeline: PipelineDescription) -> None:
        self.ledger, self.pipeline = ledger, pipeline

    def __call__(self, event: Event, call: str) -> None:
        if event == "enter":
            self.ledger.enter(self.pipeline.phase_of[component_call(call)], call.rpartition(".")[0])
        else:
            self.ledger.leave()


@dataclass(frozen=True)
class Rehearsed:
    """A finished rehearsal: the report, what `outcome.json` measures, and the images where it was done in numbers."""

    report: Rehearsal
    measured: Measured
    images: list[Image]


def rehearse_request(
    pipeline: DiffusionPipeline,
    resolved: ResolvedPlan,
    host: VirtualHost,
    on_step: StepDone | None = None,
    state: RequestState | None = None,
) -> Rehearsed:
    """Run the plan's request on a pipeline that was loaded onto `host`.

    Args:
        pipeline: loaded by `resolved`.
        resolved: a plan that was resolved to virtual GPUs.
        host: these GPUs.
        on_step: called after every denoising step.
        state: a new one that the request gathers in, for a caller that reads it afterwards, also where it fails.

    Raises:
        RunError: a virtual GPU runs out of memory, or devices are mixed.
    """
    state, workload = state or RequestState(), resolved.plan.spec.workload
    steps = min(workload.steps, SHAPE_STEPS) if host.fidelity == "shapes" else workload.steps
    bounds, steps_run = workload.bounds.model_copy(update={"steps": steps}), resolved.plan.pipeline.steps_run
    left = steps_run(workload.bounds) - steps_run(bounds)
    state.observers.append(LedgerClock(host.ledger, border_of(pipeline).pipeline))
    started = time.perf_counter()
    with host:
        pixels, per_step = run_request(pipeline, bounds, workload.request, on_step, state)
        images = to_images(pipeline, pixels.cpu()) if host.fidelity == "numbers" else []
    moved = Counter({key: n + left * per_step[key] for key, n in state.traffic.moved.items()})
    report = report_of(host, resolved, moved, per_step, steps_run(bounds))
    measured = Measured(
        peak_bytes={gpu.device: gpu.peak_bytes for gpu in report.gpus},
        seconds={"rehearse": round(time.perf_counter() - started, 6)},
        bytes_moved=by_pair(moved),
        bytes_per_step=by_pair(per_step),
        host_peak_bytes=host_peak(),
    )
    return Rehearsed(report, measured, images)


def report_of(
    host: VirtualHost,
    resolved: ResolvedPlan,
    moved: Counter[Movement],
    per_step: Counter[Movement],
    rehearsed_steps: int,
) -> Rehearsal:
    """Sum up a rehearsal: peaks against the plan's estimate, traffic by tensor, timeline, work."""
    plan, ledger = resolved.plan, host.ledger
    places = {*resolved.device_map.values(), *resolved.unit_devices.values()}
    used = sorted({int(place.partition(":")[2]) for place in places if ":" in place})
    workload = plan.spec.workload
    transfers = [
        RehearsedTransfer(
            src=src,
            dst=dst,
            tensor=tensor,
            bytes_per_step=per_step[src, dst, tensor],
            bytes_per_image=total // workload.batch,
        )
        for (src, dst, tensor), total in sorted(moved.items())
    ]
    return Rehearsal(
        fidelity=host.fidelity,
        steps=plan.pipeline.steps_run(workload.bounds),
        steps_rehearsed=rehearsed_steps,
        gpus=[_gpu(index, resolved, ledger) for index in used],
        transfers=transfers,
        timeline=[
            RehearsedMoment(
                phase=m.phase, component=m.component, live_bytes={f"vgpu:{i}": m.live_bytes[i] for i in used}
            )
            for m in ledger.timeline
        ],
        work=_work_by_component(ledger),
    )


def _work_by_component(ledger: Ledger) -> dict[str, RehearsedWork]:
    found: dict[str, RehearsedWork] = {}
    for (_, name), work in ledger.work.items():
        before = found.get(name, RehearsedWork(operations=0, flops=0))
        found[name] = RehearsedWork(operations=before.operations + work.operations, flops=before.flops + work.flops)
    return found


def _gpu(index: int, resolved: ResolvedPlan, ledger: Ledger) -> RehearsedGpu:
    gpu, peak = resolved.machine.gpus[index], ledger.peaks[index]
    slot, context = _slot_of(resolved, index), context_bytes(gpu.capability)
    assert slot is not None
    planned = slot.weights_bytes + slot.activation_bytes
    return RehearsedGpu(
        device=f"vgpu:{index}",
        gpu=gpu.name,
        capacity_bytes=gpu.total_bytes,
        context_bytes=context,
        allocator_bytes=slot.allocator_bytes,
        peak_bytes=peak.total_bytes + context + slot.allocator_bytes,
        weights_bytes=peak.weights_bytes,
        activation_bytes=peak.activation_bytes,
        phase=peak.phase,
        component=peak.component,
        planned_bytes=planned,
        planned_error=round(planned / max(peak.total_bytes, 1) - 1, 4),
        phase_peaks={phase: p.total_bytes for (i, phase), p in ledger.phase_peaks.items() if i == index},
        phase_activations={phase: p.activation_bytes for (i, phase), p in ledger.phase_peaks.items() if i == index},
        others_bytes=gpu.total_bytes - gpu.free_bytes + resolved.plan.spec.hardware.keep_free_bytes,
    )
