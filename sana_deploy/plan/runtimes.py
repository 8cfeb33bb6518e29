"""`runtime=auto` and the others: how the components of the denoising loop execute, with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from .._models import Diagnostic
from .._units import human_bytes
from ..declare.hardware import Split
from ..declare.knobs import KNOBS, Knob
from ..declare.runtime import RUNTIMES, Execution
from ..facts.machine import Gpu
from .grid import Candidate
from .profile import PipelineProfile
from .records import place_words
from .seconds import step_seconds
from .ways import PLAINEST, Choice, Way, Ways, runtimes_of

WORTH = 0.95
"""Share of the seconds of the plainer way that another one may take at most to be chosen."""


def choose_runtime(mode: Execution | Literal["auto"], split: Split, ways: Ways) -> Choice:
    """Choose the runtime of a split.

    `auto` takes one that keeps every bit, makes the denoising loop faster by 5 % and fits under the same knobs, but for
    those of placements. A denoiser on the CPU has the plainest one: the others are of GPUs. So have GPUs that are older
    than what was asked for.
    """
    plainest = Way(PLAINEST, split)
    if len(runtimes_of(split)) == 1:
        return ways.choice(plainest)
    if mode != "auto" and mode != PLAINEST:
        asked = Way(mode, split)
        best = ways.search(asked).best
        if best is None:
            return ways.choice(asked)
        if not _on_gpu(best, ways.profile(asked)):
            return ways.choice(plainest, _not_on_cpu(mode, ways.profile(plainest)))
        if older := ways.older_than(mode, best):
            return ways.choice(plainest, _too_old(mode, older[0]))
        return ways.choice(asked)
    best = ways.search(plainest).best
    if best is None or mode == PLAINEST or not _on_gpu(best, ways.profile(plainest)):
        return ways.choice(plainest)
    verdicts = [_verdict(ways, best, plainest, Way(name, split)) for name in of_auto()]
    chosen = min(verdicts, key=lambda one: one.milliseconds)
    if chosen.way == plainest:
        return ways.choice(plainest, _remark(PLAINEST, "; ".join(dict.fromkeys(one.reason for one in verdicts))))
    return ways.choice(chosen.way, _remark(chosen.way.runtime, chosen.reason))


def of_auto() -> Iterable[Execution]:
    """The runtimes that `auto` may choose beside the plainest."""
    return [name for name, one in RUNTIMES.items() if name != PLAINEST and one.exactness == "bitwise"]


@dataclass(frozen=True)
class _Verdict:
    """Of the plainest way and another one, the one to take; milliseconds of its step, and why."""

    way: Way
    milliseconds: float
    reason: str


def _verdict(ways: Ways, best: Candidate, plainest: Way, other: Way) -> _Verdict:
    """Take `other` where it pays and fits; `best` is the candidate of the plainest way."""
    plain, profile, name = ways.profile(plainest), ways.profile(other), other.runtime
    now = _milliseconds(plain, best, ways.gpus)

    def stay(reason: str) -> _Verdict:
        return _Verdict(plainest, now, reason)

    if all(_gain(plain, profile, gpu) > WORTH for gpu in ways.gpus.values()):
        return stay(f"the GPU is busy anyway in the ~{now:.0f} ms of a step")
    search = ways.search(other)
    if search.best is None:
        nearest = search.nearest()
        return stay(f"{name} do not fit{f': {nearest.message}' if nearest else ''}")
    if short := ways.short_of(search.best):
        return stay(f"{name} do not fit on {place_words(short[0])}")
    if _turned_on(search.best) != _turned_on(best):
        knobs = [", ".join(one.knobs) or "no knob" for one in (search.best, best)]
        return stay(f"{name} would fit with {knobs[0]}, {PLAINEST} takes {knobs[1]}")
    then = _milliseconds(profile, search.best, ways.gpus)
    if then > WORTH * now:
        return stay(f"a step would take ~{then:.0f} ms with {name} and takes ~{now:.0f} ms without")
    kept = [f"~{human_bytes(use.pool_bytes)} on {place_words(i)}"
            for i, use in search.best.uses.items() if use.pool_bytes]  # fmt: skip
    reason = f"~{then:.0f} ms a step, ~{now:.0f} ms launched from Python; {name} keep {', '.join(kept)}"
    return _Verdict(other, then, reason)


def _turned_on(candidate: Candidate) -> tuple[Knob, ...]:
    """The knobs of a candidate without those of its placement: graphs may gain by a ControlNet that is apart."""
    return tuple(knob for knob in candidate.knobs if KNOBS[knob].apart is None)


def _on_gpu(candidate: Candidate, profile: PipelineProfile) -> bool:
    """Whether the denoiser is on a GPU."""
    return candidate.placement[profile.pipeline.denoiser] != "cpu"


def _gain(plain: PipelineProfile, other: PipelineProfile, gpu: Gpu) -> float:
    """Seconds of a step on one GPU with another runtime over those with the plainest."""
    now, then = (sum(step_seconds(part, gpu.rates) for part in one.components.values()) for one in (plain, other))
    return then / now if now else 1.0


def _milliseconds(profile: PipelineProfile, candidate: Candidate, gpus: Mapping[int, Gpu]) -> float:
    """Milliseconds of a denoising step: with what crosses, where no component is on the CPU."""
    if candidate.seconds is not None:
        return 1e3 * candidate.seconds["denoise"] / profile.steps
    on_gpus = [(profile.parts[name], gpus[place]) for name, place in candidate.placement.items() if place != "cpu"]
    return 1e3 * sum(step_seconds(part, gpu.rates) for part, gpu in on_gpus)


def _remark(execution: Execution, reason: str) -> Diagnostic:
    message = f"auto chose {execution}: {reason}"
    return Diagnostic(type="auto_runtime", severity="info", message=message, where="runtime")


def _not_on_cpu(execution: Execution, profile: PipelineProfile) -> Diagnostic:
    message = f"the {profile.pipeline.denoiser} is on the CPU, runtime={execution} is of GPUs: it runs eagerly"
    return Diagnostic(type="no_graphs", severity="warning", message=message, where="runtime.mode")


def _too_old(execution: Execution, gpu: Gpu) -> Diagnostic:
    need, has = (".".join(map(str, one)) for one in (RUNTIMES[execution].capability, gpu.capability))
    message = f"runtime={execution} needs compute capability {need}, {place_words(gpu.index)} ({gpu.name}) has {has}: "
    return Diagnostic(
        type="old_gpu", severity="warning", message=f"{message}it runs eagerly", where="runtime.mode",
        hint="runtime=auto",
    )  # fmt: skip
