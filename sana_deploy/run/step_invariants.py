"""What a component computes alike in every step of a request, from inputs that stay the same, is computed once.

A chain of two layers turns such an input into what the rest of the forward reads: the caption's projection and norm,
the embedding of the control image and the layer behind it. diffusers computes them in each step. Here the first step
does, and while the input comes again unwritten and the layers are what they were, the first layer hands the chain's
result on and the second one lets it through. The arithmetic is the layers' own, so that the bits are.

A graph reads the result from memory of its own, which is written before a replay when the input was.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import nn

from ..declare.pipelines import SteadyChain
from .module_state import ModuleState, PlacedForward, autocast_dtype
from .not_copied import NotCopied
from .tensor_mark import TensorMark

Forward = Callable[..., Any]


@dataclass
class Kept:
    """The result of a chain for one input.

    Attributes:
        input: the input as it was.
        result: of the last layer.
        made: the result as it was made.
        states: the layers as they were.
    """

    input: TensorMark
    result: torch.Tensor
    made: TensorMark
    states: Sequence[ModuleState]

    def holds(self, value: torch.Tensor) -> bool:
        """Whether this is still what the layers would make of `value`, and nobody wrote to it."""
        same = self.input.holds(value) and self.made.holds(self.result)
        return same and all(state.holds() for state in self.states)


class Chain:
    """Two layers of one component, the second of which gets what the first one gives; each thread has its own call.

    Args:
        component: that they are layers of.
        description: which ones, and of which argument.
    """

    def __init__(self, component: nn.Module, description: SteadyChain) -> None:
        self.argument, self.names = description.argument, (description.first, description.last)
        self.layers: tuple[nn.Module, nn.Module] = (
            getattr(component, description.first),
            getattr(component, description.last),
        )
        self.inner: tuple[Forward, Forward] = (self.layers[0].forward, self.layers[1].forward)
        self._call = _OneCall()
        self.kept: Kept | None = None
        self.placed = (PlacedForward(self._first), PlacedForward(self._last))
        for layer, forward in zip(self.layers, self.placed, strict=True):
            layer.forward = forward

    def take_off(self) -> None:
        """Give the layers their own forward back."""
        for layer, forward in zip(self.layers, self.placed, strict=True):
            if vars(layer).get("forward") is forward:
                vars(layer).pop("forward")
        self.kept = None

    def belongs_to(self, component: nn.Module) -> bool:
        """Whether the component has these layers still, and they this forward."""
        return all(
            getattr(component, name, None) is layer and vars(layer).get("forward") is forward
            for name, layer, forward in zip(self.names, self.layers, self.placed, strict=True)
        )

    def compute(self, value: torch.Tensor) -> torch.Tensor:
        """The result for `value`."""
        result: torch.Tensor = self.inner[1](self.inner[0](value))
        return result

    def keep(self, value: torch.Tensor, result: torch.Tensor) -> Kept:
        """Describe `result` as what the layers, as they are, make of `value`; nothing is kept alive by that."""
        states = [ModuleState(layer, values=True) for layer in self.layers]
        return Kept(TensorMark.of(value, self._forget), result, TensorMark.of(result), states)

    def kept_for(self, value: torch.Tensor) -> Kept | None:
        """What is kept for `value`, if it still is what the layers would make."""
        kept = self.kept
        return kept if kept is not None and kept.holds(value) else None

    @contextmanager
    def at_work(self, value: torch.Tensor, kept: Kept | None) -> Iterator[None]:
        """Have the layers work on `value` while the block runs: from what is kept, or keeping what they make."""
        call = self._call
        before = call.value, call.kept, call.between
        call.value, call.kept, call.between = value, kept, None
        try:
            yield
        finally:
            call.value, call.kept, call.between = before

    def _forget(self, source: weakref.ref[torch.Tensor]) -> None:
        if self.kept is not None and self.kept.input.source is source:
            self.kept = None

    def _first(self, value: torch.Tensor, *more: Any, **named: Any) -> Any:
        call = self._call
        if more or named or call.value is None or not _alike(value, call.value):
            return self.inner[0](value, *more, **named)
        if call.kept is not None:
            return call.kept.result
        call.between = self.inner[0](value)
        return call.between

    def _last(self, value: torch.Tensor, *more: Any, **named: Any) -> Any:
        call = self._call
        if not more and not named:
            if call.kept is not None and _alike(value, call.kept.result):
                return call.kept.result
            if call.value is not None and call.between is not None and _alike(value, call.between):
                result = self.inner[1](value)
                call.between = None
                # The first layer will give this in the place of its own result, which must look the same.
                if _form(result) == _form(value):
                    self.kept = self.keep(call.value, result)
                return result
        return self.inner[1](value, *more, **named)


class _OneCall(threading.local):
    """What the layers of a chain work on in this thread: the argument, what is kept for it, the first one's result."""

    def __init__(self) -> None:
        self.value: torch.Tensor | None = None
        self.kept: Kept | None = None
        self.between: torch.Tensor | None = None


