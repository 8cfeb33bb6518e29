"""A placed pipeline as a replica: the run's own functions, in a thread for each batch. Imports torch once loaded."""

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
    from ..run.overlap import InFlight, Overlapped

log = logging.getLogger(__name__)
_LOADING = threading.Lock()
"""Loading patches libraries for a moment: one pipeline at a time."""


class PipelineReplica:
    """Draws with the pipeline of a resolved plan; see `Replica`.

    Args:
        resolved: the plan on its devices.
        load: makes the placed pipeline; `run.load.load_pipeline` unless given.
        overlap: draw several batches at once where the plan says that their stages overlap.
    """

    def __init__(
        self, resolved: ResolvedPlan, load: Callable[[ResolvedPlan], Any] | None = None, overlap: bool = False
    ) -> None:
        self.resolved, self._load = resolved, load
        self.overlap = resolved.plan.overlap if overlap else None
        self.pipeline: Any = None
        self._overlapped: Overlapped | None = None

    @property
    def at_once(self) -> int:
        """See `Replica`."""
        return self.overlap.in_flight if self.overlap else 1

    def load(self) -> None:
        """See `Replica`."""
        with _LOADING:
            from .._startup import quick_imports

            with quick_imports():
                from ..run import generate  # noqa: F401  with all that it imports, so that no request waits for it
                from ..run.load import load_pipeline
                from ..run.overlap import Overlapped
            self.pipeline = (self._load or load_pipeline)(self.resolved)
            if self.overlap:
                self._overlapped = Overlapped(self.pipeline, self.resolved, self.overlap)

    def draw(self, settings: Settings, contents: Sequence[Content], on_step: OnStep) -> Made:
        """See `Replica`."""
        workload = settings.workload(len(contents))
        if self._overlapped is None:
            return _drawn(self.pipeline, None, settings, contents, on_step)
        with self._overlapped.request(workload, on_step.check) as flying:
            return _drawn(flying.pipeline, flying, settings, contents, on_step)

    def recover(self) -> bool:
        """See `Replica`: memory goes back to the driver, graphs are made anew, and each device computes a sum.

        What else is drawn at the time ends first.
        """
        with self._overlapped.alone() if self._overlapped else contextlib.nullcontext():
            return self._recover()

    def _recover(self) -> bool:
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


def _drawn(
    pipeline: Any, flying: InFlight | None, settings: Settings, contents: Sequence[Content], on_step: OnStep
) -> Made:
    """Draw one batch with a pipeline that no other thread uses; `flying` is its request where others are in flight."""
    from ..run.asked import Drawing
    from ..run.generate import generate
    from ..run.prompts import cut_prompts

    drawings = [Drawing(_request(settings, content), content.control_image) for content in contents]
    # Before the drawing, since the tokenizer is for one thread at a time: for the one that encodes.
    remarks = [cut_prompts(pipeline, drawing.request) for drawing in drawings]

    def stepped(done: int, of: int) -> None:
        on_step(done, of, lambda: _preview(pipeline, len(contents), flying))

    pictures, measured = generate(pipeline, settings.workload(len(contents)), drawings, stepped, stages=flying)
    return Made(pictures, measured.seconds, measured.peak_bytes, remarks)


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


def _preview(pipeline: Any, batch: int, flying: InFlight | None) -> Sequence[Image] | None:
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
        with (
            flying.besides("decode") if flying else contextlib.nullcontext(),
            border.states.opened(RequestState()),  # the request itself neither counts nor checks this
        ):
            pixels = vae.decode(predicted.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
            images: list[Image] = pipeline.image_processor.postprocess(pixels, output_type="pil")
            del pixels
    except torch.OutOfMemoryError:
        return None
    return images
