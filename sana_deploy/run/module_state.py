"""Whether a module still is what it was: the same layers, weights, attention processors and adapters.

A captured graph has the addresses of weights and the order of layers built in. New values in the same memory are fine,
since a graph reads them anew; anything else makes it wrong. A result that is kept depends on the values too. The check
runs before every call, so that it is made of comparisons of kept objects. Tensors are not kept alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import repeat
from operator import attrgetter, call, is_, is_not, itemgetter
from typing import Any

import torch
from torch import nn

from ..errors import RunError
from .not_copied import NotCopied
from .quantize import parts_of
from .tensor_mark import version_of

_ADAPTER = ("scaling", "active_adapter", "_active_adapter", "_disable_adapters", "merged_adapters")
"""Attributes of peft's layers that are no tensors and change what a layer computes."""
_PLAIN = (bool, int, float, str)
_ATTENTION = "_attn_implementation_internal"
"""Where a config of transformers says which attention its layers compute."""


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What `torch.autocast` computes in on devices of a type; None where it is off, or there is none for them."""
    on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if on else None


class PlacedForward(NotCopied):
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
        without: classes of attention processors that do not count.
    """

    def __init__(self, module: nn.Module, values: bool = False, without: Collection[type] = ()) -> None:
        layers = [*module.modules()]
        self.own = [vars(layer) for layer in layers]
        self.training = [layer.training for layer in layers]
        inner = layers[1:]  # the forward of the module itself is the border's
        self.forwards = [(layer, foreign_forward(layer)) for layer in inner]
        self.placed = [vars(layer).get("forward") for layer in inner]
        self.held = [held for layer in layers for held in _held(layer)]
        self.sizes = [*map(len, self.held)]
        self.objects = _Entries([entry for layer in layers for entry in _objects(layer, without)])
        self.tensors = _Tensors(layers, values)
        self.plain = _Plain([own for own in self.own if "processor" in own])
        self.words = [word for layer in layers for word in _words(layer)]

    def holds(self) -> bool:
        """Whether nothing changed since. No loop of Python goes over what is compared: it is some thousand things."""
        return (
            [*map(len, self.held)] == self.sizes
            and all(map(is_, self.objects.now(), self.objects.values))
            and self.tensors.hold()
            and self._forwards_hold()
            and [*map(itemgetter("training"), self.own)] == self.training
            and self.plain.hold()
            and all(repr(values.get(key)) == word for values, key, word in self.words)
        )

    def _forwards_hold(self) -> bool:
        if all(map(is_, map(dict.get, self.own[1:], repeat("forward")), self.placed)):
            return True
        return all(foreign_forward(layer) is forward for layer, forward in self.forwards)


class _Entries:
    """Entries of dictionaries, by column."""

    def __init__(self, entries: Sequence[tuple[dict[str, Any], str, Any]]) -> None:
        self.owners = [owner for owner, _, _ in entries]
        self.keys = [key for _, key, _ in entries]
        self.values = [value for _, _, value in entries]

    def now(self) -> Iterable[Any]:
        """The values of today."""
        return map(dict.get, self.owners, self.keys)


class _Plain:
    """Numbers and words among the attributes of attention layers and of their processors, such as a scale.

    Those of all layers would take as long to compare as everything else.
    """

    def __init__(self, layers: Iterable[dict[str, Any]]) -> None:
        self.owners: list[dict[str, Any]] = []
        self.getters: list[Callable[[dict[str, Any]], Any]] = []
        for own in layers:
            for values in (own, getattr(own["processor"], "__dict__", {})):
                if names := [key for key, value in values.items() if type(value) in _PLAIN]:
                    self.owners.append(values)
                    self.getters.append(itemgetter(*names))
        self.values = self._now()

    def hold(self) -> bool:
        """Whether they are what they were."""
        try:
            return self._now() == self.values
        except KeyError:
            return False

    def _now(self) -> list[Any]:
        return [*map(call, self.getters, self.owners)]


class _Tensors:
    """Parameters and buffers: which they are, their dtypes and addresses, and versions where values count."""

    def __init__(self, layers: Iterable[nn.Module], values: bool) -> None:
        found = [
            (named, key, tensor)
            for layer in layers
            for named in (layer._parameters, layer._buffers)
            for key, tensor in named.items()
            if tensor is not None
        ]
        self.counted = values
        self.plain = _Entries([(named, key, weakref.ref(one)) for named, key, one in found if _is_plain(one)])
        now = [one for _, _, one in found if _is_plain(one)]
        self.dtypes, self.addresses, self.versions = self._seen(now)
        self.others = [
            (named, key, weakref.ref(one), _memory(one, values)) for named, key, one in found if not _is_plain(one)
        ]

    def hold(self) -> bool:
        """Whether they are what they were."""
        now, kept = [*self.plain.now()], [*map(weakref.ref.__call__, self.plain.values)]
        return (
            all(map(is_, now, kept))
            and all(map(is_not, now, repeat(None)))
            and self._seen(now) == (self.dtypes, self.addresses, self.versions)
            and all(self._is(named.get(key), ref(), known) for named, key, ref, known in self.others)
        )

    def _seen(self, tensors: Sequence[torch.Tensor]) -> tuple[list[Any], list[int], list[int]]:
        versions = [*map(attrgetter("_version"), tensors)] if self.counted else []
        return [*map(attrgetter("dtype"), tensors)], [*map(torch.Tensor.data_ptr, tensors)], versions

    def _is(self, tensor: torch.Tensor | None, kept: torch.Tensor | None, known: tuple[Any, ...]) -> bool:
        return tensor is not None and tensor is kept and _memory(tensor, self.counted) == known


def _held(layer: nn.Module) -> tuple[Any, ...]:
    return layer._modules, layer._parameters, layer._buffers, layer._forward_hooks, layer._forward_pre_hooks


def _objects(layer: nn.Module, without: Collection[type]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Layers, parameters that are left out, and the attention processor."""
    for key, inner in layer._modules.items():
        yield layer._modules, key, inner
    for named in (layer._parameters, layer._buffers):
        yield from ((named, key, None) for key, tensor in named.items() if tensor is None)
    if "processor" in vars(layer) and type(vars(layer)["processor"]) not in without:
        yield vars(layer), "processor", vars(layer)["processor"]


def _words(layer: nn.Module) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Settings of attention and adapters, in words."""
    values = vars(layer)
    settings = getattr(values.get("config"), "__dict__", {})
    if _ATTENTION in settings:
        yield settings, _ATTENTION, repr(settings[_ATTENTION])
    yield from ((values, key, repr(values[key])) for key in _ADAPTER if key in values)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor has one address and a version."""
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.is_inference():
        return False
    try:
        tensor.data_ptr()
    except RuntimeError:  # one without values
        return False
    return True


def _memory(tensor: torch.Tensor, values: bool) -> tuple[Any, ...]:
    """Where the values are; which they are, where that counts."""
    if not values:
        return _addresses(tensor)
    return (*_addresses(tensor), version_of(tensor), *map(version_of, parts_of(tensor)))


def _addresses(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Dtype, and where the values of a tensor are: of each part of a quantised one; alone where there are none."""
    try:
        return tensor.dtype, *(part.data_ptr() for part in parts_of(tensor))
    except (RuntimeError, RunError):  # a tensor without values, in a rehearsal
        return (tensor.dtype,)
