"""The ControlNet works beside the denoiser on another device: each residual leaves as soon as it is made.

The pipeline calls the ControlNet, which gives its device all its work, and residuals leave for buffers on the
denoiser's device as they are made. The pipeline gets tensors that wait for them (`arriving_tensor.py`), and calls the
denoiser, whose first blocks run meanwhile: its graph is cut where it reads a residual, and waits for that one there.

Whatever else reads or changes a residual waits likewise. A call whose residuals cannot be sent so sends them as any
component sends its results.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch.utils import _pytree as pytree

from ..declare.pipelines.base import LayeredResults
from ..errors import RunError
from .arriving_tensor import ArrivingTensor
from .border import Border
from .courier import Courier
from .early_results import EarlyResults
from .graphed_forward import GraphedForward
from .graphs import DeviceGraphs
from .hook import BorderHook
from .request_state import RequestState
from .traffic import move


def _nobody() -> None:
    """Nobody waits for residuals."""


class ResidualStream:
    """Sends the residuals of a ControlNet to the denoiser's device, into the same memory in each step.

    Args:
        name: what reports call residuals.
        device: the denoiser's.
        graphs: of that device, which read residuals where they arrive.
        courier: sends.
        state: what the call at work gathers; whoever was sent residuals keeps others out until the denoiser took them.
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        graphs: DeviceGraphs,
        courier: Courier,
        state: Callable[[], RequestState],
    ) -> None:
        self.name, self.device, self.graphs, self.courier, self.state = name, device, graphs, courier, state
        self.source: GraphedForward | None = None
        self.early: EarlyResults | None = None
        self.sent = self._coming = 0
        self.holder: Callable[[], object] = _nobody
        self._memory: torch.Tensor | None = None
        self._places: dict[object, list[ArrivingTensor]] = {}

    def make_early(self, source: GraphedForward, layered: LayeredResults) -> None:
        """Have the graphs of a ControlNet make each residual as soon as they can; see `EarlyResults`."""
        recorder = source.graphs.recorder

        def on_made(number: int) -> bool:
            return recorder.cut(partial(self.courier.made, number))

        self.source, source.lasting = source, False
        self.early = EarlyResults(source.module, source.innermost, layered, on_made)
        source.innermost = self.early

    def restore(self) -> None:
        """Give the ControlNet its own forward back."""
        if self.source is not None and self.early is not None:
            self.source.innermost = self.early.forward

    def send(self, output: Any) -> Any:
        """Send what the ControlNet returned; the result holds tensors that arrive on the denoiser's device."""
        state, leaves = self.state(), pytree.tree_leaves(output)
        sent = None
        if _sendable(leaves):
            with self.graphs.lock:
                if self.holder() in (None, state):
                    sent = self._send(leaves, state)
        result = move(output, self.device, state.traffic, self.name) if sent is None else _with(output, sent)
        if self.source is not None:
            with self.source.graphs.lock:
                self.source.graphs.release(leaves)
        return result

    def _send(self, leaves: Sequence[torch.Tensor], state: RequestState) -> list[ArrivingTensor]:
        places = self._places_for(leaves)
        self.sent, self._coming = self.sent + 1, len(leaves)
        self.holder = weakref.ref(state)
        self.courier.send(leaves, [place.buffer for place in places], self._are_early(leaves))
        for leaf in leaves:
            state.traffic.add(leaf.device, self.device, self.name, leaf.nbytes)
        return [
            ArrivingTensor(place.buffer, _Piece(self, number, self.sent), place) for number, place in enumerate(places)
        ]

    def _are_early(self, leaves: Sequence[torch.Tensor]) -> bool:
        """Whether a graph made them that says when each was."""
        return self.early is not None and all(map(self.early.says_when, leaves))

    def _places_for(self, leaves: Sequence[torch.Tensor]) -> list[ArrivingTensor]:
        """Where residuals of this form arrive; those of all forms share the memory that the largest one takes."""
        form = tuple(leaf.shape for leaf in leaves), leaves[0].dtype
        if form not in self._places:
            sizes = [leaf.numel() for leaf in leaves]
            memory = self._memory_for(sum(sizes), leaves[0].dtype)
            parts = torch.split(memory[: sum(sizes)], sizes)
            self._places[form] = [
                ArrivingTensor(part.view(leaf.shape), _Piece(self, number))
                for number, (part, leaf) in enumerate(zip(parts, leaves, strict=True))
            ]
        return self._places[form]

    def _memory_for(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        held = self._memory
        if held is not None and held.numel() >= elements and held.dtype == dtype:
            return held
        self.free()
        with torch.inference_mode(False):  # inference tensors cannot be written to outside of that mode
            self._memory = torch.empty(elements, dtype=dtype, device=self.device)
        return self._memory

    def free(self) -> None:
        """Give the memory back, and forget the graphs that read it."""
        for places in self._places.values():
            self.graphs.drop_readers(places)
        for number in range(self._coming):  # or the next owner of the memory would find them arriving
            self.courier.wait(number)
        self._places.clear()
        self._memory, self._coming = None, 0


@dataclass(frozen=True)
class _Piece:
    """One residual: of the call with this number, or of any call."""

    stream: ResidualStream
    number: int
    sent: int | None = None

    @property
    def graphs(self) -> DeviceGraphs:
        return self.stream.graphs

    def check(self) -> None:
        if self.sent is not None and self.sent != self.stream.sent:
            raise RunError(
                f"{self.stream.name} of an earlier call were asked for after the next call had overwritten them",
                where=self.stream.name,
                hint="clone them before the next call, or plan with runtime=eager",
            )

    def wait(self) -> None:
        wait = partial(self.stream.courier.wait, self.number)
        if not self.graphs.recorder.cut(wait):
            wait()

    def taken(self) -> None:
        if self.sent == self.stream.sent:
            self.stream.holder = _nobody


def _sendable(leaves: Sequence[Any]) -> bool:
    """Whether these are plain values of one dtype."""
    if not leaves or not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        return False
    return all(leaf.dtype == leaves[0].dtype and leaf.is_contiguous() and not leaf.requires_grad for leaf in leaves)


def _with(output: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """`output` with other tensors."""
    left = iter(tensors)
    return pytree.tree_map(lambda _: next(left), output)


def stream_residuals(pipeline: DiffusionPipeline, border: Border) -> None:
    """Send a ControlNet's residuals as they are made, where it is apart from a denoiser with graphs.

    Undone with the border.

    Args:
        pipeline: hooked.
        border: of the pipeline.
    """
    name = border.pipeline.find("controlnet")
    if name is None:
        return
    part = border.pipeline.by_name[name]
    hook, reader = (_hook_of(pipeline, one) for one in (name, border.pipeline.denoiser))
    if reader.graphed is None or hook.device == reader.device:
        return
    courier = border.host.courier(hook.device, reader.device)
    output = part.call("forward").output
    stream = ResidualStream(output, reader.device, reader.graphed.graphs, courier, lambda: border.state)
    if hook.graphed is not None and part.layered is not None:
        stream.make_early(hook.graphed, part.layered)
    hook.sender = stream.send
    border.restore += [stream.free, stream.restore]


def _hook_of(pipeline: DiffusionPipeline, name: str) -> BorderHook:
    hook = getattr(pipeline, name)._hf_hook
    assert isinstance(hook, BorderHook)
    return hook
