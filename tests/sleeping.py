"""Replicas that sleep, and what processes of Ray need of them: imports little, since each such process imports it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from PIL import Image

from sana_deploy.errors import RunError
from sana_deploy.facts import machine
from sana_deploy.plan.artifact import ResolvedPlan
from sana_deploy.serve.engine import Content, Made, OnStep, Settings


class Sleeping:
    """Sleeps a moment for every step; draws the seed into the first pixel. Prompts tell it to fail."""

    def __init__(self, step: float = 0.02) -> None:
        self.step, self.lives = step, True
        self.batches: list[list[int]] = []

    def load(self) -> None:
        time.sleep(self.step)

    def draw(self, settings: Settings, contents: Sequence[Content], on_step: OnStep) -> Made:
        self.batches.append([content.seed for content in contents])
        prompts = {content.prompt for content in contents}
        step = 0.2 if "slow" in prompts else self.step
        for done in range(settings.steps):
            time.sleep(step)
            if "poison" in prompts or ("poison of step 2" in prompts and done):
                raise RunError("the transformer gave NaN", component="transformer")
            if "defect" in prompts:
                raise ZeroDivisionError("a defect in /home/somebody/secret.py")
            if "too large" in prompts:
                raise RunError("out of memory on cuda:0, in vae during decode", out_of_memory=True)
            if "deadly" in prompts:
                self.lives = False
                raise RunError("the request failed: CUDA error")
            on_step(done + 1, settings.steps, lambda: [_marked(content) for content in contents])
        phases = {"denoise": settings.steps * self.step, "generate": settings.steps * self.step}
        return Made([_marked(content) for content in contents], phases, {"vgpu:1": 123})

    def recover(self) -> bool:
        return self.lives


def _marked(content: Content) -> Image.Image:
    picture = content.control_image.copy() if content.control_image else Image.new("RGB", (96, 64))
    picture.putpixel((0, 0), (content.seed % 256, 0, 0))
    return picture


def asleep(resolved: ResolvedPlan) -> Sleeping:
    """A replica that sleeps, for processes that import this."""
    return Sleeping()


def at_once(resolved: ResolvedPlan) -> Sleeping:
    """A replica that takes no time."""
    return Sleeping(0)


def slow(resolved: ResolvedPlan) -> Sleeping:
    """A replica that takes long to load."""
    return Sleeping(300)


class _Broken(Sleeping):
    def load(self) -> None:
        raise RunError("out of memory on cuda:0, 9.00 GiB are needed")


def broken(resolved: ResolvedPlan) -> Sleeping:
    """A replica that cannot load."""
    return _Broken()


def without_torch() -> None:
    """Ask the driver alone for GPUs: what a process of Ray does first, since torch takes seconds to import."""
    machine.probe_torch = machine.probe
