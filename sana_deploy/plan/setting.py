"""What sets of units need under one set of knobs: bytes and seconds on each GPU, in tables."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..declare.knobs import Knob
from ..declare.pipelines import Crossing, Phase
from ..facts.allocator import workspace_bytes
from ..facts.machine import Gpu
from .cost import overhead, slot_use
from .knobs import under
from .profile import PipelineProfile
from .records import Place
from .seconds import component_phases, crossing_seconds

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
NOTHING = np.iinfo(np.int64).min
"""The shortfall of what is not used."""


@dataclass(frozen=True)
class Tried:
    """A set of knobs to try, and the profile to turn them on in, which says into how many parts they cut."""

    knobs: tuple[Knob, ...]
    profile: PipelineProfile


@dataclass(frozen=True)
class Setting:
    """One set of knobs: its position among those of a search, the profile under it, and what sets of units need.

    Attributes:
        needs: bytes on a GPU for each set of groups of units, without what the GPU itself takes.
        filled: share of a GPU's free memory, and `lacking` the bytes missing, for GPU x sets + set; the last rows are
            the host's, which is never full here.
    """

    number: int
    knobs: tuple[Knob, ...]
    profile: PipelineProfile
    gpus: Sequence[Gpu]
    needs: Integers
    filled: Floats
    lacking: Integers

    @classmethod
    def of(cls, number: int, tried: Tried, gpus: Sequence[Gpu]) -> Setting:
        """Cost every set of groups of units on every GPU."""
        changed = under(tried.profile, tried.knobs)
        needs = _needs(changed, 0)
        filled, lacking = np.zeros((len(gpus) + 1, len(needs))), np.full((len(gpus) + 1, len(needs)), NOTHING)
        for i, gpu in enumerate(gpus):
            peaks = needs + workspace_bytes(gpu.capability) + overhead(gpu)
            filled[i], lacking[i] = peaks / max(gpu.free_bytes, 1), peaks - gpu.free_bytes
        return cls(number, tried.knobs, changed, gpus, needs, filled.ravel(), lacking.ravel())

    @cached_property
    def on_host(self) -> Integers:
        """Bytes of the host for each set of groups of units that runs there."""
        return _needs(self.profile, "cpu")

    @cached_property
    def work(self) -> Mapping[str, Mapping[Phase, Floats]]:
        """Seconds of each unit by phase on every GPU, and 0 on the host, which is not known."""
        rates = [gpu.rates for gpu in self.gpus]
        found = {}
        for name, part in self.profile.parts.items():
            each = [component_phases(part, self.profile.steps, rate) for rate in rates]
            phases = each[0] if each else {}
            found[name] = {phase: np.array([*(one[phase] for one in each), 0.0]) for phase in phases}
        return found

    def crossing(self, crossing: Crossing, src: Any, dst: Any) -> Any:
        """Seconds of a crossing in a request between positions, one each or many; those of the host are not known."""
        if isinstance(src, int) and isinstance(dst, int):
            return self._between(crossing, src, dst) if src != dst else 0.0
        if crossing not in self._tables:
            pairs = np.zeros((len(self.gpus) + 1, len(self.gpus) + 1))
            for a, b in itertools.permutations(range(len(self.gpus)), 2):
                pairs[a, b] = self._between(crossing, a, b)
            self._tables[crossing] = pairs
        return self._tables[crossing][src, dst]

    def _between(self, crossing: Crossing, src: int, dst: int) -> float:
        times = crossing.times(self.profile.steps)
        return times * crossing_seconds(crossing, self.gpus[src].rates, self.gpus[dst].rates)

    @cached_property
    def _tables(self) -> dict[Crossing, Floats]:
        """Seconds of crossings between every two GPUs, as they are asked for."""
        return {}


def groups_of(profile: PipelineProfile) -> list[tuple[str, ...]]:
    """Units that are on one GPU in all placements, together; every other one by itself."""
    found: dict[str | int, tuple[str, ...]] = {}
    for unit in profile.units:
        key = profile.fixed.get(unit.name, unit.name)
        found[key] = (*found.get(key, ()), unit.name)
    return list(found.values())


def _needs(profile: PipelineProfile, place: Place) -> Integers:
    """Bytes of weights and activations at the fullest moment of a place, for each set of groups that may be there."""
    groups = groups_of(profile)
    fixed = [i for i, names in enumerate(groups) if names[0] in profile.fixed]
    found = np.zeros(1 << len(groups), np.int64)
    for mask in range(len(found)):
        here = [names for i, names in enumerate(groups) if mask >> i & 1]
        if sum(mask >> i & 1 for i in fixed) <= 1:  # each group that is fixed has a GPU of its own
            found[mask] = slot_use(profile, {name: place for names in here for name in names}, place).peak_bytes
    return found
