"""A component's forward, or another call of it, replayed from graphs where it can be, and else run eagerly."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .compiled import CompiledForward
from .factor import Factor, Number, marked
from .graphs import DeviceGraphs, Graph, Input
from .module_state import ModuleState, autocast_dtype
from .not_copied import NotCopied
from .recent import Recent
from .step_invariants import Prepared, StepInvariants, refresh

log = logging.getLogger(__name__)
Forward = Callable[..., Any]
MOST_FORMS = 64
"""Forms of calls that a forward remembers to have seen, or to have failed at."""


class GraphedForward(NotCopied):
    """A component's forward, or another call of it, replayed from graphs where it can be.

    An eager call has a reason, unless it is the first of its form.

    Args:
        name: the component.
        module: whose forward it is.
        forward: the eager one.
        graphs: the graphs of the component's device.
        on_eager: called with the reason whenever a call runs eagerly that is not the first of its form.
        lasting: copy results, so that the next replay does not write over them.
        invariants: what a graph reads and does not compute, since it is the same in every step.
        unfit: says why no graph may take a call of these arguments; None where one may.
        factors: named arguments that are numbers which the results are multiplied by: one graph serves all of them.
        large: an eager call needs the memory that its graphs keep, so that graphs go before one.
        caller: who calls now. Where results are not `lasting`, a call by another one runs eagerly until they were used.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        forward: Forward,
        graphs: DeviceGraphs,
        on_eager: Callable[[str], None] = lambda reason: None,
        lasting: bool = True,
        caller: Callable[[], object] = threading.current_thread,
        factors: Collection[str] = (),
        unfit: Callable[[Sequence[Any], Mapping[str, Any]], str | None] = lambda args, kwargs: None,
        invariants: StepInvariants | None = None,
        large: bool = False,
    ) -> None:
        self.name, self.module, self.forward, self.graphs = name, module, forward, graphs
        self.on_eager, self.lasting, self.caller, self.factors = on_eager, lasting, caller, factors
        self.unfit, self.invariants, self.large = unfit, invariants, large
        self.state: ModuleState | None = None
        self.seen: Recent[Hashable, bool] = Recent(MOST_FORMS)
        self.refused: Recent[Hashable, str] = Recent(MOST_FORMS)
        self.replays = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward: from its graph, or eagerly."""
        leaves, spec = pytree.tree_flatten((args, marked(kwargs, self.factors)))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        with self.graphs.lock:
            try:
                return self._run(leaves, spec, tensors, lambda: self._eager(args, kwargs), self.unfit(args, kwargs))
            finally:
                self.graphs.release(tensors)

    def _eager(self, args: Any, kwargs: Any) -> Any:
        if self.large:
            self.graphs.make_room()
        return self.forward(*args, **kwargs)

    def _run(
        self,
        leaves: Sequence[Any],
        spec: Any,
        tensors: Sequence[torch.Tensor],
        eager: Callable[[], Any],
        reason: str | None,
    ) -> Any:
        self._follow_changes()
        reason = reason or self._unfit(leaves)
        casts = frozenset(map(autocast_dtype, {one.device.type for one in tensors}))
        form = None if reason else (spec, *map(_form, leaves), casts)
        places = [self.graphs.place_of(one) for one in tensors]
        key = (self, form, *((i, id(place)) for i, place in enumerate(places) if place is not None))
        reason = reason or self.refused.get(key)
        if reason is not None:
            self.on_eager(reason)
            return eager()
        graph = self.graphs.find(key)
        if graph is None and not self.seen.get(form):
            self.seen.put(form, True)
            return self.graphs.recorder.warm_up(eager, self.large)
        graph = graph or self._capture(key, leaves, spec, places)
        if graph is None:
            return eager()
        holder, caller = graph.holder(), self.caller()
        if holder is not None and holder is not caller:
            self.on_eager("another request had not used its results yet")
            return eager()
        self.replays += 1
        result = graph.run(tensors, [leaf for leaf in leaves if isinstance(leaf, Number)])
        if self.lasting:
            return pytree.tree_map_only(torch.Tensor, torch.clone, result)
        graph.holder = weakref.ref(caller)
        return result

    @property
    def innermost(self) -> Forward:
        """What computes at last, eagerly and in graphs: the module's own forward, unless another one was set.

        One that is set must give the same bits; graphs that were captured stay. It works within what compiles layers or
        computes them once, which look for them where they belong.
        """
        return self._around_innermost.forward

    @innermost.setter
    def innermost(self, forward: Forward) -> None:
        self._around_innermost.forward = forward

    @property
    def _around_innermost(self) -> GraphedForward | StepInvariants | CompiledForward:
        outer = self.invariants or self
        return outer.forward if isinstance(outer.forward, CompiledForward) else outer

    def reset(self) -> None:
        """Forget what was captured."""
        self.graphs.drop(self)
        self.seen.clear()
        self.refused.clear()

    def _follow_changes(self) -> None:
        """Forget graphs when the module is not what it was: other weights, layers, adapters or attention."""
        if self.state is None:
            self.state = ModuleState(self.module)
        elif not self.state.holds():
            self.state = ModuleState(self.module)
            self.reset()

    def _unfit(self, leaves: Sequence[Any]) -> str | None:
        """Why no graph can take this call."""
        if torch.is_grad_enabled() and any(value.requires_grad for value in self.module.parameters()):
            return "gradients are recorded"
        if self.module.training:
            return "the module is in training mode"
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                if leaf.device != self._device:
                    return f"an argument is on {leaf.device}"
            elif not isinstance(leaf, (int, float, str, bool, type(None), torch.dtype)):
                return f"an argument is a {type(leaf).__name__}"
        return None

    @property
    def _device(self) -> torch.device:
        return next(self.module.parameters()).device

    def _capture(
        self, key: Hashable, leaves: Sequence[Any], spec: Any, places: Sequence[torch.Tensor | None]
    ) -> Graph | None:
        """Capture a call, whose tensors have these `places`; None, and a reason kept, where that fails."""
        recorder = self.graphs.recorder
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        inputs = [
            Input(tensor, recorder) if place is None else None for tensor, place in zip(tensors, places, strict=True)
        ]
        number = torch.empty(1, dtype=torch.float64, device=self._device)
        factors = [Factor(recorder.empty_like(number), leaf) for leaf in leaves if isinstance(leaf, Number)]
        read = iter([place if own is None else own.tensor for own, place in zip(inputs, places, strict=True)])
        scaled = iter(factors)
        own_leaves = [
            next(read) if isinstance(leaf, torch.Tensor) else next(scaled) if isinstance(leaf, Number) else leaf
            for leaf in leaves
        ]
        args, kwargs = pytree.tree_unflatten(own_leaves, spec)
        prepared = self.invariants.prepared(kwargs) if self.invariants else []
        try:
            replay, result = recorder.record(lambda: self._recorded(prepared, args, kwargs))
        except (RuntimeError, ValueError, TypeError) as problem:
            reason = f"its capture failed: {(str(problem) or type(problem).__name__).splitlines()[0]}"
            log.warning("%s stays eager: %s", self.name, reason)
            self.refused.put(key, reason)
            self.on_eager(reason)
            return None
        reads = [place for place in places if place is not None]
        graph = Graph(replay, inputs, result, reads, factors, lambda: refresh(prepared), large=self.large)
        self.graphs.add(key, graph)
        return graph

    def _recorded(self, prepared: Sequence[Prepared], args: Any, kwargs: Any) -> Any:
        if self.invariants is None:
            return self.forward(*args, **kwargs)
        return self.invariants.recorded(prepared, args, kwargs)


def _form(leaf: Any) -> Hashable:
    """What a graph of a call depends on of an argument: all but the values of a tensor, and of a factor."""
    if isinstance(leaf, Number):
        return Number
    if not isinstance(leaf, torch.Tensor):
        return type(leaf), leaf
    return tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device
