"""Bands of one image's rows, what they ask of each other, and the loop that drives them.

The work of a band is a generator. It yields what it needs of the other bands (`Halo`, `Sum`, `Gather`) and goes on with
the answer. All bands ask the same things in the same order, so that one thread can advance them from exchange to
exchange. Devices may repeat: bands of one device work one after the other, and only one band's temporaries are alive.

Two rules keep that memory promise. A tensor that is yielded belongs to the exchange: the band must hold no other name
for it, unless it needs it afterwards. An answer is never a view of another band's tensor, which would stay alive.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from ...plan.row_shares import in_proportion


@dataclass(frozen=True)
class Band:
    """Some rows of one image: which band it is, its rows and those before it, and the rows of the whole image.

    Rows are of any one resolution: the ratio is what counts.
    """

    index: int
    first: int
    rows: int
    whole: int

    def whole_height(self, height: int) -> int:
        """Rows of the whole image where this band has `height` rows."""
        return height * self.whole // self.rows


class Ask(ABC):
    """What a band asks of the others; `take` gives the answer once, and lets go of it."""

    def __init__(self, given: Any) -> None:
        self.given = given

    def take(self) -> Any:
        """The answer, after the exchange."""
        answer, self.given = self.given, None
        return answer

    @staticmethod
    @abstractmethod
    def exchange(group: Group, asked: Sequence[Any]) -> None:
        """Put every band's answer in the place of what it gave."""


Work = Generator[Ask, None, Any]
"""A band's part of a computation; it returns the band's part of the result."""
Turns = Generator[None, None, list[Any]]
"""The bands of a group on their way: it stops after each exchange, and returns the bands' results."""


class Sum(Ask):
    """The sum of a tensor over all bands. Bands of one device get the same tensor, to be read only."""

    @staticmethod
    def exchange(group: Group, asked: Sequence[Sum]) -> None:
        """Add in the order of bands on every device: all hold the same bits."""
        parts = [ask.take() for ask in asked]
        totals: dict[torch.device, Tensor] = {}
        for i, ask in enumerate(asked):
            group.turn = i
            if (device := group.devices[i]) not in totals:
                total, *others = (group.move(part, j, i) for j, part in enumerate(parts))
                for other in others:
                    total = total + other
                totals[device] = total
            ask.given = totals[device]


class Gather(Ask):
    """The tensors of all bands, joined along the last dimension; of one device, the same tensor."""

    @staticmethod
    def exchange(group: Group, asked: Sequence[Gather]) -> None:
        """Join on every device once."""
        parts = [ask.take() for ask in asked]
        joined: dict[torch.device, Tensor] = {}
        for i, ask in enumerate(asked):
            group.turn = i
            if (device := group.devices[i]) not in joined:
                joined[device] = torch.cat([group.move(part, j, i) for j, part in enumerate(parts)], dim=-1)
            ask.given = joined[device]


Piece = Tensor | int
"""Some rows of another band; a number stands for so many rows of zeros."""


class Halo(Ask):
    """`size` rows of the image above and below a band of (batch, channels, rows, width).

    The answer is the pieces above and those below, from the top down. A halo may reach over several bands.
    """

    def __init__(self, given: Tensor, size: int) -> None:
        super().__init__(given)
        self.size = size

    @staticmethod
    def exchange(group: Group, asked: Sequence[Halo]) -> None:
        """Copy the rows at the edges; outside of the image are zeros."""
        parts: list[Tensor] = [ask.given for ask in asked]
        starts = [0]
        for part in parts:
            starts.append(starts[-1] + part.shape[2])
        answers = []
        for i, ask in enumerate(asked):
            group.turn, top, bottom = i, starts[i], starts[i + 1]
            above = _rows(group, parts, starts, i, top - ask.size, top)
            answers.append((above, _rows(group, parts, starts, i, bottom, bottom + ask.size)))
        for ask, answer in zip(asked, answers, strict=True):
            ask.given = answer


