"""Seconds that no placement can be below, found without a search: whether one is worth to be searched for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product

from ..declare.pipelines import Component, Phase
from ..facts.machine import Gpu
from .profile import ComponentProfile, PipelineProfile
from .seconds import component_phases, phase_seconds

Seconds = Mapping[tuple[Component, Phase], float]
"""Of each component in each phase."""
_NEVER = float("inf")


def loop_seconds(profile: PipelineProfile, placement: Mapping[str, int], gpus: Iterable[Gpu]) -> float:
    """Seconds of the denoising loop of a request, exact.

    Args:
        placement: of the loop's units, to some of `gpus`.
    """
    looped = profile.pipeline.looped
    loop = replace(
        profile,
        components={name: profile.components[name] for name in looped},
        further={unit: part for unit, part in profile.further.items() if unit.component in looped},
        crossings=tuple(one for one in profile.crossings if one.phase == "denoise"),
    )
    found = phase_seconds(loop, {name: placement[name] for name in loop.parts}, {gpu.index: gpu for gpu in gpus})
    assert found is not None
    return found["denoise"]


class Outside:
    """The least seconds of the components of a request that are outside of the denoising loop, by their GPUs.

    Each is where it is fastest, with the knobs that make it so, and what crosses between them takes no time.
    """

    def __init__(self, profile: PipelineProfile) -> None:
        self._profile = profile
        self._kept: dict[Gpu, Seconds] = {}

    def __call__(self, gpus: Iterable[Gpu], without: Collection[Component] = ()) -> float:
        """The seconds on these GPUs, `without` some components."""
        tables = [self._on(gpu) for gpu in gpus]
        return sum(min(one[key] for one in tables) for key in tables[0] if key[0] not in without)

    def _on(self, gpu: Gpu) -> Seconds:
        if gpu not in self._kept:
            profile, found = self._profile, dict[tuple[Component, Phase], float]()
            for name, part in profile.components.items():
                if name in profile.pipeline.looped:
                    continue
                modes = profile.vae_under.values() if name == profile.pipeline.of("vae") else ()
                found |= {(name, phase): seconds for phase, seconds in fastest(
                    [component_phases(way, profile.steps, gpu.rates)] for way in (part, *modes)
                ).items()}  # fmt: skip
            self._kept[gpu] = found
        return self._kept[gpu]


def fastest(ways: Iterable[Sequence[Mapping[Phase, float]]]) -> dict[Phase, float]:
    """The least seconds of each phase of a component that can work in several ways, in units at the same time each."""
    found: dict[Phase, float] = {}
    for units in ways:
        for phase in units[0]:
            longest = max(one[phase] for one in units)
            found[phase] = min(found.get(phase, longest), longest)
    return found


class LeastSeconds:
    """Seconds below those of any pipeline on some GPUs of a machine, by these GPUs.

    Args:
        whole: profiles of an image that is not split, executed in every way that may be chosen.
        halves: the same with the halves of guidance apart; none where that is not open.
        rows: the least seconds with rows on some GPUs.
    """

    def __init__(
        self,
        whole: Sequence[PipelineProfile],
        halves: Sequence[PipelineProfile],
        rows: Callable[[Sequence[Gpu]], float],
    ) -> None:
        self._whole, self._halves = ([(one, Outside(one)) for one in ways] for ways in (whole, halves))
        self._rows = rows
        self._loops: dict[tuple[int, ...], float] = {}
        self._units: dict[tuple[int, str, Gpu], float] = {}

    def __call__(self, gpus: Sequence[Gpu]) -> float:
        """The seconds."""
        return min(self._of_whole(gpus), self._of_halves(gpus), self._rows(gpus))

    def _of_whole(self, gpus: Sequence[Gpu]) -> float:
        """With the components of the loop on any GPUs."""
        found = _NEVER
        for number, (profile, outside) in enumerate(self._whole):
            ways = product(gpus, repeat=len(profile.pipeline.looped))
            found = min(found, outside(gpus) + min(self._loop(number, profile, chosen) for chosen in ways))
        return found

    def _loop(self, number: int, profile: PipelineProfile, chosen: Sequence[Gpu]) -> float:
        key = number, *(gpu.index for gpu in chosen)
        if key not in self._loops:
            places = {name: gpu.index for name, gpu in zip(profile.pipeline.looped, chosen, strict=True)}
            self._loops[key] = loop_seconds(profile, places, chosen)
        return self._loops[key]

    def _of_halves(self, gpus: Sequence[Gpu]) -> float:
        """With each component's halves on the two GPUs that are fastest with them; what crosses takes no time."""
        found = _NEVER
        for number, (profile, outside) in enumerate(self._halves if len(gpus) > 1 else ()):
            total = outside(gpus)
            for unit, part in profile.further.items():
                first = [self._unit(number, unit.component, profile.components[unit.component], gpu) for gpu in gpus]
                second = [self._unit(number, unit.name, part, gpu) for gpu in gpus]
                total += profile.steps * min(
                    max(one, other) for i, one in enumerate(first) for j, other in enumerate(second) if i != j
                )
            found = min(found, total)
        return found

    def _unit(self, number: int, name: str, part: ComponentProfile, gpu: Gpu) -> float:
        """Seconds of one unit in a step."""
        key = number, name, gpu
        if key not in self._units:
            self._units[key] = component_phases(part, 1, gpu.rates)["denoise"]
        return self._units[key]
