"""Seconds of one placement: a roofline per unit and phase, links between GPUs, and the critical path. Imports no torch.

A profile given here has its knobs applied (`knobs.under`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from operator import and_
from typing import Any, Literal

import numpy as np

from ..declare.formats import Dtype
from ..declare.pipelines import PHASES, Crossing, Phase
from ..declare.runtime import RUNTIMES
from ..facts.known_gpus import KnownGpu
from ..facts.machine import Gpu
from .cost import Placement
from .passing import Work
from .profile import ComponentProfile, PipelineProfile
from .streaming import saved_seconds
from .units import component_of


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
"""Of text encoder and VAE. Calibrated on an H200 (docs/measured.md); in graphs, a text encoder takes 5 % less."""


GRAPHED_EFFICIENCY = Efficiency(0.6, 0.36, 0.36)
"""Of a VAE in graphs, where no kernel waits for Python. Calibrated on an H100: encode 12 ms and decode 15 ms at 512 px,
decode 55 ms at 1024 px, within 15 %."""


STEP_EFFICIENCY = Efficiency(0.84, 1.0, 0.33, 2.6e-6)
"""Of transformer and ControlNet in denoise. Calibrated on CUDA graphs on an H100, 512 to 2048 px, batch 1 and 4."""


COMPILED_BYTES, COMPILED_OPERATIONS = 0.5, 0.67
"""What compiling leaves of the other bytes and of the kernels of a step, by fusing them. Calibrated on compiled blocks
in graphs on an H100: both SANA models, 512 to 2048 px, batch 1 and 4."""


LAUNCH_SECONDS = 40e-6
"""Host time to launch one kernel from eager PyTorch, its Python included; the floor for small images. Calibrated on
an H200; the host decides it, and how busy that is."""


REFILL_SECONDS = 8e-6
"""What each kernel of one more call loses while the GPU drains and fills again: slicing, tiles. Likewise."""


STEP_WAIT = 0.4e-3
"""Seconds of a step in which the GPU waits between graphs: inputs are copied, and the scheduler's step is launched
eagerly. Calibrated on an H100: loops of 20 steps at 512 and 1024 px, graphs and compiled, on one GPU and two."""


HOST_STEP, HOST_CALL = 3.7e-3, 1.0e-3
"""Seconds that Python takes for a step, and for each call in it that is replayed: no step is shorter. Their sum is that
of compiled halves on two H100s at 512 px, 7.75 ms for four calls with checks of their modules, where the kernels need
5.6 ms. How it divides is an estimate."""


HOST_REQUEST: Mapping[Phase, float] = {"encode": 0.015, "decode": 0.025}
"""Seconds of a request outside of components: tokens, timesteps, pixels to the host. Calibrated likewise."""


LINK_EFFICIENCY = 0.8
"""Share of a link's bandwidth that a large copy reaches."""


LINK_SECONDS = 20e-6
"""Fixed cost of one copy between devices."""


@dataclass(frozen=True)
class Link:
    """How two GPUs exchange bytes, and how many per second in one direction."""

    kind: Literal["nvlink", "pcie", "host"]
    bytes_per_second: float


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
    work: Work, dtype: Dtype, rates: KnownGpu, reached: Efficiency = PHASE_EFFICIENCY, launches: int = 1
) -> float:
    """Seconds of `work` on a GPU, by the roofline (Williams et al. 2009, https://doi.org/10.1145/1498765.1498785).

    max(launches, products + the rest), where launches = operations x `launches` x LAUNCH_SECONDS, products = max(FLOPs
    / rate, their bytes / bandwidth), the rest = other bytes / bandwidth + operations x a kernel's seconds, rate and
    bandwidths what is `reached` of the card's. Work cut into calls takes REFILL_SECONDS more for each kernel of every
    call but the first. A dtype that is not native runs at the float32 rate.

    Args:
        launches: how often Python launches each kernel, here and for other GPUs at the same time; a graph launches all
            at once.
    """
    tflops = {"float16": rates.tflops_float16, "bfloat16": rates.tflops_bfloat16, "float32": rates.tflops_float32}
    rate = (tflops[dtype] or rates.tflops_float32) * 1e12 * reached.products
    bandwidth = rates.memory_gbps * 1e9
    products = max(work.flops / rate, work.product_bytes / (bandwidth * reached.product_bandwidth))
    others = work.other_bytes / (bandwidth * reached.other_bandwidth)
    each = work.operations * (reached.kernel_seconds + (1 - 1 / work.calls) * REFILL_SECONDS)
    return max(work.operations * launches * LAUNCH_SECONDS, products + others + each)


def step_seconds(part: ComponentProfile, rates: KnownGpu) -> float:
    """Seconds of one unit on one GPU in a denoising step; kernels of all units are launched by one thread."""
    work, runtime = part.work.get("denoise", Work()), RUNTIMES[part.execution]
    if runtime.compiles:
        left = round(COMPILED_BYTES * work.other_bytes), round(COMPILED_OPERATIONS * work.operations)
        work = replace(work, other_bytes=left[0], operations=left[1])
    return work_seconds(work, part.format.dtype, rates, STEP_EFFICIENCY, 0 if runtime.graphs else part.units)


