"""Runs one request on a placed pipeline: progress, phases in seconds, peaks and traffic, and the images."""

from __future__ import annotations

import io
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image

from .._files import write_bytes
from .._units import human_bytes
from ..declare.pipelines import PHASES, Component, PipelineDescription
from ..declare.workload import Workload
from ..errors import RunError
from ..plan.units import component_call
from .asked import Asked, arguments_of, check_asked
from .hook import border_of
from .outcome import Measured
from .phase_clock import PhaseClock, Stages
from .request_state import Event, RequestState
from .traffic import Movement, Traffic, by_pair

_HOST_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"
StepDone = Callable[[int, int], None]
"""Called after each denoising step with the steps done and the steps in all."""


@dataclass
class StepTraffic:
    """Border observer: bytes moved in one denoising step, from its first border or the end of the step before."""

    pipeline: PipelineDescription
    traffic: Traffic
    before: Counter[Movement] | None = None
    per_step: Counter[Movement] = field(default_factory=Counter)

    def __call__(self, event: Event, call: str) -> None:
        if self.before is None and self.pipeline.phase_of.get(component_call(call)) == "denoise":
            self.before = Counter(self.traffic.moved)

    def step_done(self) -> None:
        """A step has ended: what moved since the last note is its own."""
        now = Counter(self.traffic.moved)
        self.per_step = now - (self.before or Counter())
        self.before = now


def generate(
    pipeline: DiffusionPipeline,
    workload: Workload,
    request: Asked,
    on_step: StepDone | None = None,
    state: RequestState | None = None,
    stages: Stages | None = None,
) -> tuple[list[Image], Measured]:
    """Run `request` once.

    Args:
        pipeline: a placed pipeline.
        workload: its shape.
        request: its content, or that of several which share guidance and conditioning scales.
        on_step: called after every denoising step.
        state: a new one that this call gathers in, for a caller that reads it afterwards, also where the call fails.
        stages: how it shares devices with other requests; peaks are then those of all.

    Returns:
        `workload.batch` images of (height, width), and what was measured.

    Raises:
        RunError: out of memory, a failed operation, a result or an image of NaN or infinity, or of one flat colour.
    """
    from .nan_guard import NumericsGuard

    border, state = border_of(pipeline), state or RequestState()
    guard = NumericsGuard(border.pipeline, _dtypes(pipeline))
    clock, state.overlaps = _started_clock(pipeline, stages, guard.check), stages is not None
    state.observers.append(clock)
    state.on_outputs.append(guard)
    started = time.perf_counter()
    try:
        pixels, per_step = run_request(pipeline, workload, request, _also(guard.step_done, stages, on_step), state)
        guard.check()
    finally:
        clock.switch(None)
    elapsed = time.perf_counter() - started
    return to_images(pipeline, pixels), _measured(clock, state, per_step, elapsed)


def _started_clock(pipeline: DiffusionPipeline, stages: Stages | None, on_end: Callable[[], object]) -> PhaseClock:
    """A clock for all devices of a placed pipeline; their peaks begin anew, unless others work there."""
    border, names = border_of(pipeline), sorted(set(pipeline.hf_device_map.values()))
    clock = PhaseClock(border.pipeline, border.host, [torch.device(name) for name in names], stages, on_end)
    if stages:
        stages.listen(clock.begin)
    for device in clock.devices if stages is None else ():
        clock.host.reset_peak(device)
    return clock


def _also(first: Callable[[], None], stages: Stages | None, on_step: StepDone | None) -> StepDone:
    """Call `first` after each step, then what the caller gave."""

    def stepped(done: int, of: int) -> None:
        first()
        if stages:
            stages.step_done()
        if on_step:
            on_step(done, of)

    return stepped


def run_request(
    pipeline: DiffusionPipeline,
    workload: Workload,
    request: Asked,
    on_step: StepDone | None = None,
    state: RequestState | None = None,
) -> tuple[torch.Tensor, Counter[Movement]]:
    """Call a placed pipeline once; arguments as in `generate`.

    Returns:
        Pixels of (batch, 3, height, width) in 0..1 on the VAE's device, and the bytes that one step moved.

    Raises:
        UsageError: the request's guidance is on where the workload is without it, or off where it is with it.
        RunError: out of memory, or a failed operation.
    """
    border, state = border_of(pipeline), state or RequestState()
    check_asked(border.pipeline, workload, request)
    steps = StepTraffic(border.pipeline, state.traffic)
    state.observers.append(steps)
    try:
        with border.states.opened(state):
            pixels = _call(pipeline, workload, request, steps, on_step)
    except (torch.OutOfMemoryError, UnboundLocalError) as problem:
        # In decode the pipeline only warns of an OutOfMemoryError, then trips over the image that it never got.
        said = str(problem) if isinstance(problem, torch.OutOfMemoryError) else state.failure
        if said is None:
            raise RunError(f"the request failed: {problem}", where="generate") from problem
        raise _out_of_memory(pipeline, state, said) from problem
    except (RuntimeError, ValueError, MemoryError) as problem:
        if said := _host_full(problem):
            raise _out_of_memory(pipeline, state, said) from problem
        raise RunError(f"the request failed: {problem}", where="generate") from problem
    return pixels, steps.per_step


