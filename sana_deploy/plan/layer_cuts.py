"""Which component is dealt by layers, and where: so that everything fits, and the fullest GPU is the emptiest.

Where the cut moves, one unit gets larger by what the other one loses. A profile that has the smallest units of a range
of cuts therefore fits wherever one of them does, so that whole ranges are ruled out by one search.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from ..declare.pipelines import Component
from ..facts.allocator import workspace_bytes
from ..facts.machine import Gpu
from .cost import overhead, slot_use
from .grid import Candidate
from .knobs import under
from .layers import Cuts, LayerSplit
from .profile import PipelineProfile
from .records import place_words
from .search import Search
from .units import Unit

Boxes = Mapping[Component, range]
"""The cuts of each component that are looked at together."""
Searched = Callable[[PipelineProfile], Search]
MOST_SEARCHES = 64
"""Searches for the cuts of several components at once, whose ranges rarely rule each other out; one component takes
fewer."""


def best_layers(split: LayerSplit, gpus: Sequence[Gpu], searched: Searched) -> PipelineProfile:
    """The profile with one component dealt, or all of them where one does not do; the evenest where nothing fits.

    A component that crosses once a request is dealt before one that crosses in each step. Of the cuts that fit under
    the fewest knobs, the one is taken that leaves the fullest GPU the emptiest.

    Args:
        split: that can deal a component at least.
        gpus: those that may be taken.
        searched: searches the placements of a profile.
    """
    names = tuple(split.blocks)
    for dealt in ((name,) for name in names) if len(names) == 1 else (*((name,) for name in names), names):
        cuts = fitting_cuts(split, dealt, searched) if may_fit(split.dealt(_even_cuts(split, dealt)), gpus) else None
        if cuts is not None:
            best = searched(split.dealt(cuts)).best
            assert best is not None
            return split.dealt(evened(split, cuts, best, gpus))
    largest = max(names, key=lambda name: sum(split.blocks[name].weights))
    return split.dealt(_even_cuts(split, [largest]))


def may_fit(profile: PipelineProfile, gpus: Iterable[Gpu]) -> bool:
    """Whether all GPUs together have room for all that stays, and what the neediest component works with.

    Where they have not, no cut fits, since weights are the same wherever a component is cut.
    """
    name, vae = profile.pipeline.of("text_encoder"), profile.pipeline.of("vae")
    stay = [part.weights_bytes for part in profile.parts.values() if part.name != name or name in profile.dealt]
    modes = [part.activation_bytes for part in profile.vae_under.values()]
    working = [part.activation_bytes for part in profile.parts.values() if part.name != vae]
    room = sum(gpu.free_bytes - overhead(gpu) - workspace_bytes(gpu.capability) for gpu in gpus)
    return sum(stay) + max(*working, min(modes, default=0)) <= room


def _even_cuts(split: LayerSplit, names: Iterable[Component]) -> Cuts:
    return {name: min(split.blocks[name].cuts, key=lambda cut: _uneven(split, name, cut)) for name in names}


def fitting_cuts(split: LayerSplit, names: Sequence[Component], searched: Searched) -> Cuts | None:
    """The cuts that fit under the fewest knobs, and of these the evenest by weights; None where none fits.

    Best first: ranges of cuts in the order of what their smallest units take, halved until one cut is left. For several
    components it gives up after MOST_SEARCHES.
    """
    heap: list[tuple[int, int, int, Boxes]] = []
    looked = 0

    def look_at(boxes: Boxes) -> None:
        nonlocal looked
        looked += 1
        best = searched(split.at_least(boxes)).best
        if best is not None:
            uneven = sum(min(_uneven(split, name, cut) for cut in cuts) for name, cuts in boxes.items())
            heapq.heappush(heap, (len(best.knobs), uneven, looked, boxes))

    look_at({name: split.blocks[name].cuts for name in names})
    while heap and (len(names) == 1 or looked < MOST_SEARCHES):
        *_, boxes = heapq.heappop(heap)
        longest = max(boxes, key=lambda name: len(boxes[name]))
        cuts = boxes[longest]
        if len(cuts) == 1:
            return {name: one[0] for name, one in boxes.items()}
        for half in (cuts[: len(cuts) // 2], cuts[len(cuts) // 2 :]):
            look_at({**boxes, longest: half})
    return None


def evened(split: LayerSplit, cuts: Cuts, candidate: Candidate, gpus: Sequence[Gpu]) -> Cuts:
    """Move each cut to where the fullest GPU is the emptiest under the candidate's placement and knobs."""
    by_index, found = {gpu.index: gpu for gpu in gpus}, dict(cuts)
    used = sorted({place for place in candidate.placement.values() if place != "cpu"})

    def fullest(name: Component, cut: int) -> tuple[float, int]:
        plain = replace(split.dealt({**found, name: cut}), band_count=candidate.bands)
        profile = under(plain, candidate.knobs)
        uses = {i: slot_use(profile, candidate.placement, i, by_index[i]) for i in used}
        full = max(use.peak_bytes / max(by_index[i].free_bytes, 1) for i, use in uses.items())
        return full, _uneven(split, name, cut)

    for name in cuts:
        found[name] = min(split.blocks[name].cuts, key=lambda cut: fullest(name, cut))
    return found


def _uneven(split: LayerSplit, name: Component, cut: int) -> int:
    """Bytes by which the weights of the two units differ."""
    others = sum(split.blocks[name].weights[cut:])
    return abs(split.profile.components[name].weights_bytes - 2 * others)


def layers_words(profile: PipelineProfile, candidate: Candidate) -> str:
    """Which blocks are where, and how many bytes cross for it in a step or in a request."""
    said = []
    for name, first in profile.dealt.items():
        places = [place_words(candidate.placement[Unit(name, number).name]) for number in range(2)]
        between = [one for one in profile.crossings if {one.src, one.dst} == {name, Unit(name, 1).name}]
        size = sum(one.bytes_each for one in between) / 1e6
        often = "step" if between[0].per_step else "request"
        blocks = f"{first} blocks" if first > 1 else "block"
        said.append(
            f"the first {blocks} of the {name} on {places[0]} and the others on {places[1]}, "
            f"{size:.3g} MB a {often} cross between them"
        )
    return f"{'; '.join(said)}; they work in turn, eagerly"
