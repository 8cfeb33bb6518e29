"""Sends results from one device to another: by ordinary copies, or beside the work of two CUDA devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch


class Courier(Protocol):
    """Sends the results of a component on one device into buffers on another."""

    def made(self, number: int) -> None:
        """Result `number` has been made, by the work that its device was given last."""
        ...

    def send(self, results: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor], early: bool) -> None:
        """Send every result into its buffer, whose device has been given all work that reads what is there now.

        Args:
            early: `made` was called for each result but the last when it was made; else all are sent when all are.
        """
        ...

    def wait(self, number: int) -> None:
        """Have work that the buffers' device is given from now on wait for result `number`."""
        ...


class PlainCourier:
    """Sends by an ordinary copy, which whoever works next waits for."""

    def made(self, number: int) -> None:
        """Do nothing: results are sent when all are made."""

    def send(self, results: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor], early: bool) -> None:
        """Copy; see `Courier`."""
        for result, buffer in zip(results, buffers, strict=True):
            buffer.copy_(result)

    def wait(self, number: int) -> None:
        """Return at once: copies are in order with all other work."""


class CudaCourier:
    """Sends from one CUDA device to another on streams of its own, while both work.

    PyTorch copies between devices on the current stream of the source, and has it and that of the destination wait for
    each other. Here both are streams that do nothing else, and events say what waits for what.
    """

    def __init__(self, source: torch.device, destination: torch.device) -> None:
        self.source, self.destination = source, destination
        self.leaving, self.coming = torch.cuda.Stream(source), torch.cuda.Stream(destination)  # type: ignore[no-untyped-call]
        self._made: dict[int, torch.cuda.Event] = {}
        self._there: dict[int, torch.cuda.Event] = {}

    def made(self, number: int) -> None:
        """Record that the source's current stream has got so far; see `Courier`."""
        self._event(self._made, number).record(torch.cuda.current_stream(self.source))

    def send(self, results: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor], early: bool) -> None:
        """Give both streams their copies, and return; see `Courier`."""
        working: Any = torch.cuda.current_stream(self.source)
        self.coming.wait_stream(torch.cuda.current_stream(self.destination))
        last = len(results) - 1
        for number, (result, buffer) in enumerate(zip(results, buffers, strict=True)):
            if early and number < last:
                self.leaving.wait_event(self._made[number])
            else:
                self.leaving.wait_stream(working)
            with torch.cuda.stream(self.leaving), torch.cuda.stream(self.coming):
                buffer.copy_(result, non_blocking=True)
            self._event(self._there, number).record(self.coming)
        working.wait_stream(self.leaving)  # results are written anew, or their memory is, after they left

    def wait(self, number: int) -> None:
        """Have the destination's current stream wait for a copy; see `Courier`."""
        torch.cuda.current_stream(self.destination).wait_event(self._there[number])

    def _event(self, events: dict[int, torch.cuda.Event], number: int) -> torch.cuda.Event:
        return events.setdefault(number, torch.cuda.Event())  # type: ignore[no-untyped-call]