def _rows(
    group: Group, parts: Sequence[Tensor], starts: Sequence[int], target: int, low: int, high: int
) -> list[Piece]:
    """Rows `low` to `high` of the whole, on the device of the band `target`."""
    found: list[Piece] = [min(high, 0) - low] if low < 0 else []
    for j, part in enumerate(parts):
        a, b = max(low, starts[j]), min(high, starts[j + 1])
        if a < b:
            found.append(group.copy(part[:, :, a - starts[j] : b - starts[j]], j, target))
    if high > starts[-1]:
        found.append(high - max(low, starts[-1]))
    return found


def together(groups: Sequence[Turns]) -> list[list[Any]]:
    """Advance the bands of several groups from this thread, each to its next exchange by turns; the groups' results."""
    found: dict[int, list[Any]] = {}
    while len(found) < len(groups):
        for i, group in enumerate(groups):
            if i not in found:
                try:
                    next(group)
                except StopIteration as end:
                    found[i] = end.value
    return [found[i] for i in range(len(groups))]


def _between(edges: Sequence[int]) -> list[Band]:
    return [Band(i, first, end - first, edges[-1]) for i, (first, end) in enumerate(pairwise(edges))]


@dataclass
class Group:
    """The devices of the bands, how rows are dealt, and what was exchanged.

    Attributes:
        devices: of each band; they may repeat.
        shares: of the rows, in any unit; equal ones where there are none.
        sent: bytes sent from the device of one band to another device, by the two bands.
        exchanges: how many of each kind there were.
        turn: the band whose work is issued now.
    """

    devices: Sequence[torch.device]
    shares: Sequence[float] = ()
    sent: Counter[tuple[int, int]] = field(default_factory=Counter)
    exchanges: Counter[str] = field(default_factory=Counter)
    turn: int = 0

    def bands(self, rows: int) -> list[Band]:
        """Deal `rows` by shares, at least one to each band; fewer bands than devices where there are fewer rows."""
        count = min(len(self.devices), rows)
        if not self.shares:  # the first is the largest: it works while all others are at their fullest
            return _between([-(-rows * i // count) for i in range(count + 1)])
        return _between([*accumulate(in_proportion(rows, self.shares), initial=0)])

    def move(self, x: Tensor, source: int, target: int) -> Tensor:
        """`x`, of the band `source`, on the device of the band `target`; itself where it is there."""
        here, there = self.devices[source], self.devices[target]
        if here == there:
            return x
        self.sent[source, target] += x.numel() * x.element_size()
        # A copy to the CPU that is not waited for would be read too early.
        return x.to(there, non_blocking=here.type == there.type != "cpu")

    def copy(self, x: Tensor, source: int, target: int) -> Tensor:
        """As `move`, but never a view: it keeps nothing of the band `source` alive."""
        moved = self.move(x, source, target)
        return moved.clone(memory_format=torch.contiguous_format) if moved is x else moved

    def exchange(self, asked: Sequence[Ask]) -> None:
        """Answer what all bands ask; it must be the same kind of all."""
        kind = type(asked[0])
        assert all(type(ask) is kind for ask in asked), "bands are out of step"
        self.exchanges[kind.__name__] += 1
        kind.exchange(self, asked)

    def run(self, works: Sequence[Work]) -> list[Any]:
        """Advance all bands until they end; their results, in order."""
        (found,) = together([self.turns(works)])
        return found

    def turns(self, works: Sequence[Work]) -> Turns:
        """Advance the bands from one exchange to the next, one after the other; returns their results, in order."""
        while True:
            asked, ended = [], []
            for i, work in enumerate(works):
                self.turn = i
                try:
                    asked.append(next(work))
                except StopIteration as end:
                    ended.append(end.value)
            if ended:
                assert not asked, "bands are out of step"
                return ended
            self.exchange(asked)
            del asked  # nothing is held here while other groups work
            yield

    def joined(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """The bands' tensors as one, on the device of the first."""
        return torch.cat([self.move(part, i, 0) for i, part in enumerate(parts)], dim=dim)
