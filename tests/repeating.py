"""A CPU has no CUDA graphs: here a recording repeats the work itself, into the tensors that it made first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from sana_deploy.run.host import PresentHost


class Repeating:
    """A recorder that runs the work again for every replay, and writes what comes out where the first result is."""

    def __init__(self) -> None:
        self.recorded = 0
        self.failing = False

    def warm_up(self, work: Callable[[], Any], beside: bool = False) -> Any:
        return work()

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.new_empty_strided(tensor.shape, tensor.stride())

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        if self.failing:
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        self.recorded += 1
        result = work()
        tensors = pytree.tree_leaves(result)

        def replay() -> None:
            for own, new in zip(tensors, pytree.tree_leaves(work()), strict=True):
                own.copy_(new)

        return replay, result

    def cut(self, between: Callable[[], object]) -> bool:
        return False


class RepeatingHost(PresentHost):
    """This machine, with a CPU that has graphs."""

    def __init__(self) -> None:
        self.made = Repeating()

    def recorder(self, device: torch.device) -> Repeating:
        return self.made
