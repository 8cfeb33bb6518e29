"""What the hooks of a placed pipeline share: the denoising loop's device, who listens, graphs, what placing changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..declare.hardware import OnDecodeOom
from ..declare.pipelines import DEFAULT, PipelineDescription
from .graphs import MOST_GRAPHS, DeviceGraphs
from .host import Host, PresentHost
from .not_copied import NotCopied
from .offload import OffloadedWeights
from .request_state import Event, Listeners, RequestState, States


@dataclass(kw_only=True)
class Border(NotCopied, Listeners):
    """What all hooks of one pipeline share. What listens here hears of all calls.

    Attributes:
        home: the device of the denoising loop.
        pipeline: which pipeline it is.
        host: whose devices its components are on.
        units: the devices of components' further units, by the unit's name.
        notes: what loading found that the user should know.
        on_decode_oom: what to do when the VAE runs out of memory in decode.
        offloaded: components whose weights wait on the CPU.
        origins: where components were before they were placed.
        expected: device -> bytes that the plan expects at its fullest, and that it found free.
        restore: undoes what placing changed on the pipeline besides hooks; run when the first hook is taken off.
        states: what calls gather, each for itself.
        most_graphs: graphs that each device keeps.
        graphs: the graphs of each device where components have any.
    """

    home: torch.device
    pipeline: PipelineDescription = DEFAULT
    host: Host = field(default_factory=PresentHost)
    units: dict[str, torch.device] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    on_decode_oom: OnDecodeOom = "raise"
    offloaded: dict[str, OffloadedWeights] = field(default_factory=dict)
    origins: dict[str, torch.device] = field(default_factory=dict)
    expected: dict[str, tuple[int, int]] = field(default_factory=dict)
    restore: list[Callable[[], object]] = field(default_factory=list)
    states: States = field(default_factory=States)
    most_graphs: int = MOST_GRAPHS
    graphs: dict[torch.device, DeviceGraphs | None] = field(default_factory=dict)

    @property
    def state(self) -> RequestState:
        """What the call at work in this thread gathers."""
        return self.states.current

    def enter(self, name: str, method: str, works: bool = True) -> None:
        """A component begins: offloaded weights of others leave, observers are called, its own weights arrive.

        One that has its result already does not need them (`works` is False).
        """
        state = self.state
        state.inside = (name, method)
        state.calls[name] += 1
        for other, weights in self.offloaded.items():
            if other != name:
                weights.leave_after(state)
        self._notify("enter", f"{name}.{method}")
        if works and name in self.offloaded:
            self.offloaded[name].arrive(state)

    def ready(self, name: str, method: str, args: Any, kwargs: Any) -> None:
        """A component has its inputs."""
        for on_inputs in (*self.on_inputs, *self.state.on_inputs):
            on_inputs(name, method, args, kwargs)

    def leave(self, name: str, method: str, output: Any) -> None:
        """A component ends with `output`."""
        for on_outputs in (*self.on_outputs, *self.state.on_outputs):
            on_outputs(name, method, output)
        self._notify("leave", f"{name}.{method}")

    def turn(self, ends: str, begins: str, method: str) -> None:
        """Inside a call, one unit of a component ends and another one begins."""
        self.state.inside = (begins, method)
        self._notify("leave", f"{ends}.{method}")
        self._notify("enter", f"{begins}.{method}")

    def target_of(self, unit: str) -> torch.device:
        """The device that a unit's results go to: its denoiser's.

        Predictions of a further unit wait there until the first unit has begun: a copy between GPUs has both wait for
        it, so that they would work one after the other.
        """
        number = unit.partition(".")[2]
        return self.units.get(f"{self.pipeline.denoiser}.{number}", self.home)

    def graphs_of(self, device: torch.device) -> DeviceGraphs | None:
        """The graphs that the components on `device` share; None where it has none."""
        if device not in self.graphs:
            recorder = self.host.recorder(device)
            self.graphs[device] = None if recorder is None else DeviceGraphs(recorder, self.most_graphs)
        return self.graphs[device]

    def _notify(self, event: Event, call: str) -> None:
        for observer in (*self.observers, *self.state.observers):
            observer(event, call)
