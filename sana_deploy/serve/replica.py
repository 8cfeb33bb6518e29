"""A placed pipeline as a replica: the run's own functions, in one thread. Imports torch once it is loaded."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..declare.workload import Request
from ..errors import RunError
from .engine import Content, Made, OnStep, Settings

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..plan.artifact import ResolvedPlan

log = logging.getLogger(__name__)
_LOADING = threading.Lock()
"""Loading patches libraries for a moment: one pipeline at a time."""


class PipelineReplica:
    """Draws with the pipeline of a resolved plan; see `Replica`.

    Args:
        resolved: the plan on its devices.
        load: makes the placed pipeline; `run.load.load_pipeline` unless given.
    """

    def __init__(self, resolved: ResolvedPlan, load: Callable[[ResolvedPlan], Any] | None = None) -> None:
        self.resolved, self._load = resolved, load
        self.pipeline: Any = None

    def load(self) -> None:
        """See `Replica`."""
        with _LOADING:
            from .._startup import quick_imports

            with quick_imports():
                from ..run import generate  # noqa: F401  with all that it imports, so that no request waits for it
                from ..run.load import load_pipeline
            self.pipeline = (self._load or load_pipeline)(self.resolved)

    def draw(self, settings: Settings, contents: Sequence[Content], on_step: OnStep) -> Made:
        """See `Replica`."""
        from ..run.asked import Drawing
        from ..run.generate import generate
        from ..run.prompts import cut_prompts

        drawings = [Drawing(_request(settings, content), content.control_image) for content in contents]
        pictures, measured = generate(
            self.pipeline,
            settings.workload(len(contents)),
            drawings,
            lambda done, of: on_step(done, of, lambda: _preview(self.pipeline, len(contents))),
        )
        remarks = [cut_prompts(self.pipeline, drawing.request) for drawing in drawings]
        return Made(pictures, measured.seconds, measured.peak_bytes, remarks)

    def recover(self) -> bool:
        """See `Replica`: memory goes back to the driver, graphs are made anew, and each device computes a sum."""
        import torch

        from ..run.hook import forget_graphs

        with contextlib.suppress(RuntimeError):  # what is wrong is seen below
            forget_graphs(self.pipeline)
        gc.collect()
        for name in sorted(set(self.resolved.device_map.values())):
            try:
                device = torch.device(name)
                if device.type == "cuda":
                    with torch.cuda.device(device):
                        torch.cuda.empty_cache()
                if float(torch.ones(8, device=device).sum()) != 8:
                    raise RunError(f"{name} adds wrongly")
            except (RuntimeError, RunError):
                log.exception("%s does not compute any more", name)
                return False
        return True


def _request(settings: Settings, content: Content) -> Request:
    return Request(
        prompt=content.prompt,
        negative_prompt=content.negative_prompt,
        seed=content.seed,
        conditioning_scale=settings.conditioning_scale,
        strength=settings.strength,
        pag_scale=settings.pag_scale,
        guidance_scale=settings.guidance_scale,
    )


def _preview(pipeline: Any, batch: int) -> Sequence[Image] | None:
    """Decode what the scheduler predicts of the finished pictures.

    The denoising step before has ended, so that this takes what decoding takes in the plan. None where the scheduler
    keeps no such prediction, or where memory is short all the same: a preview may be left out.
    """
    import torch

    from ..run.hook import border_of
    from ..run.request_state import RequestState

    kept = getattr(pipeline.scheduler, "model_outputs", None) or [None]
    predicted = kept[-1]
    if not isinstance(predicted, torch.Tensor) or len(predicted) != batch:
        return None
    border = border_of(pipeline)
    vae = getattr(pipeline, border.pipeline.of("vae"))
    try:
        with border.states.opened(RequestState()):  # the request itself neither counts nor checks this
            pixels = vae.decode(predicted.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
    except torch.OutOfMemoryError:
        return None
    images: list[Image] = pipeline.image_processor.postprocess(pixels, output_type="pil")
    return images