def upload_seconds(weights_bytes: int, rates: KnownGpu) -> float:
    """Seconds to copy offloaded weights from the host to a GPU, once per request: bytes / (PCIe x LINK_EFFICIENCY)."""
    return weights_bytes / (rates.pcie_gbps * 1e9 * LINK_EFFICIENCY)


def crossing_seconds(crossing: Crossing, src: KnownGpu, dst: KnownGpu) -> float:
    """Seconds of one crossing between two GPUs: LINK_SECONDS for each copy + bytes / the link's rate."""
    return crossing.copies * LINK_SECONDS + crossing.bytes_each / link_between(src, dst).bytes_per_second


def component_phases(part: ComponentProfile, steps: int, rates: KnownGpu) -> dict[Phase, float]:
    """Seconds of one component on one GPU in each phase of a request; the upload of offloaded weights is encode's."""
    seconds = {
        phase: steps * step_seconds(part, rates) if phase == "denoise" else _once_seconds(part, phase, work, rates)
        for phase, work in part.work.items()
    }
    if not part.resident:
        seconds["encode"] = seconds.get("encode", 0.0) + upload_seconds(part.weights_bytes, rates)
    return seconds


def _once_seconds(part: ComponentProfile, phase: Phase, work: Work, rates: KnownGpu) -> float:
    """Seconds of one component on one GPU in a phase that is no loop."""
    if phase in part.graph_phases:
        return work_seconds(work, part.format.dtype, rates, GRAPHED_EFFICIENCY, 0)
    # In other phases than the loop's, a denoiser does what the pipeline itself launches.
    launches = 0 if part.graphed and "denoise" not in part.work else part.units
    return work_seconds(work, part.format.dtype, rates, launches=launches)


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
        total = total + (parts[0][1] if len(parts) == 1 else longest(_by_busy(parts)))
    return total


def _by_busy(parts: list[tuple[tuple[Any, ...], Any]]) -> list[Any]:
    """Seconds that what is busy with each part takes for all parts that it is busy with."""
    if not any(isinstance(place, np.ndarray) for busy, _ in parts for place in busy):
        found: dict[tuple[Any, ...], Any] = {}
        for busy, seconds in parts:
            found[busy] = found.get(busy, 0) + seconds
        return [*found.values()]
    return [sum(_same(busy, other) * each for other, each in parts) for busy, _ in parts]


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> Any:
    return reduce(and_, (a == b for a, b in zip(one, other, strict=True)))


def seconds_by_phase(
    profile: PipelineProfile, steps: Mapping[Phase, Iterable[Step]], longest: Callable[[list[Any]], Any] = max
) -> dict[Phase, Any]:
    """Seconds of each phase: its critical path, and what Python takes of it.

    Args:
        steps: of each phase, in numbers or in arrays; see `phase_steps`.
        longest: see `critical_path`.
    """
    found = {phase: critical_path(each, longest) + HOST_REQUEST.get(phase, 0.0) for phase, each in steps.items()}
    if RUNTIMES[profile.execution].graphs:
        calls = sum(1 for part in profile.parts.values() if "denoise" in part.work)
        least = HOST_STEP + HOST_CALL * calls
        waited = found["denoise"] + STEP_WAIT * profile.steps
        found["denoise"] = longest([waited, 0.0 * waited + least * profile.steps])
    return found


def phase_steps(
    profile: PipelineProfile,
    work: Callable[[str, ComponentProfile], Mapping[Phase, Any]],
    crossing: Callable[[Crossing], Any],
    places: Mapping[str, Any],
) -> dict[Phase, list[Step]]:
    """What a request does in each phase, in numbers or in arrays: units work, and tensors cross between them.

    Where residuals are streamed, the last of a phase's steps is negative: what working at once saves.

    Args:
        work: seconds of a unit by phase.
        crossing: seconds of a crossing in the whole request; 0 where it stays on a device.
        places: where each unit is.
    """
    steps: dict[Phase, list[Step]] = {phase: [] for phase in PHASES}
    denoise, crossed = dict[str, Any](), dict[Crossing, Any]()
    for name, part in profile.parts.items():
        for phase, seconds in work(name, part).items():
            # Units that are dealt by layers wait for each other, as components do.
            whole: Hashable = name if part.name in profile.dealt else part.name
            steps[phase].append((whole, (places[name],), seconds))
            if phase == "denoise":
                denoise[name] = seconds
    for one in profile.crossings:
        ends = [end if component_of(end) in profile.dealt else component_of(end) for end in (one.src, one.dst)]
        whole, crossed[one] = (one.tensor, *ends), crossing(one)
        steps[one.phase].append((whole, (places[one.src], places[one.dst]), crossed[one]))
    steps["denoise"].append(("at once", (), -saved_seconds(profile, denoise, crossed, places)))
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

    return seconds_by_phase(profile, phase_steps(profile, work, crossing, placement))
