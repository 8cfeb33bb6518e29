"""What CUDA graphs and streams do, on a CPU: recorded operations are repeated one by one, copies arrive late.

A recording runs the work once to find its operations, and then wipes all that they wrote: whatever a replay does not
compute anew is NaN. A courier sends values as they were when they were said to be made, and delivers when waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sana_deploy.rehearsal.host import VirtualHost
from sana_deploy.run.arriving_tensor import ArrivingTensor


def tensors_of(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def copy_all(into: list[torch.Tensor], new: list[torch.Tensor]) -> None:
    for own, one in zip(into, new, strict=True):
        own.copy_(one)


class Tape(TorchDispatchMode):
    """The operations of some work, and what is called between them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Callable[[], object]] = []
        self.fresh: list[torch.Tensor] = []
        self.segments = [0]

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        arriving = next((leaf for leaf in tensors_of((args, kwargs)) if isinstance(leaf, ArrivingTensor)), None)
        if arriving is not None:
            with self:
                return arriving.__torch_dispatch__(func, (), args, kwargs)
        result = func(*args, **kwargs)
        if func.is_view:
            return result  # it shares the memory that a replay writes
        self.segments[-1] += 1
        if func._schema.is_mutable:
            self.steps.append(lambda: func(*args, **kwargs))
            return result
        made = tensors_of(result)
        self.fresh += made
        self.steps.append(
            lambda: [own.copy_(new) for own, new in zip(made, tensors_of(func(*args, **kwargs)), strict=True)]
        )
        return result

    def replay(self) -> None:
        for step in self.steps:
            step()


class TapeRecorder:
    """A recorder whose repetitions are operations, as those of CUDA graphs are kernels."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []
        self.running: Tape | None = None

    def warm_up(self, work: Callable[[], Any], beside: bool = False) -> Any:
        return work()

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.new_empty_strided(tensor.shape, tensor.stride())

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.running = tape = Tape()
        try:
            with tape:
                result = work()
        finally:
            self.running = None
        for tensor in tape.fresh:
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
        self.tapes.append(tape)
        return tape.replay, result

    def cut(self, between: Callable[[], object]) -> bool:
        if self.running is None:
            return False
        self.running.steps.append(between)
        self.running.segments.append(0)
        return True


class LateCourier:
    """Delivers a result when somebody waits for it, with the value that it had when it was said to be made."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.results: Sequence[torch.Tensor] = ()
        self.buffers: Sequence[torch.Tensor] = ()
        self.values: dict[int, torch.Tensor] = {}
        self.made_since: set[int] = set()

    def made(self, number: int) -> None:
        self.events.append(f"made {number}")
        self.made_since.add(number)
        if self.results:
            self.values[number] = self.results[number].clone()

    def send(self, results: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor], early: bool) -> None:
        known = early and all(one is other for one, other in zip(results, self.results, strict=False))
        last = len(results) - 1
        assert not early or self.made_since == set(range(last)), "each but the last was made since results were sent"
        self.made_since.clear()
        whole = {i: result.clone() for i, result in enumerate(results) if i == last or not (known and i in self.values)}
        self.values |= whole
        self.events.append(f"sent {'early' if early else 'whole'}")
        self.results, self.buffers = results, buffers
        for buffer in buffers:
            buffer.fill_(float("nan"))

    def wait(self, number: int) -> None:
        self.events.append(f"wait {number}")
        self.buffers[number].copy_(self.values[number])


class TapedHost(VirtualHost):
    """Virtual GPUs with such graphs and such a courier."""

    def __init__(self, count: int) -> None:
        super().__init__([2**34] * count, "numbers")
        self.recorders: dict[torch.device, TapeRecorder] = {}
        self.late = LateCourier()

    def recorder(self, device: torch.device) -> TapeRecorder:  # type: ignore[override]
        return self.recorders.setdefault(device, TapeRecorder())

    def courier(self, source: torch.device, destination: torch.device) -> LateCourier:  # type: ignore[override]
        return self.late
