"""What is asked of a pipeline: a workload bounds the shape of requests, a request is the content of one call."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .._models import Declared

VAE_FACTOR = 32
"""Pixels per latent cell and side: DC-AE f32, the VAE of the SANA family."""
LARGEST_SIDE = 65536
"""What no GPU holds in one piece: a slip of the keyboard. Below it, the plan says what fits."""
Side = Annotated[int, Field(ge=VAE_FACTOR, le=LARGEST_SIDE, multiple_of=VAE_FACTOR)]
"""Height or width in pixels."""
Batch = Annotated[int, Field(ge=1, le=256)]
Steps = Annotated[int, Field(ge=1, le=1000)]
Strength = Annotated[float, Field(gt=0, le=1)]


class Workload(Declared):
    """The shape of a request: what it takes in bytes and seconds. Height and width are pixels.

    `guided` says whether guidance is on; the pipeline says how many rows a step has then. `strength` is the share of
    the steps that run, where a pipeline starts from an image.
    """

    height: Side
    width: Side
    batch: Batch = 1
    steps: Steps
    guided: bool
    strength: Strength = 1.0

    def covers(self, other: Workload, counts_guidance: bool = True) -> bool:
        """Whether `other` is within this workload: it takes no more bytes anywhere. Steps take none.

        Args:
            counts_guidance: guidance doubles rows in this pipeline.
        """
        small = other.height <= self.height and other.width <= self.width
        same = self.guided or not other.guided or not counts_guidance
        return small and other.batch <= self.batch and same


class Request(Declared):
    """The content of one call, which changes neither bytes nor, but for `strength`, seconds within a workload.

    `control_fit` says what becomes of a control image of other proportions: stretch it, crop its middle, or pad it with
    black, which is empty in an edge map. Each pipeline's description says which of these keys it reads.
    """

    prompt: str
    negative_prompt: str = ""
    control_image: str | None = None
    control_fit: Literal["stretch", "crop", "pad"] = "stretch"
    conditioning_scale: Annotated[float, Field(ge=0, le=10)] = 1.0
    strength: Strength = 0.6
    pag_scale: Annotated[float, Field(gt=0, le=100)] = 3.0
    guidance_scale: Annotated[float, Field(ge=0, le=100)]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is on."""
        return self.guidance_scale > 1.0


class DeclaredWorkload(Request):
    """The group `workload`: one request, and the shape that its plan is for.

    Height and width are pixels and multiples of the VAE's factor, 32. Steps that are not given are the pipeline's own.
    """

    height: Side
    width: Side
    batch: Batch = 1
    steps: Steps = 20

    @property
    def bounds(self) -> Workload:
        """The shape alone."""
        shape = {name: getattr(self, name) for name in Workload.model_fields}
        return Workload(**shape)

    @property
    def request(self) -> Request:
        """The content alone."""
        return Request(**{name: getattr(self, name) for name in Request.model_fields})
