"""Stands for the CUDA graphs of a virtual GPU: their work is repeated, and the memory that they would keep is held."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .ledger import Ledger
from .virtual_tensor import VirtualTensor, storage_key

_KEYS = itertools.count(-1, -1)
"""Keys of pools in the books; storages have positive ones."""


class PoolRecorder:
    """A `run.graphs.Recorder` that repeats the work itself, into the tensors that the first repetition made.

    The pool is in the books from the start, since plans count it in every phase. While the work runs, its activations
    stand in the pool's place. What graphs read and return is part of the pool, and not counted twice.

    Args:
        gpu: index of the virtual GPU.
        pool_bytes: what the plan says that graphs keep there.
        first_bytes: what they keep of it while large work runs that no graph was made of yet; all of it unless given.

    Raises:
        torch.OutOfMemoryError: the pool does not fit.
    """

    def __init__(self, ledger: Ledger, gpu: int, pool_bytes: int, first_bytes: int | None = None) -> None:
        self.ledger, self.gpu, self.pool_bytes = ledger, gpu, pool_bytes
        self.first_bytes = pool_bytes if first_bytes is None else first_bytes
        self._key, self._credit, self._held = next(_KEYS), next(_KEYS), False
        self._parts: list[weakref.ref[VirtualTensor]] = []
        self._first: list[weakref.ref[VirtualTensor]] = []
        self._recorded = False
        self._hold()

    def warm_up(self, work: Callable[[], Any], beside: bool = False) -> Any:
        """Run `work` in the place of the pool, where its result stays until the first recording makes the pool.

        Work that is large is `beside` what others keep of the pool.
        """
        if beside:
            self._hold(self.first_bytes)
            try:
                return work()
            finally:
                self._hold()
        return self._in_its_place(work if self._recorded else lambda: self._standing_in(work()))

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Make an input in the pool."""
        shape, stride = tensor.shape, tensor.stride()
        made: torch.Tensor = self._in_its_place(lambda: self._inside(tensor.new_empty_strided(shape, stride)))
        return made

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Run `work` in the place of its capture and its first replay."""
        self._recorded = True
        self._first.clear()
        result, waiting = self._in_its_place(lambda: self._inside(work())), [True]

        def replay() -> None:
            if waiting:
                waiting.clear()
                return
            with self._not_counted(result):  # the graph writes it where it is
                self._in_its_place(lambda: _copy(work(), result))

        return replay, result

    def cut(self, between: Callable[[], object]) -> bool:
        """Do nothing: work is repeated as a whole."""
        return False

    def _in_its_place(self, work: Callable[[], Any]) -> Any:
        self._give_back()
        try:
            return work()
        finally:
            self._hold()

    def _standing_in(self, made: Any) -> Any:
        """Remember that tensors are in the place of the pool, which is not there yet."""
        self._first += _refs(made)
        return made

    @contextlib.contextmanager
    def _not_counted(self, result: Any) -> Iterator[None]:
        """Take `result` off the books while work makes it anew."""
        self.ledger.claim(self._credit, self.gpu, -sum(_storages(_refs(result)).values()))
        try:
            yield
        finally:
            self.ledger.release(self._credit)

    def _inside(self, made: Any) -> Any:
        """Remember that tensors are part of the pool."""
        self._parts = [*(ref for ref in self._parts if ref() is not None), *_refs(made)]
        return made

    def _hold(self, size: int | None = None) -> None:
        self._give_back()
        parts = _storages([*self._parts, *self._first])
        left = max(0, (self.pool_bytes if size is None else size) - sum(parts.values()))
        # Memory of a part that is gone is the pool's: a second request finds all of it.
        self._held = self.ledger.claim(self._key, self.gpu, left, inherits=parts)

    def _give_back(self) -> None:
        if self._held:
            self.ledger.release(self._key)
            self._held = False


def _copy(new: Any, into: Any) -> None:
    for own, one in zip(_tensors(into), _tensors(new), strict=True):
        own.copy_(one)


def _storages(refs: Iterable[weakref.ref[VirtualTensor]]) -> dict[int, int]:
    """Keys in the books of tensors that are still there, and their bytes."""
    parts = [one.held for ref in refs if (one := ref()) is not None]
    return {storage_key(part): part.untyped_storage().nbytes() for part in parts}


def _refs(result: Any) -> list[weakref.ref[VirtualTensor]]:
    return [weakref.ref(one) for one in _tensors(result) if isinstance(one, VirtualTensor)]


def _tensors(result: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
