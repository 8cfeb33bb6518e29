"""Candidates in arrays: every placement under a set of knobs, what it costs, and why it is rejected.

Rows are placements, columns GPUs. A GPU's fill depends on the set of components on it alone, a bit mask, so that each
set is costed once per set of knobs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .._units import human_bytes
from ..declare.knobs import KNOBS, Knob, ordered
from ..declare.pipelines import COMPONENTS, Component, Phase
from ..declare.spec import Objective
from ..facts.allocator import workspace_bytes
from ..facts.machine import Gpu, is_native
from .cost import (
    Placement,
    SlotUse,
    bytes_per_request,
    component_seconds,
    crossing_seconds,
    host_bytes,
    overhead,
    phase_seconds,
    slot_use,
)
from .knobs import of_placement, parted, under
from .profile import PipelineProfile
from .records import Place

Reason = Literal["split", "dtype", "host memory", "memory"]
Integers = NDArray[np.int64]
REASONS: tuple[Reason, ...] = ("memory", "host memory", "dtype", "split")
FITS = -1
_NOTHING = np.iinfo(np.int64).min
CPU = -1
"""In arrays, the position of the host among the GPUs."""


@dataclass(frozen=True)
class Rejection:
    """Why candidates cannot be: the closest of `count` that one reason ruled out on one GPU; the shortfall in bytes."""

    reason: Reason
    gpu: int
    message: str
    shortfall_bytes: int = 0
    count: int = 1


@dataclass(frozen=True)
class Candidate:
    """A placement under a set of knobs, and what it costs; `seconds` per phase, None where a CPU takes part."""

    placement: Placement
    knobs: tuple[Knob, ...]
    uses: Mapping[int, SlotUse]
    worst_utilisation: float
    bytes_per_request: int
    seconds: Mapping[Phase, float] | None


@dataclass(frozen=True)
class Rules:
    """What the search must respect, and what it is for.

    `force` takes a placement that is short of memory; `allow_emulated` one with a dtype that a GPU only emulates.
    `host_bytes` is the host's memory, None where it is not known.
    """

    allow: Iterable[Knob] = field(default_factory=lambda: tuple(KNOBS))
    objective: Objective = "balance"
    allow_emulated: bool = False
    force: bool = False
    host_bytes: int | None = None


@dataclass
class Rows:
    """Candidates in arrays, one entry per row: what a key is made of. `free` is bytes per GPU position.

    `seconds` are whole microseconds, so that equal placements tie whatever their order of summation.
    """

    places: Integers
    setting: Integers
    worst: NDArray[np.float64]
    moved: Integers
    seconds: NDArray[np.float64]
    knobs: Mapping[Knob, NDArray[np.bool_]]
    home_rank: Integers
    free: Integers

    def count_knobs(self) -> Integers:
        """Knobs that are on, per row."""
        total: Integers = np.stack([self.knobs[knob] for knob in KNOBS], 1).sum(1, dtype=np.int64)
        return total

    def count_further_places(self) -> Integers:
        """Places in use beyond the first, per row."""
        by_place = np.sort(self.places, axis=1)
        total: Integers = (np.diff(by_place, axis=1) != 0).sum(1, dtype=np.int64)
        return total


@dataclass
class CostSheet:
    """All placements under one set of knobs: bytes moved, peak and shortfall at the tightest GPU, shortfall of the
    host; `code` FITS or in REASONS."""

    knobs: tuple[Knob, ...]
    profile: PipelineProfile
    moved: Integers
    worst: NDArray[np.float64]
    short: Integers
    host_short: Integers
    tightest: Integers
    code: NDArray[np.int8]

    def lacking(self, reason: Reason) -> Integers:
        """Bytes that are missing where `reason` rules placements out."""
        return self.host_short if reason == "host memory" else self.short


class PlacementGrid:
    """The placements of one search, and what does not depend on knobs: sets per GPU, illegal dtypes."""

    def __init__(self, profile: PipelineProfile, gpus: Sequence[Gpu], rules: Rules, options: Integers) -> None:
        self.profile, self.gpus, self.rules, self.options = profile, gpus, rules, options
        self.by_index = {gpu.index: gpu for gpu in gpus}
        self.free = np.array([gpu.free_bytes for gpu in gpus], np.int64)
        bits = 1 << np.arange(len(COMPONENTS))
        self.masks = [(options == i) @ bits for i in range(len(gpus))]
        self.host_mask = (options == CPU) @ bits
        column = {name: options[:, i] for i, name in enumerate(COMPONENTS)}
        self.home = column[profile.pipeline.denoiser]
        self.parted = {knob: column[one] != column[other] for knob, (one, other) in parted(profile.pipeline).items()}
        self.column = column
        emulated = [
            [not is_native(profile.components[name].format.dtype, gpu) for gpu in gpus] + [False] for name in COMPONENTS
        ]
        hit = np.stack([np.array(emulated[i])[options[:, i]] for i in range(len(COMPONENTS))], 1)
        self.emulated = np.where(hit.any(1) & (not rules.allow_emulated), hit.argmax(1), -1)

    def cost(self, knobs: tuple[Knob, ...]) -> CostSheet:
        """Cost every placement with `knobs` on."""
        profile = under(self.profile, knobs)
        needs = np.array([_need(profile, mask) for mask in range(1 << len(COMPONENTS))], np.int64)
        worst, short = np.zeros(len(self.options)), np.full(len(self.options), _NOTHING)
        tightest = np.zeros(len(self.options), np.int64)
        for i, gpu in enumerate(self.gpus):
            peaks = needs + workspace_bytes(gpu.capability) + overhead(gpu)
            lacking = peaks - gpu.free_bytes
            peaks[0], lacking[0] = 0, _NOTHING  # an unused GPU holds nothing and is short of nothing
            worst = np.maximum(worst, (peaks / max(gpu.free_bytes, 1))[self.masks[i]])
            here = lacking[self.masks[i]]
            tightest[here > short] = i
            short = np.maximum(short, here)
        host_short = self._host_short(profile, needs)
        code = np.full(len(self.options), FITS, np.int8)
        if not self.rules.force:
            code[host_short > 0] = REASONS.index("host memory")
            code[short > 0] = REASONS.index("memory")
        code[self.emulated >= 0] = REASONS.index("dtype")
        for knob, apart in self.parted.items():
            if knob not in self.rules.allow:
                code[apart] = REASONS.index("split")
        return CostSheet(knobs, profile, self._moved(profile), worst, short, host_short, tightest, code)

    def _host_short(self, profile: PipelineProfile, needs: Integers) -> Integers:
        """Bytes that the host lacks: `cost.host_bytes`, in arrays."""
        if self.rules.host_bytes is None:
            return np.full(len(self.options), _NOTHING)
        held: Integers = needs[self.host_mask]
        for name, part in profile.components.items():
            if not part.resident:
                held += (self.column[name] != CPU) * part.weights_bytes
        held -= self.rules.host_bytes
        return held

    def _moved(self, profile: PipelineProfile) -> Integers:
        """Bytes of a request that cross between devices: `cost.bytes_per_request`, in arrays."""
        total = np.zeros(len(self.options), np.int64)
        for crossing in profile.crossings:
            apart = self.column[crossing.src] != self.column[crossing.dst]
            total += apart * crossing.bytes_each * crossing.times(profile.steps)
        return total

    def rows(self, sheets: Sequence[CostSheet], fits: Sequence[Integers]) -> Rows:
        """Gather the candidates that fit."""
        taken = np.concatenate(fits)
        setting = np.repeat(np.arange(len(sheets)), [len(rows) for rows in fits])
        seconds = [self._seconds(sheet.profile)[rows] for sheet, rows in zip(sheets, fits, strict=True)]
        speeds = sorted({gpu.speed for gpu in self.gpus}, reverse=True)
        ranks = np.array([*(speeds.index(gpu.speed) for gpu in self.gpus), 0])
        on = {knob: np.array([knob in sheet.knobs for sheet in sheets])[setting] for knob in KNOBS}
        return Rows(
            places=self.options[taken],
            setting=setting,
            worst=np.concatenate([sheet.worst[rows] for sheet, rows in zip(sheets, fits, strict=True)]),
            moved=np.concatenate([sheet.moved[rows] for sheet, rows in zip(sheets, fits, strict=True)]),
            seconds=np.concatenate(seconds).round(6),
            knobs={**on, **{knob: apart[taken] for knob, apart in self.parted.items()}},
            home_rank=ranks[self.home[taken]],
            free=self.free,
        )

    def _seconds(self, profile: PipelineProfile) -> NDArray[np.float64]:
        """Seconds of a request for every placement: `cost.phase_seconds`, in arrays; the CPU's are not known."""
        rates = [gpu.rates for gpu in self.gpus]
        total = np.zeros(len(self.options))
        for name, part in profile.components.items():
            alone = [component_seconds(part, profile.steps, rate) for rate in rates]
            total += np.array([*alone, 0.0])[self.column[name]]
        for crossing in profile.crossings:
            times = crossing.times(profile.steps)
            pairs = np.zeros((len(rates) + 1, len(rates) + 1))
            for a, b in itertools.permutations(range(len(rates)), 2):
                pairs[a, b] = times * crossing_seconds(crossing, rates[a], rates[b])
            total += pairs[self.column[crossing.src], self.column[crossing.dst]]
        return total

    def placement(self, places: Integers) -> Placement:
        """Name one row: component -> GPU index or cpu."""
        return {
            name: "cpu" if place == CPU else self.gpus[place].index
            for name, place in zip(COMPONENTS, places.tolist(), strict=True)
        }

    def candidate(self, places: Integers, knobs: tuple[Knob, ...]) -> Candidate:
        """Work out one candidate in full."""
        placement, profile = self.placement(places), under(self.profile, knobs)
        used = sorted({place for place in placement.values() if place != "cpu"})
        uses = {i: slot_use(profile, placement, i, self.by_index[i]) for i in used}
        worst = max((use.peak_bytes / max(self.by_index[i].free_bytes, 1) for i, use in uses.items()), default=0.0)
        on = ordered((*knobs, *of_placement(self.profile.pipeline, placement)))
        moved = bytes_per_request(profile, placement)
        return Candidate(placement, on, uses, worst, moved, phase_seconds(profile, placement, self.by_index))

    def closest(self, sheets: Sequence[CostSheet]) -> Candidate | None:
        """The candidate that memory ruled out by the least; where none is short, one that another reason did."""
        misses = [
            (max(REASONS.index(reason), 1), int(sheet.lacking(reason)[row]), row, sheet)
            for sheet in sheets
            for reason in REASONS
            if (row := _least(sheet, reason)) is not None
        ]
        if not misses:
            return None
        *_, row, sheet = min(misses, key=lambda miss: miss[:2])
        return self.candidate(self.options[row], sheet.knobs)

    def rejections(self, sheets: Sequence[CostSheet]) -> list[Rejection]:
        """Count the rejected candidates by reason and GPU, most frequent first, each with its closest miss."""
        groups: dict[tuple[str, int], tuple[int, Rejection]] = {}
        for sheet in sheets:
            at: dict[Reason, Integers] = {
                "memory": sheet.tightest,
                "host memory": np.full(len(self.options), -1),
                "dtype": self._emulated_at(),
                "split": np.full(len(self.options), -1),
            }
            for reason, places in at.items():
                ruled_out = np.flatnonzero(sheet.code == REASONS.index(reason))
                for place in np.unique(places[ruled_out]).tolist():
                    rows = ruled_out[places[ruled_out] == place]
                    nearest = rows[sheet.lacking(reason)[rows].argmin()]
                    mine = self._rejection(reason, place, nearest, sheet)
                    count, best = groups.get((reason, place), (0, mine))
                    best = min(best, mine, key=lambda rejection: rejection.shortfall_bytes)
                    groups[reason, place] = (count + len(rows), best)
        by_count = sorted(groups.items(), key=lambda item: (-item[1][0], item[0]))
        return [replace(rejection, count=count) for _, (count, rejection) in by_count]

    def _emulated_at(self) -> Integers:
        rows = np.arange(len(self.options))
        return np.where(self.emulated >= 0, self.options[rows, self.emulated], -1)

    def _rejection(self, reason: Reason, place: int, row: int, sheet: CostSheet) -> Rejection:
        if reason == "split":
            return Rejection(reason, -1, "ControlNet may not be split from the transformer (hardware.allow)")
        if reason == "host memory":
            need, host = host_bytes(sheet.profile, self.placement(self.options[row])), self.rules.host_bytes or 0
            message = f"the host needs {human_bytes(need)} for what is on the CPU, it has {human_bytes(host)}"
            return Rejection(reason, -1, message, need - host)
        gpu = self.gpus[place]
        if reason == "dtype":
            name = COMPONENTS[self.emulated[row]]
            capability = ".".join(map(str, gpu.capability))
            dtype = self.profile.components[name].format.dtype
            message = f"{dtype} ({name}) is not native on GPU {gpu.index}, {gpu.name} (compute capability {capability})"
            return Rejection(reason, gpu.index, message)
        placement = self.placement(self.options[row])
        use = slot_use(sheet.profile, placement, gpu.index, gpu)
        names = ", ".join(name for name, where in placement.items() if where == gpu.index)
        message = (
            f"GPU {gpu.index} needs {human_bytes(use.peak_bytes)} in {use.phase} for {names}, "
            f"{human_bytes(gpu.free_bytes)} of {human_bytes(gpu.total_bytes)} are free"
        )
        return Rejection(reason, gpu.index, message, int(sheet.short[row]))


def _least(sheet: CostSheet, reason: Reason) -> int | None:
    rows = np.flatnonzero(sheet.code == REASONS.index(reason))
    return int(rows[sheet.lacking(reason)[rows].argmin()]) if len(rows) else None


def _need(profile: PipelineProfile, mask: int) -> int:
    """Blocks of weights and activations at the fullest moment of a GPU with the components of `mask`, in bytes."""
    placed: dict[Component, Place] = {name: 0 for i, name in enumerate(COMPONENTS) if mask >> i & 1}
    return slot_use(profile, placed, 0).peak_bytes
