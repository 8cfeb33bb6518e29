"""Whole pipelines side by side: which GPUs each replica gets, so that the machine draws most images per second.

GPUs are dealt into groups, one for each replica. What a group draws is found by the search that places one pipeline;
of GPUs that are alike only their number matters. The best deal is found exactly, by dynamic programming over how many
GPUs of each kind are left.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from ..declare.hardware import Replicas
from ..facts.machine import Gpu, Machine
from .artifact import Plan
from .records import Place, PlacedComponent, PlacedUnit
from .ways import Choice

Counts = tuple[int, ...]
"""GPUs of each kind."""
Planned = Callable[[Machine], Choice]
"""Plans one pipeline on a machine."""
Wanted = Literal["every count", "most images", "most replicas"]
"""What deals are looked for: the best of every number of replicas, or less."""
Least = Callable[[Sequence[Gpu]], float]
"""Seconds that no pipeline on some GPUs can be below."""


@dataclass(frozen=True)
class Group:
    """The GPUs of one replica as a machine of their own, and how the pipeline is planned on them."""

    machine: Machine
    choice: Choice


@dataclass(frozen=True)
class Deals:
    """The best ways to deal a machine's GPUs, by the number of replicas."""

    machine: Machine
    planned: Planned
    by_count: dict[int, tuple[Counts, ...]]
    fastest: int

    @property
    def most(self) -> int:
        """Replicas that fit at most; 0 where none does."""
        return max(self.by_count)

    def chosen(self, wanted: Replicas) -> list[Group]:
        """The groups of the wanted number of replicas, the fastest first; none where so many do not fit."""
        count = self.fastest if wanted == "auto" else self.most if wanted == "max" else wanted
        kinds = _by_kind(self.machine.gpus)
        groups = []
        for counts in self.by_count.get(count, ()):
            taken = [kind.pop(0) for kind, number in zip(kinds, counts, strict=True) for _ in range(number)]
            part = replace(self.machine, gpus=tuple(sorted(taken, key=lambda gpu: gpu.index)))
            groups.append(Group(part, self.planned(part)))
        return sorted(groups, key=lambda group: (-_rate(group.choice), group.machine.gpus[0].index))


@dataclass(frozen=True, order=True)
class _Total:
    """What replicas amount to together; the larger the better.

    Attributes:
        rate: images per second, in billionths of a request, so that equal deals tie whatever their order of summation.
        gpus: GPUs that they take, as a number below zero.
        knobs: knobs that are on, likewise.
    """

    rate: int = 0
    gpus: int = 0
    knobs: int = 0

    def plus(self, other: _Total) -> _Total:
        return _Total(self.rate + other.rate, self.gpus + other.gpus, self.knobs + other.knobs)


@dataclass(frozen=True)
class _Offer:
    """One replica on GPUs of these kinds, all of which it uses."""

    counts: Counts
    total: _Total


_Best = dict[int, tuple[_Total, tuple[Counts, ...]]]
"""By the number of replicas: what the best of them amount to, and the groups that they are on."""


def deals_of(
    machine: Machine,
    planned: Planned,
    sizes: range,
    wanted: Wanted = "every count",
    least: Least = lambda gpus: 0.0,
) -> Deals:
    """Find the best ways to deal the GPUs of `machine` to replicas.

    Args:
        machine: the GPUs that may be taken.
        planned: plans one pipeline on some of them.
        sizes: how many GPUs one pipeline can use.
        wanted: what will be asked for; groups that cannot matter for it are not planned. With `most images` it is the
            most images per second, or the most replicas and their images, and `planned` looks for the fewest seconds;
            with `most replicas` only their number.
        least: seconds that no pipeline on some GPUs can be below.
    """
    kinds = _by_kind(machine.gpus)
    counts = tuple(len(kind) for kind in kinds)
    offers: list[_Offer] = []
    for size in range(sizes.start, min(sizes.stop, len(machine.gpus) + 1)):
        smaller = _deals(offers)
        for group in _groups(counts, size):
            dealt = smaller(group)
            if wanted == "most replicas" and len(dealt) > 1:
                continue
            taken = [gpu for kind, number in zip(kinds, group, strict=True) for gpu in kind[:number]]
            part = replace(machine, gpus=tuple(sorted(taken, key=lambda gpu: gpu.index)))
            if wanted == "most images" and max(dealt.values())[0].rate > _most_rate(least(part.gpus)):
                continue
            if total := _worth(planned(part), size):
                offers.append(_Offer(group, total))
    best = _deals(offers)(counts)
    fastest = max(best, key=lambda count: best[count][0])
    return Deals(machine, planned, {count: groups for count, (_, groups) in best.items()}, fastest)


