"""Pure arithmetic: a profile, GPUs and a placement give bytes per GPU, bytes moved, and seconds. Imports no torch.

A profile given here has its knobs applied (`knobs.under`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import and_
from typing import Any, Literal

from ..declare.formats import Dtype
from ..declare.pipelines import PHASES, Component, Crossing, Phase
from ..facts.allocator import context_bytes, workspace_bytes
from ..facts.known_gpus import KnownGpu
from ..facts.machine import Gpu
from .execution import pool_bytes
from .profile import ComponentProfile, PipelineProfile, Work
from .records import Place
from .units import component_of

Placement = Mapping[str, Place]
"""Unit name -> slot or host. The first unit of a component has the component's name."""

HEADROOM = 0.02
"""Fraction of a GPU left free for allocator rounding and fragmentation."""


@dataclass(frozen=True)
class Efficiency:
    """What of a GPU's rates the kernels of SANA reach.

    Attributes:
        products: share of the TFLOPS that matrix products and convolutions reach.
        product_bandwidth: share of the memory bandwidth that they reach where they are bound by it.
        other_bandwidth: share of the memory bandwidth that all other kernels reach.
        kernel_seconds: what each kernel takes beyond these, launched by Python or by a graph.
    """

    products: float
    product_bandwidth: float
    other_bandwidth: float
    kernel_seconds: float = 0.0


PHASE_EFFICIENCY = Efficiency(0.5, 0.3, 0.3)
"""Of text encoder and VAE. Calibrated on an H200 (docs/measured.md)."""
STEP_EFFICIENCY = Efficiency(0.84, 1.0, 0.33, 2.6e-6)
"""Of transformer and ControlNet in denoise. Calibrated on CUDA graphs on an H100, 512 to 2048 px, batch 1 and 4."""
LAUNCH_SECONDS = 40e-6
"""Host time to launch one kernel from eager PyTorch, its Python included; the floor for small images. Calibrated on
an H200; the host decides it, and how busy that is."""
REFILL_SECONDS = 8e-6
"""What each kernel of one more call loses while the GPU drains and fills again: slicing, tiles. Likewise."""
LINK_EFFICIENCY = 0.8
"""Share of a link's bandwidth that a large copy reaches."""
LINK_SECONDS = 20e-6
"""Fixed cost of one copy between devices."""


