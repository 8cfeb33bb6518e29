"""The engine that `serve.engine` names, for a plan on its devices."""

from __future__ import annotations

import logging
import os
import secrets
import sys
from dataclasses import replace
from typing import Any

from ..declare.serving import Serving
from ..declare.spec import Resolve
from ..declare.workload import DeclaredWorkload
from ..errors import UsageError
from ..facts.machine import Machine
from ..plan.artifact import Plan, ResolvedPlan
from ..plan.records import total_rate
from ..plan.replicas import alike
from .engine import Observer
from .local import LocalEngine
from .ray_options import Scaling
from .replica import PipelineReplica
from .warm_up import WarmUp

log = logging.getLogger(__name__)


def engine_of(
    resolved: ResolvedPlan, options: Serving, wanted: Resolve, defaults: DeclaredWorkload, observer: Observer
) -> LocalEngine:
    """Make the engine of a plan; its replicas are loaded when it is started.

    Args:
        defaults: what a request has where it says nothing.

    Raises:
        UsageError: `engine=ray` cannot serve this plan.
    """
    plan, warm_up = resolved.plan, None
    if options.warm_up:
        warm_up = WarmUp.of(plan, defaults, options.startup)
    common = common_options(resolved, options, observer)
    if options.engine == "local":
        replicas = [PipelineReplica(one, overlap=options.overlaps) for one in resolved.each()]
        return LocalEngine(replicas, warm_up=warm_up, **common)
    check_for_ray(plan, wanted, Scaling.of(plan, options).most)
    prepare_ray()
    from .ray_cluster import Cluster
    from .ray_engine import RayEngine

    scaling, one = Scaling.of(plan, options), plan.each()[0]
    cluster = Cluster(one, scaling, drain=options.drain, allow=wanted.allow, verify=wanted.verify, warm_up=warm_up)
    return RayEngine(cluster, startup=options.startup, **common)


def common_options(resolved: ResolvedPlan, options: Serving, observer: Observer) -> dict[str, Any]:
    """What every engine of a plan is given."""
    each = resolved.each()
    rate = total_rate(one.plan.estimates for one in each)
    return {
        "queue": options.queue,
        "timeout": options.timeout,
        "pace": len(each) / rate if rate else 1.0,
        "few_sizes": any(one.plan.runtime != "eager" for one in each),
        "observer": observer,
    }


def prepare_ray() -> None:
    """Set what Ray reads once, when it is imported: it reports no usage, and asks for a token of this start.

    Ray listens on every address of this host, whatever it is told, and runs what it is sent: without a token, whoever
    reaches it runs code here. Of itself it gives replicas the niceness 15, with which they wait behind whatever else
    this host computes, and their GPUs for them.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    if "RAY_AUTH_MODE" in os.environ:
        return
    if "ray" in sys.modules:
        log.warning("Ray was imported before: its ports, which others may reach, ask for no token")
        return
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def check_for_ray(plan: Plan, wanted: Resolve, most: int = 1) -> None:
    """Refuse what Ray cannot keep: it starts replicas that are all the same, on GPUs that it chooses.

    Args:
        most: replicas at most.

    Raises:
        UsageError: naming what the plan or the command asks for.
        PlanError: the plan can be read only.
    """
    plan.check_feasible()
    if len(alike(plan.each())) > 1:
        raise UsageError(
            "replicas of engine=ray are all alike, those of this plan differ",
            where="serve.engine",
            hint="serve.engine=local serves replicas that differ",
        )
    if wanted.bind:
        raise UsageError(
            "resolve.bind chooses GPUs, and with engine=ray Ray does",
            where="resolve.bind",
            hint="leave it out; CUDA_VISIBLE_DEVICES limits what Ray sees",
        )
    chosen = getattr(plan.spec.hardware, "gpu_indices", None)
    if chosen and most * len(plan.each()[0].slots) > len(chosen):
        gpus = ", ".join(map(str, sorted(chosen)))
        raise UsageError(
            f"the plan takes the GPUs {gpus} only, {most} replicas take {most * len(plan.each()[0].slots)}",
            where="hardware.use",
            hint="compile the plan without hardware.use, or with fewer replicas",
        )


def machine_for_ray(machine: Machine) -> Machine:
    """The machine for replicas that may get any of its GPUs: each has what is free on the fullest one of its size."""
    free: dict[int, int] = {}
    for gpu in machine.gpus:
        free[gpu.total_bytes] = min(gpu.free_bytes, free.get(gpu.total_bytes, gpu.free_bytes))
    return replace(machine, gpus=tuple(replace(gpu, free_bytes=free[gpu.total_bytes]) for gpu in machine.gpus))
