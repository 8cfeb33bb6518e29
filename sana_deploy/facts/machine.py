"""The GPUs of one host: which there are, how large, how fast, how much is free.

`probe()` asks the CUDA driver itself (count, name, memory, capability in CUDA's own order, so that
CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER hold) and NVML for free memory; neither needs torch nor makes a CUDA
context. `probe_torch()` leaves out what torch cannot use, and is what resolve trusts.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from .._startup import quick_imports
from .._units import MIB, human_bytes
from ..declare.formats import Dtype
from .known_gpus import KnownGpu, rates_of

FREE_GRAIN = 64 * MIB
"""Free memory is rounded down to this, so that a plan does not change with every small allocation nearby."""

NATIVE_FROM: Mapping[Dtype, tuple[int, int]] = {"float32": (0, 0), "float16": (5, 3), "bfloat16": (8, 0)}
"""First compute capability with native arithmetic per dtype. bfloat16: CUDA C++ programming guide, arithmetic
instructions; cuDNN has bfloat16 convolutions from 8.0 on."""

_ATTRIBUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{MAJOR,MINOR}
_ATTRIBUTE_MULTIPROCESSORS = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT


@dataclass(frozen=True)
class Gpu:
    """One GPU: memory in bytes, compute capability as (major, minor), count of streaming multiprocessors."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int]
    multiprocessors: int = 0
    uuid: str = ""

    @property
    def speed(self) -> tuple[int, int, int]:
        """Sort key: a newer generation first, then more multiprocessors."""
        return (*self.capability, self.multiprocessors)

    @property
    def rates(self) -> KnownGpu:
        """TFLOPS and bandwidths, from the table of known GPUs or scaled from the most alike one."""
        return rates_of(self.name, self.capability, self.multiprocessors)

    def __str__(self) -> str:
        return (
            f"{self.name} ({human_bytes(self.total_bytes)}, {human_bytes(self.free_bytes)} free, "
            f"compute capability {self.capability[0]}.{self.capability[1]})"
        )


def is_native(dtype: Dtype, gpu: Gpu) -> bool:
    """Whether `gpu` computes in `dtype` without emulation."""
    return gpu.capability >= NATIVE_FROM[dtype]


@dataclass(frozen=True)
class Machine:
    """The GPUs of one host in CUDA's order, and the host's memory in bytes."""

    kind: str
    gpus: tuple[Gpu, ...]
    host_bytes: int

    def named(self, indices: Collection[int] | None) -> tuple[Gpu, ...]:
        """Return the GPUs of `indices` that are here, in CUDA's order; all for None."""
        return tuple(gpu for gpu in self.gpus if indices is None or gpu.index in indices)

    def inventory(self) -> str:
        """Return one line that names every GPU, for messages."""
        if not self.gpus:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            note = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})"
            return f"this machine has no GPU{note}"
        return "this machine has " + ", ".join(f"GPU {gpu.index}: {gpu}" for gpu in self.gpus)


def probe() -> Machine:
    """Describe this host without importing torch; through torch where only torch finds GPUs (ROCm)."""
    if Path("/dev/kfd").exists():
        return probe_torch()
    return Machine("present", _driver_gpus(), host_memory())


def probe_torch() -> Machine:
    """Describe the GPUs that torch can use: none where it was built without CUDA.

    The driver is asked first, since asking torch for free memory makes a CUDA context that takes some of it.
    """
    with quick_imports():
        import torch

    count = torch.cuda.device_count()
    gpus = _driver_gpus()[:count] if count else ()
    if count and not gpus:
        gpus = tuple(_torch_gpu(index) for index in range(count))
    return Machine("present", gpus, host_memory())


def _torch_gpu(index: int) -> Gpu:
    import torch

    facts = torch.cuda.get_device_properties(index)
    free, _ = torch.cuda.mem_get_info(index)
    return Gpu(
        index=index,
        name=facts.name,
        total_bytes=facts.total_memory,
        free_bytes=_grained(free),
        capability=(facts.major, facts.minor),
        multiprocessors=facts.multi_processor_count,
        uuid=str(facts.uuid).removeprefix("GPU-"),
    )


def host_memory() -> int:
    """Bytes of physical memory of this host."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _grained(free: int) -> int:
    return free // FREE_GRAIN * FREE_GRAIN


def _driver_gpus() -> tuple[Gpu, ...]:
    """Enumerate GPUs through the CUDA driver API (https://docs.nvidia.com/cuda/cuda-driver-api/)."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    gpus = [_driver_gpu(driver, index) for index in range(count.value)]
    free = _free_by_uuid()
    return tuple(replace(gpu, free_bytes=_grained(free.get(gpu.uuid, gpu.total_bytes))) for gpu in gpus)


def _driver_gpu(driver: ctypes.CDLL, index: int) -> Gpu:
    device = ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(device), index)
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, len(name), device)
    total = ctypes.c_size_t()
    driver.cuDeviceTotalMem_v2(ctypes.byref(total), device)
    identity = (ctypes.c_ubyte * 16)()
    driver.cuDeviceGetUuid(ctypes.byref(identity), device)
    numbers = []
    for attribute in (*_ATTRIBUTE_CAPABILITY, _ATTRIBUTE_MULTIPROCESSORS):
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        numbers.append(value.value)
    return Gpu(
        index=index,
        name=name.value.decode(errors="replace"),
        total_bytes=total.value,
        free_bytes=total.value,
        capability=(numbers[0], numbers[1]),
        multiprocessors=numbers[2],
        uuid=str(uuid.UUID(bytes=bytes(identity))),
    )


def _free_by_uuid() -> dict[str, int]:
    """Free bytes per GPU UUID from NVML; empty where NVML is missing."""
    free: dict[str, int] = {}
    with contextlib.suppress(Exception):
        import pynvml

        pynvml.nvmlInit()
        try:
            for index in range(pynvml.nvmlDeviceGetCount()):
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                identity = str(pynvml.nvmlDeviceGetUUID(handle)).removeprefix("GPU-")
                free[identity] = int(pynvml.nvmlDeviceGetMemoryInfo(handle).free)
        finally:
            pynvml.nvmlShutdown()
    return free
