"""Whether requests of other shapes fit a plan where it is placed, by the planner's own arithmetic. Imports no torch.

A plan is made for one workload. A request of another shape runs on the same placement, with the same knobs; what it
takes there is costed as a candidate of the search would be.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NoReturn

from .._units import human_bytes
from ..declare.hardware import SPLITS
from ..declare.knobs import KNOBS
from ..declare.pipelines import Phase
from ..declare.workload import VAE_FACTOR, Workload
from ..errors import InfeasibleError
from ..facts.checkpoint import Checkpoint
from .artifact import Plan, ResolvedPlan
from .call_graphs import in_graphs, planned_calls
from .cost import host_bytes, slot_use
from .execution import executed
from .guidance_split import split_guidance
from .knobs import under
from .layers import LayerSplit
from .overlap import cycle_seconds, launch_seconds, stages_of
from .profile import ComponentProfile, PipelineProfile, profile_pipeline
from .records import Place, place_words
from .row_split import RowSplit
from .seconds import phase_seconds

_PAYS = 0.95
"""A larger batch is worth its wait where a picture of it takes at most this share of the seconds."""


@dataclass(frozen=True)
class Need:
    """What a workload takes on the place that it fills most, and what is there; bytes."""

    place: Place
    phase: Phase | None
    peak_bytes: int
    available_bytes: int

    @property
    def lacking_bytes(self) -> int:
        """Bytes that are missing; 0 or less where it fits."""
        return self.peak_bytes - self.available_bytes

    def __str__(self) -> str:
        during = f" in {self.phase}" if self.phase else ""
        needed, there = human_bytes(self.peak_bytes), human_bytes(self.available_bytes)
        return f"{needed} on {place_words(self.place)}{during}, {there} are there"


class Admission:
    """Costs workloads on the placement of a resolved plan; of several replicas, on each, for any may draw a request.

    Args:
        resolved: the plan where it is bound; GPUs have what was free when it was bound, less `hardware.keep_free`.
        checkpoint: the plan's.
        other_shapes: whether sizes beyond the planned one are taken where they fit; else all of them are refused.
        overlaps: whether stages of several requests overlap where the plan says so.
    """

    def __init__(
        self, resolved: ResolvedPlan, checkpoint: Checkpoint, other_shapes: bool = True, overlaps: bool = False
    ) -> None:
        self.resolved, self._other_shapes, self._overlaps = resolved, other_shapes, overlaps
        self._each = [_Replica(one, checkpoint) for one in resolved.each()]

    def check(self, workload: Workload) -> None:
        """Take a workload, or refuse it.

        Raises:
            InfeasibleError: it does not fit: where, in which phase, by how many bytes, and the largest size of its
                proportions that does fit; or it is beyond the plan, and only the planned one is taken.
        """
        if self.planned(workload):
            return
        size, bounds = f"{workload.width}x{workload.height}", self.resolved.plan.spec.workload
        if not self._other_shapes or not self._costs(workload):
            raise InfeasibleError(
                f"{size} exceeds the {bounds.width}x{bounds.height} that this plan is for",
                where="size",
                hint=f"ask for {bounds.width}x{bounds.height} or less",
            )
        need = self.need(workload)
        if need.lacking_bytes > 0:
            fitting = self.largest(workload)
            hint = f"{fitting.width}x{fitting.height} fits" if fitting else "no size of these proportions fits"
            raise InfeasibleError(f"{size} needs {need}", where="size", hint=hint)

    def planned(self, workload: Workload) -> bool:
        """Whether a workload is within the planned one: it takes no more bytes anywhere. Steps take none."""
        plan = self.resolved.plan
        return plan.spec.workload.bounds.covers(workload, plan.pipeline.counts_guidance)

    def need(self, workload: Workload, different: bool = False) -> Need:
        """What a workload takes on the place that lacks most, or has least to spare.

        Args:
            different: its pictures are of different prompts and control images.

        Raises:
            InfeasibleError: it would have to be measured first.
        """
        planned = self.planned(workload)
        needs = [need for one in self._each for need in one.needs(workload, different, planned)]
        return max(needs, key=lambda need: need.lacking_bytes)

    def seconds(self, workload: Workload, different: bool = False) -> float | None:
        """Seconds of a workload on the slowest replica, estimated.

        None where a component is on the CPU or nothing is known of its needs.
        """
        if not self._costs(workload):
            return None
        return _longest(one.seconds(workload, different) for one in self._each)

    def between(self, workload: Workload) -> float | None:
        """Seconds from one request of a workload to the next on the slowest replica, estimated; None as `seconds`."""
        if not self._overlaps or not self.planned(workload):
            return self.seconds(workload)
        return _longest(one.between(workload) for one in self._each) if self._costs(workload) else None

    def batch(self, workload: Workload, most: int, forced: bool = False) -> int:
        """Pictures of one size and different content that are best drawn at once, at most `most`.

        Args:
            forced: take the largest batch that fits, where the estimate would say which one pays.
        """
        best, each = 1, self.between(workload)
        for batch in range(2, most + 1):
            together = workload.model_copy(update={"batch": batch})
            if not self._costs(together) or self.need(together, True).lacking_bytes > 0:
                break
            seconds = self.seconds(together, True)
            if forced:
                best = batch
            elif seconds is not None and each is not None and seconds / batch <= _PAYS * each:
                best, each = batch, seconds / batch
        return best

    def largest(self, workload: Workload) -> Workload | None:
        """The largest workload of the same proportions that fits; sides are multiples of the VAE's factor."""
        cells = max(workload.height, workload.width) // VAE_FACTOR
        low, high = 0, cells
        while high - low > 1:
            middle = (low + high) // 2
            smaller = _scaled(workload, middle, cells)
            low, high = (middle, high) if self.need(smaller).lacking_bytes <= 0 else (low, middle)
        return _scaled(workload, low, cells) if low else None

    def _costs(self, workload: Workload) -> bool:
        """Whether a workload beyond the planned one can be costed: a form that was not measured cannot."""
        try:
            for one in self._each:
                one.profile(workload, False)
        except InfeasibleError:
            return False
        return True


