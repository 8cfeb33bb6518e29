"""Candidates that fit in arrays, one entry per row: what they are compared by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..declare.knobs import KNOBS, Knob
from ..declare.pipelines import Crossing, Phase
from .placements import Places
from .profile import ComponentProfile, PipelineProfile
from .seconds import phase_steps, seconds_by_phase
from .setting import Floats, Integers, Setting


@dataclass
class Feasible:
    """Candidates that fit under one set of knobs, one entry per row; `parted` says which knobs placements turn on."""

    places: Places
    worst: Floats
    parted: Mapping[Knob, NDArray[np.bool_]]
    moved: Integers
    seconds: Floats

    def __len__(self) -> int:
        return len(self.places)

    def take(self, rows: Any) -> Feasible:
        """Keep some rows."""
        parted = {knob: apart[rows] for knob, apart in self.parted.items()}
        return Feasible(self.places[rows], self.worst[rows], parted, self.moved[rows], self.seconds[rows])

    @classmethod
    def joined(cls, parts: Sequence[Feasible]) -> Feasible:
        """Put `parts`, of which there is at least one, one after the other."""
        return cls(
            np.concatenate([part.places for part in parts]),
            np.concatenate([part.worst for part in parts]),
            {knob: np.concatenate([part.parted[knob] for part in parts]) for knob in parts[0].parted},
            np.concatenate([part.moved for part in parts]),
            np.concatenate([part.seconds for part in parts]),
        )


@dataclass
class Rows:
    """Candidates in arrays, one entry per row: what a key is made of. `free` is bytes per GPU position.

    `bands` are those that the VAE takes an image in.

    `seconds` are whole microseconds, so that equal placements tie whatever their order of summation.
    """

    places: Places
    setting: Integers
    worst: Floats
    moved: Integers
    seconds: Floats
    knobs: Mapping[Knob, NDArray[np.bool_]]
    bands: Integers
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


def _places_of(profile: PipelineProfile, places: Places) -> dict[str, Any]:
    """The position of each unit's GPU for every placement; a single number for one that is there in all of them."""
    return {
        unit.name: int(places[0, i]) if unit.name in profile.fixed and len(places) else places[:, i].astype(np.intp)
        for i, unit in enumerate(profile.units)
    }


def moved_bytes(profile: PipelineProfile, places: Places) -> Integers:
    """Bytes of a request that cross between devices: `cost.bytes_per_request`, in arrays."""
    at = _places_of(profile, places)
    total = np.zeros(len(places), np.int64)
    for crossing in profile.crossings:
        total += (at[crossing.src] != at[crossing.dst]) * (crossing.bytes_each * crossing.times(profile.steps))
    return total


def request_seconds(setting: Setting, places: Places) -> Floats:
    """Seconds of a request for every placement: `cost.phase_seconds`, in arrays; the CPU's are not known."""
    at = _places_of(setting.profile, places)

    def work(name: str, part: ComponentProfile) -> Mapping[Phase, Floats]:
        return {phase: table[at[name]] for phase, table in setting.work[name].items()}

    def crossing(one: Crossing) -> Any:
        return setting.crossing(one, at[one.src], at[one.dst])

    total = np.zeros(len(places))
    steps = phase_steps(setting.profile, work, crossing, at)
    for seconds in seconds_by_phase(setting.profile, steps, partial(np.maximum.reduce, axis=0)).values():
        total += seconds
    return total.round(6)
