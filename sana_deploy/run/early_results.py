"""A forward that makes each of its results as soon as the block that it is made of has run, and not at the end.

diffusers' ControlNet runs all blocks, projects what each gave, and scales that. A projection needs its own block only:
where the denoiser is on another device, it can have the first residual while the ControlNet is at its second block. The
forward stays diffusers' own, with its blocks and projections exchanged while it runs: a block projects and scales what
it gave, and a projection hands that on. The kernels and their arguments are the same, and so are the bits.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..declare.pipelines.base import LayeredResults
from .not_copied import NotCopied
from .tensor_mark import TensorMark

log = logging.getLogger(__name__)


class UnlikeDescriptionError(Exception):
    """A forward does something else than its description says."""


class EarlyResults(NotCopied):
    """A module's forward, with each result made right after its block.

    A forward that does something else with blocks or projections than `layered` says runs as it is from then on, and
    `problem` says why.

    Args:
        module: whose forward it is.
        forward: its own.
        layered: how it makes its results.
        on_made: called with a result's number when its kernels were launched, but for the last one's; returns whether
            work is recorded, whose repetitions will say so again.
    """

    def __init__(
        self, module: nn.Module, forward: Callable[..., Any], layered: LayeredResults, on_made: Callable[[int], bool]
    ) -> None:
        self.module, self.forward, self.layered, self.on_made = module, forward, layered, on_made
        self.signature = inspect.signature(type(module).forward)
        self.problem: str | None = None
        self._recorded: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()

    def says_when(self, result: torch.Tensor) -> bool:
        """Whether `result` is one of recorded work, whose repetitions say when they have made each."""
        return self._recorded.get(id(result)) is result

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward; results are equal bit for bit."""
        if self.problem is None:
            try:
                return self._early(args, kwargs)
            except UnlikeDescriptionError as problem:
                self.problem = str(problem)
                log.warning("residuals are sent when all are made: %s", problem)
        return self.forward(*args, **kwargs)

    def _early(self, args: Any, kwargs: Any) -> Any:
        given = self.signature.bind(self.module, *args, **kwargs)
        given.apply_defaults()
        blocks, projections = (getattr(self.module, name) for name in (self.layered.blocks, self.layered.projections))
        run = _Run(given.arguments[self.layered.scale], list(projections), self.on_made)
        instead = [_Block(inner, run, i) for i, inner in enumerate(blocks)]
        handed_on = [_Projection(inner, run, i) for i, inner in enumerate(projections)]
        with _exchanged(blocks, instead), _exchanged(projections, handed_on):
            try:
                result = self.forward(*args, **kwargs)
            except (IndexError, TypeError, AttributeError) as problem:
                raise UnlikeDescriptionError(f"the forward is unlike its description ({problem})") from problem
        leaves = pytree.tree_leaves(result)
        if len(leaves) != len(run.made) or any(a is not b.result for a, b in zip(leaves, run.made, strict=True)):
            raise UnlikeDescriptionError("the forward returns something else than its projections, in their order")
        if run.recorded:
            self._recorded.update({id(leaf): leaf for leaf in leaves})
        return result


class _Made:
    """A result that waits until the forward comes to it: it may be scaled, as it already is, and nothing else."""

    def __init__(self, hidden: torch.Tensor, result: torch.Tensor, scale: Any) -> None:
        self.source, self.result, self.scale = TensorMark.of(hidden), result, scale

    def __mul__(self, scale: object) -> torch.Tensor:
        if scale is not self.scale:
            raise UnlikeDescriptionError("the forward scales results by something else than its argument")
        return self.result


@dataclass
class _Run:
    """One run of a forward: its scale, the projections as they are, what was made so far and whether it is recorded."""

    scale: Any
    projections: list[nn.Module]
    on_made: Callable[[int], bool]
    made: list[_Made] = field(default_factory=list)
    recorded: bool = True

    def after_block(self, number: int, hidden: torch.Tensor) -> None:
        """Make the result of a block, where it has one."""
        if number < len(self.projections):
            self.made.append(_Made(hidden, self.projections[number](hidden) * self.scale, self.scale))
        if number + 1 < len(self.projections):
            self.recorded &= self.on_made(number)

    def projected(self, number: int, hidden: object) -> _Made:
        """What stands for the projection of `hidden`."""
        if not self.made[number].source.holds(hidden):
            raise UnlikeDescriptionError("the forward projects something else than its block gave")
        return self.made[number]


class _Instead(nn.Module):
    """Takes the place of a layer, which stays within it for whoever goes through all layers."""

    def __init__(self, inner: nn.Module, run: _Run, number: int) -> None:
        super().__init__()
        self.inner, self.run, self.number = inner, run, number


class _Block(_Instead):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self.inner(*args, **kwargs)
        self.run.after_block(self.number, hidden)
        return hidden


class _Projection(_Instead):
    def forward(self, hidden: torch.Tensor) -> _Made:
        return self.run.projected(self.number, hidden)


@contextlib.contextmanager
def _exchanged(layers: nn.ModuleList, instead: Sequence[nn.Module]) -> Iterator[None]:
    """Have whoever goes through `layers` find others; forward hooks would be compiled into layers that are compiled."""
    held: dict[str, Any] = layers._modules
    own = dict(held)
    held.update(zip(own, instead, strict=True))
    try:
        yield
    finally:
        held.update(own)
