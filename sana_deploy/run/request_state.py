"""What one call of a placed pipeline gathers at the borders; calls in several threads have a state each."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch

from .compiled import Compiling
from .control_image_copies import Copies
from .halves import Halves
from .tensor_mark import TensorMark
from .traffic import Traffic, move

Event = Literal["enter", "leave"]
Observer = Callable[[Event, str], None]
"""Called with the event and `component.method` at every border, on the calling thread."""
OnInputs = Callable[[Any, str, Any, Any], None]
"""Called with the component, its method, and the positional and named inputs."""
OnOutputs = Callable[[Any, str, Any], None]
"""Called with the component, its method and the result."""
MOST_REMARKS = 100
"""Remarks that a state keeps at most; the oldest go first."""


@dataclass(kw_only=True)
class Listeners:
    """What is called at borders.

    Attributes:
        observers: called at every border.
        on_inputs: called with every input where it is taken, after it moved.
        on_outputs: called with every result where it was made, before it moves.
    """

    observers: list[Observer] = field(default_factory=list)
    on_inputs: list[OnInputs] = field(default_factory=list)
    on_outputs: list[OnOutputs] = field(default_factory=list)


@dataclass(frozen=True)
class KeptCopy:
    """The copy of an argument, good for as long as the same tensor comes again and neither was written to."""

    source: TensorMark
    copy: torch.Tensor
    made: TensorMark

    def holds(self, value: torch.Tensor) -> bool:
        """Whether it is a copy of `value` as that is now."""
        return self.source.holds(value) and self.made.holds(self.copy)


@dataclass(kw_only=True)
class RequestState(Listeners):
    """State of one call. What listens here hears of this call alone.

    Attributes:
        traffic: bytes moved.
        remarks: what was done that the user should know.
        failure: what an OutOfMemoryError of the VAE said, which diffusers' pipeline swallows.
        inside: the component and method at work, or the last one.
        copies: which rows of the control images are copies, where each image is encoded once.
        halves: what the pipeline's call at work keeps of the halves of its guidance; None without guidance.
        seen: units whose weights were looked at, where rows of an image are dealt.
        kept: copies of arguments that stay the same from step to step, by component and argument.
        calls: how often each component was called.
        prompt_cache_hits: how often the text encoder's result was there already.
        eager_calls: how often a component with graphs ran eagerly, by component and reason.
        compiling: what was compiled, and what was not.
        overlaps: other requests are at work meanwhile.
    """

    traffic: Traffic = field(default_factory=Traffic)
    remarks: list[str] = field(default_factory=list)
    failure: str | None = None
    inside: tuple[str, str] = ("pipeline", "")
    copies: Copies | None = None
    halves: Halves | None = None
    seen: set[str] = field(default_factory=set)
    kept: dict[tuple[str, str], KeptCopy] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    prompt_cache_hits: int = 0
    eager_calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    compiling: Compiling = field(default_factory=Compiling)
    overlaps: bool = False

    def eager_sentences(self) -> list[str]:
        """Which components with graphs ran eagerly, how often and why."""
        return [
            f"the {name} ran eagerly in {count} of {self.calls[name]} calls: {reason}"
            for (name, reason), count in self.eager_calls.items()
        ]

    def remark(self, text: str) -> None:
        """Add a remark."""
        self.remarks.append(text)
        del self.remarks[:-MOST_REMARKS]

    def steady(
        self,
        component: str,
        argument: str,
        value: torch.Tensor,
        device: torch.device,
        cut: Callable[[torch.Tensor], torch.Tensor] = lambda value: value,
    ) -> torch.Tensor:
        """The copy on `device` of an argument that stays the same from step to step: it crosses once.

        Args:
            cut: gives the part of it that is wanted there, the same in every step.
        """
        key = (component, argument)
        kept = self.kept.get(key)
        if kept is None or not kept.holds(value):
            copy = move(cut(value), device, self.traffic, argument)
            source = TensorMark.of(value, lambda ref: self._drop(key, ref))
            kept = self.kept[key] = KeptCopy(source, copy, TensorMark.of(copy))
        return kept.copy

    def _drop(self, key: tuple[str, str], source: weakref.ref[torch.Tensor]) -> None:
        if key in self.kept and self.kept[key].source.source is source:
            del self.kept[key]


class States:
    """The states of one border's calls: that of the request at work in this context, else this thread's own.

    A thread's own state serves calls of the pipeline that no request was opened for. It ends with the thread.
    """

    def __init__(self) -> None:
        self._own = _OwnState()

    @property
    def current(self) -> RequestState:
        """The state that this thread adds to now."""
        return _OPEN.get().get(id(self)) or self._own.state

    @contextlib.contextmanager
    def opened(self, state: RequestState) -> Iterator[RequestState]:
        """Have this thread add to `state` while the block runs; tensors that it kept are given back at the end."""
        token = _OPEN.set({**_OPEN.get(), id(self): state})
        try:
            yield state
        finally:
            _OPEN.reset(token)
            state.kept.clear()
            state.copies = state.halves = None


class _OwnState(threading.local):
    """One state in each thread that asks."""

    def __init__(self) -> None:
        self.state = RequestState()


_OPEN: ContextVar[Mapping[int, RequestState]] = ContextVar("requests", default=MappingProxyType({}))
"""Open requests in this context, by the identity of the border's `States`."""
