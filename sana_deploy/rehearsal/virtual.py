"""Virtual GPUs on any machine: a PyTorch device type `vgpu` with N indices, bounded memory, and bookkeeping.

With `virtual_tensor.py` the files that know PyTorch's Python backends. A `VirtualTensor` reports `vgpu:i` and holds
an inner tensor: real numbers on the CPU (fidelity *numbers*), or nothing but shape and dtype on `meta` (fidelity
*shapes*; tensors small enough to steer control flow, such as timesteps, keep their data). Every operation passes
`VirtualGpus.run`, which refuses mixed devices as CUDA does, counts live bytes per GPU, and raises
`torch.OutOfMemoryError` where a real GPU of that size would.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import sdpa_flop_count

from ..declare.spec import Fidelity
from ..run.arriving_tensor import ArrivingTensor
from .ledger import Ledger, touched_bytes
from .shape_memory import ShapeMemory
from .virtual_tensor import (
    DEVICE_TYPE,
    VirtualTensor,
    indexed,
    inner_of,
    map_tensors,
    register_device_type,
    storage_key,
    tensors_in,
)

SMALL_ELEMENTS = 65_536
"""In shapes fidelity, tensors up to this many elements keep data that was real where they came from."""

_SHAPES = ShapeMemory()
_aten = torch.ops.aten
_INDEXING = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}


class _Entered(threading.local):
    """What each thread leaves when it is done."""

    def __init__(self) -> None:
        self.stacks: list[ExitStack] = []


class VirtualGpus:
    """The virtual GPUs of one rehearsal; a context manager, in each thread, while tensors are made on them.

    Args:
        capacities: bytes that each GPU offers to tensors (its memory less context and what others use).
        fidelity: `shapes` or `numbers`.
    """

    def __init__(self, capacities: list[int], fidelity: Fidelity) -> None:
        register_device_type()
        self.fidelity = fidelity
        self.ledger = Ledger(capacities)
        self._entered = _Entered()

    def __enter__(self) -> VirtualGpus:
        stack = ExitStack()
        self._entered.stacks.append(stack)
        # Makes `torch.tensor(data, device=...)` and `x[[1, 2]]` build on the CPU and move, which a mode can see.
        lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        stack.enter_context(_Calls(self))
        stack.enter_context(_Factories(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._entered.stacks.pop().close()

    def take(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Put a weight on `device`: the tensor itself where its data is kept, else its shape.

        The address stays: kernels of the CPU round by it (MKL's product of one row does, modulo 16 bytes), so that
        a copy would compute other last places than the pipeline that it was loaded as.
        """
        inner = inner_of(tensor)
        if inner.device.type != "cpu" or not self._keeps_data(inner):
            return self.put(tensor, device)
        if inner.untyped_storage().nbytes() != inner.nbytes:  # one of many in a file's memory map: count it alone
            inner = torch.utils.dlpack.from_dlpack(inner)
        return inner if device.type == "cpu" else self._wrap(inner, device)

    def put(self, tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Copy `tensor` to `device`; data is dropped where this host keeps shapes only and the tensor is not small."""
        inner = inner_of(tensor)
        dtype = dtype or inner.dtype
        if self._keeps_data(inner):
            copied = inner.detach().to(dtype, copy=True)
        else:
            copied = torch.empty_like(inner, dtype=dtype, device="meta")
        if device.type == "cpu" and copied.device.type == "cpu":
            return copied
        return self._wrap(copied, device)

    def run(self, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[torch.Tensor]) -> Any:
        """Run one operation on the inner tensors; `tensors` are those among its arguments.

        Raises:
            RuntimeError: tensors of two devices are mixed.
            torch.OutOfMemoryError: the result does not fit its GPU.
        """
        if func is _aten._to_copy.default:
            return self._to_copy(args[0], kwargs)
        if func is _aten.copy_.default:
            return self._copy_into(args[0], args[1])
        device = _common_device(func, tensors)
        if kwargs.get("device") is not None:
            device = indexed(torch.device(kwargs["device"]))
            kwargs = {**kwargs, "device": None}
        virtual = [leaf for leaf in tensors if isinstance(leaf, VirtualTensor)]
        no_data = any(leaf.held.is_meta for leaf in virtual)
        if not virtual:
            kwargs = {**kwargs, "device": self._factory_device(func, args, kwargs)}
        elif no_data:
            self._drop_data(func, virtual)
            args, kwargs = (
                map_tensors(_as_meta, args),
                {key: map_tensors(_as_meta, value) for key, value in kwargs.items()},
            )
        else:
            args, kwargs = (
                map_tensors(inner_of, args),
                {key: map_tensors(inner_of, value) for key, value in kwargs.items()},
            )
        result = _SHAPES.run(func, args, kwargs) if no_data else func(*args, **kwargs)
        self.ledger.count(func, args, kwargs, result)
        back = {id(leaf.held): leaf for leaf in virtual}  # in-place operations return what they were given
        return map_tensors(
            lambda made: back[id(made)] if id(made) in back else self._wrap(self._settle(made), device), result
        )

    def _factory_device(self, func: Any, args: Any, kwargs: dict[str, Any]) -> str:
        """Where a tensor that a factory makes lives inside: with data, unless it is large and only shapes are kept."""
        if self.fidelity == "numbers":
            return "cpu"
        shape = func(*args, **{**kwargs, "device": "meta"})
        return "cpu" if shape.numel() <= SMALL_ELEMENTS else "meta"

    def attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, args: Any, kwargs: Any) -> Any:
        """Scaled dot product attention as one operation, as the fused CUDA kernels are: no score matrix is kept."""
        tensors = tensors_in((query, key, value, *args), kwargs)
        device = _common_device(_aten.scaled_dot_product_attention.default, tensors)
        if any(isinstance(leaf, VirtualTensor) and leaf.held.is_meta for leaf in tensors):
            made = torch.empty(*query.shape[:-1], value.shape[-1], dtype=query.dtype, device="meta")
        else:
            inner = {key: map_tensors(inner_of, value) for key, value in kwargs.items()}
            made = torch.nn.functional.scaled_dot_product_attention(
                *map_tensors(inner_of, (query, key, value, *args)), **inner
            )
        heads = query.shape[:2]
        flops = sdpa_flop_count(query.shape, (*heads, *key.shape[2:]), (*heads, *value.shape[2:]))  # type: ignore[no-untyped-call]
        self.ledger.add_work(flops, touched_bytes((query, key, value, made)))
        return self._wrap(made, device)

    def _keeps_data(self, inner: torch.Tensor) -> bool:
        if inner.is_meta:
            return False
        return self.fidelity == "numbers" or inner.numel() <= SMALL_ELEMENTS

    def _settle(self, made: torch.Tensor) -> torch.Tensor:
        """Drop the data of a result that grew too large to keep."""
        if made.device.type == "meta" or self.fidelity == "numbers" or made.untyped_storage().nbytes() < 2**20:
            return made
        return _as_meta(made)

    def _wrap(self, inner: torch.Tensor, device: torch.device) -> torch.Tensor:
        if device.type == DEVICE_TYPE:
            storage = inner.untyped_storage()
            key = storage_key(inner)
            if self.ledger.claim(key, device.index, storage.nbytes()):
                weakref.finalize(storage, self.ledger.release, key)
        elif inner.device.type == "cpu":
            return inner
        return VirtualTensor(inner, device, self)

    def _to_copy(self, source: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        device = indexed(torch.device(kwargs.get("device") or source.device))
        made = self.put(source, device, kwargs.get("dtype"))
        if source.device != device:
            self.ledger.moved(str(source.device), str(device), made.nbytes)
        else:
            self.ledger.add_work(0, touched_bytes((source, made)))
        return made

    def _copy_into(self, target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        if target.device != source.device:
            self.ledger.moved(str(source.device), str(target.device), source.nbytes)
        else:
            self.ledger.add_work(0, touched_bytes((source, target)))
        inner, origin = inner_of(target), inner_of(source)
        if inner.device.type == "cpu" and origin.device.type == "cpu":
            inner.copy_(origin)
        elif isinstance(target, VirtualTensor) and inner.device.type == "cpu":
            target.held = self._claimed_meta(inner, target.device)
        return target

    def _drop_data(self, func: Any, virtual: list[VirtualTensor]) -> None:
        """An operation that writes into a tensor with data, from one without: the target loses its data for good."""
        target = virtual[0]
        if func._schema.is_mutable and target.held.device.type != "meta":
            target.held = self._claimed_meta(target.held, target.device)

    def _claimed_meta(self, inner: torch.Tensor, device: torch.device) -> torch.Tensor:
        made = _as_meta(inner)
        self._wrap(made, device)
        return made


class _Factories(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Catches what makes or moves tensors onto virtual GPUs without one among its inputs."""

    def __init__(self, host: VirtualGpus) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.host = host

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = tensors_in(args, kwargs)
        arriving = next((leaf for leaf in tensors if isinstance(leaf, ArrivingTensor)), None)
        if arriving is not None:
            with self:
                return arriving.__torch_dispatch__(func, (), args, kwargs)
        if any(leaf.is_inference() for leaf in tensors) and any(map(_is_virtual, (*args, *kwargs.values()))):
            with self:  # PyTorch leaves it to a backend to take operations on these apart
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        device = kwargs.get("device")
        if any(isinstance(leaf, VirtualTensor) for leaf in tensors) or (
            device is not None and torch.device(device).type == DEVICE_TYPE
        ):
            return self.host.run(func, args, kwargs, tensors)
        return func(*args, **kwargs)


class _Calls(torch.overrides.TorchFunctionMode):
    """Hands attention on virtual tensors to `VirtualGpus.attention` before PyTorch takes it apart.

    In inference mode PyTorch leaves it to a backend to take operations apart and to follow views; virtual GPUs compute
    without that mode then, to the same bits.
    """

    def __init__(self, host: VirtualGpus) -> None:
        super().__init__()
        self.host = host

    def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and isinstance(
            query := args[0] if args else kwargs["query"], VirtualTensor
        ):
            named = dict(zip(("query", "key", "value"), args, strict=False))
            rest = {key: value for key, value in kwargs.items() if key not in ("query", "key", "value")}
            key, value = named.get("key", kwargs.get("key")), named.get("value", kwargs.get("value"))
            return self.host.attention(query, key, value, args[3:], rest)
        if torch.is_inference_mode_enabled() and any(map(_is_virtual, (*args, *kwargs.values()))):
            with torch.inference_mode(False), torch.no_grad():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _is_virtual(value: Any) -> bool:
    """Whether an argument is a virtual tensor, a list with one, or a virtual device."""
    if isinstance(value, (list, tuple)):
        return any(map(_is_virtual, value))
    if isinstance(value, (str, torch.device)):
        return str(value).startswith(DEVICE_TYPE)
    return isinstance(value, VirtualTensor)


def _as_meta(tensor: torch.Tensor) -> torch.Tensor:
    inner = inner_of(tensor)
    if inner.is_meta:
        return inner
    return torch.empty_strided(inner.size(), inner.stride(), dtype=inner.dtype, device="meta")


def _common_device(func: Any, leaves: list[torch.Tensor]) -> torch.device:
    """Return the device an operation runs on, by CUDA's rule: one GPU; 0-dim CPU tensors and CPU indices may mix.

    Raises:
        RuntimeError: with CUDA's words, naming the two devices.
    """
    gpus = {leaf.device for leaf in leaves if leaf.device.type == DEVICE_TYPE}
    hosts = [leaf for leaf in leaves if leaf.device.type != DEVICE_TYPE and leaf.dim() > 0]
    if len(gpus) > 1 or (gpus and hosts and func not in _INDEXING):
        first, second = [*sorted(map(str, gpus)), *(str(leaf.device) for leaf in hosts)][:2]
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{first} and {second}! (when checking arguments of {func})"
        )
    return next(iter(gpus)) if gpus else torch.device("cpu")
