"""A component whose first blocks are on one device and whose other blocks are on another, which work in turn.

What comes before the blocks and after them is with the first ones. Hidden states cross where the first of the other
blocks begins, and come back where the last one ends. What all blocks get besides crosses once a call. The arithmetic
is the module's own, so that the bits are.

accelerate's `dispatch_model` would do the same by a hook on every block; it sends what blocks share to each of them
anew, and counts nothing.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..declare.pipelines import Layers
from ..errors import RunError
from ..plan.artifact import ResolvedPlan
from .border import Border
from .not_copied import NotCopied
from .other_blocks import OtherBlocks, other_blocks
from .traffic import move


class DealtForward(NotCopied):
    """A module's forward, part of which works elsewhere.

    Args:
        name: the component.
        module: its module, whose blocks are where they belong.
        layers: what the description says of its blocks.
        others: those that are elsewhere.
        border: of the pipeline.
        forward: what calls the module's layers.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        layers: Layers,
        others: OtherBlocks,
        border: Border,
        forward: Callable[..., Any],
    ) -> None:
        self.name, self.layers, self.others, self.border, self.forward = name, layers, others, border, forward
        self.device, self.blocks = torch.device(others.device), others.of(module)
        self.names = list(inspect.signature(type(module).forward).parameters)[1:]
        self._call = _OneCall()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the forward; what is added to results of the other blocks goes to their device."""
        self._check_device()
        self._call.home = None
        if self.layers.added:
            where = self.names.index(self.layers.added)
            if where < len(args):
                args = (*args[:where], self._added(args[where]), *args[where + 1 :])
            kwargs = {key: self._added(value) if key == self.layers.added else value for key, value in kwargs.items()}
        try:
            return self.forward(*args, **kwargs)
        finally:
            self._call.arrived.clear()

    def hook(self) -> Iterator[Callable[[], object]]:
        """Put hooks on the blocks; yields what takes each off."""
        for block in self.blocks:
            yield block.register_forward_pre_hook(self._arrive, with_kwargs=True).remove
        yield self.blocks[-1].register_forward_hook(self._return).remove

    def _added(self, values: Any) -> Any:
        """Tensor i is added to the result of block i + 1, which of the last block is at home again."""
        if values is None:
            return None
        traffic, name = self.border.state.traffic, self.layers.added
        there = range(self.others.first, self.others.first + len(self.blocks) - 1)
        return tuple(
            move(value, self.device, traffic, name) if number + 1 in there else value
            for number, value in enumerate(values)
        )

    def _arrive(self, block: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """Bring what a block gets to its device."""
        if not args:
            return args, dict(kwargs)
        hidden, *rest = args
        if block is self.blocks[0]:
            self._call.home = hidden.device
            self._turn(self.name, self.others.unit)
        names = list(inspect.signature(type(block).forward).parameters)[1:]
        given = [self._fetch(value, name) for value, name in zip(rest, names[1:], strict=False)]
        hidden = move(hidden, self.device, self.border.state.traffic, names[0])
        return (hidden, *given), {key: self._fetch(value, key) for key, value in kwargs.items()}

    def _fetch(self, value: Any, name: str) -> Any:
        """Move one argument that blocks share, or tensors in it, the first time that it comes in a call."""
        if isinstance(value, (tuple, list)):
            return type(value)(self._fetch(one, name) for one in value)
        if not isinstance(value, torch.Tensor) or value.device == self.device:
            return value
        arrived = self._call.arrived
        if id(value) not in arrived:
            arrived[id(value)] = value, move(value, self.device, self.border.state.traffic, name)
        return arrived[id(value)][1]

    def _return(self, block: nn.Module, args: Any, output: Any) -> Any:
        """Bring the result of the last block back to where the first ones are."""
        self._call.arrived.clear()
        if self._call.home is None:
            return output
        back = move(output, self._call.home, self.border.state.traffic, "hidden_states")
        self._turn(self.others.unit, self.name)
        return back

    def _turn(self, ends: str, begins: str) -> None:
        """Tell whoever listens that one unit ends and another one begins."""
        self.border.turn(ends, begins, "forward")

    def _check_device(self) -> None:
        found = next((value.device for value in self.blocks[0].parameters()), self.device)
        if found != self.device:
            raise RunError(
                f"{self.others.unit} was moved to {found} after it was placed on {self.device}",
                where=self.name,
                hint="move it back, or unplace(pipeline) and place it by another plan",
            )


class _OneCall(threading.local):
    """What the call of one thread has brought: id of a tensor -> it and its copy; and where hidden states came from."""

    def __init__(self) -> None:
        self.arrived: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.home: torch.device | None = None


def deal_layers(pipeline: Any, resolved: ResolvedPlan, border: Border) -> None:
    """Have the hooked components that a plan deals by layers work on both devices; undone with the border."""
    for name in resolved.plan.layers:
        others, module = other_blocks(resolved, name), getattr(pipeline, name)
        layers = border.pipeline.by_name[name].layers
        if others is None or layers is None:
            continue
        hook = module._hf_hook
        dealt = DealtForward(name, module, layers, others, border, vars(module)["_old_forward"])
        hook.replace_forward(module, dealt)
        border.restore += dealt.hook()
        # Without hooks a module has to be on one device, and it may fit on no GPU.
        border.origins[name] = torch.device("cpu")
