"""The search: every placement under every allowed set of knobs; nothing is guessed, the best of all is taken."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from ..declare.hardware import Objective
from ..declare.knobs import KNOBS, Knob, clash, completed
from ..facts.machine import Gpu
from .candidates import Rows
from .cost import Placement
from .grid import Candidate, PlacementGrid, Rules
from .knobs import under, useful
from .placements import CHUNK, CPU, Places, canonical_placements
from .profile import ComponentProfile, PipelineProfile
from .records import Place
from .rejections import Rejection, RejectionTally
from .seconds import component_phases
from .setting import Tried
from .shortlist import Key, KeyOf, Shortlist


@dataclass
class Search:
    """The outcome of a search.

    Attributes:
        ranked: the best candidates that fit, best first, four at most.
        closest: of those that do not fit, the one that misses by least memory.
        placements: how many placements were looked at, each under `settings` sets of knobs.
        feasible: how many of these candidates fit.
        rejections: the others by reason and GPU, most frequent first.
    """

    ranked: list[Candidate] = field(default_factory=list)
    closest: Candidate | None = None
    placements: int = 0
    settings: int = 1
    feasible: int = 0
    rejections: list[Rejection] = field(default_factory=list)

    @property
    def best(self) -> Candidate | None:
        """The chosen candidate, or None when nothing fits."""
        return self.ranked[0] if self.ranked else None

    @property
    def considered(self) -> int:
        """How many candidates were looked at."""
        return self.placements * self.settings

    def nearest(self) -> Rejection | None:
        """The rejection that misses by least memory, or any other one when no memory was short."""
        short = [rejection for rejection in self.rejections if rejection.reason in ("memory", "host memory")]
        return (
            min(short, key=lambda rejection: rejection.shortfall_bytes) if short else next(iter(self.rejections), None)
        )


def search_balanced(
    profile: PipelineProfile,
    gpus: Sequence[Gpu],
    rules: Rules,
    pins: Mapping[str, int] | None = None,
    chunk: int = CHUNK,
) -> Search:
    """Search all placements of whole units over `gpus`, GPUs that are alike counted once; `pins` are kept to.

    A further unit is on another GPU than the first one of its component: it is there to work at the same time.

    `balance` takes the fewest seconds, then the fewest bytes moved, among placements whose fullest GPU is at most ROOMY
    full, and the emptiest fullest GPU where none is. Before that it wants, one after the other: no tiling, no bands, no
    offload, ControlNet beside the transformer, few bands, and no slicing; slicing goes on where otherwise nothing fits,
    or where keeping ControlNet with the transformer would fill a GPU beyond ROOMY, and more than splitting it off.
    `latency` takes the fewest seconds per request, `fit` the fewest knobs, then the fewest bands, then the fewest GPUs.
    Ties go to a faster denoiser (for `balance` before emptier GPUs) and to lower indices, so that the result is
    deterministic.

    Args:
        pins: unit name -> GPU index.
        chunk: placements that are looked at together; it bounds the memory, and changes nothing in the result.
    """
    apart = {unit.name: unit.component for unit in profile.further}
    blocks = partial(canonical_placements, [unit.name for unit in profile.units], gpus, pins or {}, chunk, apart)
    return _whole_first(profile, gpus, rules, blocks, _balanced_key, chunk)


def search_single(profile: PipelineProfile, gpus: Sequence[Gpu], rules: Rules, gpu: int | None) -> Search:
    """Search the placements that put everything on one GPU: fewest knobs, then the fastest GPU, then the emptiest."""
    chosen = np.array([i for i, one in enumerate(gpus) if gpu in (None, one.index)], np.int16)
    places = np.repeat(chosen[:, None], len(profile.units), axis=1)
    return _whole_first(profile, gpus, rules, lambda: [places], _single_key)


def search_custom(
    profile: PipelineProfile, gpus: Sequence[Gpu], rules: Rules, placement: Placement, knobs: Iterable[Knob] = ()
) -> Search:
    """Check the one placement the user wrote, with the knobs that are to be on.

    Where it is forced, what cuts does so into as few parts as fit, and into the most where none does.
    """
    position: dict[Place, int] = {"cpu": CPU, **{gpu.index: i for i, gpu in enumerate(gpus)}}
    places = np.array([[position[placement[unit.name]] for unit in profile.units]], np.int16)
    tried = _counted(profile, useful(profile, knobs))
    if rules.force and len(tried) > 1:
        fitting = _search(profile, gpus, replace(rules, force=False), [places], tried, _balanced_key)
        if fitting.best:
            return fitting
        tried = tried[-1:]
    return _search(profile, gpus, rules, [places], tried, _balanced_key)


def search_host(profile: PipelineProfile, rules: Rules) -> Search:
    """Put everything on the CPU; where that is short of memory, under every set of knobs that need no GPU."""
    places = np.full((1, len(profile.units)), CPU, np.int16)
    sets = _settings(profile, [knob for knob in rules.allow if not KNOBS[knob].needs_gpu])
    plain = _search(profile, (), rules, [places], sets[:1], _balanced_key)
    return plain if plain.best else _search(profile, (), rules, [places], sets, _balanced_key)


def _whole_first(
    profile: PipelineProfile,
    gpus: Sequence[Gpu],
    rules: Rules,
    blocks: Callable[[], Iterable[Places]],
    key: KeyOf,
    limit: int = CHUNK,
) -> Search:
    """Search without what cuts into parts or is dearer, and then with it where that may find something better.

    It cannot where no placement is short of memory and no unit is faster with it, nor where `balance`, which avoids
    dear knobs before all else, has found one.
    """
    settings = _settings(profile, rules.allow)
    order, tried = list(KNOBS), {knob for one in settings for knob in one.knobs}
    if cutting := [i for i, knob in enumerate(order) if knob in tried and KNOBS[knob].counts]:
        dear = {*order[cutting[0] :]}
        plain = [one for one in settings if not dear & {*one.knobs}]
        found = _search(profile, gpus, rules, blocks(), plain, key, limit)
        short = any(rejection.reason == "memory" for rejection in found.rejections)
        if found.best and rules.objective == "balance":
            return found
        if not short and not any(_saves_seconds(profile, one, dear, gpus) for one in settings if dear & {*one.knobs}):
            return found
    return _search(profile, gpus, rules, blocks(), settings, key, limit)


def _saves_seconds(profile: PipelineProfile, tried: Tried, dear: Collection[Knob], gpus: Iterable[Gpu]) -> bool:
    """Whether a unit takes fewer seconds on any GPU with the knobs that were tried than without the `dear` of them."""
    changed = under(tried.profile, tried.knobs).parts
    plain = under(profile, [knob for knob in tried.knobs if knob not in dear]).parts

    def seconds(part: ComponentProfile, gpu: Gpu) -> float:
        return sum(component_phases(part, profile.steps, gpu.rates).values())

    return any(seconds(changed[name], gpu) < seconds(part, gpu) for gpu in gpus for name, part in plain.items())


def _settings(profile: PipelineProfile, allow: Iterable[Knob]) -> list[Tried]:
    """Every set of knobs to try, none first, but those that change nothing in the request.

    A knob that is always on is in every set where it is allowed and has something to do; one of placements is in none,
    since placements turn it on; one that cuts is tried with every number of parts that saves memory. Knobs of one role
    vary before those of the next.
    """
    allowed = completed(allow)
    always = [knob for knob in useful(profile, allow) if KNOBS[knob].always]
    roles = [one.role for one in KNOBS.values()]
    free = sorted(filter(_may_vary, allowed), key=lambda knob: roles.index(KNOBS[knob].role))
    chosen = [[knob for i, knob in enumerate(free) if number >> i & 1] for number in range(1 << len(free))]
    sets = dict.fromkeys(completed([*always, *knobs]) for knobs in chosen)
    kept: list[Tried] = []
    found: list[PipelineProfile] = []
    for knobs in (knobs for knobs in sets if not clash(knobs)):
        for one in _counted(profile, knobs):
            changed = under(one.profile, knobs)
            if changed not in found:
                found.append(changed)
                kept.append(one)
    return kept


def _counted(profile: PipelineProfile, knobs: tuple[Knob, ...]) -> list[Tried]:
    """Knobs with every number of parts that those of them may take, fewest first; as they are where none cuts.

    More parts that take no less memory are left out.
    """
    counts = next((KNOBS[knob].counts for knob in knobs if KNOBS[knob].counts), ())
    if not counts:
        return [Tried(knobs, profile)]
    kept, least = [], None
    for count in counts:
        one = Tried(knobs, replace(profile, band_count=count))
        taken = sum(part.activation_bytes for part in under(one.profile, knobs).components.values())
        if least is None or taken < least:
            kept.append(one)
            least = taken
    return kept


def _may_vary(knob: Knob) -> bool:
    """Whether the search tries a knob on and off."""
    return not KNOBS[knob].always and not KNOBS[knob].apart


ROOMY = 0.7
"""Share of its free memory up to which a GPU's fullness does not matter: evenness is worth nothing there."""


