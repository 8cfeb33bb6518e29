"""Stages of several requests at once on one placed pipeline: each request in a thread, with a pipeline of its own.

The copy of a request has the same components, borders and graphs, and what a call writes for itself: the scheduler and
the attributes of the pipeline object. What borders gather is in the request's state. Components work for one request
at a time, since each stage has its places to itself (`turns.py`), so that pictures are those of requests one by one.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image

from ..declare.pipelines import Phase
from ..declare.workload import Workload
from ..plan.artifact import ResolvedPlan
from ..plan.records import Overlap
from .asked import Asked
from .generate import StepDone, generate
from .hook import border_of
from .outcome import Measured
from .phase_clock import PhaseClock
from .recent import Recent
from .request_state import RequestState
from .turns import Turn, Turns

_FIRST_ALONE = 2
"""Requests of each shape that are drawn alone where there are graphs, which are captured meanwhile."""
_MOST_SHAPES = 64


class Overlapped:
    """A placed pipeline that several threads may draw with at once.

    Requests that exceed the planned workload, which the plan has no room for beside others, are drawn alone.

    Args:
        pipeline: placed by `resolved`.
        resolved: a plan on its devices.
        overlap: of that plan.
    """

    def __init__(self, pipeline: DiffusionPipeline, resolved: ResolvedPlan, overlap: Overlap) -> None:
        self.pipeline, self.overlap = pipeline, overlap
        self.turns = Turns(overlap.in_flight)
        border = border_of(pipeline)
        self.home, self.aside = border.home, border.host.aside(border.home)
        self.places = {phase: frozenset(stage.places) for stage in overlap.stages for phase in stage.phases}
        self.devices = {
            phase: [torch.device(resolved.slot_devices.get(place, "cpu")) for place in places if place != "cpu"]
            for phase, places in self.places.items()
        }
        expected = border.expected
        for use in overlap.slots:
            if device := resolved.slot_devices.get(use.slot):
                expected[device] = use.peak_bytes, expected[device][1]
        self._planned, self._counts_guidance = resolved.plan.spec.workload.bounds, border.pipeline.counts_guidance
        self._first_alone = _FIRST_ALONE if any(border_of(pipeline).graphs.values()) else 0
        self._drawn: Recent[Workload, int] = Recent(_MOST_SHAPES)

    @contextlib.contextmanager
    def request(self, workload: Workload, check: Callable[[], None] = lambda: None) -> Iterator[InFlight]:
        """Have a request in flight while the block runs, in the calling thread; waits until there is room for it.

        Args:
            workload: its shape.
            check: raises where nobody waits for the request any more; called now and then while it waits for others.
        """
        with self.turns.turn(check, self._is_alone(workload)) as turn:
            flying = InFlight(self, turn)
            try:
                flying.enter("encode")
                yield flying
            except BaseException as problem:
                _let_go(problem)  # before others get the places: what the calls held is still there
                flying.give_back()
                raise
            finally:
                flying.leave()
            shape = _shape(workload)
            self._drawn.put(shape, 1 + (self._drawn.get(shape) or 0))

    def alone(self) -> contextlib.AbstractContextManager[Turn]:
        """Have no request in flight while the block runs."""
        return self.turns.turn(alone=True)

    def _is_alone(self, workload: Workload) -> bool:
        seldom = (self._drawn.get(_shape(workload)) or 0) < self._first_alone
        return seldom or not self._planned.covers(workload, self._counts_guidance)


class InFlight:
    """A request in flight: its own pipeline, and the stages that it goes through; a `phase_clock.Stages`."""

    def __init__(self, whole: Overlapped, turn: Turn) -> None:
        self._whole, self._turn = whole, turn
        self.pipeline = own_pipeline(whole.pipeline)
        self._state: RequestState | None = None
        self._phase: Phase | None = None
        self._in_loop = False
        self._is_aside = False
        self._step_before: Callable[[], object] | None = None

    def generate(
        self,
        workload: Workload,
        request: Asked,
        on_step: StepDone | None = None,
        state: RequestState | None = None,
    ) -> tuple[list[Image], Measured]:
        """Draw; arguments, results and errors are `generate.generate`'s."""
        self._state = state or RequestState()
        return generate(self.pipeline, workload, request, on_step, self._state, self)

    def lead(self, state: RequestState) -> None:
        """Have a call that gathers in `state` enter stages as it goes on; `generate` does so itself."""
        border = border_of(self.pipeline)
        self._state, state.overlaps = state, True
        clock = PhaseClock(border.pipeline, border.host, [], self)
        self.listen(clock.begin)
        state.observers.insert(0, clock)

    def give_back(self) -> None:
        """Have weights leave that came for a request which failed."""
        if self._state is not None:
            for weights in border_of(self.pipeline).offloaded.values():
                weights.leave_after(self._state)

    def devices(self, phase: Phase) -> Sequence[torch.device]:
        """The devices that a phase works on."""
        return self._whole.devices.get(phase, ())

    def listen(self, begin: Callable[[Phase], None]) -> None:
        """Begin phases before their tensors are made, not when their first component begins; see `phase_clock.Stages`.

        Memory of the loop's own tensors is given back while the GPU works with them: it must not be aside.
        """
        for owner, method, phase in _first_calls(self.pipeline):
            if inner := getattr(owner, method, None):
                vars(owner)[method] = _beginning(inner, begin, phase)

    def enter(self, phase: Phase) -> None:
        """Wait for the places of a phase; those of the one before are given back, unless it needs them too.

        What it does besides on the denoiser's GPU until the loop begins goes aside.
        """
        if phase == self._phase:
            return
        self.leave()
        self._phase, self._in_loop = phase, self._in_loop or phase == "denoise"
        self._whole.turns.take(self._turn, self._whole.places.get(phase, ()))
        aside = self._whole.aside
        if aside and not self._in_loop and self._whole.home not in self.devices(phase):
            self._is_aside = True
            aside.enter()

    def leave(self) -> None:
        """Wait for what went aside, and have nothing more go there."""
        if self._is_aside and self._whole.aside:
            self._is_aside = False
            self._whole.aside.leave()
            self._whole.aside.synchronize()

    def step_done(self) -> None:
        """Let the GPU be one step behind at most: what others copy to and from it waits for all that it was given."""
        border = border_of(self.pipeline)
        if self._step_before is not None:
            self._step_before()
        self._step_before = border.host.mark(border.home)

    def besides(self, phase: Phase) -> contextlib.AbstractContextManager[None]:
        """Have the places of another phase too while the block runs; only in the denoising loop."""
        return self._whole.turns.also(self._turn, self._whole.places.get(phase, ()))