class _Replica:
    """Costs workloads on the placement of one replica."""

    def __init__(self, resolved: ResolvedPlan, checkpoint: Checkpoint) -> None:
        self._plan, self._machine, self._checkpoint = resolved.plan, resolved.machine, checkpoint
        plan, kept = resolved.plan, resolved.plan.spec.hardware.keep_free_bytes
        slots = {slot: _place_of(device) for slot, device in resolved.slot_devices.items()}
        self._gpus = {gpu.index: replace(gpu, free_bytes=gpu.free_bytes - kept) for gpu in resolved.machine.gpus}
        further = {name: "cpu" if unit.slot == "cpu" else slots[unit.slot] for name, unit in plan.units.items()}
        first = {name: _place_of(device) for name, device in resolved.device_map.items()}
        self._placement: dict[str, Place] = {**first, **further}
        self._pools = {slots.get(slot.index): slot.pool_bytes for slot in plan.slots}
        self.profile = lru_cache(512)(self._profiled)

    def needs(self, workload: Workload, different: bool, planned: bool) -> Iterator[Need]:
        """What a workload takes on each place; `planned` ones run in the graphs that the plan has room for."""
        profile = self.profile(workload, different)
        placement = self._places(profile)
        for place in dict.fromkeys(placement.values()):
            if place == "cpu":
                yield Need("cpu", None, host_bytes(profile, placement), self._machine.host_bytes)
                continue
            use = slot_use(profile, placement, place, self._gpus[place])
            # Graphs of the planned workload keep their pool beside those of another one.
            peak = use.peak_bytes + (0 if planned else self._pools.get(place, 0))
            yield Need(place, use.phase, peak, self._gpus[place].free_bytes)

    def seconds(self, workload: Workload, different: bool) -> float | None:
        """Seconds of a workload, estimated; None where a component is on the CPU."""
        profile = self.profile(workload, different)
        phases = phase_seconds(profile, self._places(profile), self._gpus)
        return None if phases is None else sum(phases.values())

    def between(self, workload: Workload) -> float | None:
        """Seconds from one request to the next, estimated; those of one where stages do not overlap."""
        profile, overlap = self.profile(workload, False), self._plan.overlap
        placement = self._places(profile)
        phases = phase_seconds(profile, placement, self._gpus)
        if phases is None or overlap is None:
            return None if phases is None else sum(phases.values())
        stages = stages_of(profile, placement, phases)
        return cycle_seconds(stages, overlap.in_flight, launch_seconds(profile))

    def _places(self, profile: PipelineProfile) -> dict[str, Place]:
        """Where units are; an image of few rows has none for some."""
        return {name: place for name, place in self._placement.items() if name in profile.parts}

    def _profiled(self, workload: Workload, different: bool) -> PipelineProfile:
        plan = self._plan
        formats = {name: part.format for name, part in plan.components.items()}
        split = SPLITS[plan.split]
        if split.halves:  # the first units draw a call without guidance, with as many rows as they take of one with it
            workload = workload.model_copy(update={"guided": True})
        profile = profile_pipeline(self._checkpoint, workload, formats, _refuse_to_measure)
        if different:
            profile = _different(profile, workload.batch)
        if split.halves and not split.rows:
            profile = split_guidance(profile, self._checkpoint, workload, formats, _refuse_to_measure)
        if split.rows:
            dealt = RowSplit(profile, self._checkpoint, workload, formats, _refuse_to_measure)
            profile = dealt.again(plan.rows, _vae_is_dealt(plan), split.teams)
        if plan.layers:
            profile = LayerSplit(profile, self._checkpoint, workload, formats).dealt(plan.layers)
        knobs = [knob for knob in plan.knobs if not (different and KNOBS[knob].of_copies)]
        profile = replace(profile, band_count=plan.vae_band_count or 1)
        profile = executed(under(profile, knobs), plan.runtime)
        return in_graphs(profile, planned_calls(plan.graphed_calls, profile))


