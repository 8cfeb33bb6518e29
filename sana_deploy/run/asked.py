"""What a call of a placed pipeline is asked for: one request, or drawings of several requests in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image

from ..declare.control_image import read_control_image
from ..declare.pipelines import PipelineDescription
from ..declare.workload import Request, Workload
from ..errors import UsageError


@dataclass(frozen=True)
class Drawing:
    """A request whose image is in memory already: RGB, (height, width) as the workload has it; None without one."""

    request: Request
    control_image: Image | None


_SCALES = ("conditioning_scale", "strength", "pag_scale")
"""Keys of a request that a call takes one of, whatever it draws."""
Asked = Request | Sequence[Drawing]
"""One request, or drawings of one call: a picture each, as many as the workload's batch."""


def check_asked(description: PipelineDescription, workload: Workload, request: Asked) -> None:
    """Refuse what is not of the workload's shape, or cannot be drawn in one call.

    Raises:
        UsageError: saying which rule is broken.
    """
    requests = [request] if isinstance(request, Request) else [one.request for one in request]
    if not isinstance(request, Request) and len(requests) != workload.batch:
        message = f"the workload's batch is {workload.batch}, and {len(requests)} drawings were given"
        raise UsageError(message, where="request", hint="a drawing for each image")
    scales = ["guidance_scale", *(key for key in _SCALES if key in description.reads)]
    if len({tuple(getattr(one, key) for key in scales) for one in requests}) > 1:
        raise UsageError(f"drawings of one call share {' and '.join(scales)}", where="request")
    if requests[0].guided != workload.guided and description.counts_guidance:
        guided = "with" if workload.guided else "without"
        raise UsageError(
            f"the workload is {guided} guidance, and the request's guidance_scale is {requests[0].guidance_scale:g}",
            where="request.guidance_scale",
            hint="above 1 is with guidance, up to 1 without",
        )


def arguments_of(description: PipelineDescription, workload: Workload, asked: Asked) -> dict[str, Any]:
    """What the pipeline is called with: a generator for each drawing, so that none depends on those beside it."""
    if isinstance(asked, Request):
        picture = read_control_image(asked, workload) if description.image else None
        return {**description.arguments(asked, workload, picture), "generator": _generator(asked)}
    if len(asked) == 1:  # called as a request alone is, so that its picture has the same bits
        (one,) = asked
        return {**description.arguments(one.request, workload, one.control_image), "generator": _generator(one.request)}
    requests, pictures = [one.request for one in asked], [one.control_image for one in asked]
    return {
        **description.together(requests, workload, pictures),
        "generator": [_generator(one) for one in requests],
    }


def _generator(request: Request) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(request.seed)
