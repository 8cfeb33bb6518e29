"""`SanaSprintPipeline` of diffusers: a SANA that draws in 1 to 4 steps. Guidance is an input, and adds no rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..formats import Dtype
from ..workload import Request, Workload
from .base import Configs, Crossing, PipelineDescription
from .parts import (
    SPRINT_SCHEDULER,
    SPRINT_TRANSFORMER,
    STEADY,
    TEXT_ENCODER,
    VAE,
    common_arguments,
    decode_crossing,
    prompt_crossings,
)
from .sana_rows import RowUnits

INTERMEDIATE_TIMESTEP = 1.3
"""diffusers' own, for two steps; it takes none for any other number of them."""
ROWS = RowUnits((1, 1), recast=True, guidance=True)
UNDIVIDED = "a SANA-Sprint pipeline embeds guidance, so that a step has no rows to split"


def crossings(configs: Configs, workload: Workload, dtypes: Mapping[str, Dtype]) -> tuple[Crossing, ...]:
    """Tensors between components, in bytes; the denoising loop lives with the transformer."""
    return (*prompt_crossings(configs, dtypes, negative=False), decode_crossing(configs, workload, dtypes))


def arguments(request: Request, workload: Workload, _: Any) -> dict[str, Any]:
    """What a call of the pipeline gets."""
    intermediate = INTERMEDIATE_TIMESTEP if workload.steps == 2 else None
    return {**common_arguments(request, workload), "intermediate_timesteps": intermediate}


def together(requests: Sequence[Request], workload: Workload, images: Sequence[Any]) -> dict[str, Any]:
    """What one call of the pipeline gets for several requests with the same scales, a picture each."""
    prompts = [one.prompt for one in requests]
    return {**arguments(requests[0], workload, None), "prompt": prompts, "num_images_per_prompt": 1}


SANA_SPRINT = PipelineDescription(
    class_name="SanaSprintPipeline",
    title="SANA-Sprint pipeline",
    components=(TEXT_ENCODER, VAE, SPRINT_TRANSFORMER),
    scheduler=SPRINT_SCHEDULER,
    crossings=crossings,
    arguments=arguments,
    together=together,
    # The dtype of the embeddings is guidance's too, so that they are not cast ahead (`casts_prompt`).
    steady=(*STEADY, "guidance"),
    rows_each=(1, 1),
    steps=2,
    most_steps=4,
    undivided=UNDIVIDED,
    bands=ROWS.bands,
)
