"""What a plan's components live on: a host loads them to its devices, waits for these, and says how full they were."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import diffusers
import torch
from torch import nn

from ..declare.pipelines import Component
from ..errors import RunError
from ..facts.checkpoint import Checkpoint
from ..plan.artifact import ResolvedPlan
from .aside import Aside, CudaAside
from .courier import Courier, CudaCourier, PlainCourier
from .graphs import CudaRecorder, Recorder
from .mirror import copied_to, digest
from .weights import LoadRequest, Progress, load_components, quiet_libraries


class Host(Protocol):
    """Devices, and how components get there."""

    @property
    def reads_weights(self) -> bool:
        """Whether loading reads a checkpoint's weights; configs are enough where it does not."""

    def check(self, resolved: ResolvedPlan) -> None:
        """Refuse a plan that was resolved to devices of another host.

        Raises:
            RunError, InfeasibleError: saying what the plan is for.
        """

    def load_components(
        self, requests: Mapping[Component, LoadRequest], on_progress: Progress | None, notes: list[str]
    ) -> dict[Component, nn.Module]:
        """Load components to their devices, in evaluation mode; arguments and errors are `weights.load_components`'."""

    def load_helpers(self, checkpoint: Checkpoint) -> Mapping[str, Any]:
        """Load what a pipeline has beside components that are placed: `tokenizer` and `scheduler`.

        Raises:
            RunError: the scheduler is of a class that diffusers does not have.
        """

    def synchronize(self, device: torch.device) -> None:
        """Wait until `device` has done all work that it was given."""

    def mark(self, device: torch.device) -> Callable[[], object]:
        """Mark what `device` was given so far; calling the result waits until that is done."""
        ...

    def reset_peak(self, device: torch.device) -> None:
        """Begin to look for the peak of `device` anew, where the host can."""

    def peak_bytes(self, device: torch.device) -> int | None:
        """Most bytes that tensors took on `device` since `reset_peak`; None where the host cannot say."""

    def release_cached(self, device: torch.device) -> None:
        """Give back memory of `device` that is kept for later tensors."""

    def copy_module(self, module: nn.Module, unit: str, device: torch.device) -> nn.Module:
        """Copy a module onto `device` as the weights of `unit`; see `mirror.copied_to`.

        Raises:
            torch.OutOfMemoryError: the copy does not fit.
        """

    def digest(self, tensors: Iterable[torch.Tensor]) -> torch.Tensor | None:
        """What changes when values in `tensors` do; None where they have no values. See `mirror.digest`."""

    def recorder(self, device: torch.device) -> Recorder | None:
        """What makes the graphs of `device`, with a memory pool of its own; None for a device that has none.

        Raises:
            RunError: the pool does not fit.
        """

    def courier(self, source: torch.device, destination: torch.device) -> Courier:
        """What sends a component's results between two devices."""

    def aside(self, device: torch.device) -> Aside | None:
        """A stream aside of `device`; None for a device that has one order of work only."""

    def compiler(self, device: torch.device) -> str | None:
        """The backend of `torch.compile` that compiles for `device`; None where nothing is compiled."""


class PresentHost:
    """The GPUs and the CPU of this machine, through PyTorch's own device types."""

    reads_weights = True

    def check(self, resolved: ResolvedPlan) -> None:
        """Refuse a plan for GPUs that are only described; see `Host`."""
        if resolved.machine.kind != "present":
            raise RunError("the plan is for virtual GPUs", hint="use rehearse(plan), or machine=present")

    def load_components(
        self, requests: Mapping[Component, LoadRequest], on_progress: Progress | None, notes: list[str]
    ) -> dict[Component, nn.Module]:
        """Read every file once, straight to its device and dtype; see `Host`."""
        return load_components(requests, on_progress, notes)

    def load_helpers(self, checkpoint: Checkpoint) -> Mapping[str, Any]:
        """Load what the checkpoint holds; see `Host`."""
        return load_helpers(checkpoint)

    def synchronize(self, device: torch.device) -> None:
        """Wait for a GPU; the CPU has always ended."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def mark(self, device: torch.device) -> Callable[[], object]:
        """Record an event on a GPU; the CPU has always ended."""
        if device.type != "cuda":
            return lambda: None
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event.synchronize

    def reset_peak(self, device: torch.device) -> None:
        """Reset what PyTorch's allocator remembers of a GPU."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def peak_bytes(self, device: torch.device) -> int | None:
        """What PyTorch's allocator remembers of a GPU; None for the CPU."""
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None

    def release_cached(self, device: torch.device) -> None:
        """Empty the cache of PyTorch's allocator."""
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def copy_module(self, module: nn.Module, unit: str, device: torch.device) -> nn.Module:
        """Copy it from device to device; see `Host`."""
        return copied_to(module, device)

    def digest(self, tensors: Iterable[torch.Tensor]) -> torch.Tensor | None:
        """Norms and sums, computed where the tensors are; see `Host`."""
        return digest(tensors)

    def recorder(self, device: torch.device) -> Recorder | None:
        """CUDA graphs on a GPU; the CPU has none."""
        return CudaRecorder(device) if device.type == "cuda" else None

    def courier(self, source: torch.device, destination: torch.device) -> Courier:
        """Copies beside the work of two GPUs; an ordinary one where the CPU takes part."""
        both = source.type == destination.type == "cuda"
        return CudaCourier(source, destination) if both else PlainCourier()

    def aside(self, device: torch.device) -> Aside | None:
        """A further stream of a GPU; the CPU has none."""
        return CudaAside(device) if device.type == "cuda" else None

    def compiler(self, device: torch.device) -> str | None:
        """Inductor for a GPU; what runs on the CPU is eager."""
        return "inductor" if device.type == "cuda" else None


def load_helpers(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Load tokenizer and scheduler, of whatever class the checkpoint names.

    Raises:
        RunError: the checkpoint is not on this machine, or the scheduler is of a class that diffusers does not have.
    """
    from transformers import AutoTokenizer

    folder = checkpoint.folder
    if folder is None:
        raise RunError(f"tokenizer and scheduler of {checkpoint.source} are not on this host", where="model.source")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    class_name = index["scheduler"][1]
    scheduler = getattr(diffusers, class_name, None)
    if scheduler is None or not issubclass(scheduler, diffusers.SchedulerMixin):
        raise RunError(f"diffusers {diffusers.__version__} has no scheduler {class_name}", where="scheduler")
    with quiet_libraries():
        return {
            "scheduler": scheduler.from_pretrained(str(folder), subfolder="scheduler"),
            "tokenizer": AutoTokenizer.from_pretrained(str(folder / "tokenizer"), local_files_only=True),
        }
