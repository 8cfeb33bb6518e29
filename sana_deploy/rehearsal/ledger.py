"""The books of virtual GPUs: live bytes, peaks, traffic, operations and FLOPs, by phase and component."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from .._units import human_bytes

BLOCK_BYTES = 512
"""PyTorch's CUDA caching allocator hands out multiples of this (`kMinBlockSize`, c10/cuda/CUDACachingAllocator)."""


_aten = torch.ops.aten
_NO_KERNEL = {
    _aten._unsafe_view, _aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided,
}  # fmt: skip
"""Operations that are no views to PyTorch, yet compute nothing."""


@dataclass
class Peak:
    """A fullest moment of one GPU, bytes; `component` worked in `phase` then."""

    total_bytes: int = 0
    weights_bytes: int = 0
    activation_bytes: int = 0
    phase: str = "load"
    component: str = "pipeline"


@dataclass
class Moment:
    """The fullest moment of every GPU between two border events: what just ended, and live bytes per GPU."""

    phase: str
    component: str
    live_bytes: list[int]


@dataclass
class Tally:
    """What one component computed in one phase.

    `operations` are those that launch a kernel: views are free. `product_bytes` were read and written by operations
    with a FLOP formula (matrix products, convolutions, attention), `other_bytes` by all others.
    """

    operations: int = 0
    flops: int = 0
    product_bytes: int = 0
    other_bytes: int = 0


class _AtWork(threading.local):
    """What each thread does."""

    phase, component, loading = "load", "pipeline", False


