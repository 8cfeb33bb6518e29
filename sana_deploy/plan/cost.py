"""Pure arithmetic: a profile, GPUs and a placement give bytes per GPU, and bytes moved. Imports no torch.

A profile given here has its knobs applied (`knobs.under`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from ..declare.pipelines import PHASES, Component, Crossing, Phase
from ..facts.allocator import context_bytes, workspace_bytes
from ..facts.machine import Gpu
from .execution import pool_bytes
from .profile import ComponentProfile, PipelineProfile
from .records import Place
from .streaming import early_bytes, streamed

Placement = Mapping[str, Place]
"""Unit name -> slot or host. The first unit of a component has the component's name."""

HEADROOM = 0.02
"""Fraction of a GPU left free for allocator rounding and fragmentation."""


@dataclass(frozen=True)
class SlotUse:
    """What one slot holds at its fullest moment, in bytes; `peak_bytes` includes context and headroom.

    `allocator_bytes` are what PyTorch's allocator counts beyond tensors: unsplit blocks and cuBLAS's workspace.
    `pool_bytes` are the part of `activation_bytes` that graphs keep, also while nothing works; `first_pool_bytes` what
    they keep of it before calls with large activations are in graphs, from the second request on.
    """

    weights_bytes: int
    activation_bytes: int
    allocator_bytes: int
    overhead_bytes: int
    phase: Phase
    pool_bytes: int = 0
    first_pool_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """Weights, activations of the fullest phase, what the allocator adds, and overhead."""
        return self.weights_bytes + self.activation_bytes + self.allocator_bytes + self.overhead_bytes


def slot_use(profile: PipelineProfile, placement: Placement, slot: Place, gpu: Gpu | None = None) -> SlotUse:
    """Work out what `slot` holds under `placement`, in bytes.

    peak = max over phases of (weights there with their blocks + activations) + workspace + context + headroom x
    capacity. Weights stay, but for an offloaded component's, which are there only while it works. Components of one
    phase work one after the other, so that the largest counts, units of one component at once, so that they add up;
    what waits outside the denoising loop (prompt embeddings, the control image) is listed under the denoiser's units
    and adds to whoever works there. What graphed units take in their own phase is in the pool of their graphs, which is
    there in every phase: a second request finds it. So is what they read and do not compute. Other calls in graphs take
    theirs from the same pool, but for the first request, in which they are eager and take it beside a pool that is as
    small as without them.

    Args:
        gpu: the one that the slot is; without it workspace, context and headroom are left out.
    """
    here = {name: profile.parts[name] for name, place in placement.items() if place == slot}
    graphed = {name: part for name, part in here.items() if part.graphed and slot != "cpu"}
    worked = {name: _graphed_bytes(profile, part) + early_bytes(profile, name, here) for name, part in graphed.items()}
    later = [size for part in here.values() if slot != "cpu" for size in _graph_phase_bytes(part)]
    steady = sum(part.steady_bytes for part in graphed.values())
    first = steady + pool_bytes(max(worked.values())) if graphed else 0
    pool = max(first, steady + pool_bytes(max(later))) if later else first
    weights, unsplit, activations = (dict.fromkeys(PHASES, 0) for _ in range(3))
    for phase in PHASES:
        there = [part for part in here.values() if part.resident or phase in part.activations]
        weights[phase] = sum(part.weights_bytes for part in there)
        inside = {name for name, part in here.items() if slot != "cpu" and phase in part.graph_phases}
        beside = {name: _beside_pool(profile, name, phase, here) for name in graphed}
        results = {name: _result_bytes(profile, name, phase) for name in inside}
        ways = [(first, beside, set[str]()), (pool, {**beside, **results}, inside)]
        held = [
            (kept + _activations(profile, here, phase, own), _allocated(there, phase, out) if slot != "cpu" else 0)
            for kept, own, out in ways
        ]
        activations[phase], unsplit[phase] = max(held, key=sum)
    phase = max(PHASES, key=lambda name: weights[name] + unsplit[name] + activations[name])
    allocated = unsplit[phase] + (workspace_bytes(gpu.capability) if gpu else 0)
    return SlotUse(weights[phase], activations[phase], allocated, overhead(gpu) if gpu else 0, phase, pool, first)


def _activations(
    profile: PipelineProfile, here: Mapping[str, ComponentProfile], phase: Phase, beside: Mapping[str, int]
) -> int:
    """Bytes of activations that the units `here` take in a phase; `beside` says what those of graphed units are."""
    waiting, working = 0, dict[Component, int]()
    for name, part in here.items():
        own = beside.get(name, part.activations.get(phase, 0))
        if part.name == profile.pipeline.denoiser and phase != "denoise":
            waiting += own
        else:
            working[part.name] = working.get(part.name, 0) + own
    return waiting + max(working.values(), default=0)


def _graph_phase_bytes(part: ComponentProfile) -> list[int]:
    """Bytes that a unit takes in each phase in which calls besides its `forward` are in graphs, workspaces included."""
    return [part.activations[phase] + part.workspaces.get(phase, 0) for phase in part.graph_phases]


def _result_bytes(profile: PipelineProfile, name: str, phase: Phase) -> int:
    """Bytes copied out of the pool, of calls besides `forward` in a phase: latents to read, pixels to show."""
    latents = sum(one.bytes_each for one in profile.crossings if one.src == name and one.phase == phase)
    return latents + (profile.parts[name].pixel_bytes if phase == PHASES[-1] else 0)


def _allocated(there: Iterable[ComponentProfile], phase: Phase, inside: Collection[str]) -> int:
    """Bytes of a phase that blocks of weights have beyond them, and workspaces of libraries that are in no pool.

    Args:
        inside: units whose workspaces are in the pool of graphs.
    """
    return sum(part.unsplit_bytes + (0 if part.name in inside else part.workspaces.get(phase, 0)) for part in there)


def _graphed_bytes(profile: PipelineProfile, part: ComponentProfile) -> int:
    """Bytes of activations that a unit takes in the phase in which its graphs work."""
    return part.activations.get(profile.pipeline.phase_of[f"{part.name}.forward"], 0)


def _beside_pool(profile: PipelineProfile, name: str, phase: Phase, here: Collection[str]) -> int:
    """Bytes of activations that a graphed unit has in a phase outside the pool of its graphs.

    Residuals of a ControlNet that is graphed on the same GPU are in the pool, but for those of the first step, which is
    eager: diffusers' pipeline still has them while the second one is captured. Residuals from elsewhere are copied out
    of that GPU's pool, and those of two steps are here at a time. Those that are streamed come into the same memory in
    every step, which is there in every phase like the pool, and leave from their own GPU's pool. Prompt embeddings are
    copied out of the pool.
    """
    part, streams = profile.parts[name], streamed(profile)
    if profile.pipeline.phase_of[f"{part.name}.forward"] != "denoise":
        return sum(one.bytes_each for one in profile.crossings if one.src == name and one.phase == phase)
    own = part.activations.get(phase, 0)
    residuals = [one for one in profile.crossings if one.tensor in profile.pipeline.waiting]
    if phase == "denoise":
        come = sum(
            one.bytes_each * (1 if one.src in here or one in streams else 2) for one in residuals if one.dst == name
        )
        left = [one for one in residuals if one.src == name and one.dst not in here and one not in streams]
        return come + sum(one.bytes_each for one in left)
    if phase != "decode":
        return own + sum(one.bytes_each for one in streams if one.dst == name and one.src not in here)
    kept = sum(one.bytes_each for one in residuals if one.dst == name and one.src in here)
    return max(0, own - kept)


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
