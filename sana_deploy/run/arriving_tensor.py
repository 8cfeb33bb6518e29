"""A tensor that another device sends while work that will need it is already under way."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from .stand_in_tensor import StandInTensor


class Arrival(Protocol):
    """When a tensor arrives, and for how long it stands."""

    @property
    def graphs(self) -> object:
        """The graphs that may read it where it arrives."""
        ...

    def check(self) -> None:
        """Refuse to read a tensor that another one took the place of.

        Raises:
            RunError: there was one.
        """
        ...

    def wait(self) -> None:
        """Have work that its device is given from now on wait for it."""
        ...

    def taken(self) -> None:
        """Whoever needed the tensor has given its device the work that reads it."""
        ...


class ArrivingTensor(StandInTensor):
    """What will stand in `buffer`: any operation that reads it waits for it first, and sees an ordinary tensor.

    A graph of a call that is given one is cut where the call reads it. What changes it, or looks at part of it, works
    on a copy, since the next tensor arrives in the same memory.

    Attributes:
        buffer: where it arrives.
        arrival: when.
        fixed: stands for every tensor that arrives in `buffer`, for graphs to read; None for that one itself.
    """

    buffer: torch.Tensor
    arrival: Arrival
    fixed: ArrivingTensor | None
    _own: torch.Tensor | None

    @staticmethod
    def __new__(
        cls: type[ArrivingTensor], buffer: torch.Tensor, arrival: Arrival, fixed: ArrivingTensor | None = None
    ) -> ArrivingTensor:
        """Make one of the shape, dtype and device of `buffer`."""
        made: ArrivingTensor = torch.Tensor._make_wrapper_subclass(
            cls, buffer.shape, strides=buffer.stride(), dtype=buffer.dtype, device=buffer.device
        )
        made.buffer, made.arrival, made.fixed, made._own = buffer, arrival, fixed, None
        return made

    def place_for(self, graphs: object) -> ArrivingTensor | None:
        """What one of `graphs` may read in its place without a copy; None where it has to be copied.

        Raises:
            RunError: another tensor took its place.
        """
        if self._own is not None or self.arrival.graphs is not graphs:
            return None
        self.arrival.check()
        return self.fixed

    def arrived(self) -> torch.Tensor:
        """The buffer, or the tensor's own memory, when it has arrived."""
        if self._own is not None:
            return self._own
        self.arrival.check()
        self.arrival.wait()
        return self.buffer

    def copied(self, to_change: bool) -> torch.Tensor:
        """A copy, which this tensor is from now on; what stands for every tensor in a place stays what it is.

        Raises:
            RuntimeError: that one is `to_change`.
        """
        if self.fixed is not None:
            if self._own is None:
                self._own = self.arrived().clone()
            return self._own
        if to_change:
            raise RuntimeError("a tensor that arrives from another device is changed in place")
        return self.arrived().clone()

    def plain(self, func: Any) -> torch.Tensor:
        """A copy for what changes it or looks at part of it, else what arrived."""
        changing = func._schema.is_mutable
        return self.copied(changing) if changing or func.is_view else self.arrived()