def _host_full(problem: Exception) -> str:
    """What is said where the host's memory has run out, for which PyTorch has no error of its own; else nothing."""
    said = str(problem)
    if isinstance(problem, MemoryError):
        return said or "the host's memory is full"
    return said[said.index(_HOST_ALLOCATOR) :] if _HOST_ALLOCATOR in said else ""


def _out_of_memory(pipeline: DiffusionPipeline, state: RequestState, said: str) -> RunError:
    """Say where memory ran out, what the plan expected there, and what the allocator says."""
    border, (name, method) = border_of(pipeline), state.inside
    phase = border.pipeline.phase_of.get(component_call(f"{name}.{method}"), "generate")
    device = pipeline.hf_device_map.get(name, str(border.home))
    planned = ""
    if device in border.expected:
        peak, free = (human_bytes(size) for size in border.expected[device])
        planned = f"; the plan expected {peak} there at most, of {free} that were free"
    return RunError(
        f"out of memory on {device}, in {name} during {phase}{planned} ({said.splitlines()[0]})",
        where="generate",
        hint="a smaller height, width or batch, or more GPUs",
        out_of_memory=True,
        device=device,
        component=name,
        phase=phase,
    )


def to_images(pipeline: DiffusionPipeline, pixels: torch.Tensor) -> list[Image]:
    """Turn pixels of (batch, 3, height, width) into pictures.

    Raises:
        RunError: one of them holds NaN or is one flat colour.
    """
    _check_pixels(pixels, border_of(pipeline).pipeline, _dtypes(pipeline))
    images: list[Image] = pipeline.image_processor.numpy_to_pil(pipeline.image_processor.pt_to_numpy(pixels))
    return images


def _call(
    pipeline: DiffusionPipeline, workload: Workload, request: Asked, steps: StepTraffic, on_step: StepDone | None
) -> torch.Tensor:
    done, description = 0, border_of(pipeline).pipeline
    whole = description.steps_run(workload)

    def step_end(_: Any, __: int, ___: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        nonlocal done
        done += 1
        steps.step_done()
        if on_step:
            on_step(done, whole)
        return kwargs

    arguments = arguments_of(description, workload, request)
    pipeline.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Try to use VAE tiling", category=UserWarning)
        result = pipeline(
            **arguments,
            callback_on_step_end=step_end,
            output_type="pt",
        )
    pixels: torch.Tensor = result.images
    return pixels


def _measured(clock: PhaseClock, state: RequestState, per_step: Counter[Movement], elapsed: float) -> Measured:
    peaks = {str(device): clock.host.peak_bytes(device) for device in clock.devices}
    seconds: dict[str, float] = {phase: round(clock.seconds[phase], 6) for phase in PHASES if phase in clock.seconds}
    compiled = {"compile": round(state.compiling.seconds, 6)} if state.compiling.seconds else {}
    return Measured(
        peak_bytes={device: peak for device, peak in peaks.items() if peak is not None},
        seconds={**seconds, **compiled, "generate": round(elapsed, 6)},
        bytes_moved=by_pair(state.traffic.moved),
        bytes_per_step=by_pair(per_step),
        prompt_cache_hits=state.prompt_cache_hits,
        host_peak_bytes=host_peak(),
    )


def host_peak() -> int:
    """Largest resident size of this process so far, in bytes; 0 where the system cannot tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _dtypes(pipeline: DiffusionPipeline) -> dict[Component, str]:
    """What each component computes in."""
    names = border_of(pipeline).pipeline.names
    return {name: str(getattr(pipeline, name).dtype).removeprefix("torch.") for name in names}


def _check_pixels(pixels: torch.Tensor, description: PipelineDescription, dtypes: dict[Component, str]) -> None:
    """Refuse images (batch, 3, height, width) that hold NaN or infinity, or are one flat colour."""
    from .nan_guard import image_cure

    hint = image_cure(description, dtypes)
    for number, image in enumerate(pixels):
        broken = int((~torch.isfinite(image)).sum())
        if broken:
            raise RunError(
                f"image {number} has {broken} of {image.numel()} values that are NaN or infinite",
                where="generate",
                hint=hint,
                image=number,
                broken_values=broken,
            )
        if bool((image == image[:, :1, :1]).all()):
            raise RunError(f"image {number} is one flat colour", where="generate", hint=hint, image=number)


def save_images(images: list[Image], folder: Path) -> list[Path]:
    """Write `image-000.png`, ... into `folder`, each under a temporary name first.

    Raises:
        InputError: the folder cannot be written.
    """
    paths = []
    for number, image in enumerate(images):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        paths.append(write_bytes(folder / f"image-{number:03d}.png", buffer.getvalue()))
    return paths
