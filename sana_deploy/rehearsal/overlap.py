"""The rehearsal of requests that are in flight at once: what their stages take together, beside the plan.

Virtual GPUs work when they are asked, so that seconds are the plan's: the timeline is its own. Bytes are counted while
real requests go through their stages in threads, with the turns of a real run.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from diffusers import DiffusionPipeline
from PIL.Image import Image

from ..declare.workload import Request
from ..errors import UsageError
from ..facts.allocator import context_bytes
from ..plan.artifact import Plan, ResolvedPlan
from ..plan.overlap import Visit, schedule
from ..run.generate import run_request, to_images
from ..run.hook import border_of
from ..run.load import load_pipeline
from ..run.overlap import Overlapped
from ..run.place import resolved_plan
from ..run.request_state import RequestState
from .host import VirtualHost
from .rehearse import SHAPE_STEPS, LedgerClock, open_host


@dataclass(frozen=True)
class Together:
    """What requests took that were in flight at once.

    Attributes:
        peaks: GPU index -> bytes at its fullest, context and what the allocator takes included.
        planned: GPU index -> what the plan says of that.
        timeline: requests in their stages, in the plan's seconds.
        images: a picture of each request; none in shapes.
    """

    peaks: dict[int, int]
    planned: dict[int, int]
    timeline: list[Visit]
    images: list[Image]


class Stand:
    """A pipeline on virtual GPUs, for requests in flight.

    Args:
        plan: compiled with `machine=virtual`, one whose stages overlap.

    Raises:
        UsageError: its stages do not overlap.
        InfeasibleError: the plan is not for virtual GPUs.
    """

    def __init__(self, plan: Plan | ResolvedPlan) -> None:
        resolved = resolved_plan(plan, "Stand(plan)").each()[0]
        overlap = resolved.plan.overlap
        if overlap is None:
            raise UsageError("the stages of requests do not overlap in this plan", where="plan.overlap")
        self.resolved, self.overlap = resolved, overlap
        self.host: VirtualHost = open_host(resolved)
        self.pipeline: DiffusionPipeline = load_pipeline(resolved, None, self.host)
        self.overlapped = Overlapped(self.pipeline, resolved, overlap)

    def draw(self, request: Request, state: RequestState | None = None) -> list[Image]:
        """Draw a request of the planned shape, in the calling thread; what it gathers is in `state`."""
        state, bounds = state or RequestState(), self.resolved.plan.spec.workload.bounds
        if self.host.fidelity == "shapes":
            bounds = bounds.model_copy(update={"steps": min(bounds.steps, SHAPE_STEPS)})
        with self.host, self.overlapped.request(bounds) as flying:
            pipeline = border_of(flying.pipeline).pipeline
            flying.lead(state)
            state.observers.append(LedgerClock(self.host.ledger, pipeline))
            pixels, _ = run_request(flying.pipeline, bounds, request, None, state)
            return to_images(flying.pipeline, pixels.cpu()) if self.host.fidelity == "numbers" else []

    def together(self, requests: Sequence[Request]) -> Together:
        """Draw requests, as many at once as the plan says.

        Raises:
            RunError: a virtual GPU runs out of memory.
        """
        with ThreadPoolExecutor(self.overlap.in_flight) as pool:
            images = [image for drawn in pool.map(self.draw, requests) for image in drawn]
        timeline = schedule(self.overlap.stages, self.overlap.in_flight, len(requests))
        return Together(self.peaks(), self.planned(), timeline, images)

    def peaks(self) -> dict[int, int]:
        """See `Together`: the most since loading; headroom is no bytes of anything."""
        taken = {slot.index: slot.allocator_bytes for slot in self.resolved.plan.slots}
        gpus = {gpu.index: gpu for gpu in self.resolved.machine.gpus}
        return {
            slot: self.host.ledger.peaks[slot].total_bytes + context_bytes(gpus[slot].capability) + allocated
            for slot, allocated in taken.items()
        }

    def planned(self) -> dict[int, int]:
        """See `Together`."""
        return {use.slot: use.peak_bytes for use in self.overlap.slots}
