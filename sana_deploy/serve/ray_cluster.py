"""Ray, and the deployment of a plan on it: started, watched, and ended. Imports Ray."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray import serve
from ray.serve.config import ProxyLocation
from ray.serve.schema import LoggingConfig

from ..errors import RunError, UsageError
from ..plan.artifact import Plan
from .ray_options import REPLICA, Scaling
from .ray_replica import Make, deployment
from .warm_up import WarmUp

log = logging.getLogger(__name__)
_STORE_BYTES = 512 * 1024**2
"""Ray's store of objects: a picture passes through it once."""
_POLL_SECONDS = 0.1
_QUIET = LoggingConfig(log_level="ERROR", enable_access_log=False)


class Cluster:
    """One deployment of a plan on a Ray of this host, or on the one that this process is in already.

    Args:
        plan: of a single replica.
        replicas: how many of it, or within which bounds.
        drain: seconds that replicas have to end what they draw.
        allow, verify: see `Plan.resolve`.
        name: of the application, one of its own among those of a cluster.
        make, warm_up: see `RayReplica`.
    """

    def __init__(
        self,
        plan: Plan,
        replicas: int | Scaling,
        *,
        drain: float,
        allow: Sequence[str] = (),
        verify: bool = False,
        name: str = "sana",
        make: Make | None = None,
        warm_up: WarmUp | None = None,
    ) -> None:
        self.plan, self.name = plan, name
        self.scaling = replicas if isinstance(replicas, Scaling) else Scaling(replicas)
        self._drain, self._arguments = drain, (list(allow), verify, make, warm_up)
        self._ours = self._deployed = False
        self.handle: Any = None

    @property
    def replicas(self) -> int:
        """Replicas at most."""
        return self.scaling.most

    def open(self) -> None:
        """Start Ray, unless this process is in one already. Ray takes SIGTERM from the process."""
        if ray.is_initialized():
            return
        self._ours = True
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, self.replicas),  # a replica counts as one, and none waits for cores
            object_store_memory=_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )

    def deploy(self, seconds: float, stopped: Callable[[], bool]) -> None:
        """Deploy, and wait until every replica that it begins with can draw.

        Args:
            seconds: how long that may take.
            stopped: whether to give it up; asked now and then.

        Raises:
            UsageError: the cluster has fewer GPUs than the replicas take.
            RunError: a replica could not be started, with its reason, or not in time.
        """
        until = time.monotonic() + seconds
        self._check_resources()
        logging.getLogger("ray.serve").disabled = True  # replicas are watched by us
        serve.start(proxy_location=ProxyLocation.Disabled, logging_config=_QUIET)
        made = deployment(self.scaling, len(self.plan.slots), self._drain)
        target = serve.RunTarget(
            made.bind(self.plan.to_json(), *self._arguments), name=self.name, route_prefix=None, logging_config=_QUIET
        )
        self._deployed = True
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        while (status := self._status()) != "RUNNING" and not stopped():
            if status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise RunError(f"a replica could not be started{self.why()}", where="serve.engine")
            if time.monotonic() > until:
                lived = f"{self.living()} of {self.scaling.first} replicas were ready"
                hint = "serve.startup gives it more time"
                raise RunError(f"{lived} within {seconds:g} s{self.why()}", where="serve.startup", hint=hint)
            time.sleep(_POLL_SECONDS)
        if not stopped():
            self.handle = serve.get_app_handle(self.name)

    def living(self) -> int:
        """Replicas that can draw now."""
        there = self._deployment()
        return int(there.replica_states.get("RUNNING", 0)) if there else 0

    def why(self) -> str:
        """The last line of what Ray says of the deployment, after a colon; nothing where it says nothing."""
        there = self._deployment()
        lines = [line.strip() for line in there.message.splitlines() if line.strip()] if there else []
        return f": {lines[-1]}" if lines else ""

    def remove(self) -> None:
        """Remove the deployment, and end Ray where it was started here."""
        if self._deployed:
            serve.delete(self.name)
        if self._ours:
            serve.shutdown()
            ray.shutdown()

    def _status(self) -> str:
        application = serve.status().applications.get(self.name)
        return str(application.status.value) if application else ""

    def _deployment(self) -> Any:
        """What Ray says of the replicas; None where it has none of them."""
        application = serve.status().applications.get(self.name)
        return application.deployments.get(REPLICA) if application else None

    def _check_resources(self) -> None:
        needed, there = self.replicas * len(self.plan.slots), int(ray.cluster_resources().get("GPU", 0))
        if needed > there:
            bounds, fitting = self.scaling.autoscaling_config, there // len(self.plan.slots)
            key, least = ("autoscaling_config.max_replicas", self.scaling.least) if bounds else ("replicas", 1)
            raise UsageError(
                f"{self.replicas} replicas of {len(self.plan.slots)} GPUs take {needed}, Ray has {there}",
                where=f"serve.{key}",
                hint=f"serve.{key}={fitting}" if fitting >= least else "",
            )
