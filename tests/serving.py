"""A service with replicas that sleep, on a port of its own: for tests of the API that need no picture of a model."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from PIL import Image

from sana_deploy.api import compile_spec
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.serving import Serving
from sana_deploy.errors import RunError
from sana_deploy.facts.checkpoint import open_checkpoint
from sana_deploy.plan.admission import Admission
from sana_deploy.plan.artifact import Plan, ResolvedPlan
from sana_deploy.serve import server
from sana_deploy.serve.app import build
from sana_deploy.serve.engine import Content, Made, OnStep, Replica, Settings
from sana_deploy.serve.local import LocalEngine
from sana_deploy.serve.metrics import Metrics
from sana_deploy.serve.orders import Orders
from sana_deploy.serve.service import Service


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
        for done in range(settings.steps):
            time.sleep(self.step)
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


def engine_over(replicas: Sequence[Any], **given: Any) -> LocalEngine:
    """The engine of this process over replicas, or the one on Ray over a deployment."""
    if not hasattr(replicas[0], "deploy"):
        return LocalEngine(replicas, **given)
    from sana_deploy.serve.ray_engine import RayEngine

    return RayEngine(replicas[0], startup=60, **given)


def two_small_gpus(*overrides: str) -> ResolvedPlan:
    """SANA 1.6B on two cards of 8 GiB: 1024 px, which leave little room for more."""
    plan: Plan = compile_spec(compose_spec(["model=sana_1600m_controlnet", "machine=2x8gb", *overrides]))
    return plan.resolve()


def service_of(
    resolved: ResolvedPlan, *replicas: Replica, keys: Sequence[str] = (), **options: Any
) -> tuple[Service, LocalEngine]:
    """A service of a plan and its engine, as the command puts them together."""
    plan, given, metrics = resolved.plan, Serving(port=0, **options), Metrics(resolved)
    engine = LocalEngine(replicas, queue=given.queue, timeout=given.timeout, pace=0.1, observer=metrics)
    metrics.watch(lambda: engine.standing)
    admission = Admission(resolved, open_checkpoint(plan.spec.model), given.admit == "fitting")
    orders = Orders(plan, plan.spec.workload, admission, given)
    return Service(plan, orders, engine, given, metrics, keys), engine


@dataclass
class Running:
    """A service that runs in a thread."""

    url: str
    service: Service
    engine: LocalEngine
    loop: asyncio.AbstractEventLoop

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def metric(self, line: str) -> float:
        """The value of a metric, as Prometheus would read it."""
        found = [one for one in self.service.metrics.text().decode().splitlines() if one.startswith(f"{line} ")]
        return float(found[0].rpartition(" ")[2]) if found else 0.0


@contextmanager
def running(resolved: ResolvedPlan, *replicas: Replica, **options: Any) -> Iterator[Running]:
    """Serve while the block runs."""
    service, engine = service_of(resolved, *replicas, **options)
    opened = server.listen("127.0.0.1", 0)
    ready, loops = threading.Event(), list[asyncio.AbstractEventLoop]()
    uv = uvicorn.Server(server._config(build(service), service.options))

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        serving = asyncio.create_task(uv.serve(sockets=[opened]))
        await engine.start()
        while not uv.started:
            await asyncio.sleep(0.01)
        ready.set()
        await serving
        await engine.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    url = server.url_of(opened)
    thread.start()
    assert ready.wait(20)
    try:
        yield Running(url, service, engine, loops[0])
    finally:
        uv.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
