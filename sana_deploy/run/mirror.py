"""A copy of a module on another device that follows the module: the second unit of a component.

The module itself is the one that users change: they load LoRA, write to weights, set attention processors. Before each
call the copy is compared with what the module was when it was copied, and is made anew where anything changed. Writing
through `tensor.data` leaves no trace on a tensor, so that the weights themselves are looked at once in each request.
"""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import RunError
from .module_state import ModuleState, PlacedForward, foreign_forward
from .quantize import like, map_parts, own_tensors, parts_of

log = logging.getLogger(__name__)


class Hook(Protocol):
    """The hook of a copy."""

    def forget_graphs(self) -> None:
        """Give back the memory that the copy's calls keep."""


HookOn = Callable[[nn.Module], Hook]
CopyModule = Callable[[nn.Module], nn.Module]
Digest = Callable[[Iterable[torch.Tensor]], torch.Tensor | None]
_PLACING = ("forward", "_old_forward", "_hf_hook", "enable_group_offload")
"""Attributes that placing puts on a module; they work on that module and none other."""
_CALLED_AROUND = ("_forward_hooks", "_forward_pre_hooks")
"""A module's own hooks; they see whole calls, also where it has a copy that takes a part."""


class Mirror:
    """A copy of `module` that is made anew when the module changes.

    Args:
        unit: its name, for the log.
        module: the original.
        copy_module: makes the copy.
        digest: what to recognise weights by.
        hook: puts the unit's hook on a new copy.
        processors: classes of attention processors that whoever calls the copy looks up in the module itself.

    Attributes:
        refusal: why there is no copy; empty where there is one.

    Raises:
        torch.OutOfMemoryError: the copy does not fit.
    """

    def __init__(
        self,
        unit: str,
        module: nn.Module,
        copy_module: CopyModule,
        digest: Digest,
        hook: HookOn,
        processors: Collection[type] = (),
    ) -> None:
        self.unit, self.module, self.refusal = unit, module, ""
        self._processors = processors
        self._copy_module, self._digest, self._hook_on = copy_module, digest, hook
        self._lock = threading.RLock()
        self._copy: nn.Module | None = None
        self._hook: Hook | None = None
        self._make()

    def current(self, seen: set[str]) -> nn.Module | None:
        """The copy of the module as it is now; None, and a refusal, where there can be none.

        Args:
            seen: units whose weights were looked at in this request; this one is added.

        Raises:
            torch.OutOfMemoryError: the module changed, and the new copy does not fit.
        """
        with self._lock:
            if not self._state.holds() or (self.unit not in seen and not self._same_weights()):
                self.free()
                self._make()
                done = f"there is no copy: {self.refusal}" if self.refusal else "it was copied anew"
                log.warning("the module behind %s changed; %s", self.unit, done)
            seen.add(self.unit)
            return self._copy

    def free(self) -> None:
        """Give back the memory of the copy."""
        with self._lock:
            if self._hook is not None:
                self._hook.forget_graphs()
            self._copy = self._hook = None
            gc.collect()  # a hooked module refers to itself

    def _make(self) -> None:
        state, weights = ModuleState(self.module, True, self._processors), self._digest(stored(self.module))
        self.refusal = whole_only(self.module, self._processors)
        if not self.refusal:
            try:
                made = self._copy_module(self.module)
            except (TypeError, AttributeError, pickle.PicklingError, RunError) as problem:
                self.refusal = f"it cannot be copied: {problem}"
            else:
                self._copy, self._hook = made, self._hook_on(made)
        self._state, self._weights = state, weights  # last: where the copy failed, the next call tries again

    def _same_weights(self) -> bool:
        found = self._digest(stored(self.module))
        if found is None or self._weights is None:
            return True
        return found.device == self._weights.device and torch.equal(found, self._weights)


def copied_to(module: nn.Module, device: torch.device) -> nn.Module:
    """Copy a module, placed or not, with all its weights onto `device`; quantised weights stay quantised.

    The copy is not placed, and has none of the hooks on the module itself. Tensors that layers share stay shared.

    Raises:
        torch.OutOfMemoryError: it does not fit.
        TypeError: an attribute of a layer cannot be copied.
    """
    memo: dict[int, Any] = {id(value): "" for key, value in vars(module).items() if key in _PLACING}
    memo |= {id(getattr(module, name)): OrderedDict() for name in _CALLED_AROUND}
    with torch.no_grad():
        for _, _, value in own_tensors(module):
            if id(value) not in memo:
                memo[id(value)] = like(value, map_parts(value.detach(), lambda part: part.to(device, copy=True)))
    made = copy.deepcopy(module, memo)
    for name in _PLACING:
        vars(made).pop(name, None)
    for layer in made.modules():
        if isinstance(vars(layer).get("forward"), PlacedForward):
            vars(layer).pop("forward")
    return made


def digest(tensors: Iterable[torch.Tensor]) -> torch.Tensor | None:
    """What changes when values in `tensors` do: norms of floating-point ones, sums of whole numbers; None without any.

    Returns:
        One vector of float64, the same for the same values on the same device; its bits are in int64.
    """
    groups: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    found: list[torch.Tensor] = []
    with torch.no_grad():
        for dtype, group in groups.items():
            if dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):  # a kernel for many tensors
                wide = dtype if dtype == torch.float64 else torch.float32
                found.append(torch.stack(torch._foreach_norm(group, 2, dtype=wide)).double())
            else:
                found.append(torch.stack([part.sum(dtype=torch.int64) for part in group]).double())
        return torch.cat(found).view(torch.int64) if found else None


def whole_only(module: nn.Module, processors: Collection[type] = ()) -> str:
    """Why no copy of `module` may take a part of its rows; empty where one may.

    Hooks, forwards and attention processors from elsewhere may look at rows together, or keep what they saw; those of
    the classes in `processors` are known.
    """
    for path, layer in module.named_modules():
        if path and any(getattr(layer, name) for name in _CALLED_AROUND):
            return f"{path} has hooks"
        if path and foreign_forward(layer) is not None:
            return f"{path} has another forward than its class"
        processor = vars(layer).get("processor")
        if processor is not None and not (type(processor) in processors or _takes_rows_alone(type(processor))):
            return f"{path} has the attention processor {type(processor).__name__}, which may look at rows together"
    if any(part.is_inference() for part in stored(module)):
        return "its weights were made in inference mode, which hides what is written to them"
    return ""


def _takes_rows_alone(kind: type) -> bool:
    """Whether an attention processor is diffusers' own, and none that deals rows out itself (perturbed attention)."""
    return kind.__module__.startswith("diffusers.") and "PAG" not in kind.__name__


def stored(module: nn.Module) -> list[torch.Tensor]:
    """The ordinary tensors that hold a module's weights and buffers."""
    return [part for _, _, value in own_tensors(module) for part in parts_of(value)]
