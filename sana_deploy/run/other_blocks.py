"""Which blocks of a component that is dealt by layers are not with its first ones, and where they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..plan.artifact import ResolvedPlan
from ..plan.units import Unit
from .quantize import like, map_parts, own_tensors


@dataclass(frozen=True)
class OtherBlocks:
    """The blocks of a component that are not with its first ones.

    Attributes:
        unit: the name of the unit that they are.
        blocks: the attribute that lists all blocks.
        first: how many are with the rest of the component.
        device: where the others are.
    """

    unit: str
    blocks: str
    first: int
    device: str

    def hold(self, key: str) -> bool:
        """Whether the tensor of this name in the component belongs to them."""
        attribute, _, rest = key.partition(".")
        return attribute == self.blocks and int(rest.partition(".")[0]) >= self.first

    def of(self, module: nn.Module) -> list[nn.Module]:
        """The blocks themselves."""
        return list(getattr(module, self.blocks))[self.first :]

    def move(self, module: nn.Module, device: torch.device) -> None:
        """Move them to their device, and all else of the module to `device`."""
        others = self.of(module)
        for block in others:
            block.to(self.device)
        for own, key, value in own_tensors(module, others):
            own[key] = like(value, map_parts(value.detach(), lambda part: part.to(device)))


def other_blocks(resolved: ResolvedPlan, name: str) -> OtherBlocks | None:
    """The blocks of a component that a plan has elsewhere; None where it is whole."""
    unit, part = Unit(name, 1).name, resolved.plan.pipeline.by_name[name]
    if name not in resolved.plan.layers or unit not in resolved.unit_devices or part.layers is None:
        return None
    return OtherBlocks(unit, part.layers.blocks, resolved.plan.layers[name], resolved.unit_devices[unit])
