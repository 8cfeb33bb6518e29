"""Enumerates placements in arrays, without those that only rename GPUs that are alike.

GPUs that are alike come into use in their order: a unit goes to a GPU that is in use, or to the first of a kind that is
not. Placements grow by this rule unit by unit, so that no other one is ever made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..facts.machine import Gpu

Places = NDArray[np.int16]
"""Positions in the list of GPUs, one row per placement, one column per unit; CPU for the host."""
CPU = -1
CHUNK = 1 << 16
"""Placements that are looked at together, which bounds the memory of a search: each takes some 300 bytes."""


def canonical_placements(
    units: Sequence[str],
    gpus: Sequence[Gpu],
    pins: Mapping[str, int],
    chunk: int = CHUNK,
    apart: Mapping[str, str] | None = None,
) -> Iterator[Places]:
    """Yield every assignment of `units` to `gpus` that keeps to `pins`, in lexicographic order.

    Args:
        units: their names.
        gpus: GPUs that differ in nothing but index and UUID are alike; one that `pins` names is alike to none.
        pins: unit name -> GPU index.
        chunk: placements in an array at most, where that is more than there are GPUs.
        apart: unit name -> an earlier one that it shares no GPU with.
    """
    position = {gpu.index: i for i, gpu in enumerate(gpus)}
    fixed = {column: position[pins[name]] for column, name in enumerate(units) if name in pins}
    beside = {units.index(one): units.index(other) for one, other in (apart or {}).items()}
    kinds = _Kinds.of(gpus, {position[index] for index in pins.values()})
    step = max(1, chunk // max(1, len(gpus)))

    def grow(rows: Places, used: Places, column: int) -> Iterator[Places]:
        if column == len(units):
            yield rows
            return
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            grown, now = kinds.extend(rows[part], used[part], column, fixed.get(column))
            if column in beside:
                kept = grown[:, column] != grown[:, beside[column]]
                grown, now = grown[kept], now[kept]
            yield from grow(grown, now, column + 1)

    none = np.zeros((1, len(units)), np.int16)
    return grow(none, np.zeros((1, kinds.count), np.int16), 0)


@dataclass(frozen=True)
class _Kinds:
    """Which GPUs are alike.

    Attributes:
        count: kinds that have more than one GPU.
        alike: positions of their GPUs.
        kind: the kind of each of these.
        rank: the position of each of these among its kind.
        total: all GPUs.
    """

    count: int
    alike: NDArray[np.intp]
    kind: NDArray[np.intp]
    rank: NDArray[np.int16]
    total: int

    @classmethod
    def of(cls, gpus: Sequence[Gpu], apart: Iterable[int]) -> _Kinds:
        """Group GPUs; each at a position in `apart` is alike to none."""
        alone = set(apart)
        found: dict[Any, list[int]] = {}
        for i, gpu in enumerate(gpus):
            key = i if i in alone else replace(gpu, index=-1, uuid="")
            found.setdefault(key, []).append(i)
        several = [positions for positions in found.values() if len(positions) > 1]
        members = [(i, kind, rank) for kind, positions in enumerate(several) for rank, i in enumerate(positions)]
        alike, kinds, ranks = (np.array([member[part] for member in members], np.intp) for part in range(3))
        return cls(len(several), alike, kinds, ranks.astype(np.int16), len(gpus))

    def extend(self, rows: Places, used: Places, column: int, fixed: int | None) -> tuple[Places, Places]:
        """Give the unit of `column` a GPU in every way that is allowed.

        Args:
            rows: placements of the units before it.
            used: how many GPUs of each kind they use: (placements, kinds).
            fixed: the position that the unit must get.
        """
        if fixed is not None:
            origin, gpu = np.arange(len(rows)), np.full(len(rows), fixed)
        else:
            allowed = np.ones((len(rows), self.total), bool)
            allowed[:, self.alike] = self.rank <= used[:, self.kind]
            origin, gpu = np.nonzero(allowed)
        grown, now = rows[origin], used[origin]
        grown[:, column] = gpu
        for i, kind, rank in zip(self.alike, self.kind, self.rank, strict=True):
            now[:, kind] += (gpu == i) & (now[:, kind] == rank)
        return grown, now
