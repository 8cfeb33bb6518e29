"""Calls besides `forward` that are launched from graphs: those of the VAE, where eager ones would wait for Python.

Their activations are large beside those of a step. They join the pool of the device's graphs, and take in it what an
eager call takes beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from ..declare.pipelines import Phase
from ..declare.runtime import RUNTIMES
from ..facts.machine import Gpu
from .cost import Placement
from .passing import VaeMode
from .profile import ComponentProfile, PipelineProfile
from .seconds import LAUNCH_SECONDS, work_seconds

LAUNCH_BOUND = 0.25
"""Share of a call's seconds on a GPU from which on launching its kernels binds: at a share of 0.3, a decode of 1024 px
took 74 ms eagerly and 55 ms in a graph on an H100."""
Chosen = Callable[[ComponentProfile, Phase], bool]


def launch_bound(gpus: Collection[Gpu]) -> Chosen:
    """Choose calls that launching binds on every one of `gpus`."""

    def chosen(part: ComponentProfile, phase: Phase) -> bool:
        work = part.work[phase]
        least = LAUNCH_SECONDS * work.operations / LAUNCH_BOUND
        seconds = (work_seconds(work, part.format.dtype, gpu.rates, launches=0) for gpu in gpus)
        return bool(gpus) and all(least >= one for one in seconds)

    return chosen


def planned_calls(calls: Collection[str], profile: PipelineProfile) -> Chosen:
    """Choose calls that a plan names, of the pipeline of `profile`."""
    phases = {(call.rpartition(".")[0], profile.pipeline.phase_of[call]) for call in calls}
    return lambda part, phase: (part.name, phase) in phases


def in_graphs(profile: PipelineProfile, chosen: Chosen) -> PipelineProfile:
    """Return `profile` with further calls in graphs, where its runtime has graphs: those that may be, and are `chosen`.

    The VAE's are not where it takes an image in parts: a knob that saves memory is not to be paid for with a pool.
    """
    if not RUNTIMES[profile.execution].graphs:
        return profile
    may: dict[str, list[Phase]] = {
        one.name: [call.phase for call in one.calls if call.graphed and call.phase]
        for one in profile.pipeline.components
    }

    def changed(part: ComponentProfile, whole: bool = True) -> ComponentProfile:
        phases = [phase for phase in may[part.name] if whole and phase in part.work and chosen(part, phase)]
        return replace(part, graph_phases=tuple(phases))

    under = {mode: changed(part, _is_whole(profile, mode)) for mode, part in profile.vae_under.items()}
    vae = profile.pipeline.of("vae")
    components = {name: changed(part, name != vae or _is_whole(profile, profile.vae_mode)) for name, part in
                  profile.components.items()}  # fmt: skip
    return replace(profile, components=components, vae_under=under)


def _is_whole(profile: PipelineProfile, mode: VaeMode) -> bool:
    """Whether all images of a request pass the VAE together in a mode, and whole."""
    together = profile.vae_under.get(replace(mode, sliced=False))
    alike = not mode.sliced or (together is not None and together.work == profile.vae_under[mode].work)
    return alike and not mode.tiled and mode.bands == 1


def graphed_calls(profile: PipelineProfile, placement: Placement) -> list[str]:
    """The calls besides `forward` that are launched from graphs under `placement`, as plans write them."""
    return [
        f"{one.name}.{call.method}"
        for one in profile.pipeline.components
        for call in one.calls
        if call.graphed and call.phase in profile.components[one.name].graph_phases and placement[one.name] != "cpu"
    ]
