"""From a request of the API to an order for the engine: defaults of the plan, its bounds, and what fits it."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._models import Diagnostic
from ..declare.pipelines import PIPELINES
from ..declare.serving import Serving
from ..declare.workload import DeclaredWorkload
from ..errors import InfeasibleError
from ..plan.admission import Admission
from ..plan.artifact import Plan
from .engine import Content, Order, Settings
from .openai import ApiError, ImagesRequest
from .pictures import control_image, no_control_image, sent_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

_STEPS_OF_PLAN = 3
"""`most_steps` where it is not given, as a multiple of the plan's."""


@dataclass(frozen=True)
class Placed:
    """An order, and what its answer says of it."""

    order: Order
    asked: ImagesRequest
    facts: Mapping[str, Any]
    remarks: Sequence[Diagnostic]

    def facts_of(self, number: int, batch: int) -> dict[str, Any]:
        """What the file of a picture says: with these, the same plan draws it again."""
        return {**self.facts, "seed": self.order.contents[number].seed, "batch": batch}


class Orders:
    """Turns requests into orders.

    Args:
        plan: what is served.
        defaults: what a request has where it says nothing.
        admission: what fits the plan.
        options: bounds of the service.
    """

    def __init__(self, plan: Plan, defaults: DeclaredWorkload, admission: Admission, options: Serving) -> None:
        self.plan, self.defaults, self.admission, self.options = plan, defaults, admission, options
        self.model = options.name or served_name(plan)
        self.most_steps = options.most_steps or min(1000, _STEPS_OF_PLAN * defaults.steps)

    def place(self, name: str, asked: ImagesRequest, image: bytes | None = None) -> Placed:
        """Check a request against the plan and read its control image; takes some ms, so call it in a thread.

        Args:
            name: the request's id.
            asked: what its body says.
            image: the control image, where it came as a file.

        Raises:
            ApiError: with the sentence of the rule that it breaks.
        """
        self._check_bounds(asked)
        self._check_read(asked, image is not None)
        settings = self._settings(asked, image is not None)
        self._check_fits(asked, settings)
        picture, remarks, digest = self._control(asked, image, settings)
        seed = secrets.randbelow(2**32) if asked.seed is None else asked.seed
        numbers = range(asked.n or 1)
        contents = [Content(asked.prompt, asked.negative_prompt, seed + number, picture) for number in numbers]
        batch = self.admission.batch(settings.workload(), self.options.batch_bound, forced=self.options.batch != "auto")
        order = Order(name, settings, contents, batch, asked.partial_images if asked.stream else 0)
        facts = {"plan": self.plan.digest, "model": self.model, "request": self._described(asked, settings, digest)}
        return Placed(order, asked, facts, remarks)

    def _check_bounds(self, asked: ImagesRequest) -> None:
        if asked.model is not None and asked.model != self.model:
            message = f"there is no model {asked.model!r:.80} here; this service has {self.model!r}"
            raise ApiError(404, message, "model_not_found", "model")
        if asked.n is not None and asked.n > self.options.most_images:
            raise ApiError(400, f"n is at most {self.options.most_images} here, got {asked.n}", "invalid_value", "n")
        if asked.steps is not None and asked.steps > self.most_steps:
            message = (
                f"steps are at most {self.most_steps} here, got {asked.steps}; the plan is for {self.defaults.steps}"
            )
            raise ApiError(400, message, "invalid_value", "steps")

    def _check_read(self, asked: ImagesRequest, has_file: bool) -> None:
        """Refuse what the pipeline does not read, and a request without the image that it starts from."""
        pipeline = self.plan.pipeline
        if has_file and pipeline.image is None:
            message = f"{self.model} takes no image; POST /v1/images/generations draws from the prompt alone"
            raise ApiError(400, message, "unknown_parameter", "image")
        known = {key for one in PIPELINES.values() for key in one.reads}
        for key in sorted(asked.model_fields_set & known):
            if key not in pipeline.reads and getattr(asked, key) != ImagesRequest.model_fields[key].default:
                raise ApiError(400, f"{self.model} takes no {key}", "unknown_parameter", key)
        if pipeline.image and not pipeline.image.optional and not has_file and asked.control_image is None:
            message = f"{self.model} starts from an image: send the file image to POST /v1/images/edits"
            raise ApiError(400, message, "missing_parameter", "image")

    def _settings(self, asked: ImagesRequest, has_file: bool) -> Settings:
        width, height = asked.pixels(self.defaults.width, self.defaults.height)
        controlled = has_file or asked.control_image is not None
        if asked.conditioning_scale and not controlled:
            message = "conditioning_scale steers by a control image, and none is given"
            raise ApiError(400, message, "missing_parameter", "control_image")
        scale = self.defaults.conditioning_scale if asked.conditioning_scale is None else asked.conditioning_scale
        guidance = self.defaults.guidance_scale if asked.guidance_scale is None else asked.guidance_scale
        strength = self.defaults.strength if asked.strength is None else asked.strength
        pag_scale = self.defaults.pag_scale if asked.pag_scale is None else asked.pag_scale
        steps, scale = asked.steps or self.defaults.steps, scale if controlled else 0.0
        return Settings(height, width, steps, guidance, scale, strength, pag_scale)

    def _check_fits(self, asked: ImagesRequest, settings: Settings) -> None:
        shape = settings.workload()
        try:
            self.admission.check(shape)
        except InfeasibleError as problem:
            raise ApiError(400, f"{problem.message}; {problem.hint}", "does_not_fit", problem.where) from None
        count, each = asked.n or 1, self.admission.seconds(shape)
        if each is not None and count * each > self.options.timeout:
            pictures = f"{count} picture{'s' if count > 1 else ''} of {settings.width}x{settings.height}"
            message = (
                f"{pictures} in {settings.steps} steps take some {count * each:.0f} s by the plan's estimate, "
                f"more than the {self.options.timeout:g} s that a request may take"
            )
            raise ApiError(400, message, "takes_too_long", "steps")

    def _control(
        self, asked: ImagesRequest, image: bytes | None, settings: Settings
    ) -> tuple[Image | None, list[Diagnostic], str | None]:
        """The image of a request, what was done to it, and the digest of what was sent."""
        if image is not None and asked.control_image is not None:
            message = "control_image and a file are both given; send one of them"
            raise ApiError(400, message, "invalid_value", "control_image")
        param = "control_image" if image is None else "image"
        if image is None and asked.control_image is not None:
            image = sent_bytes(asked.control_image, param)
        shape = settings.workload()
        if image is None:
            return no_control_image(shape) if self.plan.pipeline.image else None, [], None
        picture, remarks = control_image(image, asked, shape, self.options.max_pixels, param)
        return picture, remarks, hashlib.sha256(image).hexdigest()

    def _described(self, asked: ImagesRequest, settings: Settings, digest: str | None) -> dict[str, Any]:
        """What was asked for, with the defaults that were filled in."""
        read = {
            "negative_prompt": asked.negative_prompt,
            "conditioning_scale": settings.conditioning_scale,
            "control_fit": asked.control_fit,
            "control_image": digest and f"sha256:{digest}",
            "strength": settings.strength,
            "pag_scale": settings.pag_scale,
        }
        return {
            "prompt": asked.prompt,
            "size": f"{settings.width}x{settings.height}",
            "steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
            **{key: value for key, value in read.items() if key in self.plan.pipeline.reads},
        }


def served_name(plan: Plan) -> str:
    """What the API calls the planned model: its name in the catalogue or on the hub, or that of its folder."""
    model = plan.spec.model
    if model.kind == "tiny":
        return model.kind
    if model.kind == "catalogue":
        return model.name
    return Path(model.source).name if Path(model.source).expanduser().is_dir() else model.source