class StepInvariants(NotCopied):
    """The chains of one component, around its forward.

    Args:
        module: the component.
        chains: those of its layers.
        forward: the component's own.
    """

    def __init__(self, module: nn.Module, chains: Sequence[SteadyChain], forward: Forward) -> None:
        self.module, self.forward = module, forward
        # A module of another class may lack them.
        there = [one for one in chains if hasattr(module, one.first) and hasattr(module, one.last)]
        self.chains = [Chain(module, one) for one in there]
        self._casts: dict[str, tuple[TensorMark, torch.Tensor]] = {}

    def take_off(self) -> None:
        """Give the layers their own forward back."""
        for chain in self.chains:
            chain.take_off()

    def cast_once(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Give the inputs of chains the dtype of the first argument, to which the forward would cast them each time."""
        if not args or not isinstance(args[0], torch.Tensor):
            return kwargs
        given = {chain.argument: kwargs.get(chain.argument) for chain in self.chains}
        found = {name: value for name, value in given.items() if _steady(value) and value.dtype != args[0].dtype}
        return {**kwargs, **{name: self._cast(name, value, args[0].dtype) for name, value in found.items()}}

    def eager(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward; what an earlier step made of the same inputs is not made again."""
        known = [(chain, value, chain.kept_for(value)) for chain, value in self._fed(kwargs)]
        return self._run(known, args, kwargs)

    def prepared(self, kwargs: Mapping[str, Any]) -> list[Prepared]:
        """Compute the chains of a call whose inputs a graph will read, for `recorded`."""
        found = []
        with torch.no_grad():
            for chain, value in self._fed(kwargs):
                between = chain.inner[0](value)
                result = chain.inner[1](between)
                if _form(result) == _form(between):
                    found.append(Prepared(chain, value, chain.keep(value, result)))
        return found

    def recorded(self, prepared: Sequence[Prepared], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run the forward with what was prepared."""
        return self._run([(one.chain, one.value, one.kept) for one in prepared], args, kwargs)

    def _run(
        self, known: Sequence[tuple[Chain, torch.Tensor, Kept | None]], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        with ExitStack() as stack:
            for chain, value, kept in known:
                stack.enter_context(chain.at_work(value, kept))
            return self.forward(*args, **kwargs)

    def _fed(self, kwargs: Mapping[str, Any]) -> list[tuple[Chain, torch.Tensor]]:
        """Chains whose layers are the component's still, and their inputs in this call."""
        given = [(chain, kwargs.get(chain.argument)) for chain in self.chains if chain.belongs_to(self.module)]
        return [(chain, value) for chain, value in given if _steady(value)]

    def _cast(self, name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        mark, cast = self._casts.get(name, (None, None))
        if mark is not None and cast is not None and mark.holds(value) and cast.dtype == dtype:
            return cast
        cast = value.to(dtype)
        self._casts[name] = TensorMark.of(value, lambda source: self._drop(name, source)), cast
        return cast

    def _drop(self, name: str, source: weakref.ref[torch.Tensor]) -> None:
        if name in self._casts and self._casts[name][0].source is source:
            del self._casts[name]


@dataclass
class Prepared:
    """A chain's result that a graph reads, and the graph's input that it is made from."""

    chain: Chain
    value: torch.Tensor
    kept: Kept


def refresh(prepared: Sequence[Prepared]) -> None:
    """Write results anew, where they are read, if their input was written or the layers changed."""
    for one in prepared:
        if not one.kept.holds(one.value):
            one.kept.result.copy_(one.chain.compute(one.value))
            one.kept = one.chain.keep(one.value, one.kept.result)


def _steady(value: Any) -> TypeGuard[torch.Tensor]:
    """Whether results of `value` can be kept: a plain tensor that counts what is written to it, without gradients."""
    if type(value) is not torch.Tensor or value.is_inference() or torch.is_grad_enabled():
        return False
    return autocast_dtype(value.device.type) is None


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def _alike(value: Any, known: torch.Tensor) -> bool:
    """Whether `value` is `known`, or a view of all of it in the same order."""
    if value is known:
        return True
    plain = type(value) is torch.Tensor and type(known) is torch.Tensor
    return plain and value.data_ptr() == known.data_ptr() and _form(value) == _form(known)
