"""The search: enumerate placements, reject with the reason, score, choose. Keeps every rejection."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from .cost import Placement, SlotUse, bytes_per_request, home_of, is_split, slot_use
from .machine import Gpu
from .precision import is_native
from .profile import PipelineProfile
from .spec import COMPONENTS, Component
from .units import human_bytes

Key = tuple[float | int, ...]
"""A score, smaller is better, compared element by element."""
Score = Callable[[Placement, float, int, Gpu | None], Key]
"""(placement, worst utilisation, bytes moved, the home GPU) -> key."""


@dataclass(frozen=True)
class Rejection:
    """Why one placement cannot be: `reason` is memory, dtype or split; memory carries the shortfall in bytes."""

    reason: str
    gpu: int
    message: str
    shortfall_bytes: int = 0


@dataclass(frozen=True)
class Candidate:
    """A placement that fits, with what it costs."""

    placement: Placement
    uses: dict[int, SlotUse]
    worst_utilisation: float
    bytes_per_request: int
    key: Key


@dataclass
class Search:
    """The outcome of a search: feasible candidates best first, and every rejected placement with its reason."""

    feasible: list[Candidate] = field(default_factory=list)
    rejected: list[tuple[Placement, Rejection]] = field(default_factory=list)

    @property
    def best(self) -> Candidate | None:
        """The chosen candidate, or None when nothing fits."""
        return self.feasible[0] if self.feasible else None

    @property
    def considered(self) -> int:
        """How many placements were looked at."""
        return len(self.feasible) + len(self.rejected)

    def closest(self) -> Rejection | None:
        """The rejection that misses by least memory, or any other one when no memory was short."""
        memory = [rejection for _, rejection in self.rejected if rejection.reason == "memory"]
        if memory:
            return min(memory, key=lambda rejection: rejection.shortfall_bytes)
        return self.rejected[0][1] if self.rejected else None


@dataclass(frozen=True)
class Rules:
    """What the search must respect beyond memory."""

    allow_split: bool = True
    allow_emulated: bool = False


def search_balanced(
    profile: PipelineProfile, gpus: Sequence[Gpu], rules: Rules, pins: Mapping[Component, int] | None = None
) -> Search:
    """Search all placements of whole components over `gpus`, GPUs that are alike counted once; `pins` are kept to.

    Order: ControlNet beside the transformer, then the lowest worst peak/capacity, then fewest bytes moved, then the
    denoiser on the faster GPU. Ties go to lower indices, so that the result is deterministic.
    """
    return _search(placements(gpus, pins or {}), profile, gpus, rules, _balanced_score)


def search_single(profile: PipelineProfile, gpus: Sequence[Gpu], rules: Rules, gpu: int | None) -> Search:
    """Search the placements that put everything on one GPU: the fastest that fits, then the emptiest."""
    chosen = [g.index for g in gpus] if gpu is None else [gpu]
    options: list[Placement] = [dict.fromkeys(COMPONENTS, index) for index in chosen]
    return _search(options, profile, gpus, rules, _single_score)


def search_custom(profile: PipelineProfile, gpus: Sequence[Gpu], rules: Rules, placement: Placement) -> Search:
    """Check the one placement the user wrote."""
    return _search([placement], profile, gpus, rules, _balanced_score)


def placements(gpus: Sequence[Gpu], pins: Mapping[Component, int]) -> Iterator[Placement]:
    """Yield every assignment that keeps to `pins`, without those that only rename GPUs that are alike."""
    pinned = set(pins.values())
    kinds = {gpu.index: replace(gpu, index=gpu.index if gpu.index in pinned else -1, uuid="") for gpu in gpus}
    indices = [gpu.index for gpu in gpus]
    for places in itertools.product(*([pins[name]] if name in pins else indices for name in COMPONENTS)):
        if _is_canonical(places, indices, kinds):
            yield dict(zip(COMPONENTS, places, strict=True))


def _is_canonical(places: Sequence[int], indices: Sequence[int], kinds: Mapping[int, Gpu]) -> bool:
    """Whether alike GPUs are taken in index order: the first use of one comes after that of the one before."""
    if len(set(kinds.values())) == len(kinds):
        return True
    seen: set[int] = set()
    for place in places:
        if place not in seen:
            alike = [i for i in indices if kinds[i] == kinds[place] and i not in seen]
            if alike[0] != place:
                return False
            seen.add(place)
    return True


class Checker:
    """Says of a placement what rules it out, and what every used GPU would hold.

    A GPU's fill depends on the set of components on it alone, so that each set is worked out once per GPU.
    """

    def __init__(self, profile: PipelineProfile, gpus: Sequence[Gpu], rules: Rules) -> None:
        self.profile = profile
        self.rules = rules
        self.gpus = {gpu.index: gpu for gpu in gpus}
        self._uses: dict[tuple[int, int], SlotUse] = {}
        self._emulated = {(name, gpu.index): _emulated(profile, name, gpu) for name in COMPONENTS for gpu in gpus}

    def check(self, placement: Placement) -> tuple[Rejection | None, dict[int, SlotUse]]:
        """Return why `placement` cannot be, or None, and what every used GPU would hold."""
        if not self.rules.allow_split and is_split(placement):
            return Rejection("split", -1, "ControlNet may not be split from the transformer (hardware.allow)"), {}
        masks: dict[int, int] = {}
        for bit, (name, place) in enumerate(placement.items()):
            if place == "cpu":
                continue
            if not self.rules.allow_emulated and (why := self._emulated[name, place]):
                return Rejection("dtype", place, why), {}
            masks[place] = masks.get(place, 0) | 1 << bit
        uses = {place: self._use(placement, place, masks[place]) for place in sorted(masks)}
        worst, place = max(((use.peak_bytes - self.gpus[i].free_bytes, i) for i, use in uses.items()), default=(0, -1))
        return (self._too_small(place, uses[place], worst) if worst > 0 else None), uses

    def _use(self, placement: Placement, place: int, mask: int) -> SlotUse:
        key = (place, mask)
        if key not in self._uses:
            self._uses[key] = slot_use(self.profile, placement, place, self.gpus[place].total_bytes)
        return self._uses[key]

    def _too_small(self, place: int, use: SlotUse, shortfall: int) -> Rejection:
        gpu = self.gpus[place]
        message = (
            f"GPU {place} needs {human_bytes(use.peak_bytes)} in {use.phase}, "
            f"{human_bytes(gpu.free_bytes)} of {human_bytes(gpu.total_bytes)} are free"
        )
        return Rejection("memory", place, message, shortfall)


def _emulated(profile: PipelineProfile, name: Component, gpu: Gpu) -> str:
    dtype = profile.components[name].dtype
    if is_native(dtype, gpu):
        return ""
    major, minor = gpu.capability
    return f"{dtype} ({name}) is not native on GPU {gpu.index}, {gpu.name} (compute capability {major}.{minor})"


def _search(
    options: Iterable[Placement], profile: PipelineProfile, gpus: Sequence[Gpu], rules: Rules, score: Score
) -> Search:
    found, checker = Search(), Checker(profile, gpus, rules)
    for placement in options:
        rejection, uses = checker.check(placement)
        if rejection:
            found.rejected.append((placement, rejection))
            continue
        worst = max((use.peak_bytes / checker.gpus[i].free_bytes for i, use in uses.items()), default=0.0)
        moved = bytes_per_request(profile, placement)
        home = home_of(placement)
        key = score(placement, worst, moved, None if home == "cpu" else checker.gpus[home])
        found.feasible.append(Candidate(placement, uses, worst, moved, key))
    found.feasible.sort(key=lambda candidate: candidate.key)
    return found


def _balanced_score(placement: Placement, worst: float, moved: int, home: Gpu | None) -> Key:
    return (int(is_split(placement)), worst, moved, *_speed_rank(home), *_index_order(placement))


def _single_score(placement: Placement, worst: float, moved: int, home: Gpu | None) -> Key:
    return (*_speed_rank(home), -home.free_bytes if home else 0, *_index_order(placement))


def _speed_rank(home: Gpu | None) -> Key:
    return tuple(-part for part in home.speed) if home else ()


def _index_order(placement: Placement) -> Key:
    return tuple(-1 if place == "cpu" else place for place in placement.values())
