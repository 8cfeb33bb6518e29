"""Runs one request on a placed pipeline: progress, phases in seconds, peaks and traffic, and the images."""

from __future__ import annotations

import io
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import SanaControlNetPipeline
from PIL.Image import Image

from .boundary import Border, Event, Pair, border_of
from .errors import RunError
from .files import write_bytes
from .inputs import read_control_image
from .outcome import Measured
from .profile import PHASES, Phase
from .spec import Workload

StepDone = Callable[[int, int], None]
"""Called after each denoising step with the steps done and the steps in all."""

_PHASE_OF: dict[str, Phase] = {
    "text_encoder.forward": "encode",
    "vae.encode": "prepare",
    "controlnet.forward": "denoise",
    "transformer.forward": "denoise",
    "vae.decode": "decode",
}


@dataclass
class PhaseClock:
    """Border observer: seconds from a phase's first entry to the next phase's first entry."""

    devices: list[torch.device]
    seconds: dict[str, float] = field(default_factory=dict)
    current: Phase | None = None
    since: float = 0.0

    def __call__(self, event: Event, place: str) -> None:
        phase = _PHASE_OF.get(place)
        if event == "enter" and phase and phase != self.current:
            self.switch(phase)

    def switch(self, phase: Phase | None) -> None:
        """End the current phase, wait for its GPUs, and begin `phase`."""
        for device in self.devices:
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        if self.current:
            self.seconds[self.current] = self.seconds.get(self.current, 0.0) + now - self.since
        self.current, self.since = phase, now


@dataclass
class StepTraffic:
    """Bytes moved between the ends of two neighbouring steps: one whole step, prompt and decode left out."""

    border: Border
    before: Counter[Pair] | None = None
    per_step: Counter[Pair] = field(default_factory=Counter)

    def step_done(self) -> None:
        """Note the traffic so far; from the second step on the difference is one step's."""
        now = Counter(self.border.traffic.moved)
        if self.before is not None:
            self.per_step = now - self.before
        self.before = now


def generate(
    pipeline: SanaControlNetPipeline, workload: Workload, on_step: StepDone | None = None
) -> tuple[list[Image], Measured]:
    """Run `workload` once.

    Args:
        pipeline: a placed pipeline.
        workload: prompt, sizes, steps, seed.
        on_step: told after every denoising step.

    Returns:
        `workload.batch` images of (height, width), and what was measured.

    Raises:
        RunError: out of memory, a failed operation, or an image that is NaN or one flat colour.
    """
    border = border_of(pipeline)
    if border is None:
        raise RunError("the pipeline is not placed", hint="use load_pipeline(plan) or place(pipeline, resolved)")
    gpus = sorted({place for place in pipeline.hf_device_map.values() if place.startswith("cuda")})
    devices = [torch.device(gpu) for gpu in gpus]
    clock, steps = PhaseClock(devices), StepTraffic(border)
    border.traffic.moved.clear()
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    border.observers.append(clock)
    started = time.perf_counter()
    try:
        pixels = _call(pipeline, workload, steps, on_step)
    finally:
        clock.switch(None)
        border.observers.remove(clock)
    elapsed = time.perf_counter() - started
    measured = _measured(clock, steps, devices, elapsed)
    _check_pixels(pixels)
    images: list[Image] = pipeline.image_processor.numpy_to_pil(pipeline.image_processor.pt_to_numpy(pixels))
    return images, measured


def _call(
    pipeline: SanaControlNetPipeline, workload: Workload, steps: StepTraffic, on_step: StepDone | None
) -> torch.Tensor:
    done = 0

    def step_end(_: Any, __: int, ___: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        nonlocal done
        done += 1
        steps.step_done()
        if on_step:
            on_step(done, workload.steps)
        return kwargs

    pipeline.set_progress_bar_config(disable=True)
    try:
        result = pipeline(
            prompt=workload.prompt,
            negative_prompt=workload.negative_prompt,
            control_image=read_control_image(workload),
            controlnet_conditioning_scale=workload.conditioning_scale,
            height=workload.height,
            width=workload.width,
            num_images_per_prompt=workload.batch,
            num_inference_steps=workload.steps,
            guidance_scale=workload.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(workload.seed),
            use_resolution_binning=False,
            callback_on_step_end=step_end,
            output_type="pt",
        )
    except torch.OutOfMemoryError as problem:
        raise RunError(f"out of memory while generating: {problem}", where="generate") from problem
    except UnboundLocalError as problem:  # the pipeline warns of the decoder's OutOfMemoryError and goes on
        raise RunError("out of memory while the VAE decoded the latents", where="vae", hint="a smaller height, width "
                       "or batch") from problem  # fmt: skip
    except (RuntimeError, ValueError) as problem:
        raise RunError(f"the request failed: {problem}", where="generate") from problem
    pixels: torch.Tensor = result.images
    return pixels


def _measured(clock: PhaseClock, steps: StepTraffic, devices: list[torch.device], elapsed: float) -> Measured:
    seconds: dict[str, float] = {phase: round(clock.seconds[phase], 6) for phase in PHASES if phase in clock.seconds}
    return Measured(
        peak_bytes={str(device): torch.cuda.max_memory_allocated(device) for device in devices},
        seconds={**seconds, "generate": round(elapsed, 6)},
        bytes_moved=_named(steps.border.traffic.moved),
        bytes_per_step=_named(steps.per_step),
        host_peak_bytes=host_peak(),
    )


def _named(moved: Counter[Pair]) -> dict[str, int]:
    return {f"{src}->{dst}": count for (src, dst), count in sorted(moved.items())}


def host_peak() -> int:
    """Largest resident size of this process so far, in bytes; 0 where the system cannot tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _check_pixels(pixels: torch.Tensor) -> None:
    """Refuse images (batch, 3, height, width) that hold NaN or infinity, or are one flat colour."""
    for number, image in enumerate(pixels):
        broken = int((~torch.isfinite(image)).sum())
        hint = "precision=mixed_bf16 or precision=fp32 keeps text encoder and VAE out of float16"
        if broken:
            raise RunError(
                f"image {number} has {broken} of {image.numel()} values that are NaN or infinite",
                where="generate",
                hint=hint,
                broken_values=broken,
            )
        if bool((image == image[:, :1, :1]).all()):
            raise RunError(f"image {number} is one flat colour", where="generate", hint=hint)


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
