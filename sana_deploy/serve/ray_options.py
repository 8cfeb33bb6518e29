"""How many replicas Ray Serve keeps, and the options of their deployment: for a service, and for its export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..declare.serving import Serving
from ..plan.artifact import Plan

REPLICA, API = "replica", "api"
"""The deployments of an application: replicas that draw, and the one that answers HTTP and owns the queue."""
_END_SECONDS = 0.1
"""How often a replica that is to end looks whether it still draws."""
_HEALTH_SECONDS = 2.0
"""How often Ray asks a replica whether it lives."""


@dataclass(frozen=True)
class Scaling:
    """How many replicas there are.

    Attributes:
        most: as many at most, or always where there are no bounds.
        autoscaling_config: Ray Serve's bounds; None keeps the number.
    """

    most: int
    autoscaling_config: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, plan: Plan, options: Serving) -> Scaling:
        """As many as `serve.replicas`, or as the plan has; within bounds where there are any."""
        first, bounds = options.replicas or len(plan.each()), options.autoscaling_config
        if bounds.max_replicas is None:
            return cls(first)
        first = min(max(first, bounds.min_replicas), bounds.max_replicas)
        # A replica draws one batch at a time, so that a second drawing for each of them is one that waits.
        return cls(
            bounds.max_replicas, {**bounds.model_dump(), "initial_replicas": first, "target_ongoing_requests": 1}
        )

    @property
    def first(self) -> int:
        """Replicas that a deployment begins with."""
        return int(self.autoscaling_config["initial_replicas"]) if self.autoscaling_config else self.most

    @property
    def least(self) -> int:
        """Replicas that are always there."""
        return int(self.autoscaling_config["min_replicas"]) if self.autoscaling_config else self.most

    @property
    def option(self) -> dict[str, Any]:
        """The option of a deployment."""
        if self.autoscaling_config:
            return {"autoscaling_config": dict(self.autoscaling_config)}
        return {"num_replicas": self.most}


def replica_options(scaling: Scaling, gpus: int, drain: float) -> dict[str, Any]:
    """Options of the deployment that draws, as `ServeDeploySchema` has them.

    Args:
        gpus: of one replica.
        drain: seconds that a replica has to end what it draws.
    """
    return {
        **scaling.option,
        "max_ongoing_requests": 1,
        "ray_actor_options": {"num_cpus": 1, "num_gpus": gpus},
        "health_check_period_s": _HEALTH_SECONDS,
        "graceful_shutdown_wait_loop_s": _END_SECONDS,
        "graceful_shutdown_timeout_s": drain,
    }
