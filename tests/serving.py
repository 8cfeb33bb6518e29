"""A service on a port of its own, over either engine: for tests of the API that need no picture of a model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from sana_deploy.api import compile_spec
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.serving import Serving
from sana_deploy.facts.checkpoint import open_checkpoint
from sana_deploy.plan.admission import Admission
from sana_deploy.plan.artifact import Plan, ResolvedPlan
from sana_deploy.serve import server
from sana_deploy.serve.app import build
from sana_deploy.serve.local import LocalEngine
from sana_deploy.serve.metrics import Metrics
from sana_deploy.serve.orders import Orders
from sana_deploy.serve.service import Service


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
    resolved: ResolvedPlan, *replicas: Any, keys: Sequence[str] = (), **options: Any
) -> tuple[Service, LocalEngine]:
    """A service of a plan and its engine, as the command puts them together; `replicas` are those of `engine_over`."""
    plan, given, metrics = resolved.plan, Serving(port=0, **options), Metrics(resolved)
    engine = engine_over(replicas, queue=given.queue, timeout=given.timeout, pace=0.1, observer=metrics)
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
def running(resolved: ResolvedPlan, *replicas: Any, **options: Any) -> Iterator[Running]:
    """Serve while the block runs; see `service_of`."""
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
    assert ready.wait(180)
    try:
        yield Running(url, service, engine, loops[0])
    finally:
        uv.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
