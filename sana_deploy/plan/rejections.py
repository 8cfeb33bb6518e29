"""Counts the candidates of a search that are rejected, by reason and GPU, and keeps those that miss by the least."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .._units import human_bytes
from .cost import host_bytes, slot_use
from .grid import REASONS, Candidate, CostSheet, PlacementGrid, Reason
from .placements import CPU, Places
from .setting import Setting


@dataclass(frozen=True)
class Rejection:
    """Why candidates cannot be: the closest of `count` that one reason ruled out on one GPU; the shortfall in bytes."""

    reason: Reason
    gpu: int
    message: str
    shortfall_bytes: int = 0
    count: int = 1


@dataclass
class _Nearest:
    """The candidates that one reason ruled out on one GPU under one set of knobs: their number, and the first of those
    that lack the fewest bytes; `row` is its position in the search, `emulated` the unit whose dtype is emulated."""

    count: int
    lacking: int
    row: int
    places: Places
    emulated: int


def host_sentence(needed: int, available: int) -> str:
    """What the host needs and has, in bytes."""
    return f"the host needs {human_bytes(needed)} for what is on the CPU, it has {human_bytes(available)}"


class RejectionTally:
    """The rejected candidates of one search, which come in blocks.

    Which one is named does not depend on how the search is cut into blocks: the first in the order of settings, then
    of placements.
    """

    def __init__(self, grid: PlacementGrid) -> None:
        self.grid = grid
        self._found: dict[tuple[int, Reason, int], _Nearest] = {}

    def add(self, sheet: CostSheet, start: int) -> None:
        """Count the rejected ones of a block whose first placement is number `start` of the search."""
        for code, reason in enumerate(REASONS):
            ruled_out = np.flatnonzero(sheet.code == code)
            if not len(ruled_out):
                continue
            places = _places(sheet, reason, ruled_out)
            for place in np.unique(places).tolist():
                rows = ruled_out[places == place]
                self._add((sheet.setting.number, reason, place), sheet, rows, start)

    def _add(self, key: tuple[int, Reason, int], sheet: CostSheet, rows: NDArray[np.intp], start: int) -> None:
        lacking = sheet.lacking(key[1])[rows]
        nearest = int(lacking.argmin())
        row = int(rows[nearest])
        mine = _Nearest(
            len(rows),
            int(lacking[nearest]),
            start + row,
            sheet.block.places[row].copy(),
            int(sheet.block.emulated[row]),
        )
        before = self._found.get(key)
        if before is not None:
            kept = before if before.lacking <= mine.lacking else mine
            mine = replace(kept, count=before.count + mine.count)
        self._found[key] = mine

    def closest(self) -> Candidate | None:
        """The candidate that memory ruled out by the least; where none is short, one that another reason did."""
        if not self._found:
            return None
        (number, *_), nearest = min(
            self._found.items(),
            key=lambda item: (
                max(REASONS.index(item[0][1]), 1),
                item[1].lacking,
                item[0][0],
                REASONS.index(item[0][1]),
                item[1].row,
            ),
        )
        return self.grid.candidate(nearest.places, self.grid.settings[number])

    def rejections(self) -> list[Rejection]:
        """Count by reason and GPU, most frequent first, each with its closest miss."""
        groups: dict[tuple[Reason, int], list[tuple[int, Rejection]]] = {}
        for number, reason, place in sorted(self._found, key=lambda key: key[0]):
            nearest = self._found[number, reason, place]
            named = self._rejection(reason, place, nearest, self.grid.settings[number])
            groups.setdefault((reason, place), []).append((nearest.count, named))
        counts = {key: sum(count for count, _ in found) for key, found in groups.items()}
        return [
            replace(min((named for _, named in groups[key]), key=lambda one: one.shortfall_bytes), count=counts[key])
            for key in sorted(groups, key=lambda key: (-counts[key], key))
        ]

    def _rejection(self, reason: Reason, place: int, nearest: _Nearest, setting: Setting) -> Rejection:
        if reason == "split":
            return Rejection(reason, -1, "ControlNet may not be split from the transformer (hardware.allow)")
        placement = self.grid.placement(nearest.places)
        if reason == "host memory":
            need, host = host_bytes(setting.profile, placement), self.grid.rules.host_bytes or 0
            return Rejection(reason, -1, host_sentence(need, host), need - host)
        gpu = self.grid.gpus[place]
        if reason == "dtype":
            name = self.grid.units[nearest.emulated]
            capability = ".".join(map(str, gpu.capability))
            dtype = self.grid.profile.parts[name].format.dtype
            message = f"{dtype} ({name}) is not native on GPU {gpu.index}, {gpu.name} (compute capability {capability})"
            return Rejection(reason, gpu.index, message)
        use = slot_use(setting.profile, placement, gpu.index, gpu)
        names = ", ".join(name for name, where in placement.items() if where == gpu.index)
        message = (
            f"GPU {gpu.index} needs {human_bytes(use.peak_bytes)} in {use.phase} for {names}, "
            f"{human_bytes(gpu.free_bytes)} of {human_bytes(gpu.total_bytes)} are free"
        )
        return Rejection(reason, gpu.index, message, nearest.lacking)


def _places(sheet: CostSheet, reason: Reason, rows: NDArray[np.intp]) -> NDArray[np.int64]:
    """The position of the GPU where `reason` ruled each of `rows` out; CPU where it is no GPU's."""
    if reason == "memory":
        return sheet.tightest(rows)
    if reason == "dtype":
        return sheet.block.places[rows, sheet.block.emulated[rows]].astype(np.int64)
    return np.full(len(rows), CPU, np.int64)
