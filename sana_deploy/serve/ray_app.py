"""The application that `serve deploy` and KubeRay build of an exported config: the API, and replicas behind it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel
from ray import serve

from ..declare.serving import Serving
from ..declare.spec import Resolve
from ..declare.workload import DeclaredWorkload
from ..plan.artifact import Plan
from .app import build as build_routes
from .assembly import assemble, bearer_keys
from .engine import Engine, Observer
from .engines import common_options
from .gate import Gate
from .ray_cluster import Cluster
from .ray_engine import RayEngine
from .ray_options import API, Scaling
from .ray_replica import deployment
from .server import log_to_stderr
from .warm_up import WarmUp

_MOST_REQUESTS = 10_000
"""Requests that the API has at a time: more than its queue, so that it is the one that refuses them, with 429."""
_FLUSH_SECONDS = 10.0
"""Seconds beyond those of drawing that answers have to be written at the end."""


class Arguments(BaseModel):
    """What an exported config says of an application.

    Attributes:
        plan: plan.json, as text.
        serve: the group `serve`.
        workload: what a request has where it says nothing.
        resolve: how the plan is bound.
    """

    plan: str
    serve: dict[str, Any]
    workload: DeclaredWorkload
    resolve: Resolve

    @property
    def options(self) -> Serving:
        """The group `serve`, validated."""
        return Serving.from_mapping(self.serve)

    @property
    def loaded(self) -> Plan:
        """The plan."""
        return Plan.from_values(json.loads(self.plan), "the plan")


def build(args: Mapping[str, Any]) -> serve.Application:
    """Build the application; `sana-deploy serve --export` writes the arguments.

    Raises:
        ValidationError, SanaDeployError: an argument is missing, or is not valid.
    """
    given = Arguments.model_validate(args)
    plan, options = given.loaded, given.options
    one, scaling = plan.each()[0], Scaling.of(plan, options)
    warm_up = WarmUp.of(plan, given.workload, options.startup) if options.warm_up else None
    replicas = deployment(scaling, len(one.slots), options.drain).bind(
        one.to_json(), given.resolve.allow, given.resolve.verify, None, warm_up
    )
    api: Any = serve.deployment(
        Api,
        name=API,
        num_replicas=1,
        max_ongoing_requests=_MOST_REQUESTS,
        ray_actor_options={"num_cpus": 1},
        graceful_shutdown_timeout_s=options.drain + _FLUSH_SECONDS,
    )
    return api.bind(given.model_dump(mode="json"), replicas)


@serve.ingress()
class Api:
    """Answers HTTP behind Ray's proxy. There is one of it, since it owns the queue.

    Args:
        args: see `Arguments`.
        replicas: the handle of the deployment that draws.
    """

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, args: Mapping[str, Any], replicas: Any
    ) -> None:
        log_to_stderr()
        given = Arguments.model_validate(args)
        plan, options = given.loaded, given.options
        resolved = await replicas.resolved.remote()  # once a replica lives; this process may be where no GPU is
        cluster = _Deployed(plan.each()[0], Scaling.of(plan, options), replicas)

        def engine_of(observer: Observer) -> Engine:
            return RayEngine(cluster, startup=options.startup, **common_options(resolved, options, observer))

        self._service = assemble(resolved, given.workload, options, bearer_keys(options.keys), engine_of)
        self._service.plan = plan
        await self._service.engine.start()
        self._lost = asyncio.ensure_future(self._service.engine.lost())

    def __serve_build_asgi_app__(self) -> Gate:
        return build_routes(self._service)

    def check_health(self) -> None:
        """Have Ray start this anew once no replica is left for good.

        Raises:
            SanaDeployError: with the reason.
        """
        if self._lost.done():
            raise self._lost.result()


class _Deployed(Cluster):
    """The application that this process is of: Ray has deployed it, watches and ends it."""

    def __init__(self, plan: Plan, scaling: Scaling, handle: Any) -> None:
        super().__init__(plan, scaling, drain=0, name=serve.get_replica_context().app_name)
        self.handle = handle

    def open(self) -> None:
        """Ray runs."""

    def deploy(self, seconds: float, stopped: Callable[[], bool]) -> None:
        """It is deployed."""

    def remove(self) -> None:
        """Ray ends it."""
