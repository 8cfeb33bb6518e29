"""`SanaPAGPipeline` of diffusers: SANA with perturbed attention guidance, which adds a third row for each image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..workload import Request, Workload
from . import sana
from .base import PipelineDescription
from .parts import FLOW_SCHEDULER, STEADY, TEXT_ENCODER, TRANSFORMER, VAE, plain_crossings
from .sana_rows import RowUnits

ROWS_EACH = (2, 3)
"""The prompt's rows come twice, the second time to be perturbed."""
PERTURBED_BLOCKS = 1
"""The pipeline's `pag_applied_layers`, where nobody says otherwise, are the first block alone."""


def arguments(request: Request, workload: Workload, _: Any) -> dict[str, Any]:
    """What a call of the pipeline gets."""
    return {**sana.arguments(request, workload, None), "pag_scale": request.pag_scale}


def together(requests: Sequence[Request], workload: Workload, images: Sequence[Any]) -> dict[str, Any]:
    """What one call of the pipeline gets for several requests with the same scales, a picture each."""
    return {**sana.together(requests, workload, images), "pag_scale": requests[0].pag_scale}


SANA_PAG = PipelineDescription(
    class_name="SanaPAGPipeline",
    title="SANA PAG pipeline",
    components=(TEXT_ENCODER, VAE, TRANSFORMER),
    scheduler=FLOW_SCHEDULER,
    crossings=plain_crossings,
    arguments=arguments,
    together=together,
    steady=STEADY,
    reads=("negative_prompt", "pag_scale"),
    rows_each=ROWS_EACH,
    undivided="a SANA PAG pipeline computes the rows of a step together in perturbed attention",
    bands=RowUnits(ROWS_EACH, perturbed=PERTURBED_BLOCKS).bands,
)
