"""Seconds of a request by phase, and where it waits for others between two phases."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ..declare.pipelines import Phase, PipelineDescription
from ..plan.units import component_call
from .host import Host
from .request_state import Event


class Stages(Protocol):
    """How a request shares devices with others that are in flight; see `overlap.py`."""

    def devices(self, phase: Phase) -> Sequence[torch.device]:
        """The devices that a phase works on."""
        ...

    def listen(self, begin: Callable[[Phase], None]) -> None:
        """Have the request's pipeline call `begin` before it makes tensors of a phase."""

    def enter(self, phase: Phase) -> None:
        """Wait until the request may work in a phase."""

    def step_done(self) -> None:
        """A denoising step was given to its device."""


@dataclass
class PhaseClock:
    """Border observer: seconds from a phase's first entry to the next phase's first entry.

    Attributes:
        devices: all that components are on.
        stages: of a request that shares them; what it waits for others is in no phase.
        on_end: called at the end of a phase of such a request, before others may have its devices.
    """

    pipeline: PipelineDescription
    host: Host
    devices: list[torch.device]
    stages: Stages | None = None
    on_end: Callable[[], object] = lambda: None
    seconds: dict[str, float] = field(default_factory=dict)
    current: Phase | None = None
    since: float = 0.0

    def __call__(self, event: Event, call: str) -> None:
        phase = self.pipeline.phase_of.get(component_call(call))
        if event == "enter" and phase:
            self.begin(phase)

    def begin(self, phase: Phase) -> None:
        """Begin `phase`, unless it has begun."""
        if phase != self.current:
            self.switch(phase)

    def switch(self, phase: Phase | None) -> None:
        """End the current phase, wait for its devices, and begin `phase`."""
        for device in self._busy():
            self.host.synchronize(device)
        now = time.perf_counter()
        if self.current:
            self.seconds[self.current] = self.seconds.get(self.current, 0.0) + now - self.since
        if phase and self.stages:
            self.on_end()
            self.stages.enter(phase)
            now = time.perf_counter()
        self.current, self.since = phase, now

    def _busy(self) -> Sequence[torch.device]:
        """The devices that the current phase works on: on others, those of other requests may be at work."""
        if self.stages is None:
            return self.devices
        return self.stages.devices(self.current) if self.current else ()
