"""`SanaPipeline` of diffusers: Gemma 2, DC-AE and SANA's transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..workload import Request, Workload
from .base import PipelineDescription
from .parts import (
    FLOW_SCHEDULER,
    STEADY,
    TEXT_ENCODER,
    TRANSFORMER,
    VAE,
    common_arguments,
    half_crossings,
    plain_crossings,
)
from .sana_rows import RowUnits


def arguments(request: Request, workload: Workload, _: Any) -> dict[str, Any]:
    """What a call of the pipeline gets."""
    return {**common_arguments(request, workload), "negative_prompt": request.negative_prompt}


def together(requests: Sequence[Request], workload: Workload, images: Sequence[Any]) -> dict[str, Any]:
    """What one call of the pipeline gets for several requests with the same scales, a picture each."""
    return {
        **arguments(requests[0], workload, None),
        "prompt": [one.prompt for one in requests],
        "negative_prompt": [one.negative_prompt for one in requests],
        "num_images_per_prompt": 1,
    }


SANA = PipelineDescription(
    class_name="SanaPipeline",
    title="SANA pipeline",
    components=(TEXT_ENCODER, VAE, TRANSFORMER),
    scheduler=FLOW_SCHEDULER,
    crossings=plain_crossings,
    arguments=arguments,
    together=together,
    steady=STEADY,
    extended=(("controlnet", "SanaControlNetPipeline"),),
    reads=("negative_prompt",),
    casts_prompt=True,
    second_half=half_crossings,
    bands=RowUnits().bands,
)
