"""`SanaSprintImg2ImgPipeline` of diffusers: a SANA-Sprint that starts from an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..formats import DTYPE_BYTES, Dtype
from ..workload import Request, Workload
from . import sana_sprint
from .base import Configs, Crossing, ImageInput, PipelineDescription
from .parts import SPRINT_SCHEDULER, SPRINT_TRANSFORMER, STEADY, TEXT_ENCODER, encoding_vae, latents_bytes


def crossings(configs: Configs, workload: Workload, dtypes: Mapping[str, Dtype]) -> tuple[Crossing, ...]:
    """Tensors between components, in bytes; the images of a request share the one that they start from."""
    pixels = 3 * workload.height * workload.width * DTYPE_BYTES[dtypes["vae"]]
    *prompt, decode = sana_sprint.crossings(configs, workload, dtypes)
    return (
        *prompt,
        Crossing("start_image", "transformer", "vae", pixels, False, "prepare"),
        Crossing("start_latents", "vae", "transformer", latents_bytes(configs, workload, 1, dtypes["vae"]), False,
                 "prepare"),
        decode,
    )  # fmt: skip


def steps_run(workload: Workload) -> int:
    """Steps that run: diffusers leaves out those before the noise that `strength` asks for."""
    wanted = min(workload.steps * workload.strength, workload.steps)
    return workload.steps - int(max(workload.steps - wanted, 0))


def arguments(request: Request, workload: Workload, image: Any) -> dict[str, Any]:
    """What a call of the pipeline gets; the image is of the workload's size."""
    return {**sana_sprint.arguments(request, workload, None), "image": image, "strength": request.strength}


def together(requests: Sequence[Request], workload: Workload, images: Sequence[Any]) -> dict[str, Any]:
    """What one call of the pipeline gets for several requests with the same scales, a picture each."""
    own = {"image": list(images), "strength": requests[0].strength}
    return {**sana_sprint.together(requests, workload, images), **own}


SANA_SPRINT_IMG2IMG = PipelineDescription(
    class_name="SanaSprintImg2ImgPipeline",
    title="SANA-Sprint image-to-image pipeline",
    components=(TEXT_ENCODER, encoding_vae("start_image", "start_latents"), SPRINT_TRANSFORMER),
    scheduler=SPRINT_SCHEDULER,
    crossings=crossings,
    arguments=arguments,
    together=together,
    steady=(*STEADY, "guidance"),
    reads=("control_image", "control_fit", "strength"),
    image=ImageInput("image", optional=False, each_row=False),
    rows_each=(1, 1),
    steps=2,
    most_steps=4,
    steps_run=steps_run,
    undivided=sana_sprint.UNDIVIDED,
    bands=sana_sprint.ROWS.bands,
)
