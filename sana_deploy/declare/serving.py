"""The group `serve`: how a plan is offered as an images API. It belongs to the command, not to a deployment's plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from .._models import Declared
from .._units import parse_bytes
from .explain import first_error
from .sizes import Size
from .workload import Steps

MOST_BATCH = 8
"""Pictures that `batch=auto` draws at once at most."""
Seconds = Annotated[float, Field(gt=0, le=86400)]
Count = Annotated[int, Field(ge=1, le=4096)]


class Serving(Declared):
    """How a plan is served.

    Attributes:
        host: address or name to listen on.
        port: TCP port; 0 takes a free one.
        keys: path of a file with one bearer key a line; None asks for no key.
        engine: replicas in threads of this process, or in processes of Ray Serve.
        replicas: of `engine=ray`; None takes the plan's.
        startup: seconds that replicas of `engine=ray` may take until they can draw.
        name: the served model's name in the API; None takes that of the planned model.
        queue: pictures that may wait.
        most_images: pictures of one request.
        batch: pictures drawn at once, or `auto` for what the plan's estimate says.
        admit: sizes beyond the plan's workload that are taken: those that fit, or none.
        most_steps: denoising steps of one request; None for three times the plan's.
        timeout: seconds that a request may take in all.
        receive_timeout: seconds for a request's head, and for its body, to arrive.
        drain: seconds that accepted requests have to end once the service is told to stop.
        max_body: bytes of the largest body, e.g. `32MiB`.
        max_pixels: pixels of the largest control image.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    keys: str | None = None
    engine: Literal["local", "ray"] = "local"
    replicas: Annotated[int, Field(ge=1, le=1024)] | None = None
    startup: Seconds = 900.0
    name: Annotated[str, Field(pattern=r"^[\w./:-]{1,128}$")] | None = None
    queue: Count = 64
    most_images: Annotated[int, Field(ge=1, le=256)] = 10
    batch: Annotated[int, Field(ge=1, le=256)] | Literal["auto"] = "auto"
    admit: Literal["fitting", "planned"] = "fitting"
    most_steps: Steps | None = None
    timeout: Seconds = 600.0
    receive_timeout: Seconds = 30.0
    drain: Seconds = 120.0
    max_body: Size = "32MiB"
    max_pixels: Annotated[int, Field(ge=1024, le=2**28)] = 2**26

    @property
    def max_body_bytes(self) -> int:
        """`max_body` in bytes."""
        return parse_bytes(self.max_body)

    @property
    def batch_bound(self) -> int:
        """Pictures drawn at once at most, whatever an estimate says."""
        return MOST_BATCH if self.batch == "auto" else self.batch

    @model_validator(mode="after")
    def _queue_holds_a_request(self) -> Self:
        if self.most_images > self.queue:
            raise ValueError(f"most_images={self.most_images} must not exceed queue={self.queue}")
        return self

    @model_validator(mode="after")
    def _replicas_are_of_ray(self) -> Self:
        if self.replicas is not None and self.engine != "ray":
            raise ValueError("replicas is of engine=ray; engine=local has those that hardware.replicas planned")
        return self

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Serving:
        """Validate the composed group.

        Raises:
            InvalidSpecError: naming the first offending key and the rule it breaks.
        """
        try:
            return _Composed.model_validate({"serve": values}).serve
        except ValidationError as problem:
            raise first_error(problem) from None


class _Composed(Declared):
    """The group where it stands in the configuration, so that errors name its keys in full."""

    serve: Serving
