"""The host of a rehearsal: virtual GPUs that components are loaded to, with their weights or as shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import diffusers
import torch
from torch import nn

from ..declare.pipelines import Component
from ..declare.spec import Fidelity
from ..errors import InfeasibleError, RunError
from ..facts.checkpoint import Checkpoint
from ..plan.artifact import ResolvedPlan
from ..run.courier import PlainCourier
from ..run.host import load_helpers
from ..run.mirror import copied_to, digest
from ..run.quantize import like, map_parts, own_tensors
from ..run.weights import LoadRequest, Progress, load_components
from .meta_modules import StandInTokenizer, stand_in
from .pools import PoolRecorder
from .virtual import VirtualGpus
from .virtual_tensor import DEVICE_TYPE, inner_of


class VirtualHost(VirtualGpus):
    """Virtual GPUs as a `run.host.Host`; a context manager while tensors are made on them.

    In numbers, weights are read as ever and then put on virtual GPUs; in shapes, components are laid out from their
    configs, so that nothing of the checkpoint but its configs has to be on this machine.

    Args:
        pools: GPU index -> bytes that the plan says graphs keep there.
        first_pools: the same of a first request, where it is less.
    """

    def __init__(
        self,
        capacities: list[int],
        fidelity: Fidelity,
        pools: Mapping[int, int] = MappingProxyType({}),
        first_pools: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        super().__init__(capacities, fidelity)
        self.pools, self.first_pools = pools, first_pools

    @property
    def reads_weights(self) -> bool:
        """Whether components have values."""
        return self.fidelity == "numbers"

    def check(self, resolved: ResolvedPlan) -> None:
        """Refuse a plan for real devices; see `Host`."""
        check_virtual(resolved)

    def load_components(
        self, requests: Mapping[Component, LoadRequest], on_progress: Progress | None, notes: list[str]
    ) -> dict[Component, nn.Module]:
        """Load components by this host's fidelity; see `Host`."""
        if self.reads_weights:
            on_cpu = {name: replace(request, device="cpu", others=None) for name, request in requests.items()}
            loaded = load_components(on_cpu, on_progress, notes)
            return {name: self._load(loaded[name], name, request) for name, request in requests.items()}
        return {
            name: self._load(stand_in(request.facts, request.format), name, request)
            for name, request in requests.items()
        }

    def _load(self, module: nn.Module, name: Component, request: LoadRequest) -> nn.Module:
        try:
            others = request.others.of(module) if request.others else []
            for block in others:
                assert request.others is not None
                self.place_module(block, request.others.unit, torch.device(request.others.device))
            return self.place_module(module, name, torch.device(request.device), others)
        except torch.OutOfMemoryError as problem:
            raise RunError(f"out of memory while loading {name}: {problem}", where=name) from problem

    def place_module(
        self, module: nn.Module, name: str, device: torch.device, without: Iterable[nn.Module] = ()
    ) -> nn.Module:
        """Put parameters and buffers on `device`, counted as weights of `name`; matmul goes by their requires_grad.

        Args:
            without: parts of it that are elsewhere.
        """
        with torch.no_grad(), self.ledger.owning(name):
            for own, key, value in own_tensors(module, without):
                own[key] = like(value, map_parts(value.detach(), lambda part: self.take(part, device)))
        return module

    def copy_module(self, module: nn.Module, unit: str, device: torch.device) -> nn.Module:
        """Copy it between virtual GPUs, counted as weights of `unit`; see `Host`."""
        with self.ledger.owning(unit):
            return copied_to(module, device)

    def digest(self, tensors: Iterable[torch.Tensor]) -> torch.Tensor | None:
        """Norms and sums, computed beside the books; see `Host`."""
        return digest(map(inner_of, tensors)) if self.reads_weights else None

    def load_helpers(self, checkpoint: Checkpoint) -> Mapping[str, Any]:
        """Load what the checkpoint holds; see `Host`. Stand-ins do where a catalogued model has nothing here."""
        if checkpoint.folder is not None:
            return load_helpers(checkpoint)
        return {"scheduler": checkpoint.pipeline.scheduler.make(diffusers), "tokenizer": StandInTokenizer()}

    def synchronize(self, device: torch.device) -> None:
        """Return at once: a virtual GPU works when it is asked."""

    def mark(self, device: torch.device) -> Callable[[], object]:
        """Mark nothing: a virtual GPU works when it is asked."""
        return lambda: None

    def reset_peak(self, device: torch.device) -> None:
        """Keep the books: those of a rehearsal begin with loading."""

    def peak_bytes(self, device: torch.device) -> int | None:
        """Most live bytes of a virtual GPU since this host was made; None for the CPU."""
        return self.ledger.peaks[device.index].total_bytes if device.type == DEVICE_TYPE else None

    def release_cached(self, device: torch.device) -> None:
        """Return at once: nothing is kept for later."""

    def recorder(self, device: torch.device) -> PoolRecorder | None:
        """What stands for the graphs of a virtual GPU; see `Host`."""
        if device.type != DEVICE_TYPE:
            return None
        try:
            kept, first = self.pools.get(device.index, 0), self.first_pools.get(device.index)
            return PoolRecorder(self.ledger, device.index, kept, first)
        except torch.OutOfMemoryError as problem:
            raise RunError(f"out of memory while making room for graphs: {problem}", where="runtime") from problem

    def courier(self, source: torch.device, destination: torch.device) -> PlainCourier:
        """Ordinary copies: a virtual GPU works when it is asked."""
        return PlainCourier()

    def aside(self, device: torch.device) -> None:
        """Have one order of work: a virtual GPU works when it is asked."""

    def compiler(self, device: torch.device) -> None:
        """Compile nothing: a virtual GPU runs what an eager one would; see `Host`."""


def check_virtual(resolved: ResolvedPlan) -> None:
    """Refuse a plan that was resolved to real devices.

    Raises:
        InfeasibleError: saying how a plan for virtual ones is compiled.
    """
    if resolved.machine.kind != "virtual":
        raise InfeasibleError(
            "the plan is for this host's GPUs, a rehearsal needs virtual ones",
            where="machine",
            hint="compile it with machine=virtual machine.gpus=2xt4",
        )
