"""The group `serve`: how a plan is offered as an images API. It belongs to the command, not to a deployment's plan."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from .._models import Declared
from .._units import parse_bytes
from .command_group import CommandGroup
from .sizes import Size
from .workload import Steps

MOST_BATCH = 8
"""Pictures that `batch=auto` draws at once at most."""
Seconds = Annotated[float, Field(gt=0, le=86400)]
Count = Annotated[int, Field(ge=1, le=4096)]
Replicas = Annotated[int, Field(ge=1, le=1024)]
Delay = Annotated[float, Field(ge=0, le=86400)]


class AutoscalingConfig(Declared):
    """Bounds between which replicas of `engine=ray` follow the load; the words are those of Ray Serve.

    Attributes:
        min_replicas: those that are always there.
        max_replicas: as many at most; None keeps their number as it is.
        upscale_delay_s: seconds of more load before replicas are added.
        downscale_delay_s: seconds of less load before replicas end.
    """

    min_replicas: Replicas = 1
    max_replicas: Replicas | None = None
    upscale_delay_s: Delay = 30.0
    downscale_delay_s: Delay = 600.0


class KubeRay(Declared):
    """What a manifest of `--export kuberay` says and no plan knows.

    Attributes:
        image: the container image with this package and Ray.
        cpus: cores of a replica.
        memory: host memory of a replica, e.g. `16GiB`.
        claim: the PersistentVolumeClaim with the checkpoint's folder; None mounts nothing.
    """

    image: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:@-]*$", max_length=512)] = (
        "registry.example/sana-deploy:latest"
    )
    cpus: Annotated[int, Field(ge=1, le=1024)] = 4
    memory: Size = "16GiB"
    claim: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$", max_length=253)] | None = None


class Serving(CommandGroup):
    """How a plan is served.

    Attributes:
        host: address or name to listen on.
        port: TCP port; 0 takes a free one.
        keys: path of a file with one bearer key a line; None asks for no key.
        engine: replicas in threads of this process, or in processes of Ray Serve.
        replicas: of `engine=ray`; None takes the plan's.
        autoscaling_config: bounds within which replicas of `engine=ray` follow the load.
        warm_up: draw before requests are taken, so that none of them waits for what is done once.
        kuberay: what a manifest of `--export kuberay` says besides the plan.
        startup: seconds that replicas of `engine=ray` may take until they can draw.
        name: the served model's name in the API; None takes that of the planned model.
        queue: pictures that may wait.
        most_images: pictures of one request.
        batch: pictures drawn at once, or `auto` for what the plan's estimate says.
        overlap: of `engine=local`: stages of several requests at once where the plan has room for it, or never.
        admit: sizes beyond the plan's workload that are taken: those that fit, or none.
        most_steps: denoising steps of one request; None for three times the plan's.
        timeout: seconds that a request may take in all.
        receive_timeout: seconds for a request's head, and for its body, to arrive, and for more of an answer to leave.
        drain: seconds that accepted requests have to end once the service is told to stop.
        max_body: bytes of the largest body, e.g. `32MiB`.
        max_pixels: pixels of the largest control image.
    """

    group: ClassVar[str] = "serve"
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    keys: str | None = None
    engine: Literal["local", "ray"] = "local"
    replicas: Replicas | None = None
    autoscaling_config: AutoscalingConfig = AutoscalingConfig()
    warm_up: bool = True
    kuberay: KubeRay = KubeRay()
    startup: Seconds = 900.0
    name: Annotated[str, Field(pattern=r"^[\w./:-]{1,128}$")] | None = None
    queue: Count = 64
    most_images: Annotated[int, Field(ge=1, le=256)] = 10
    batch: Annotated[int, Field(ge=1, le=256)] | Literal["auto"] = "auto"
    overlap: Literal["auto", "off"] = "auto"
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
    def overlaps(self) -> bool:
        """Whether stages of requests overlap where the plan has room for it."""
        return self.overlap == "auto" and self.engine == "local"

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
        if self.engine == "ray":
            return self
        if self.replicas is not None:
            raise ValueError("replicas is of engine=ray; engine=local has those that hardware.replicas planned")
        if self.autoscaling_config.max_replicas is not None:
            raise ValueError("autoscaling_config is of engine=ray; engine=local has the replicas of its plan")
        return self

    @model_validator(mode="after")
    def _replicas_are_within_bounds(self) -> Self:
        bounds = self.autoscaling_config
        if bounds.max_replicas is None:
            if bounds.min_replicas > 1:
                raise ValueError("autoscaling_config.min_replicas needs autoscaling_config.max_replicas beside it")
            return self
        if bounds.min_replicas > bounds.max_replicas:
            raise ValueError(f"min_replicas={bounds.min_replicas} must not exceed max_replicas={bounds.max_replicas}")
        if self.replicas is not None and not bounds.min_replicas <= self.replicas <= bounds.max_replicas:
            raise ValueError(
                f"replicas={self.replicas} must be within autoscaling_config, "
                f"from {bounds.min_replicas} to {bounds.max_replicas}"
            )
        return self
