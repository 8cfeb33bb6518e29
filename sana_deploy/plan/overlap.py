"""Stages of several requests at once on one placed pipeline: which overlap, what that takes, and images per second.

While one request denoises on its GPU, the next one encodes on another and the one before decodes there. A stage is what
a request does on the same GPUs at a stretch; it has them to itself (`run/turns.py`). So a GPU holds what one stage
takes there, as with one request, and what waits there of the others. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..declare.pipelines import PHASES, Phase
from ..facts.allocator import ROUNDING, SEGMENT, workspace_bytes
from ..facts.machine import Gpu
from .cost import Placement
from .grid import Candidate
from .knobs import under
from .profile import ComponentProfile, PipelineProfile
from .records import Overlap, OverlapUse, Place, Stage
from .seconds import LAUNCH_SECONDS
from .units import component_of

MOST_IN_FLIGHT = 3
"""One request encodes, one denoises and one decodes: more would wait for each other."""
_REQUESTS = 64
"""Requests that are followed to see how fast they come: the first quarter fills the stages."""
WORTH = 0.98
"""Stages overlap where a picture then takes at most this share of the seconds."""


def most_images(profile: PipelineProfile, ranked: Sequence[Candidate], gpus: Mapping[int, Gpu]) -> list[Candidate]:
    """Candidates in the order of images per second, with overlap where it fits; those that tie as they were.

    Args:
        profile: without any knob.
        ranked: candidates, whose seconds are known or not.
        gpus: by index.
    """

    def each(chosen: Candidate) -> float:
        overlap = overlap_of(under(profile, chosen.knobs), chosen, gpus, 1)
        return overlap.seconds_per_image if overlap else sum((chosen.seconds or {}).values())

    return sorted(ranked, key=each)


def overlap_of(profile: PipelineProfile, chosen: Candidate, gpus: Mapping[int, Gpu], batch: int) -> Overlap | None:
    """Plan how the stages of requests overlap; None where that gains nothing or does not fit.

    Halves of guidance keep GPUs busy that would do something else meanwhile: they are drawn one after the other.

    Args:
        profile: with its knobs applied.
        chosen: where its units are, and what that costs.
        gpus: by index; with the bytes that are free.
        batch: images of a request.
    """
    placement, uses, seconds = chosen.placement, chosen.uses, chosen.seconds
    if not seconds or profile.further:
        return None
    stages = stages_of(profile, placement, seconds)
    for count in range(min(MOST_IN_FLIGHT, len(stages)), 1, -1):
        each = cycle_seconds(stages, count, launch_seconds(profile))
        if each > WORTH * sum(seconds.values()):
            return None
        extra = {index: (count - 1) * waiting_bytes(profile, placement, index, gpus[index]) for index in uses}
        peaks = {index: use.peak_bytes + extra[index] for index, use in uses.items()}
        if all(peak <= gpus[index].free_bytes for index, peak in peaks.items()):
            return Overlap(
                in_flight=count,
                stages=list(stages),
                slots=[OverlapUse(slot=i, waiting_bytes=extra[i], peak_bytes=peak) for i, peak in peaks.items()],
                seconds_per_image=round(each / batch, 4),
                images_per_second=round(batch / each, 4),
            )
    return None


def stages_of(profile: PipelineProfile, placement: Placement, seconds: Mapping[Phase, float]) -> tuple[Stage, ...]:
    """The stages of a request in order: phases that work on the same GPUs one after the other are one."""
    stages: list[Stage] = []
    for phase in PHASES:
        places = _places(profile, placement, phase)
        if not places:
            continue
        if stages and stages[-1].places == places:
            before = stages.pop()
            whole = round(before.seconds + seconds[phase], 4)
            stages.append(Stage(phases=[*before.phases, phase], places=places, seconds=whole))
        else:
            stages.append(Stage(phases=[phase], places=places, seconds=round(seconds[phase], 4)))
    return tuple(stages)


def _places(profile: PipelineProfile, placement: Placement, phase: Phase) -> list[Place]:
    """Where units work in a phase."""
    working = {
        name
        for name in placement
        if any(call.phase == phase for call in profile.pipeline.by_name[component_of(name)].calls)
    }
    return sorted({placement[name] for name in working}, key=str)


def cycle_seconds(stages: Sequence[Stage], in_flight: int, launches: float = 0.0) -> float:
    """Seconds from one request to the next where so many are in flight: those of the bottleneck, or more.

    No request comes sooner than the GPU with most to do in a request has done it, nor than the one interpreter has
    launched what is in no graph.

    Args:
        launches: seconds of a request that Python takes to launch its kernels.
    """
    visits = schedule(stages, in_flight, _REQUESTS)
    steady = [visit.end for visit in visits if visit.stage == len(stages) - 1][_REQUESTS // 4 :]
    places = {place for stage in stages for place in stage.places}
    busiest = max(sum(stage.seconds for stage in stages if place in stage.places) for place in places)
    return max(launches, busiest, (steady[-1] - steady[0]) / (len(steady) - 1))


@dataclass(frozen=True)
class Visit:
    """A request in one of its stages, from `begin` to `end` in seconds."""

    request: int
    stage: int
    begin: float
    end: float


def schedule(stages: Sequence[Stage], in_flight: int, requests: int) -> list[Visit]:
    """What so many requests do that all wait from the start, in the order in which stages end.

    Turns are those of `run/turns.py`: of requests that want the same place, the one that began first has it.
    """
    now, at, working = 0.0, dict[int, int](), dict[int, Visit]()
    done, begun = list[Visit](), 0
    while len(done) < requests * len(stages):
        while begun < requests and len(at) < in_flight:
            at[begun], begun = 0, begun + 1
        for number in sorted(at.keys() - working.keys()):
            # Whoever works has its places, and of those that wait the one that began first.
            before = (other for other in at if other in working or other < number)
            if not any(_share(stages[at[number]], stages[at[other]]) for other in before):
                working[number] = Visit(number, at[number], now, now + stages[at[number]].seconds)
        now = min(visit.end for visit in working.values())
        for number in [number for number, visit in sorted(working.items()) if visit.end == now]:
            done.append(working.pop(number))
            at[number] += 1
            if at[number] == len(stages):
                del at[number]
    return done


def _share(one: Stage, other: Stage) -> bool:
    return not set(one.places).isdisjoint(other.places)


def launch_seconds(profile: PipelineProfile) -> float:
    """Seconds of a request in which Python launches kernels, for no other thread at the same time."""
    return sum(
        work.operations * LAUNCH_SECONDS * (profile.steps if phase == "denoise" else 1)
        for part in profile.parts.values()
        for phase, work in part.work.items()
        if not _in_graphs(part, phase)
    )


def _in_graphs(part: ComponentProfile, phase: Phase) -> bool:
    """Whether graphs launch a component's kernels: in other phases than the loop's, its components have no calls."""
    return phase in part.graph_phases or (part.graphed and (phase == "denoise" or "denoise" not in part.work))


def waiting_bytes(profile: PipelineProfile, placement: Placement, place: Place, gpu: Gpu) -> int:
    """Bytes that a request in flight takes on a GPU on which it does not work.

    The denoiser's GPU has its embeddings, control image and last residuals, others of the denoising loop have copies of
    what stays the same from step to step. Each thread that works has a workspace of cuBLAS's own.
    """
    parts = {name: part for name, part in profile.parts.items() if placement[name] == place}
    home = max((_waiting(part) for part in parts.values() if part.name == profile.pipeline.denoiser), default=0)
    steady = sum(
        one.bytes_each
        for one in profile.crossings
        if one.dst in parts and placement[one.src] != place and one.tensor in profile.pipeline.steady
    )
    aside = SEGMENT + ROUNDING if home else 0  # what is made on a stream aside is in blocks of its own
    return home + aside + steady + workspace_bytes(gpu.capability)


def _waiting(denoiser: ComponentProfile) -> int:
    """The most that the pipeline itself holds on the denoiser's GPU outside of the denoising loop."""
    return max((size for phase, size in denoiser.activations.items() if phase != "denoise"), default=0)