def _longest(each: Iterable[float | None]) -> float | None:
    """The largest; None where one is not known."""
    known = list(each)
    return None if None in known else max(seconds for seconds in known if seconds is not None)


def _vae_is_dealt(plan: Plan) -> bool:
    return any(unit.component == plan.pipeline.of("vae") for unit in plan.units.values())


def _place_of(device: str) -> Place:
    return "cpu" if device == "cpu" else int(device.partition(":")[2])


def _scaled(workload: Workload, part: int, whole: int) -> Workload:
    """The workload with both sides times part / whole, in whole latent cells."""
    height, width = (side * part // whole // VAE_FACTOR * VAE_FACTOR for side in (workload.height, workload.width))
    return workload.model_copy(update={"height": max(VAE_FACTOR, height), "width": max(VAE_FACTOR, width)})


def _different(profile: PipelineProfile, prompts: int) -> PipelineProfile:
    """The text encoder takes a prompt for each picture, where several pictures of one request share theirs.

    So does the VAE take an image for each, where the pipeline makes no copies of one.
    """
    pipeline, name = profile.pipeline, profile.pipeline.of("text_encoder")
    components = {**profile.components, name: _repeated(profile.components[name], "encode", prompts)}
    under = profile.vae_under
    if pipeline.image and not pipeline.image.each_row:
        vae = pipeline.of("vae")
        components[vae] = _repeated(components[vae], "prepare", prompts)
        under = {mode: _repeated(one, "prepare", prompts) for mode, one in under.items()}
    return replace(profile, components=components, vae_under=under)


def _repeated(part: ComponentProfile, phase: Phase, times: int) -> ComponentProfile:
    """The component with so much more to do in a phase."""
    one = part.work[phase]
    work = replace(
        one, flops=one.flops * times, product_bytes=one.product_bytes * times, other_bytes=one.other_bytes * times
    )
    activations = {**part.activations, phase: part.activations[phase] * times}
    return replace(part, work={**part.work, phase: work}, activations=activations)


def _refuse_to_measure(*_: object) -> NoReturn:
    raise InfeasibleError("this checkpoint was not measured in this form", where="size")
