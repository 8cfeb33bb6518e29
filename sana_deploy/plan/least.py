"""Seconds that no placement can be below, found without a search: whether one is worth to be searched for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import product

from ..declare.pipelines import Phase
from ..facts.machine import Gpu
from .profile import ComponentProfile, PipelineProfile
from .seconds import component_phases, phase_seconds


def least_seconds(split: PipelineProfile, gpus: Sequence[Gpu]) -> float:
    """Seconds below those of any placement of `split`, whose looped units have fixed GPUs, on these and others.

    The denoising loop is exact. Text encoder and VAE are where they are fastest, with the knobs that make them so, and
    what crosses to them and back takes no time.

    Args:
        gpus: all that may be taken.
    """
    loop = _loop(split)
    found = phase_seconds(loop, {name: split.fixed[name] for name in loop.parts}, {gpu.index: gpu for gpu in gpus})
    assert found is not None
    return found["denoise"] + _outside(split, gpus)


def _loop(profile: PipelineProfile) -> PipelineProfile:
    """The denoising loop alone."""
    looped = profile.pipeline.looped
    return replace(
        profile,
        components={name: profile.components[name] for name in looped},
        further={unit: part for unit, part in profile.further.items() if unit.component in looped},
        crossings=tuple(one for one in profile.crossings if one.phase == "denoise"),
        vae_under={},
        further_vae_under={},
    )


def _outside(profile: PipelineProfile, gpus: Sequence[Gpu]) -> float:
    """The least seconds of the components outside the loop, each phase for itself."""
    vae, by_index = profile.pipeline.of("vae"), {gpu.index: gpu for gpu in gpus}
    least: dict[tuple[str, Phase], float] = {}

    def lower(part: ComponentProfile, on: Iterable[Gpu], others: Mapping[str, ComponentProfile]) -> None:
        """Take one way of a component into account; its `others` work at the same time, where they are fixed."""
        beside = [component_phases(one, profile.steps, by_index[profile.fixed[name]].rates)
                  for name, one in others.items()]  # fmt: skip
        for gpu in on:
            for phase, seconds in component_phases(part, profile.steps, gpu.rates).items():
                longest = max([seconds, *(one.get(phase, 0.0) for one in beside)])
                key = part.name, phase
                least[key] = min(least.get(key, longest), longest)

    for name, part in profile.components.items():
        if name in profile.pipeline.looped:
            continue
        ways = profile.vae_under if name == vae and profile.vae_under else {None: part}
        on = [by_index[profile.fixed[name]]] if name in profile.fixed else gpus
        for mode, way in ways.items():
            further = {} if mode is None else profile.further_vae_under.get(mode, {})
            lower(way, on, {unit.name: one for unit, one in further.items()})
    return sum(least.values())


class LeastSeconds:
    """Seconds below those of any pipeline on some GPUs of a machine, by these GPUs.

    Args:
        whole: profiles of an image that is not split, executed in every way that may be chosen.
        halves: the same with the halves of guidance apart; none where that is not open.
        rows: the profiles with rows that may be chosen on some GPUs.
    """

    def __init__(
        self,
        whole: Sequence[PipelineProfile],
        halves: Sequence[PipelineProfile],
        rows: Callable[[Sequence[Gpu]], Iterable[PipelineProfile]],
    ) -> None:
        self._whole, self._halves, self._rows = whole, halves, rows
        self._steps: dict[tuple[int, ...], float] = {}

    def __call__(self, gpus: Sequence[Gpu]) -> float:
        """The seconds; 0 where nothing is known of these GPUs."""
        return min(self._of_whole(gpus), self._of_halves(gpus), self._of_rows(gpus)) if gpus else 0.0

    def _of_whole(self, gpus: Sequence[Gpu]) -> float:
        def at(number: int, loop: PipelineProfile, chosen: tuple[Gpu, ...]) -> float:
            key = number, *(gpu.index for gpu in chosen)
            if key not in self._steps:
                places = dict(zip(loop.parts, (gpu.index for gpu in chosen), strict=True))
                found = phase_seconds(loop, places, {gpu.index: gpu for gpu in chosen})
                assert found is not None
                self._steps[key] = found["denoise"]
            return self._steps[key]

        return (
            min(
                _outside(self._whole[number], gpus)
                + min(at(number, loop, chosen) for chosen in product(gpus, repeat=len(loop.parts)))
                for number, loop in enumerate(self._loops)
            )
            if self._whole
            else float("inf")
        )

    @cached_property
    def _loops(self) -> list[PipelineProfile]:
        return [_loop(profile) for profile in self._whole]

    def _of_halves(self, gpus: Sequence[Gpu]) -> float:
        """With each component's halves on the two GPUs that are fastest with them."""
        if len(gpus) < 2:
            return float("inf")
        found = float("inf")
        for profile in self._halves:
            total = _outside(profile, gpus)
            for unit, part in profile.further.items():
                pairs = [[component_phases(one, profile.steps, gpu.rates)["denoise"] for gpu in gpus]
                         for one in (profile.components[unit.component], part)]  # fmt: skip
                total += min(
                    max(one, other) for i, one in enumerate(pairs[0]) for j, other in enumerate(pairs[1]) if i != j
                )
            found = min(found, total)
        return found

    def _of_rows(self, gpus: Sequence[Gpu]) -> float:
        return min((least_seconds(profile, gpus) for profile in self._rows(gpus)), default=float("inf"))
