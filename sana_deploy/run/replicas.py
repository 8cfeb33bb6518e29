"""Several pipelines beside each other: loaded one after the other, and drawing at once, each in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from diffusers import DiffusionPipeline
from PIL.Image import Image

from ..declare.workload import Request, Workload
from ..plan.artifact import Plan, ResolvedPlan
from .generate import StepDone, generate
from .host import Host
from .load import load_pipeline
from .outcome import Measured
from .place import resolved_plan
from .request_state import RequestState
from .weights import Progress

_SEEDS = 2**63
"""Seeds are below this."""
_THREADS: WeakKeyDictionary[DiffusionPipeline, ThreadPoolExecutor] = WeakKeyDictionary()
"""The thread in which a pipeline draws beside others. It is kept, since CUDA's libraries start anew in each thread,
which takes as long as a picture; it ends with the pipeline."""


def load_pipelines(
    plan: Plan | ResolvedPlan, progress: Progress | None = None, host: Host | None = None
) -> list[DiffusionPipeline]:
    """Load every replica of a plan, one after the other, each straight to its own GPUs.

    Weights are read once for each replica, all but the first time from the system's cache of files where that holds
    them; none are kept in the host's memory.

    Args:
        plan: a plan (resolved against the GPUs present) or a resolved plan; one without replicas gives one pipeline.
        progress: called with the bytes read of each component; those of later replicas have their number.
        host: whose devices the plan was resolved to; this machine's unless given.

    Returns:
        Ordinary pipelines, in the order of `plan.each()`. Each is used, placed and unplaced by itself, also in a
        thread of its own.

    Raises:
        CheckpointError, PlanError, RunError: see `load_pipeline`.
    """
    replicas = resolved_plan(plan, "load_pipelines(plan)").each()
    return [load_pipeline(one, _numbered(progress, number), host) for number, one in enumerate(replicas)]


def _numbered(progress: Progress | None, number: int) -> Progress | None:
    """`progress` with the replica's number beside the component, but for the first."""
    if progress is None or number == 0:
        return progress
    return lambda name, done, of: progress(f"{name} {number}", done, of)


def request_of(request: Request, replica: int) -> Request:
    """What a replica draws of a request: with the request's seed and its own number added."""
    return request.model_copy(update={"seed": (request.seed + replica) % _SEEDS})


class _StoppedError(Exception):
    """Another replica failed, or the caller was interrupted."""


def generate_each(
    pipelines: Sequence[DiffusionPipeline],
    workload: Workload,
    request: Request,
    on_step: StepDone | None = None,
    states: Sequence[RequestState] | None = None,
) -> tuple[list[Image], Measured]:
    """Draw a request on all pipelines at once, each with a seed of its own: see `request_of`.

    Args:
        pipelines: placed ones, on GPUs of their own.
        workload: the request's shape.
        request: its content.
        on_step: called after every denoising step of the first one.
        states: one for each pipeline; see `generate`.

    Returns:
        `workload.batch` images for each pipeline, in their order, and what was measured: of several, `generate` are
        seconds from first start to last end, phases those of the slowest, peaks and bytes those of all.

    Raises:
        RunError: see `generate`; the other pipelines stop after the step that they are in.
    """
    states = states or [RequestState() for _ in pipelines]
    if len(pipelines) == 1:
        return generate(pipelines[0], workload, request, on_step, states[0])
    started, stop = time.perf_counter(), threading.Event()
    tasks = [
        _Task(pipeline, workload, request_of(request, number), state, stop, None if number else on_step)
        for number, (pipeline, state) in enumerate(zip(pipelines, states, strict=True))
    ]
    drawn = _results([_thread_of(task.pipeline).submit(task.draw) for task in tasks], stop)
    images = [image for own, _ in drawn for image in own]
    return images, _together([measured for _, measured in drawn], len(images), time.perf_counter() - started)


def _thread_of(pipeline: DiffusionPipeline) -> ThreadPoolExecutor:
    return _THREADS.setdefault(pipeline, ThreadPoolExecutor(1, "beside"))


@dataclass(frozen=True)
class _Task:
    """What one replica draws; it ends early once `stop` is set, and sets it where it fails."""

    pipeline: DiffusionPipeline
    workload: Workload
    request: Request
    state: RequestState
    stop: threading.Event
    on_step: StepDone | None

    def draw(self) -> tuple[list[Image], Measured]:
        try:
            return generate(self.pipeline, self.workload, self.request, self._stepped, self.state)
        except BaseException:
            self.stop.set()
            raise

    def _stepped(self, done: int, of: int) -> None:
        if self.stop.is_set():
            raise _StoppedError
        if self.on_step:
            self.on_step(done, of)


def _results(
    futures: Sequence[Future[tuple[list[Image], Measured]]], stop: threading.Event
) -> list[tuple[list[Image], Measured]]:
    """The results, or the failure that stopped the others; who interrupts the wait for them sets `stop`."""
    try:
        problems = [problem for problem in (future.exception() for future in futures) if problem]
    except BaseException:
        stop.set()
        wait(futures)
        raise
    if problems:
        raise next((one for one in problems if not isinstance(one, _StoppedError)), problems[0])
    return [future.result() for future in futures]


def _together(each: Sequence[Measured], images: int, elapsed: float) -> Measured:
    slowest = max(each, key=lambda one: one.seconds["generate"])
    return Measured(
        peak_bytes={device: peak for one in each for device, peak in one.peak_bytes.items()},
        seconds={**slowest.seconds, "generate": round(elapsed, 6)},
        bytes_moved=_summed(one.bytes_moved for one in each),
        bytes_per_step=_summed(one.bytes_per_step for one in each),
        host_peak_bytes=max(one.host_peak_bytes for one in each),
        images_per_second=round(images / elapsed, 4),
    )


def _summed(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return dict(total)
