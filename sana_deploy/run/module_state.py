"""Whether a module still is what it was: the same layers, weights, attention processors and adapters.

A captured graph has the addresses of weights and the order of layers built in. New values in the same memory are fine,
since a graph reads them anew; anything else makes it wrong. The check runs before every call, so that it is made of
comparisons of kept objects.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import RunError
from .quantize import parts_of

_ADAPTER = ("scaling", "active_adapter", "_active_adapter", "_disable_adapters", "merged_adapters")
"""Attributes of peft's layers that are no tensors and change what a layer computes."""


class ModuleState:
    """What a module's work depends on besides its arguments, kept to be compared.

    With `values`, writing to a weight is a change too: PyTorch counts that, but for what goes through `tensor.data`.
    """

    def __init__(self, module: nn.Module, values: bool = False) -> None:
        self.layers = [(layer.__dict__, layer.training) for layer in module.modules()]
        self.sizes: list[tuple[Any, int]] = []
        self.objects: list[tuple[dict[str, Any], str, Any]] = []
        self.addresses: list[tuple[torch.Tensor, tuple[Any, ...]]] = []
        self.words: list[tuple[dict[str, Any], str, str]] = []
        self.versions: list[tuple[torch.Tensor, int]] = []
        for layer in module.modules():
            self._keep(layer)
            if layer is not module:  # whose forward is the border's
                self.objects.append((layer.__dict__, "forward", layer.__dict__.get("forward")))
        if values:
            parts = [part for tensor, _ in self.addresses for part in parts_of(tensor) if not part.is_inference()]
            self.versions = [(part, part._version) for part in parts]

    def _keep(self, layer: nn.Module) -> None:
        for held in (layer._modules, layer._parameters, layer._buffers, layer._forward_hooks, layer._forward_pre_hooks):
            self.sizes.append((held, len(held)))
        for named in (layer._modules, layer._parameters, layer._buffers):
            self.objects += [(named, key, value) for key, value in named.items()]
        for tensor in (*layer._parameters.values(), *layer._buffers.values()):
            if tensor is not None:
                self.addresses.append((tensor, _addresses(tensor)))
        values = layer.__dict__
        if "processor" in values:
            self.objects.append((values, "processor", values["processor"]))
        self.words += [(values, key, repr(values[key])) for key in _ADAPTER if key in values]

    def holds(self) -> bool:
        """Whether nothing changed since."""
        return (
            all(len(held) == size for held, size in self.sizes)
            and all(named.get(key) is value for named, key, value in self.objects)
            and all(_addresses(tensor) == known for tensor, known in self.addresses)
            and all(part._version == known for part, known in self.versions)
            and all(values["training"] == training for values, training in self.layers)
            and all(repr(values.get(key)) == word for values, key, word in self.words)
        )


def _addresses(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Dtype, and where the values of a tensor are: of each part of a quantised one; alone where there are none."""
    try:
        return tensor.dtype, *(part.data_ptr() for part in parts_of(tensor))
    except (RuntimeError, RunError):  # a tensor without values, in a rehearsal
        return (tensor.dtype,)
