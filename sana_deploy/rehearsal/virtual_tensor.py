"""The device type `vgpu` in PyTorch, and the tensor on it: device and shape outside, another tensor inside.

With `virtual.py` the files that know PyTorch's Python backends.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import RunError
from .ledger import Ledger

DEVICE_TYPE = "vgpu"


class Runner(Protocol):
    """What runs the operations on virtual tensors, and keeps the books of their bytes."""

    ledger: Ledger

    def run(self, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[torch.Tensor]) -> Any:
        """Run one operation; `tensors` are those among its arguments."""


def register_device_type() -> None:
    """Make `torch.device("vgpu:3")` valid in this process; PyTorch cannot take a device type back.

    Raises:
        RunError: another backend took PyTorch's one free device type, or this PyTorch lacks the interface.
    """
    name = torch._C._get_privateuse1_backend_name()
    if name == DEVICE_TYPE and hasattr(torch, DEVICE_TYPE):
        return
    if name not in ("privateuseone", DEVICE_TYPE):
        raise RunError(f"PyTorch's one free device type is taken by {name!r}: no virtual GPUs here", where="machine")
    if not hasattr(torch._C, "_acc") or not hasattr(torch.Tensor, "_make_wrapper_subclass"):
        raise RunError(
            f"torch {torch.__version__} lacks Python device backends: no virtual GPUs here",
            where="machine",
            hint="install torch 2.11 or newer",
        )
    torch.utils.rename_privateuse1_backend(DEVICE_TYPE)  # type: ignore[attr-defined]
    module = types.ModuleType(f"torch.{DEVICE_TYPE}")
    module.is_available = lambda: False  # type: ignore[attr-defined]
    module.device_count = lambda: 0  # type: ignore[attr-defined]
    module.current_device = lambda: 0  # type: ignore[attr-defined]
    module._is_in_bad_fork = lambda: False  # type: ignore[attr-defined]
    module.manual_seed_all = lambda seed: None  # type: ignore[attr-defined]
    torch._register_device_module(DEVICE_TYPE, module)  # type: ignore[no-untyped-call]
    torch._C._acc.register_python_privateuseone_device_guard(_guard())


def _guard() -> Any:
    """Build the device guard that indexing asks for; there is nothing to switch."""

    class Guard(torch._C._acc.DeviceGuard):
        def type_(self) -> Any:
            return torch._C._autograd.DeviceType.PrivateUse1

    return Guard()


class VirtualTensor(torch.Tensor):
    """A tensor on a virtual GPU (or, without data, on the host): device and shape outside, `held` inside."""

    held: torch.Tensor
    host: Runner

    @staticmethod
    def __new__(cls: type[VirtualTensor], inner: torch.Tensor, device: torch.device, host: Runner) -> VirtualTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=device,
            requires_grad=False,
        )
        made.held, made.host = inner, host
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"VirtualTensor({tuple(self.shape)}, {self.dtype}, {self.device})"

    @property
    def data(self) -> torch.Tensor:
        """An alias without history; what is assigned replaces the tensor inside too, as `.half()` and `.to()` do."""
        alias: torch.Tensor = torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return alias

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        inner = inner_of(value)
        self.host.ledger.hand_over(storage_key(self.held), storage_key(inner))
        self.held = inner

    def __deepcopy__(self, memo: dict[int, Any]) -> VirtualTensor:
        """Copy the data on the same virtual GPU; weights are counted as weights again."""
        if id(self) not in memo:
            with torch.no_grad():
                made: Any = self.detach().clone()
            self.host.ledger.hand_over(storage_key(self.held), storage_key(made.held))
            made.requires_grad_(self.requires_grad)
            made._is_param = isinstance(self, nn.Parameter)
            memo[id(self)] = made
        copied: VirtualTensor = memo[id(self)]
        return copied

    def untyped_storage(self) -> torch.UntypedStorage:
        """The storage inside: its size, and an address by which tensors that share memory are found."""
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        """The address of the data, for what reads memory itself, such as writers of files.

        Raises:
            RunError: there is no data, only a shape.
        """
        if self.held.is_meta:
            raise RunError(
                "a rehearsal in shapes has no values to read or save, only shapes",
                where="machine.fidelity",
                hint="machine.fidelity=numbers rehearses with values",
            )
        return self.held.data_ptr()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, _: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        tensors = tensors_in(args, kwargs or {})
        host = next(leaf.host for leaf in tensors if isinstance(leaf, VirtualTensor))
        return host.run(func, args, kwargs or {}, tensors)


def tensors_in(args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors among an operation's arguments; operations take tensors and lists of them, nothing deeper."""
    found = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [item for item in value if isinstance(item, torch.Tensor)]
    return found


def map_tensors(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Apply `change` to a tensor, or to every tensor in nested lists and tuples."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)([map_tensors(change, item) for item in value])
    return value


def storage_key(inner: torch.Tensor) -> int:
    """What the ledger knows a storage by."""
    key: int = inner.untyped_storage()._cdata
    return key


def inner_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.held if isinstance(tensor, VirtualTensor) else tensor


def indexed(device: torch.device) -> torch.device:
    return torch.device(DEVICE_TYPE, 0) if device.type == DEVICE_TYPE and device.index is None else device
