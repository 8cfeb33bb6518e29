"""Candidates in arrays: some placements under a set of knobs, what they cost, and why they are rejected.

Rows are placements, columns units. A GPU's fill depends on the set of units on it alone, a bit mask, so that each set
is costed once per GPU and set of knobs. Units that are always together share a bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..declare.hardware import Objective
from ..declare.knobs import KNOBS, Knob, ordered
from ..declare.pipelines import Phase
from ..facts.machine import Gpu, is_native
from .candidates import Feasible, Rows, moved_bytes, request_seconds
from .cost import Placement, SlotUse, bytes_per_request, slot_use
from .knobs import of_placement, parted
from .placements import CPU, Places
from .profile import PipelineProfile
from .seconds import phase_seconds
from .setting import NOTHING, Floats, Integers, Setting, Tried, groups_of

Reason = Literal["split", "dtype", "host memory", "memory"]
REASONS: tuple[Reason, ...] = ("memory", "host memory", "dtype", "split")
FITS = -1


@dataclass(frozen=True)
class Candidate:
    """A placement under a set of knobs, and what it costs; `seconds` per phase, None where a CPU takes part.

    `bands` are those that the VAE takes an image in.
    """

    placement: Placement
    knobs: tuple[Knob, ...]
    uses: Mapping[int, SlotUse]
    worst_utilisation: float
    bytes_per_request: int
    seconds: Mapping[Phase, float] | None
    bands: int = 1


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
class Block:
    """Some placements of a search, and what does not depend on knobs.

    Attributes:
        places: (placements, units).
        columns: of the first unit of each group.
        sets: for each group of units, its GPU x sets + the set of groups there, as `Setting.lacking` is indexed.
        on_host: the set of units on the host.
        emulated: the first unit whose dtype its GPU only emulates, where that is not allowed; -1 where none is.
        parted: the knobs of placements, and whether the placement turns each on.
    """

    places: Places
    columns: Sequence[int]
    sets: Sequence[NDArray[np.intp]]
    on_host: NDArray[np.intp]
    emulated: Places
    parted: Mapping[Knob, NDArray[np.bool_]]


@dataclass
class CostSheet:
    """A block under one set of knobs: how full the fullest GPU is, the shortfall of the tightest and of the host in
    bytes; `code` FITS or in REASONS."""

    setting: Setting
    block: Block
    worst: Floats
    short: Integers
    host_short: Integers
    code: NDArray[np.int8]

    def lacking(self, reason: Reason) -> Integers:
        """Bytes that are missing where `reason` rules placements out."""
        return self.host_short if reason == "host memory" else self.short

    def tightest(self, rows: NDArray[np.intp]) -> Integers:
        """The position of the GPU that lacks most, for each of `rows`."""
        found = np.full(len(rows), len(self.setting.gpus), np.int64)
        for column, sets in zip(self.block.columns, self.block.sets, strict=True):
            here = self.setting.lacking[sets[rows]] == self.short[rows]
            found[here] = np.minimum(found, self.block.places[rows, column])[here]
        return found

    def fits(self, rows: NDArray[np.intp]) -> Feasible:
        """What the candidates in `rows`, which fit, are compared by."""
        places, profile = self.block.places[rows], self.setting.profile
        return Feasible(
            places,
            self.worst[rows],
            {knob: apart[rows] for knob, apart in self.block.parted.items()},
            moved_bytes(profile, places),
            request_seconds(self.setting, places),
        )


class PlacementGrid:
    """What one search works out placements with: the profile under each set of knobs, GPUs and rules."""

    def __init__(self, profile: PipelineProfile, gpus: Sequence[Gpu], rules: Rules, settings: Sequence[Tried]) -> None:
        self.profile, self.gpus, self.rules = profile, gpus, rules
        self.units = [unit.name for unit in profile.units]
        self._columns = [self.units.index(names[0]) for names in groups_of(profile)]
        self.by_index = {gpu.index: gpu for gpu in gpus}
        self.settings = [Setting.of(number, tried, gpus) for number, tried in enumerate(settings)]
        self._emulated = [
            np.array([not is_native(profile.parts[name].format.dtype, gpu) for gpu in gpus] + [False])
            for name in self.units
        ]

    def block(self, places: Places) -> Block:
        """Work out what does not depend on knobs; `places` is (placements, units)."""
        columns = [places[:, i].astype(np.intp) for i in range(len(self.units))]
        at = dict(zip(self.units, columns, strict=True))
        groups, sets = [columns[i] for i in self._columns], []
        for column in groups:
            mask = sum((other == column).astype(np.intp) << bit for bit, other in enumerate(groups))
            sets.append(np.where(column == CPU, len(self.gpus), column) * (1 << len(groups)) + mask)
        on_host = sum((column == CPU).astype(np.intp) << bit for bit, column in enumerate(groups))
        emulated = np.full(len(places), -1, np.int16)
        if not self.rules.allow_emulated:
            for i in reversed(range(len(columns))):
                emulated[self._emulated[i][columns[i]]] = i
        pairs = parted(self.profile.pipeline, self.units)
        apart = {knob: np.logical_or.reduce([at[a] != at[b] for a, b in found]) for knob, found in pairs.items()}
        return Block(places, self._columns, sets, np.asarray(on_host), emulated, apart)

    def cost(self, block: Block, setting: Setting) -> CostSheet:
        """Cost every placement of `block` under `setting`."""
        worst, short = np.zeros(len(block.places)), np.full(len(block.places), NOTHING)
        for sets in block.sets:
            np.maximum(worst, setting.filled[sets], out=worst)
            np.maximum(short, setting.lacking[sets], out=short)
        host_short = self._host_short(block, setting)
        code = np.full(len(block.places), FITS, np.int8)
        if not self.rules.force:
            code[host_short > 0] = REASONS.index("host memory")
            code[short > 0] = REASONS.index("memory")
        code[block.emulated >= 0] = REASONS.index("dtype")
        for knob, apart in block.parted.items():
            if knob not in self.rules.allow:
                code[apart] = REASONS.index("split")
        return CostSheet(setting, block, worst, short, host_short, code)

    def _host_short(self, block: Block, setting: Setting) -> Integers:
        """Bytes that the host lacks: `cost.host_bytes`, in arrays."""
        if self.rules.host_bytes is None:
            return np.full(len(block.places), NOTHING)
        held: Integers = setting.on_host[block.on_host]
        for column, name in enumerate(self.units):
            part = setting.profile.parts[name]
            if not part.resident:
                held += (block.places[:, column] != CPU) * part.weights_bytes
        held -= self.rules.host_bytes
        return held

    def rows(self, fits: Mapping[int, Feasible]) -> Rows:
        """Put candidates by the number of their setting into one table, in this order."""
        joined = Feasible.joined(list(fits.values()))
        setting = np.repeat(list(fits), [len(part) for part in fits.values()])
        speeds = sorted({gpu.speed for gpu in self.gpus}, reverse=True)
        ranks = np.array([*(speeds.index(gpu.speed) for gpu in self.gpus), 0])
        on = {knob: np.array([knob in one.knobs for one in self.settings])[setting] for knob in KNOBS}
        return Rows(
            places=joined.places,
            setting=setting,
            worst=joined.worst,
            moved=joined.moved,
            seconds=joined.seconds,
            knobs={**on, **joined.parted},
            bands=np.array([one.profile.vae_mode.bands for one in self.settings], np.int64)[setting],
            home_rank=ranks[joined.places[:, self.units.index(self.profile.pipeline.denoiser)]],
            free=np.array([gpu.free_bytes for gpu in self.gpus], np.int64),
        )

    def placement(self, places: Places) -> Placement:
        """Name one row: unit -> GPU index or cpu."""
        return {
            name: "cpu" if place == CPU else self.gpus[place].index
            for name, place in zip(self.units, places.tolist(), strict=True)
        }

    def candidate(self, places: Places, setting: Setting) -> Candidate:
        """Work out one candidate in full."""
        placement, profile, knobs = self.placement(places), setting.profile, setting.knobs
        used = sorted({place for place in placement.values() if place != "cpu"})
        uses = {i: slot_use(profile, placement, i, self.by_index[i]) for i in used}
        worst = max((use.peak_bytes / max(self.by_index[i].free_bytes, 1) for i, use in uses.items()), default=0.0)
        on = ordered((*knobs, *of_placement(self.profile.pipeline, placement)))
        moved = bytes_per_request(profile, placement)
        seconds = phase_seconds(profile, placement, self.by_index)
        return Candidate(placement, on, uses, worst, moved, seconds, profile.vae_mode.bands)
