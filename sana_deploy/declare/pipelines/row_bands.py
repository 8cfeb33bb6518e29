"""What a pipeline description says of units that compute some rows of an image each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..formats import Dtype
from ..workload import Workload

Configs = Mapping[str, Mapping[str, Any]]
"""Each component's config."""


@dataclass(frozen=True)
class Exchanges:
    """Names of what is exchanged: rows at edges, sums over all rows, and of a small image all keys and values."""

    edges: str
    sums: str
    keys: str = ""


STEP_EXCHANGES = Exchanges("edge_rows", "attention_sums")
"""Those of a denoising step, as plans and outcomes call them."""


@dataclass(frozen=True)
class BandWork:
    """What a component's unit takes in a step beyond its share of the rows: it puts its neighbours' beside its own.

    Attributes:
        operations: kernels launched.
        moved_bytes: read and written.
        held_bytes: of activations at the fullest moment; less than 0 where it lets go of more than the whole does.
    """

    operations: int
    moved_bytes: int
    held_bytes: int


@dataclass(frozen=True)
class Bands:
    """How the units of a denoising loop compute some rows of an image each.

    Attributes:
        row_pixels: the height in pixels that is dealt to units, given configs.
        crossings: the units' tensors (`base.Crossing`), for a workload and the rows of each: inputs, results, and what
            they exchange. The last number says how many teams there are: the units of each, one team after the other,
            share all rows of an equal part of the batch, and exchange nothing with other teams. A unit without rows
            takes no part.
        work: of a component's unit, given its config and rows; the last number is of teams, too.
    """

    row_pixels: Callable[[Configs], int]
    crossings: Callable[[Configs, Workload, Mapping[str, Dtype], Sequence[int], int], tuple[Any, ...]]
    work: Callable[[Mapping[str, Any], Workload, Dtype, int, int], BandWork]