def _balanced_key(rows: Rows, objective: Objective) -> Key:
    ties: Key = [rows.worst, rows.moved, rows.home_rank, *rows.places.T]
    if objective == "latency":
        return [rows.seconds, rows.count_knobs(), *ties]
    if objective == "fit":
        return [rows.count_knobs(), rows.bands, rows.count_further_places(), *ties]
    dear, cheap = _dearest_first()
    varied = [rows.knobs[knob] for knob in (*dear, *cheap) if _may_vary(knob)]
    crowd = np.maximum(rows.worst, ROOMY)
    fuller = crowd > crowd[~np.logical_or.reduce(varied)].min(initial=np.inf)
    knobs: Key = [*(rows.knobs[knob] for knob in dear), rows.bands, fuller, *(rows.knobs[knob] for knob in cheap)]
    return [*knobs, crowd, rows.seconds, rows.moved, rows.home_rank, *ties]


def _dearest_first() -> tuple[list[Knob], list[Knob]]:
    """Knobs that are not always on, dearest first: down to the last one of placements, and those that are cheaper."""
    knobs = [knob for knob in reversed(KNOBS) if not KNOBS[knob].always]
    last = max((i for i, knob in enumerate(knobs, 1) if KNOBS[knob].apart), default=0)
    return knobs[:last], knobs[last:]