def _deals(offers: Sequence[_Offer]) -> Callable[[Counts], _Best]:
    """Dynamic programming: one of the GPUs that are left stays idle, or is in a group with others that are left."""

    @cache
    def best(left: Counts) -> _Best:
        first = next((kind for kind, count in enumerate(left) if count), None)
        if first is None:
            return {0: (_Total(), ())}
        found = dict(best(tuple(count - (kind == first) for kind, count in enumerate(left))))
        for offer in offers:
            rest = tuple(count - taken for count, taken in zip(left, offer.counts, strict=True))
            if not offer.counts[first] or min(rest) < 0:
                continue
            for count, (total, groups) in best(rest).items():
                more = total.plus(offer.total)
                if count + 1 not in found or found[count + 1][0] < more:
                    found[count + 1] = more, (*groups, offer.counts)
        return found

    return best


def _groups(counts: Counts, size: int) -> Iterator[Counts]:
    """Every way to take `size` GPUs, by kind."""
    if not counts:
        yield from [()] if size == 0 else []
        return
    for taken in range(min(counts[0], size), -1, -1):
        for rest in _groups(counts[1:], size - taken):
            yield taken, *rest


def _by_kind(gpus: Sequence[Gpu]) -> list[list[Gpu]]:
    """GPUs that differ in nothing but index and UUID together."""
    found: dict[Any, list[Gpu]] = {}
    for gpu in gpus:
        found.setdefault(replace(gpu, index=-1, uuid=""), []).append(gpu)
    return list(found.values())


def _worth(choice: Choice, size: int) -> _Total | None:
    """What one replica amounts to; None where nothing fits, or a GPU is left over, so that a smaller group does."""
    best = choice.search.best
    if best is None or len(set(best.placement.values())) < size:
        return None
    return _Total(_rate(choice), -size, -len(best.knobs))


def _rate(choice: Choice) -> int:
    """Billionths of a request per second."""
    best = choice.search.best
    seconds = sum((best.seconds or {}).values()) if best else 0.0
    return round(1e9 / seconds) if seconds else 0


def _most_rate(seconds: float) -> float:
    """Billionths of a request per second that are more than those of any that takes at least so many seconds."""
    return 1e9 / seconds + 1 if seconds > 0 else math.inf


def alike(plans: Sequence[Plan]) -> list[list[int]]:
    """Positions of plans that differ in the numbers of their slots only, together; in the order of their first."""
    found: dict[str, list[int]] = {}
    for position, plan in enumerate(plans):
        found.setdefault(json.dumps(_without_numbers(plan), sort_keys=True), []).append(position)
    return list(found.values())


def _without_numbers(plan: Plan) -> list[Any]:
    """What a replica does and takes, its slots by rank."""
    rank: dict[Place, Place] = {"cpu": "cpu", **{slot.index: number for number, slot in enumerate(plan.slots)}}
    parts: dict[str, PlacedComponent | PlacedUnit] = {**plan.components, **plan.units}
    return [
        [slot.model_dump(mode="json", exclude={"name", "index"}) for slot in plan.slots],
        {name: {**part.model_dump(mode="json"), "slot": rank[part.slot]} for name, part in parts.items()},
        plan.knobs,
        plan.runtime,
        plan.split,
        plan.estimates.model_dump(mode="json"),
    ]
