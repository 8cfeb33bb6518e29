"""`runtime=auto|eager|graphs`: how the components of the denoising loop execute, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from .._models import Diagnostic
from .._units import human_bytes
from ..declare.runtime import Execution
from ..facts.machine import Gpu, Machine
from .execution import executed
from .grid import Candidate
from .profile import PipelineProfile
from .records import place_words
from .search import Search
from .seconds import step_seconds

WORTH = 0.95
"""Share of the eager denoising loop's seconds that graphs may take at most to be chosen."""

Searched = Callable[[PipelineProfile], Search]
"""Searches the placements of a profile."""


@dataclass(frozen=True)
class Choice:
    """The profile with the runtime that was chosen, what was searched with it, and what is to say of that."""

    profile: PipelineProfile
    search: Search
    remarks: tuple[Diagnostic, ...] = ()


def choose_runtime(
    mode: Literal["auto", "eager", "graphs"], profile: PipelineProfile, machine: Machine, searched: Searched
) -> Choice:
    """Search the placements of `profile` with the runtime asked for.

    `auto` takes graphs where they make the denoising loop faster by 5 % and fit under the same knobs. A denoiser on the
    CPU is eager: graphs are of GPUs.
    """
    graphed = executed(profile, "graphs")
    if mode == "graphs":
        search = searched(graphed)
        if search.best is None or _on_gpu(search.best, profile):
            return Choice(graphed, search)
    eager = Choice(profile, searched(profile))
    if eager.search.best is None or mode == "eager":
        return eager
    if not _on_gpu(eager.search.best, profile):
        return Choice(profile, eager.search, () if mode == "auto" else (_no_graphs(profile),))
    return _chosen(eager, graphed, eager.search.best, machine, searched)


def _chosen(eager: Choice, graphed: PipelineProfile, best: Candidate, machine: Machine, searched: Searched) -> Choice:
    """Graphs where they pay and fit, else eager; both with the reason."""
    gpus = {gpu.index: gpu for gpu in machine.gpus}
    now = _milliseconds(eager.profile, best, gpus)
    if all(_gain(graphed, gpu) > WORTH for gpu in gpus.values()):
        return _with(eager, "eager", f"the GPU is busy anyway in the ~{now:.0f} ms of a step")
    search = searched(graphed)
    if search.best is None:
        nearest = search.nearest()
        return _with(eager, "eager", f"graphs do not fit{f': {nearest.message}' if nearest else ''}")
    short = [i for i, use in search.best.uses.items() if use.peak_bytes > gpus[i].free_bytes]
    if short:  # of a placement that is forced
        return _with(eager, "eager", f"graphs do not fit on {place_words(short[0])}")
    if search.best.knobs != best.knobs:
        knobs = [", ".join(one.knobs) or "no knob" for one in (search.best, best)]
        return _with(eager, "eager", f"graphs would fit with {knobs[0]}, eager takes {knobs[1]}")
    then = _milliseconds(graphed, search.best, gpus)
    if then > WORTH * now:
        return _with(eager, "eager", f"a step would take ~{then:.0f} ms with graphs and takes ~{now:.0f} ms without")
    kept = [f"~{human_bytes(use.pool_bytes)} on {place_words(i)}"
            for i, use in search.best.uses.items() if use.pool_bytes]  # fmt: skip
    reason = f"~{then:.0f} ms a step, ~{now:.0f} ms launched from Python; graphs keep {', '.join(kept)}"
    return _with(Choice(graphed, search), "graphs", reason)


def _on_gpu(candidate: Candidate, profile: PipelineProfile) -> bool:
    """Whether the denoiser is on a GPU."""
    return candidate.placement[profile.pipeline.denoiser] != "cpu"


def _gain(graphed: PipelineProfile, gpu: Gpu) -> float:
    """Seconds of a step on one GPU with graphs over those without."""
    eager = executed(graphed, "eager")
    then, now = (sum(step_seconds(part, gpu.rates) for part in one.components.values()) for one in (graphed, eager))
    return then / now if now else 1.0


def _milliseconds(profile: PipelineProfile, candidate: Candidate, gpus: Mapping[int, Gpu]) -> float:
    """Milliseconds of a denoising step: with what crosses, where no component is on the CPU."""
    if candidate.seconds is not None:
        return 1e3 * candidate.seconds["denoise"] / profile.steps
    on_gpus = [(profile.parts[name], gpus[place]) for name, place in candidate.placement.items() if place != "cpu"]
    return 1e3 * sum(step_seconds(part, gpu.rates) for part, gpu in on_gpus)


def _with(choice: Choice, execution: Execution, reason: str) -> Choice:
    message = f"auto chose {execution}: {reason}"
    remark = Diagnostic(type="auto_runtime", severity="info", message=message, where="runtime")
    return Choice(choice.profile, choice.search, (remark,))


def _no_graphs(profile: PipelineProfile) -> Diagnostic:
    message = f"the {profile.pipeline.denoiser} is on the CPU, which has no graphs: it runs eagerly"
    return Diagnostic(type="no_graphs", severity="warning", message=message, where="runtime.mode")
