"""What a description says of a component that two GPUs hold by layers: consecutive blocks each, and what crosses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..formats import Dtype
from ..workload import Workload
from .crossing import Configs, Crossing


@dataclass(frozen=True)
class Deal:
    """A component dealt by layers, and what passes it in a request.

    Attributes:
        first: blocks of its first unit; the other ones are its second unit.
        rows: of a denoising step.
        negative: whether a negative prompt passes the text encoder.
    """

    first: int
    rows: int
    negative: bool


DealtCrossings = Callable[[Configs, Workload, Mapping[str, Dtype], Deal], tuple[Crossing, ...]]
"""Tensors that cross between the two units, given configs and dtypes."""


@dataclass(frozen=True)
class Layers:
    """How a component can be dealt: it has blocks, which run one after the other on hidden states.

    Each block gets the hidden states first, and returns them. What works before the blocks and after them belongs to
    the first unit.

    Attributes:
        blocks: the attribute that lists the blocks.
        count: the key of the config that says how many they are.
        crossings: what the blocks of the second unit get, and what the last one returns.
        added: the argument whose tensor i is added to the result of block i + 1; empty where there is none.
    """

    blocks: str
    count: str
    crossings: DealtCrossings
    added: str = ""
