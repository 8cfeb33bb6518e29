"""Which GPUs share the rows of an image: of those that can hold the weights, the fastest ones, as many as pay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from ..declare.hardware import SPLITS, Split, SplitDescription
from ..facts.machine import Gpu, is_native
from .profile import PipelineProfile
from .row_split import RowSplit
from .search import Search


def best_rows(
    split: RowSplit,
    gpus: Sequence[Gpu],
    pins: Mapping[str, int],
    searched: Callable[[PipelineProfile], Search],
    emulated: bool,
    way: Split = "rows",
) -> PipelineProfile:
    """The profile with the rows on as many GPUs as take the fewest seconds; where none fits, the closest miss.

    More are not always faster: Python launches the kernels of all units by turns. Profiles that cannot be faster than
    what was found are not searched.

    Args:
        gpus: as many as the split takes, or more.
        pins: of the declaration: the GPUs of the denoiser's and the ControlNet's first two units.
        searched: searches the placements of a profile.
        emulated: whether a GPU may emulate a dtype.
        way: `rows`, or another split that deals rows.
    """
    ways = [*dealt_ways(split, gpus, pins, emulated, way)]
    best: tuple[tuple[bool, float], int] | None = None
    made: dict[int, PipelineProfile] = {}
    for number in sorted(range(len(ways)), key=lambda number: (ways[number].least, number)):
        if best is not None and best[0] < (False, ways[number].least - _PRINTED):
            break
        made[number] = ways[number].make()
        found = _rank(searched(made[number])), number
        best = found if best is None else min(best, found)
    assert best is not None
    return made[best[1]]


_PRINTED = 1e-4
"""What seconds are rounded to where they are compared."""


@dataclass(frozen=True)
class Dealt:
    """Rows on some GPUs: seconds that no placement of its profile is below, and what makes the profile."""

    least: float
    make: Callable[[], PipelineProfile]


def dealt_ways(
    split: RowSplit, gpus: Sequence[Gpu], pins: Mapping[str, int], emulated: bool, way: Split
) -> Iterator[Dealt]:
    """Rows on the fewest GPUs, on one more for each team, and so on; with the VAE whole, then dealt as well."""
    teams, vae = SPLITS[way].teams, split.profile.pipeline.of("vae")
    for chosen in _choices(split, gpus, pins, emulated, SPLITS[way]):
        profile, loop = split.dealt_to(chosen, teams), split.loop_seconds(chosen, teams)
        yield Dealt(loop + split.outside(gpus), partial(_same, profile))
        if _may_deal_vae(split, pins, chosen[0]):
            beside = split.outside(gpus, without=[vae]) + split.vae_seconds(chosen, teams)
            yield Dealt(loop + beside, partial(split.with_vae, profile))


def _same(profile: PipelineProfile) -> PipelineProfile:
    return profile


def _may_deal_vae(split: RowSplit, pins: Mapping[str, int], home: Gpu) -> bool:
    """Whether the VAE may have its first unit with the denoising loop."""
    return pins.get(split.profile.pipeline.of("vae"), home.index) == home.index


def _rank(search: Search) -> tuple[bool, float]:
    """What is compared: seconds, rounded to what is printed, where something fits, else the bytes that are missing."""
    if search.best is not None:
        return False, round(sum((search.best.seconds or {}).values()), 4)
    nearest = search.nearest()
    return True, nearest.shortfall_bytes if nearest else float("inf")


def _choices(
    split: RowSplit, gpus: Sequence[Gpu], pins: Mapping[str, int], emulated: bool, way: SplitDescription
) -> Iterator[tuple[Gpu, ...]]:
    """The fewest GPUs, one more for each team, and so on; those of pins are among them and come first."""
    looped = split.profile.pipeline.looped
    pinned = [[pins[f"{name}{unit}"] for name in looped if f"{name}{unit}" in pins] for unit in ("", ".1")]
    by_index, order = {gpu.index: gpu for gpu in gpus}, _fastest_first(split, gpus, emulated)
    named = [by_index[found[0]] if found else None for found in pinned]
    left = [gpu for gpu in order if gpu not in named]
    order = [one if one is not None else left.pop(0) for one in named if one is not None or left] + left
    most = min(len(order), way.most_gpus, way.teams * split.rows)
    for count in range(way.least_gpus, most + 1, way.teams):
        yield _in_teams(split, order[:count], way.teams, sum(one is not None for one in named))


def _in_teams(split: RowSplit, gpus: Sequence[Gpu], teams: int, pinned: int) -> tuple[Gpu, ...]:
    """GPUs by team, one team after the other, as fast as each other; GPUs that are equally fast stay in their order.

    Args:
        pinned: how many of the first GPUs are in the first team whatever their speed.
    """
    seconds = {gpu.index: split.whole_seconds(gpu) for gpu in gpus}
    if len(set(seconds.values())) == 1:
        return tuple(gpus)
    size, dealt = len(gpus) // teams, [[*gpus[:pinned]], *([] for _ in range(teams - 1))]
    for gpu in gpus[pinned:]:
        open_ones = [team for team in dealt if len(team) < size]
        min(open_ones, key=lambda team: sum(1 / seconds[one.index] for one in team)).append(gpu)
    return tuple(gpu for team in dealt for gpu in team)


def _fastest_first(split: RowSplit, gpus: Sequence[Gpu], emulated: bool) -> list[Gpu]:
    """GPUs in the order in which they are taken: those that hold the weights and compute natively before others."""
    looped = [split.profile.components[name] for name in split.profile.pipeline.looped]
    weights = sum(part.weights_bytes for part in looped)

    def unfit(gpu: Gpu) -> bool:
        native = emulated or all(is_native(part.format.dtype, gpu) for part in looped)
        return gpu.free_bytes <= weights or not native

    return sorted(gpus, key=lambda gpu: (unfit(gpu), *(-value for value in gpu.speed), -gpu.free_bytes, gpu.index))
