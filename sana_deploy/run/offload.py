"""Weights that wait on the CPU and are on their GPU for a while: what the knob `text_encoder_offload` turns on."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .quantize import like, map_parts, own_tensors, stored_bytes

if TYPE_CHECKING:
    from .request_state import RequestState


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """Copy `tensor` to pinned host memory; return it as it is where the system has no more to lock.

    The device is named, since PyTorch would ask a rehearsal's device type once that is registered.
    """
    with warnings.catch_warnings(), contextlib.suppress(RuntimeError):
        warnings.simplefilter("ignore", DeprecationWarning)
        return tensor.pin_memory("cuda")
    return tensor


class OffloadedWeights:
    """Weights that wait on the CPU and are on `device` only while their component works: a knob of the plan.

    They are copied when the component is entered and dropped when another one is: parameters on the CPU stay the
    module's own objects. For CUDA they are kept in pinned memory, which copies at the link's full rate.
    """

    def __init__(self, module: nn.Module, name: str, device: torch.device) -> None:
        self.module, self.name, self.device = module, name, device
        self._kept: list[tuple[dict[str, Any], str, Any]] = []
        self._user: Callable[[], RequestState | None] = lambda: None
        if device.type == "cuda":
            for own, key, value in own_tensors(module):
                own[key] = like(value, map_parts(value.detach(), pinned))

    @property
    def there(self) -> bool:
        """Whether the weights are on the GPU."""
        return bool(self._kept)

    def arrive(self, user: RequestState) -> None:
        """Copy the weights to the GPU for a request; nothing is copied where they are there already."""
        self._user = weakref.ref(user)
        if self._kept:
            return
        for own, key, value in own_tensors(self.module):
            moved = map_parts(value.detach(), lambda part: part.to(self.device, non_blocking=True))
            user.traffic.add(value.device, self.device, f"{self.name} weights", stored_bytes(value))
            self._kept.append((own, key, value))
            own[key] = like(value, moved)

    def leave_after(self, request: RequestState) -> None:
        """Have the weights leave since `request` goes on, unless another one that overlaps with it brought them."""
        user = self._user()
        if user is None or user is request or not user.overlaps:
            self.leave()

    def leave(self) -> None:
        """Put the module's own parameters back, so that the copies are freed."""
        for own, key, value in self._kept:
            own[key] = value
        self._kept.clear()
