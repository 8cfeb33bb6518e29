"""What the NVIDIA driver tells of its GPUs beside what CUDA does: who uses them, how they are linked. Imports no torch.

NVML is asked (https://docs.nvidia.com/deploy/nvml-api/); it makes no CUDA context and takes no memory of a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Process:
    """A process with a CUDA context on a GPU; `bytes` is None where the driver does not tell, e.g. in a container."""

    pid: int
    name: str
    bytes: int | None


@dataclass(frozen=True)
class Card:
    """One GPU as NVML lists it, in PCI order; `uuid` as `facts.machine.Gpu` has it."""

    uuid: str
    name: str
    processes: tuple[Process, ...]


@dataclass(frozen=True)
class Link:
    """The way between two GPUs, by UUID; `peer` says whether one reads the other's memory, None where unknown."""

    between: tuple[str, str]
    way: str
    peer: bool | None


@dataclass(frozen=True)
class Driver:
    """The driver: its version, the newest CUDA that it takes as (major, minor), its GPUs, and the links between them.

    `silent` is the reason why it could not be asked; all else is empty then.
    """

    version: str = ""
    cuda: tuple[int, int] | None = None
    cards: tuple[Card, ...] = ()
    links: tuple[Link, ...] = ()
    silent: str = ""


def ask_driver() -> Driver:
    """Ask NVML; never raises."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception as problem:  # not installed, no driver, or one that does not fit the kernel's module
        return Driver(silent=f"{type(problem).__name__}: {problem}")
    try:
        return _asked(pynvml)
    except Exception as problem:
        return Driver(silent=f"{type(problem).__name__}: {problem}")
    finally:
        with contextlib.suppress(Exception):
            pynvml.nvmlShutdown()


def _asked(nvml: ModuleType) -> Driver:
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    number = _or_none(nvml.nvmlSystemGetCudaDriverVersion_v2)  # 12040 is 12.4
    return Driver(
        version=_text(_or_none(nvml.nvmlSystemGetDriverVersion)),
        cuda=None if number is None else (number // 1000, number % 1000 // 10),
        cards=tuple(_card(nvml, handle) for handle in handles),
        links=tuple(_links(nvml, handles)),
    )


def _card(nvml: ModuleType, handle: Any) -> Card:
    running = _or_none(nvml.nvmlDeviceGetComputeRunningProcesses, handle) or []
    processes = tuple(Process(one.pid, _process_name(one.pid), one.usedGpuMemory) for one in running)
    return Card(_uuid(nvml, handle), _text(nvml.nvmlDeviceGetName(handle)), processes)


def _links(nvml: ModuleType, handles: list[Any]) -> Iterator[Link]:
    for one, other in combinations(handles, 2):
        read = _or_none(nvml.nvmlDeviceGetP2PStatus, one, other, nvml.NVML_P2P_CAPS_INDEX_READ)
        wired = _or_none(nvml.nvmlDeviceGetP2PStatus, one, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
        level = _or_none(nvml.nvmlDeviceGetTopologyCommonAncestor, one, other)
        by_wire = wired == nvml.NVML_P2P_STATUS_OK
        way = "NVLink" if by_wire else _path(level)
        peer = (
            (by_wire or None) if read is None else read == nvml.NVML_P2P_STATUS_OK
        )  # a virtual driver may tell one only
        yield Link((_uuid(nvml, one), _uuid(nvml, other)), way, peer)


def _path(level: int | None) -> str:
    """The way over PCIe by the nearest ancestor of two GPUs: 0 to 20 are switches, 30 a host bridge, 40 a NUMA node."""
    if level is None:
        return "unknown"
    return "PCIe" if level <= 30 else "PCIe over the CPU" if level <= 40 else "PCIe over two CPUs"


def _uuid(nvml: ModuleType, handle: Any) -> str:
    return _text(nvml.nvmlDeviceGetUUID(handle)).removeprefix("GPU-")


def _process_name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    return "process"  # of another container


def _or_none(call: Callable[..., Any], *arguments: Any) -> Any:
    """What NVML answers; None where this GPU or driver does not support the question."""
    try:
        return call(*arguments)
    except Exception:
        return None


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else "" if value is None else str(value)