@dataclass(frozen=True)
class SlotUse:
    """What one slot holds at its fullest moment, in bytes; `peak_bytes` includes context and headroom.

    `allocator_bytes` are what PyTorch's allocator counts beyond tensors: unsplit blocks and cuBLAS's workspace.
    `pool_bytes` are the part of `activation_bytes` that graphs keep, also while nothing works.
    """

    weights_bytes: int
    activation_bytes: int
    allocator_bytes: int
    overhead_bytes: int
    phase: Phase
    pool_bytes: int = 0

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
    first unit and adds to whoever works there. What graphed units take in denoise is in the pool of their graphs, which
    is there in every phase: a second request finds it.

    Args:
        gpu: the one that the slot is; without it workspace, context and headroom are left out.
    """
    here = {name: profile.parts[name] for name, place in placement.items() if place == slot}
    graphed = {name: part for name, part in here.items() if part.execution == "graphs" and slot != "cpu"}
    pool = pool_bytes(max(part.activations.get("denoise", 0) for part in graphed.values())) if graphed else 0
    weights, unsplit, activations = (dict.fromkeys(PHASES, 0) for _ in range(3))
    for phase in PHASES:
        for part in here.values():
            if part.resident or phase in part.activations:
                weights[phase] += part.weights_bytes
                unsplit[phase] += part.unsplit_bytes + part.workspaces.get(phase, 0) if slot != "cpu" else 0
        beside = {name: _beside_pool(profile, name, phase, here) for name in graphed}
        activations[phase] = pool + _activations(profile, here, phase, beside)
    phase = max(PHASES, key=lambda name: weights[name] + unsplit[name] + activations[name])
    allocated = unsplit[phase] + (workspace_bytes(gpu.capability) if gpu else 0)
    return SlotUse(weights[phase], activations[phase], allocated, overhead(gpu) if gpu else 0, phase, pool)


def _activations(
    profile: PipelineProfile, here: Mapping[str, ComponentProfile], phase: Phase, beside: Mapping[str, int]
) -> int:
    """Bytes of activations that the units `here` take in a phase; `beside` says what those of graphed units are."""
    waiting, working = 0, dict[Component, int]()
    for name, part in here.items():
        own = beside.get(name, part.activations.get(phase, 0))
        if name == profile.pipeline.denoiser and phase != "denoise":
            waiting = own
        else:
            working[part.name] = working.get(part.name, 0) + own
    return waiting + max(working.values(), default=0)


def _beside_pool(profile: PipelineProfile, name: str, phase: Phase, here: Collection[str]) -> int:
    """Bytes of activations that a graphed unit has in a phase outside the pool of its graphs.

    Residuals of a ControlNet that is graphed on the same GPU are in the pool, but for those of the first step, which is
    eager: diffusers' pipeline still has them while the second one is captured. Residuals from elsewhere are copied out
    of that GPU's pool, and those of two steps are here at a time.
    """
    own = profile.parts[name].activations.get(phase, 0)
    residuals = [one for one in profile.crossings if one.tensor in profile.pipeline.waiting]
    if phase == "denoise":
        come = sum(one.bytes_each * (1 if one.src in here else 2) for one in residuals if one.dst == name)
        return come + sum(one.bytes_each for one in residuals if one.src == name and one.dst not in here)
    kept = sum(one.bytes_each for one in residuals if one.dst == name and one.src in here)
    return max(0, own - kept) if phase == "decode" else own


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


def work_seconds(
    work: Work, dtype: Dtype, rates: KnownGpu, reached: Efficiency = PHASE_EFFICIENCY, launched: bool = True
) -> float:
    """Seconds of `work` on a GPU, by the roofline (Williams et al. 2009, https://doi.org/10.1145/1498765.1498785).

    max(launches, products + the rest), where launches = operations x LAUNCH_SECONDS, products = max(FLOPs / rate, their
    bytes / bandwidth), the rest = other bytes / bandwidth + operations x a kernel's seconds, rate and bandwidths what
    is `reached` of the card's. Work cut into calls takes REFILL_SECONDS more for each kernel of every call but the
    first. A dtype that is not native runs at the float32 rate.

    Args:
        launched: whether Python launches each kernel; a graph launches all at once.
    """
    tflops = {"float16": rates.tflops_float16, "bfloat16": rates.tflops_bfloat16, "float32": rates.tflops_float32}
    rate = (tflops[dtype] or rates.tflops_float32) * 1e12 * reached.products
    bandwidth = rates.memory_gbps * 1e9
    products = max(work.flops / rate, work.product_bytes / (bandwidth * reached.product_bandwidth))
    others = work.other_bytes / (bandwidth * reached.other_bandwidth)
    each = work.operations * (reached.kernel_seconds + (1 - 1 / work.calls) * REFILL_SECONDS)
    return max(work.operations * LAUNCH_SECONDS if launched else 0.0, products + others + each)


def step_seconds(part: ComponentProfile, rates: KnownGpu) -> float:
    """Seconds of one component on one GPU in a denoising step."""
    work, launched = part.work.get("denoise", Work()), part.execution == "eager"
    return work_seconds(work, part.format.dtype, rates, STEP_EFFICIENCY, launched)


def upload_seconds(weights_bytes: int, rates: KnownGpu) -> float:
    """Seconds to copy offloaded weights from the host to a GPU, once per request: bytes / (PCIe x LINK_EFFICIENCY)."""
    return weights_bytes / (rates.pcie_gbps * 1e9 * LINK_EFFICIENCY)


def crossing_seconds(crossing: Crossing, src: KnownGpu, dst: KnownGpu) -> float:
    """Seconds of one crossing between two GPUs: LINK_SECONDS + bytes / the link's rate."""
    return LINK_SECONDS + crossing.bytes_each / link_between(src, dst).bytes_per_second


def component_phases(part: ComponentProfile, steps: int, rates: KnownGpu) -> dict[Phase, float]:
    """Seconds of one component on one GPU in each phase of a request; the upload of offloaded weights is encode's."""
    seconds = {
        phase: steps * step_seconds(part, rates) if phase == "denoise" else work_seconds(work, part.format.dtype, rates)
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
