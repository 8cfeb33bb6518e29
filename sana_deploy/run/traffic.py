"""Moves tensors between devices, and counts every byte where it moves."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .split_tensor import SplitTensor

Movement = tuple[str, str, str]
"""Source device, destination device, tensor."""


@dataclass
class Traffic:
    """Bytes moved between devices, counted where they move, by tensor."""

    moved: Counter[Movement] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, src: torch.device, dst: torch.device, tensor: str, count: int) -> None:
        """Count `count` bytes of `tensor` from `src` to `dst`."""
        with self._lock:
            self.moved[str(src), str(dst), tensor] += count


def by_pair(moved: Counter[Movement]) -> dict[str, int]:
    """Sum movements over tensors: "src->dst" -> bytes."""
    pairs: Counter[str] = Counter()
    for (src, dst, _), count in sorted(moved.items()):
        pairs[f"{src}->{dst}"] += count
    return dict(pairs)


def floating(value: Any) -> Iterator[torch.Tensor]:
    """Yield the floating-point tensors in nested dicts (model outputs), lists and tuples; of a split one, its parts."""
    if isinstance(value, SplitTensor) and value.parts is not None:
        yield from floating(value.parts)
    elif isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from floating(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from floating(item)


def move(value: Any, device: torch.device, traffic: Traffic, name: str) -> Any:
    """Return `value` with every tensor in it (dict, list, tuple, model output) on `device`, counting bytes."""
    if isinstance(value, torch.Tensor):
        if value.device == device:
            return value
        traffic.add(value.device, device, name, value.nbytes)
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(move(item, device, traffic, name) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(move(item, device, traffic, name) for item in value)
    if isinstance(value, dict):
        moved = {key: move(item, device, traffic, name) for key, item in value.items()}
        return moved if type(value) is dict else type(value)(**moved)
    return value
