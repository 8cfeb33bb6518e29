"""Whether a module still is what it was: the same layers, weights, attention processors and adapters.

A captured graph has the addresses of weights and the order of layers built in. New values in the same memory are fine,
since a graph reads them anew; anything else makes it wrong. A result that is kept depends on the values too. The check
runs before every call, so that it is made of comparisons of kept objects. Tensors are not kept alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import RunError
from .quantize import parts_of
from .tensor_mark import version_of

_ADAPTER = ("scaling", "active_adapter", "_active_adapter", "_disable_adapters", "merged_adapters")
"""Attributes of peft's layers that are no tensors and change what a layer computes."""
_ATTENTION = "_attn_implementation_internal"
"""Where a config of transformers says which attention its layers compute."""


class PlacedForward:
    """A forward that placing puts on a layer: it computes what the layer's own does, and belongs to no other layer."""

    def __init__(self, work: Callable[..., Any]) -> None:
        self.work = work

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Work as the layer does."""
        return self.work(*args, **kwargs)

    def __deepcopy__(self, _: object) -> PlacedForward:
        """Stay with the layer: whoever copies one gives the copy its class's forward back."""
        return self


def foreign_forward(layer: nn.Module) -> Any:
    """The forward that a layer has in the place of its class's, if it is none of placing's own; else None."""
    found = vars(layer).get("forward")
    return None if isinstance(found, PlacedForward) else found


class ModuleState:
    """What a module's work depends on besides its arguments, kept to be compared.

    Args:
        module: the whole component.
        values: whether values that are written in place count, as far as PyTorch counts versions: writing through
            `tensor.data` is not seen.
    """

    def __init__(self, module: nn.Module, values: bool = False) -> None:
        self.values = values
        self.layers = [(layer.__dict__, layer.training) for layer in module.modules()]
        self.sizes: list[tuple[Any, int]] = []
        self.objects: list[tuple[dict[str, Any], str, Any]] = []
        self.tensors: list[tuple[dict[str, Any], str, weakref.ref[torch.Tensor], tuple[Any, ...]]] = []
        self.forwards: list[tuple[nn.Module, Any]] = []
        self.words: list[tuple[dict[str, Any], str, str]] = []
        for layer in module.modules():
            self._keep(layer)
            if layer is not module:  # whose forward is the border's
                self.forwards.append((layer, foreign_forward(layer)))

    def _keep(self, layer: nn.Module) -> None:
        for held in (layer._modules, layer._parameters, layer._buffers, layer._forward_hooks, layer._forward_pre_hooks):
            self.sizes.append((held, len(held)))
        self.objects += [(layer._modules, key, value) for key, value in layer._modules.items()]
        for named in (layer._parameters, layer._buffers):
            for key, tensor in named.items():
                if tensor is None:
                    self.objects.append((named, key, None))
                else:
                    self.tensors.append((named, key, weakref.ref(tensor), self._memory(tensor)))
        values = layer.__dict__
        if "processor" in values:
            self.objects.append((values, "processor", values["processor"]))
        settings = getattr(values.get("config"), "__dict__", {})
        if _ATTENTION in settings:
            self.words.append((settings, _ATTENTION, repr(settings[_ATTENTION])))
        self.words += [(values, key, repr(values[key])) for key in _ADAPTER if key in values]

    def holds(self) -> bool:
        """Whether nothing changed since."""
        return (
            all(len(held) == size for held, size in self.sizes)
            and all(named.get(key) is value for named, key, value in self.objects)
            and all(self._is(named.get(key), kept(), known) for named, key, kept, known in self.tensors)
            and all(foreign_forward(layer) is forward for layer, forward in self.forwards)
            and all(values["training"] == training for values, training in self.layers)
            and all(repr(values.get(key)) == word for values, key, word in self.words)
        )

    def _is(self, tensor: torch.Tensor | None, kept: torch.Tensor | None, known: tuple[Any, ...]) -> bool:
        return tensor is not None and tensor is kept and self._memory(tensor) == known

    def _memory(self, tensor: torch.Tensor) -> tuple[Any, ...]:
        """Where the values are; which they are, where that counts."""
        if not self.values:
            return _addresses(tensor)
        return (*_addresses(tensor), version_of(tensor), *map(version_of, parts_of(tensor)))


def _addresses(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Dtype, and where the values of a tensor are: of each part of a quantised one; alone where there are none."""
    try:
        return tensor.dtype, *(part.data_ptr() for part in parts_of(tensor))
    except (RuntimeError, RunError):  # a tensor without values, in a rehearsal
        return (tensor.dtype,)