@dataclass
class Ledger:
    """Bookkeeping of one rehearsal. `capacities` are bytes that tensors may take per GPU.

    Each thread works in a phase of its own: those of several requests may be in one book.
    """

    capacities: list[int]
    weights: list[int] = field(default_factory=list)
    activations: list[int] = field(default_factory=list)
    peaks: list[Peak] = field(default_factory=list)
    phase_peaks: dict[tuple[int, str], Peak] = field(default_factory=dict)
    traffic: Counter[tuple[str, str]] = field(default_factory=Counter)
    work: dict[tuple[str, str], Tally] = field(default_factory=dict)
    timeline: list[Moment] = field(default_factory=list)

    def __post_init__(self) -> None:
        count = len(self.capacities)
        self.weights, self.activations = [0] * count, [0] * count
        self.peaks = [Peak() for _ in range(count)]
        self._held: dict[int, tuple[int, int, bool]] = {}
        self._heirs: dict[int, int] = {}
        self._work = _AtWork()
        self._since = [0] * count
        self._lock = threading.RLock()

    @property
    def phase(self) -> str:
        """The phase that this thread works in."""
        return self._work.phase

    @property
    def component(self) -> str:
        """The component that works in this thread."""
        return self._work.component

    def live(self, gpu: int) -> int:
        """Bytes held on `gpu` now."""
        return self.weights[gpu] + self.activations[gpu]

    def claim(self, key: int, gpu: int, size: int, inherits: Collection[int] = ()) -> bool:
        """Take `size` bytes on `gpu` for the storage `key`; False if it holds them already.

        Args:
            inherits: other storages whose bytes become those of `key` if they are given back before it is.

        Raises:
            torch.OutOfMemoryError: the GPU is full.
        """
        with self._lock:
            if key in self._held:
                return False
            taken = -(-size // BLOCK_BYTES) * BLOCK_BYTES
            if self.live(gpu) + taken > self.capacities[gpu]:
                raise torch.OutOfMemoryError(
                    f"vgpu:{gpu} is out of memory: {self.component} tried to allocate {human_bytes(taken)} in "
                    f"{self.phase}; of {human_bytes(self.capacities[gpu])} for tensors, "
                    f"{human_bytes(self.weights[gpu])} are weights and {human_bytes(self.activations[gpu])} activations"
                )
            self._held[key] = (gpu, taken, self._work.loading)
            self._heirs |= dict.fromkeys(inherits, key)
            (self.weights if self._work.loading else self.activations)[gpu] += taken
            self._note(gpu)
            return True

    def release(self, key: int) -> None:
        """Give back what the storage `key` held, or leave it to its heir."""
        with self._lock:
            gpu, taken, is_weight = self._held.pop(key)
            if key in self._heirs.values():
                self._heirs = {one: heir for one, heir in self._heirs.items() if heir != key}
            heir = self._heirs.pop(key, None)
            if heir is not None:
                self._held[heir] = (gpu, self._held[heir][1] + taken, False)
                return
            (self.weights if is_weight else self.activations)[gpu] -= taken

    def hand_over(self, old: int, new: int) -> None:
        """The storage `new` takes the place of `old`: it counts as weights if `old` does."""
        with self._lock:
            if not self._held.get(old, (0, 0, False))[2] or self._held.get(new, (0, 0, True))[2]:
                return
            gpu, taken, _ = self._held[new]
            self._held[new] = (gpu, taken, True)
            self.activations[gpu] -= taken
            self.weights[gpu] += taken

    def _note(self, gpu: int) -> None:
        total = self.live(gpu)
        self._since[gpu] = max(self._since[gpu], total)
        by_phase = self.phase_peaks.setdefault((gpu, self.phase), Peak())
        for peak in (self.peaks[gpu], by_phase):
            if total > peak.total_bytes:
                peak.total_bytes, peak.weights_bytes = total, self.weights[gpu]
                peak.activation_bytes, peak.phase, peak.component = self.activations[gpu], self.phase, self.component

    def note_live(self) -> None:
        """Note what is live on each GPU as what its phase takes at least."""
        with self._lock:
            for gpu in range(len(self.capacities)):
                self._note(gpu)

    @contextlib.contextmanager
    def owning(self, component: str) -> Iterator[None]:
        """Count what is claimed inside as weights of `component`."""
        work = self._work
        before, work.component, work.loading = work.component, component, True
        try:
            yield
        finally:
            work.component, work.loading = before, False

    def enter(self, phase: str, component: str) -> None:
        """A component begins to work."""
        self._turn()
        self._work.phase, self._work.component = phase, component

    def leave(self) -> None:
        """The component has ended; what follows is the pipeline's own."""
        self._turn()
        self._work.component = "pipeline"

    def _turn(self) -> None:
        with self._lock:
            self.timeline.append(Moment(self.phase, self.component, list(self._since)))
            self._since = [self.live(gpu) for gpu in range(len(self.capacities))]

    def moved(self, src: str, dst: str, size: int) -> None:
        """Count a copy between devices, unless weights are being laid out."""
        if not self._work.loading:
            with self._lock:
                self.traffic[src, dst] += size

    def add_work(self, flops: int, touched: int) -> None:
        """Count one operation of the working component: its FLOPs, and the bytes it reads and writes."""
        with self._lock:
            work = self.work.setdefault((self.phase, self.component), Tally())
            work.operations += 1
            work.flops += flops
            if flops:
                work.product_bytes += touched
            else:
                work.other_bytes += touched

    def count(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        """Count one operation, with PyTorch's own FLOP formula where it has one (2 per multiply-add)."""
        if func.is_view or func._overloadpacket in _NO_KERNEL:
            return
        formula = flop_registry.get(func._overloadpacket)
        kwargs = {key: value for key, value in kwargs.items() if key != "device"}
        flops = int(formula(*args, **kwargs, out_val=result)) if formula else 0
        self.add_work(flops, touched_bytes((*args, *kwargs.values(), result)))


def touched_bytes(values: Any) -> int:
    """Bytes of all tensors among `values` and in lists of them: what an operation reads and writes at least."""
    total = 0
    for value in values:
        if isinstance(value, torch.Tensor):
            total += value.nbytes
        elif isinstance(value, (list, tuple)):
            total += touched_bytes(value)
    return total
