"""Pure arithmetic: a profile, GPUs and a placement give bytes per GPU, bytes moved, and seconds. Imports no torch.

A profile given here has its knobs applied (`knobs.under`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import and_
from typing import Any, Literal

from ..declare.formats import Dtype
from ..declare.pipelines import PHASES, Component, Crossing, Phase
from ..facts.allocator import context_bytes, workspace_bytes
from ..facts.known_gpus import KnownGpu
from ..facts.machine import Gpu
from .profile import ComponentProfile, PipelineProfile, Work
from .records import Place
from .units import component_of

Placement = Mapping[str, Place]
"""Unit name -> slot or host. The first unit of a component has the component's name."""

HEADROOM = 0.02
"""Fraction of a GPU left free for allocator rounding and fragmentation."""

PRODUCT_EFFICIENCY = 0.5
"""Share of a GPU's TFLOPS that SANA's matrix products and convolutions reach. Fitted to an H200 (docs/measured.md)."""
BANDWIDTH_EFFICIENCY = 0.3
"""Share of a GPU's memory bandwidth that its other operations reach in eager PyTorch. Fitted likewise."""
LAUNCH_SECONDS = 40e-6
"""Host time to launch one kernel from eager PyTorch, its Python included; the floor for small images. Likewise."""
REFILL_SECONDS = 8e-6
"""What each kernel of one more call loses while the GPU drains and fills again: slicing, tiles. Fitted likewise."""
LINK_EFFICIENCY = 0.8
"""Share of a link's bandwidth that a large copy reaches."""
LINK_SECONDS = 20e-6
"""Fixed cost of one copy between devices."""


@dataclass(frozen=True)
class SlotUse:
    """What one slot holds at its fullest moment, in bytes; `peak_bytes` includes context and headroom.

    `allocator_bytes` are what PyTorch's allocator counts beyond tensors: unsplit blocks and cuBLAS's workspace.
    """

    weights_bytes: int
    activation_bytes: int
    allocator_bytes: int
    overhead_bytes: int
    phase: Phase

    @property
    def peak_bytes(self) -> int:
        """Weights, activations of the fullest phase, what the allocator adds, and overhead."""
        return self.weights_bytes + self.activation_bytes + self.allocator_bytes + self.overhead_bytes


@dataclass(frozen=True)
class Link:
    """How two GPUs exchange bytes, and how many per second in one direction."""

    kind: Literal["nvlink", "pcie", "host"]
    bytes_per_second: float


def slot_use(profile: PipelineProfile, placement: Placement, slot: Place, gpu: Gpu | None = None) -> SlotUse:
    """Work out what `slot` holds under `placement`, in bytes.

    peak = max over phases of (weights there with their blocks + activations) + workspace + context + headroom x
    capacity. Weights stay, but for an offloaded component's, which are there only while it works. Components of one
    phase work one after the other, so that the largest counts, units of one component at once, so that they add up;
    what waits at home outside the denoising loop (prompt embeddings, the control image) is listed under the denoiser's
    first unit and adds to whoever works there.

    Args:
        gpu: the one that the slot is; without it workspace, context and headroom are left out.
    """
    home = profile.pipeline.denoiser
    here = [(name, profile.parts[name]) for name, place in placement.items() if place == slot]
    weights, unsplit, activations = (dict.fromkeys(PHASES, 0) for _ in range(3))
    for phase in PHASES:
        working: dict[Component, int] = {}
        for name, part in here:
            own = part.activations.get(phase)
            if part.resident or own is not None:
                weights[phase] += part.weights_bytes
                unsplit[phase] += part.unsplit_bytes + part.workspaces.get(phase, 0) if slot != "cpu" else 0
            if name == home and phase != "denoise":
                activations[phase] = own or 0
            else:
                working[part.name] = working.get(part.name, 0) + (own or 0)
        activations[phase] += max(working.values(), default=0)
    phase = max(PHASES, key=lambda name: weights[name] + unsplit[name] + activations[name])
    workspace = workspace_bytes(gpu.capability) if gpu else 0
    return SlotUse(weights[phase], activations[phase], unsplit[phase] + workspace, overhead(gpu) if gpu else 0, phase)


