"""Replicas of Ray Serve that follow the load within bounds, and what they draw before they are ready."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from serving import two_small_gpus
from sleeping import Sleeping, asleep
from test_serve_engine import order
from test_serve_ray import until

from sana_deploy.declare.serving import AutoscalingConfig, Serving
from sana_deploy.errors import RunError, UsageError
from sana_deploy.plan.artifact import ResolvedPlan
from sana_deploy.serve.engine import Content, Made, OnStep, Settings
from sana_deploy.serve.ray_options import Scaling
from sana_deploy.serve.warm_up import WarmUp


class Unable(Sleeping):
    def draw(self, settings: Settings, contents: Sequence[Content], on_step: OnStep) -> Made:
        raise RunError("out of memory on cuda:0, in vae during decode", out_of_memory=True)


def unable(resolved: ResolvedPlan) -> Sleeping:
    return Unable()


@pytest.mark.slow
def test_replicas_are_added_for_drawings_that_wait_and_end_when_none_do(ray_pair: Any) -> None:
    from sana_deploy.serve.ray_cluster import Cluster
    from sana_deploy.serve.ray_engine import RayEngine

    bounds = AutoscalingConfig(min_replicas=1, max_replicas=2, upscale_delay_s=0, downscale_delay_s=1)
    scaling = Scaling.of(ray_pair.plan, Serving(engine="ray", autoscaling_config=bounds))
    quick = {**scaling.option["autoscaling_config"], "metrics_interval_s": 0.2, "look_back_period_s": 1}
    cluster = Cluster(ray_pair.plan, Scaling(scaling.most, quick), drain=5, name="scaled", make=asleep)

    async def run() -> None:
        engine = RayEngine(cluster, startup=60, queue=64, timeout=60)
        await engine.start()
        try:
            assert (engine.standing.ready, engine.standing.replicas) == (1, 2)
            colours: list[Any] = []
            while engine.standing.ready < 2 and len(colours) < 120:  # load until the other process has started
                seeds = range(len(colours), len(colours) + 6)
                drawn = await asyncio.gather(*(engine.draw(order(seed, steps=50)) for seed in seeds))
                colours += [one.picture.getpixel((0, 0))[0] for (one,) in drawn]  # type: ignore[index]
            assert engine.standing.ready == 2
            assert colours == list(range(len(colours)))
            await until(lambda: engine.standing.ready == 1)
            await engine.draw(order(3))
        finally:
            await engine.close()

    asyncio.run(run())


@pytest.mark.slow
def test_a_replica_that_cannot_draw_fails_the_deployment_with_the_reason(ray_pair: Any) -> None:
    from sana_deploy.serve.ray_cluster import Cluster

    plan = ray_pair.plan
    cluster = Cluster(plan, 1, drain=1, name="unable", make=unable, warm_up=WarmUp.of(plan, plan.spec.workload, 60))
    with pytest.raises(RunError, match="the warm-up drawing failed: out of memory on cuda:0"):
        cluster.deploy(60, lambda: False)
    cluster.remove()


@pytest.mark.usefixtures("ray_pair")
def test_bounds_beyond_the_gpus_of_this_host_are_refused() -> None:
    from sana_deploy.serve.ray_cluster import Cluster

    resolved = two_small_gpus()
    scaling = Scaling.of(resolved.plan, Serving(engine="ray", autoscaling_config=AutoscalingConfig(max_replicas=4)))
    with pytest.raises(UsageError, match="4 replicas of 2 GPUs take 8, Ray has 0") as caught:
        Cluster(resolved.plan, scaling, drain=1).deploy(60, lambda: False)
    assert caught.value.where == "serve.autoscaling_config.max_replicas"