def _first_calls(pipeline: DiffusionPipeline) -> tuple[tuple[Any, str, Phase], ...]:
    """What a pipeline of diffusers calls first in a phase."""
    return (pipeline, "prepare_image", "prepare"), (pipeline.scheduler, "set_timesteps", "denoise")


def _beginning(inner: Callable[..., Any], begin: Callable[[Phase], None], phase: Phase) -> Callable[..., Any]:
    @functools.wraps(inner)
    def outer(*args: Any, **kwargs: Any) -> Any:
        begin(phase)
        return inner(*args, **kwargs)

    return outer


def own_pipeline(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """A pipeline with the same components and a scheduler of its own; what a call sets on it, it alone has."""
    own = copy.copy(pipeline)
    vars(own)["scheduler"] = copy.deepcopy(pipeline.scheduler)
    return own


def _shape(workload: Workload) -> Workload:
    """What graphs depend on: steps are replays."""
    return workload.model_copy(update={"steps": 1})


def _let_go(problem: BaseException) -> None:
    """Free what the calls that ended with `problem` held: the tensors of their frames, which it keeps alive."""
    seen: list[BaseException] = []
    left: list[BaseException | None] = [problem]
    while left:
        one = left.pop()
        if one is not None and one not in seen:
            seen.append(one)
            traceback.clear_frames(one.__traceback__)
            left += [one.__cause__, one.__context__]
