"""Keeps the candidates of a search that may be among the best, while they come in blocks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..declare.hardware import Objective
from .candidates import Feasible, Rows
from .grid import FITS, Candidate, CostSheet, PlacementGrid

Key = list[NDArray[Any]]
"""Columns to sort by, the most important one first; smaller is better."""
KeyOf = Callable[[Rows, Objective], Key]
WANTED = 4
"""How many of the best are named."""


class Shortlist:
    """Candidates that fit, by setting; where they become many, the best of each group that knobs tell apart are kept.

    A key may compare a group with others (whether it is fuller than without a knob), but only by its best: what
    becomes of the best of each group does not depend on the rest of it.
    """

    def __init__(self, grid: PlacementGrid, key: KeyOf, limit: int) -> None:
        self.grid, self.key, self.limit = grid, key, limit
        self.feasible = 0
        self._kept: dict[int, list[Feasible]] = {}
        self._added = 0

    def add(self, sheet: CostSheet) -> None:
        """Take in what fits of a block; blocks come in the order of placements."""
        rows = np.flatnonzero(sheet.code == FITS)
        if not len(rows):
            return
        self._kept.setdefault(sheet.setting.number, []).append(sheet.fits(rows))
        self.feasible += len(rows)
        self._added += len(rows)
        if self._added > self.limit:
            self._added = 0
            self._kept = {number: [self._best(number, Feasible.joined(parts))] for number, parts in self._kept.items()}

    def _best(self, number: int, fits: Feasible) -> Feasible:
        """The best of each group of `fits` under which placements turn on the same knobs, in their order."""
        best: list[int] = []
        for on in itertools.product((False, True), repeat=len(fits.parted)):
            same = [apart == wanted for apart, wanted in zip(fits.parted.values(), on, strict=True)]
            rows = np.flatnonzero(np.logical_and.reduce(same)) if same else np.arange(len(fits))
            if len(rows):
                table = self.grid.rows({number: fits.take(rows)})
                best += rows[first(self.key(table, self.grid.rules.objective), WANTED)].tolist()
        return fits.take(sorted(best))

    def ranked(self) -> list[Candidate]:
        """The best candidates, best first."""
        if not self.feasible:
            return []
        rows = self.grid.rows({number: Feasible.joined(parts) for number, parts in sorted(self._kept.items())})
        order = first(self.key(rows, self.grid.rules.objective), WANTED)
        return [self.grid.candidate(rows.places[i], self.grid.settings[rows.setting[i]]) for i in order]


def first(key: Key, count: int) -> list[int]:
    """The first `count` rows of the order that `key` gives, without sorting all."""
    left, found = np.arange(len(key[0])), []
    for _ in range(min(count, len(left))):
        rows = left
        for column in key:
            values = column[rows]
            rows = rows[values == values.min()]
        found.append(int(rows[0]))
        left = left[left != rows[0]]
    return found