def host_bytes(profile: PipelineProfile, placement: Placement) -> int:
    """Bytes of host memory that `placement` takes: what runs on the CPU, and offloaded weights that wait there."""
    parts = [profile.parts[name] for name, place in placement.items() if place != "cpu"]
    return slot_use(profile, placement, "cpu").peak_bytes + sum(p.weights_bytes for p in parts if not p.resident)


def overhead(gpu: Gpu) -> int:
    """Bytes of a used GPU that its allocator cannot have: the CUDA context + HEADROOM x capacity."""
    return context_bytes(gpu.capability) + int(HEADROOM * gpu.total_bytes)


def crossings_of(profile: PipelineProfile, placement: Placement) -> list[Crossing]:
    """Return the tensors that change devices under `placement`."""
    return [c for c in profile.crossings if placement[c.src] != placement[c.dst]]


def bytes_per_step(profile: PipelineProfile, placement: Placement) -> int:
    """Bytes that cross between devices in one denoising step."""
    return sum(c.bytes_each for c in crossings_of(profile, placement) if c.per_step)


def bytes_per_request(profile: PipelineProfile, placement: Placement) -> int:
    """Bytes that cross between devices in one whole request; offloaded weights are not among them."""
    return sum(c.times(profile.steps) * c.bytes_each for c in crossings_of(profile, placement))


def link_between(one: KnownGpu, other: KnownGpu) -> Link:
    """Return the link of two GPUs of one host.

    NVLink where both are wired to a fabric of it (SXM boards); a bridge that may or may not be there is not counted.
    Else PCIe peer copies at the slower card's rate, but not between GeForce cards: their driver has no peer access
    over PCIe, copies are staged in host memory and each byte passes PCIe twice.
    """
    pcie = min(one.pcie_gbps, other.pcie_gbps) * 1e9 * LINK_EFFICIENCY
    if one.fabric and other.fabric:
        return Link("nvlink", min(one.nvlink_gbps, other.nvlink_gbps) * 1e9 * LINK_EFFICIENCY)
    if "GeForce" in one.name or "GeForce" in other.name:
        return Link("host", pcie / 2)
    return Link("pcie", pcie)


def work_seconds(work: Work, dtype: Dtype, rates: KnownGpu) -> float:
    """Seconds of `work` on a GPU, by the roofline (Williams et al. 2009, https://doi.org/10.1145/1498765.1498785).

    max(launches, products + the rest), where launches = operations x LAUNCH_SECONDS, products = max(FLOPs / (rate x
    PRODUCT_EFFICIENCY), their bytes / bandwidth), the rest = other bytes / bandwidth, bandwidth = the card's x
    BANDWIDTH_EFFICIENCY. Work cut into calls takes REFILL_SECONDS more for each kernel of every call but the first. A
    dtype that is not native runs at the float32 rate.
    """
    tflops = {"float16": rates.tflops_float16, "bfloat16": rates.tflops_bfloat16, "float32": rates.tflops_float32}
    rate = (tflops[dtype] or rates.tflops_float32) * 1e12 * PRODUCT_EFFICIENCY
    bandwidth = rates.memory_gbps * 1e9 * BANDWIDTH_EFFICIENCY
    products = max(work.flops / rate, work.product_bytes / bandwidth)
    refills = work.operations * (1 - 1 / work.calls) * REFILL_SECONDS
    return max(work.operations * LAUNCH_SECONDS, products + work.other_bytes / bandwidth + refills)


def upload_seconds(weights_bytes: int, rates: KnownGpu) -> float:
    """Seconds to copy offloaded weights from the host to a GPU, once per request: bytes / (PCIe x LINK_EFFICIENCY)."""
    return weights_bytes / (rates.pcie_gbps * 1e9 * LINK_EFFICIENCY)