def _single_key(rows: Rows, objective: Objective) -> Key:
    ties: Key = [rows.home_rank, -rows.free[rows.places[:, 0]], rows.places[:, 0]]
    if objective == "latency":
        return [rows.seconds, rows.count_knobs(), *ties]
    if objective == "fit":
        return [rows.count_knobs(), rows.bands, *ties]
    dear, cheap = _dearest_first()
    return [*(rows.knobs[knob] for knob in (*dear, *cheap)), rows.bands, *ties]


def _search(
    profile: PipelineProfile,
    gpus: Sequence[Gpu],
    rules: Rules,
    blocks: Iterable[Places],
    settings: Sequence[Tried],
    key: KeyOf,
    limit: int = CHUNK,
) -> Search:
    """Cost every placement of `blocks` under every one of `settings`.

    One block is held at a time, and no more than about `limit` candidates that fit.
    """
    grid = PlacementGrid(profile, gpus, rules, settings)
    tally, shortlist, count = RejectionTally(grid), Shortlist(grid, key, limit), 0
    for places in blocks:
        block = grid.block(places)
        for setting in grid.settings:
            sheet = grid.cost(block, setting)
            tally.add(sheet, start=count)
            shortlist.add(sheet)
        count += len(places)
    if not count:
        return Search()
    return Search(
        ranked=shortlist.ranked(),
        closest=tally.closest(),
        placements=count,
        settings=len(settings),
        feasible=shortlist.feasible,
        rejections=tally.rejections(),
    )
