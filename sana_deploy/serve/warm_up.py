"""A replica draws before it takes requests: what is done once is done then, and what cannot draw is seen then."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..declare.workload import DeclaredWorkload
from ..errors import RunError, SanaDeployError
from ..plan.artifact import Plan
from .engine import Content, Preview, Replica, Settings
from .pictures import no_control_image

log = logging.getLogger(__name__)
_STEPS = 3
"""Of a warm-up drawing: a graph is captured in the second step and replayed in the third."""


@dataclass(frozen=True)
class WarmUp:
    """Draws pictures that nobody gets.

    Attributes:
        settings: of these pictures.
        prompts: one for each picture.
        image: whether the pipeline takes an image; it gets an empty one.
        seconds: how long they may take in all; looked at after every step.
    """

    settings: Settings
    prompts: Sequence[str]
    image: bool
    seconds: float

    @classmethod
    def of(cls, plan: Plan, defaults: DeclaredWorkload, seconds: float) -> WarmUp:
        """The warm-up of a plan: in its own size, with the guidance that requests have where they say nothing.

        Graphs capture a call when it comes the second time. The text encoder is called once for each prompt, so that it
        takes two pictures of different prompts; without graphs one is enough.
        """
        prompts = ("warm-up",) if plan.runtime == "eager" else ("warm-up", "another warm-up")
        shape, steps = (defaults.height, defaults.width), min(_STEPS, defaults.steps)
        # Of its strength an image leaves a share of the steps, which may be none of so few.
        settings = Settings(*shape, steps, defaults.guidance_scale, 0.0, strength=1.0, pag_scale=defaults.pag_scale)
        return cls(settings, prompts, plan.pipeline.image is not None, seconds)

    def __call__(self, replica: Replica) -> None:
        """Draw on a loaded replica.

        Raises:
            RunError: the drawing failed, and why, or it was not done in time.
        """
        began = time.monotonic()
        watch = _Watch(began + self.seconds)
        blank = no_control_image(self.settings.workload()) if self.image else None
        for prompt in self.prompts:
            try:
                replica.draw(self.settings, [Content(prompt, "", 0, blank)], watch)
            except _LateError:
                message = f"the warm-up drawing was not done within {self.seconds:g} s"
                hint = "serve.warm_up=false does without, serve.startup gives it more time"
                raise RunError(message, where="serve.warm_up", hint=hint) from None
            except SanaDeployError as problem:
                message = f"the warm-up drawing failed: {problem.message}"
                raise RunError(message, where="serve.warm_up", hint=problem.hint, **problem.facts) from problem
        log.info("warmed up in %.1f s", time.monotonic() - began)


class _LateError(Exception):
    """Raised in the thread that draws, to end it."""


class _Watch:
    """Ends a warm-up that takes too long; see `OnStep`."""

    shown: Collection[int] = ()

    def __init__(self, until: float) -> None:
        self._until = until

    def check(self) -> None:
        """See `OnStep`."""
        if time.monotonic() > self._until:
            raise _LateError

    def __call__(self, done: int, of: int, preview: Preview) -> None:
        """See `OnStep`."""
        self.check()