def crossing_seconds(crossing: Crossing, src: KnownGpu, dst: KnownGpu) -> float:
    """Seconds of one crossing between two GPUs: LINK_SECONDS + bytes / the link's rate."""
    return LINK_SECONDS + crossing.bytes_each / link_between(src, dst).bytes_per_second


def component_phases(part: ComponentProfile, steps: int, rates: KnownGpu) -> dict[Phase, float]:
    """Seconds of one component on one GPU in each phase of a request; the upload of offloaded weights is encode's."""
    seconds = {
        phase: (steps if phase == "denoise" else 1) * work_seconds(work, part.format.dtype, rates)
        for phase, work in part.work.items()
    }
    if not part.resident:
        seconds["encode"] = seconds.get("encode", 0.0) + upload_seconds(part.weights_bytes, rates)
    return seconds


Step = tuple[Hashable, tuple[Any, ...], Any]
"""Part of a phase: what it belongs to, what is busy with it (a GPU, or the two ends of a link), and its seconds."""


def critical_path(steps: Iterable[Step], longest: Callable[[list[Any]], Any] = max) -> Any:
    """Seconds of one phase: the sum of what waits for each other, the longest of what is done at once.

    Steps that belong to the same are done at once where different GPUs or links are busy with them, and wait for each
    other where it is the same one. All others wait for each other: a component needs the result of the one before.

    Args:
        steps: in numbers, or in arrays with an entry per placement.
        longest: the largest of a list of such numbers or arrays.
    """
    together: dict[Hashable, list[tuple[tuple[Any, ...], Any]]] = {}
    for whole, busy, seconds in steps:
        together.setdefault(whole, []).append((busy, seconds))
    total = 0.0
    for parts in together.values():
        if len(parts) == 1:
            total = total + parts[0][1]
        else:
            total = total + longest([sum(_same(busy, other) * each for other, each in parts) for busy, _ in parts])
    return total


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> Any:
    return reduce(and_, (a == b for a, b in zip(one, other, strict=True)))


def phase_steps(
    profile: PipelineProfile,
    work: Callable[[str, ComponentProfile], Mapping[Phase, Any]],
    crossing: Callable[[Crossing], Any],
    places: Mapping[str, Any],
) -> dict[Phase, list[Step]]:
    """What a request does in each phase, in numbers or in arrays: units work, and tensors cross between them.

    Args:
        work: seconds of a unit by phase.
        crossing: seconds of a crossing in the whole request; 0 where it stays on a device.
        places: where each unit is.
    """
    steps: dict[Phase, list[Step]] = {phase: [] for phase in PHASES}
    for name, part in profile.parts.items():
        for phase, seconds in work(name, part).items():
            steps[phase].append((part.name, (places[name],), seconds))
    for one in profile.crossings:
        whole = (one.tensor, component_of(one.src), component_of(one.dst))
        steps[one.phase].append((whole, (places[one.src], places[one.dst]), crossing(one)))
    return steps


def phase_seconds(profile: PipelineProfile, placement: Placement, gpus: Mapping[int, Gpu]) -> dict[Phase, float] | None:
    """Seconds of one request per phase: the critical path of the work of its units and the crossings into it.

    None where a component sits on the host: CPUs are not in the table of rates.
    """
    rates: dict[str, KnownGpu] = {}
    for name, place in placement.items():
        if place == "cpu":
            return None
        rates[name] = gpus[place].rates

    def work(name: str, part: ComponentProfile) -> Mapping[Phase, float]:
        return component_phases(part, profile.steps, rates[name])

    def crossing(one: Crossing) -> float:
        if placement[one.src] == placement[one.dst]:
            return 0.0
        return one.times(profile.steps) * crossing_seconds(one, rates[one.src], rates[one.dst])

    return {phase: critical_path(steps) for phase, steps in phase_steps(profile, work, crossing, placement).items()}
