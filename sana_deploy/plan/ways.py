"""Ways to execute a request on a machine: a runtime and a split together, each profiled and searched at most once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from .._models import Diagnostic
from ..declare.hardware import SPLITS, Split
from ..declare.knobs import KNOBS, Exactness, Knob, least_exact
from ..declare.runtime import RUNTIMES, Execution
from ..facts.machine import Gpu, Machine
from .call_graphs import in_graphs, launch_bound
from .execution import executed
from .grid import Candidate
from .profile import PipelineProfile
from .search import Search

PLAINEST: Execution = next(iter(RUNTIMES))
"""What everything runs with that has no other runtime."""


@dataclass(frozen=True)
class Way:
    """How components execute, and how one image is spread over GPUs."""

    runtime: Execution
    split: Split

    @property
    def exactness(self) -> Exactness:
        """What it does to the picture."""
        return least_exact((RUNTIMES[self.runtime].exactness, SPLITS[self.split].exactness))


def runtimes_of(split: Split) -> tuple[Execution, ...]:
    """The runtimes that the units of a split can have, the plainest first."""
    return tuple(name for name, one in RUNTIMES.items() if SPLITS[split].graphs or not (one.graphs or one.compiles))


@dataclass(frozen=True)
class Choice:
    """The way that was chosen, its profile, what was searched with it, and what is to say of that."""

    way: Way
    profile: PipelineProfile
    search: Search
    remarks: tuple[Diagnostic, ...] = ()


class Ways:
    """The ways that a request can take on a machine.

    Args:
        profiles: makes the profile of each split that is possible, executed the plainest way.
        machine: the GPUs that may be taken.
        searched: searches the placements of a profile.
        refused: why other splits are not possible.
    """

    def __init__(
        self,
        profiles: Mapping[Split, Callable[[], PipelineProfile]],
        machine: Machine,
        searched: Callable[[PipelineProfile], Search],
        refused: Mapping[Split, str] = MappingProxyType({}),
    ) -> None:
        self.refused = refused
        self.gpus: Mapping[int, Gpu] = {gpu.index: gpu for gpu in machine.gpus}
        self.splits = tuple(profiles)
        self._made, self._search = profiles, searched
        self._plain: dict[Split, PipelineProfile] = {}
        self._executed: dict[Way, PipelineProfile] = {}
        self._found: dict[Way, Search] = {}

    def __iter__(self) -> Iterator[Way]:
        """The plainest first."""
        return (Way(runtime, split) for split in self.splits for runtime in runtimes_of(split))

    def profile(self, way: Way) -> PipelineProfile:
        """The profile of a request that goes this way."""
        if way.split not in self._plain:
            self._plain[way.split] = self._made[way.split]()
        if way not in self._executed:
            plain = self._plain[way.split]
            changed = plain if way.runtime == PLAINEST else executed(plain, way.runtime)
            self._executed[way] = in_graphs(changed, launch_bound(self.gpus.values()))
        return self._executed[way]

    def search(self, way: Way) -> Search:
        """The placements of a request that goes this way."""
        if way not in self._found:
            self._found[way] = self._search(self.profile(way))
            self._without_large_graphs(way)
        return self._found[way]

    def _without_large_graphs(self, way: Way) -> None:
        """Leave the VAE's calls out of graphs where their pool leaves no room, or takes a knob that saves memory."""
        profile, found = self._executed[way], self._found[way]
        plain = in_graphs(profile, lambda part, phase: False)
        if plain == profile or (found.best and not _saving(found.best)):
            return
        search = self._search(plain)
        if search.best and (found.best is None or len(_saving(search.best)) < len(_saving(found.best))):
            self._executed[way], self._found[way] = plain, search

    def choice(self, way: Way, *remarks: Diagnostic) -> Choice:
        """Choose this way."""
        search = self.search(way)  # which decides what of the profile is in graphs
        return Choice(way, self.profile(way), search, remarks)

    def short_of(self, candidate: Candidate) -> list[int]:
        """GPUs that a candidate does not fit, which is so where it is forced."""
        return [i for i, use in candidate.uses.items() if use.peak_bytes > self.gpus[i].free_bytes]

    def older_than(self, runtime: Execution, candidate: Candidate) -> list[Gpu]:
        """GPUs of a candidate that a runtime does not work on."""
        used = sorted({place for place in candidate.placement.values() if place != "cpu"})
        return [self.gpus[i] for i in used if self.gpus[i].capability < RUNTIMES[runtime].capability]


def _saving(candidate: Candidate) -> list[Knob]:
    """The knobs that are on to save memory."""
    return [knob for knob in candidate.knobs if not KNOBS[knob].always and not KNOBS[knob].apart]
