"""What components over GPUs share: counted exchanges, units as they are now, and why a call is not dealt out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..declare.pipelines import STEP_EXCHANGES, Exchanges
from .border import Border
from .mirror import Mirror
from .rows.exchange import Ask, Band, Gather, Group, Halo, Sum
from .traffic import Traffic


def named(exchanges: Exchanges) -> Mapping[type[Ask], str]:
    """What is exchanged, as plans and outcomes call it."""
    return {Sum: exchanges.sums, Halo: exchanges.edges, Gather: exchanges.keys}


class UndealtError(Exception):
    """The rows of a call cannot be dealt out; the message says why."""


@dataclass
class CountedGroup(Group):
    """Bands whose exchanges are counted as traffic.

    Attributes:
        traffic: of the request.
        names: of what is exchanged.
        tensor: that moves now.
        result: what all of them make.
    """

    traffic: Traffic = field(default_factory=Traffic)
    names: Mapping[type[Ask], str] = field(default_factory=lambda: named(STEP_EXCHANGES))
    tensor: str = ""
    result: str = ""

    def exchange(self, asked: Sequence[Ask]) -> None:
        """Answer what all bands ask; see `Group`."""
        self.tensor = self.names[type(asked[0])]
        super().exchange(asked)

    def move(self, x: Tensor, source: int, target: int) -> Tensor:
        """Move and count; see `Group`."""
        here, there = self.devices[source], self.devices[target]
        if here != there:
            self.traffic.add(here, there, self.tensor, x.nbytes)
        return super().move(x, source, target)

    def joined(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """Join results; see `Group`."""
        self.tensor = self.result
        return super().joined(parts, dim)


@dataclass(frozen=True)
class Team:
    """The units of a component that share the rows of one image, or of one half of guidance.

    Attributes:
        module: the component's own, where it is the first of them.
        mirrors: the copies, in order.
        devices: of each unit.
        shares: rows that each takes of the planned image; of another one, as many in proportion.
    """

    module: nn.Module | None
    mirrors: Sequence[Mirror]
    devices: Sequence[torch.device]
    shares: Sequence[int]


@dataclass(frozen=True)
class Dealt:
    """A call of a team: its group, its bands, the modules that compute them, and the arguments."""

    team: Team
    group: CountedGroup
    bands: Sequence[Band]
    modules: Sequence[Any]
    given: Mapping[str, Any]

    def unit(self, band: Band, name: str) -> str:
        """The unit of a component that computes a band."""
        number = band.index - (self.team.module is not None)
        return name if number < 0 else self.team.mirrors[number].unit


def teams_of(
    module: nn.Module, copies: Sequence[Mirror], devices: Sequence[torch.device], shares: Sequence[int], count: int
) -> list[Team]:
    """Deal the units of a component, a module and its copies, to so many teams of one size; the first with the module.

    Args:
        devices, shares: of each unit; see `Team`.
    """
    size = len(devices) // count
    first = Team(module, copies[: size - 1], devices[:size], shares[:size])
    starts = range(size, len(devices), size)
    return [first, *(Team(None, copies[i - 1 : i - 1 + size], devices[i : i + size], shares[i : i + size])
                     for i in starts)]  # fmt: skip


def units_of(module: nn.Module, mirrors: Sequence[Mirror], border: Border) -> list[Any]:
    """The module and its copies, as they are now.

    Raises:
        UndealtError: a copy cannot stand for the module in this call.
        torch.OutOfMemoryError: the module changed, and a new copy does not fit.
    """
    if torch.is_grad_enabled():
        raise UndealtError("gradients are recorded")
    if module.training:
        raise UndealtError("the module is in training mode")
    found: list[Any] = [module]
    for mirror in mirrors:
        copied = mirror.current(border.state.seen)
        if copied is None:
            raise UndealtError(mirror.refusal)
        found.append(copied)
    return found


def tell(border: Border, name: str, reason: str) -> None:
    """Remark once in a request that a component did all rows by itself."""
    remark = f"the {name} computed all rows of the image on one device: {reason}"
    if remark not in border.state.remarks:
        border.state.remark(remark)
