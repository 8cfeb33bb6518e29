"""Replicas on Ray Serve: one that is killed, one that cannot start, and what Ray itself lets others do."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
import sleeping
from processes import descendants, listening, replicas_of
from serving import two_small_gpus
from test_serve_engine import Noted, order, using

from sana_deploy.api import compile_spec
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.spec import Resolve
from sana_deploy.errors import RunError, UsageError
from sana_deploy.facts.machine import Machine
from sana_deploy.serve.engine import OnProgress
from sana_deploy.serve.engines import check_for_ray, machine_for_ray, prepare_ray
from sana_deploy.serve.local import LocalEngine


def answers_of(port: int) -> Iterator[grpc.StatusCode]:
    """What a port answers to the calls of Ray's services that are made without a token."""
    from ray.core.generated import core_worker_pb2_grpc as worker
    from ray.core.generated import gcs_service_pb2_grpc as store
    from ray.core.generated import node_manager_pb2_grpc as scheduler
    from ray.core.generated.core_worker_pb2 import GetCoreWorkerStatsRequest
    from ray.core.generated.gcs_service_pb2 import GetAllNodeInfoRequest
    from ray.core.generated.node_manager_pb2 import GetNodeStatsRequest

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for call, asked in (
            (store.NodeInfoGcsServiceStub(channel).GetAllNodeInfo, GetAllNodeInfoRequest()),
            (scheduler.NodeManagerServiceStub(channel).GetNodeStats, GetNodeStatsRequest()),
            (worker.CoreWorkerServiceStub(channel).GetCoreWorkerStats, GetCoreWorkerStatsRequest()),
        ):
            try:
                call(asked, timeout=5)
                yield grpc.StatusCode.OK
            except grpc.RpcError as problem:
                yield problem.code()


def marks(event: asyncio.Event) -> OnProgress:
    return lambda _: event.set()


async def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


def test_a_replica_that_is_killed_has_its_picture_drawn_by_another_and_is_started_again(ray_pair: Any) -> None:
    noted = Noted()

    async def work(engine: LocalEngine) -> None:
        begun = [asyncio.Event(), asyncio.Event()]
        drawing = [asyncio.create_task(engine.draw(order(seed, steps=30), marks(begun[seed]))) for seed in range(2)]
        await asyncio.gather(*(one.wait() for one in begun))
        waiting = [asyncio.create_task(engine.draw(order(seed))) for seed in range(2, 6)]
        os.kill(replicas_of(os.getpid())[0], signal.SIGKILL)
        drawn = await asyncio.gather(*drawing, *waiting)
        assert [one.picture.getpixel((0, 0))[0] for (one,) in drawn] == list(range(6))  # type: ignore[index]
        await until(lambda: engine.standing.ready == 1)
        await until(lambda: engine.standing.ready == 2)

    using(work, ray_pair.seen_as(2), observer=noted)
    assert noted.again == 1


def test_a_picture_that_kills_replicas_is_given_up_after_two_and_the_others_are_drawn(ray_pair: Any) -> None:
    async def work(engine: LocalEngine) -> None:
        with pytest.raises(RunError, match="two replicas were lost while they drew this"):
            await engine.draw(order(1, prompt="deadly"))
        (drawn,) = await engine.draw(order(2))  # waits for a replica that is started again
        assert drawn.picture.getpixel((0, 0)) == (2, 0, 0)
        await until(lambda: engine.standing.ready == 2)

    using(work, ray_pair.seen_as(2))


def test_failures_come_back_as_they_were_raised(ray_pair: Any) -> None:
    noted = Noted()

    async def work(engine: LocalEngine) -> None:
        orders = [order(1, batch=3), order(2, prompt="too large", batch=3), order(3, batch=3)]
        before, bad, after = await asyncio.gather(*map(engine.draw, orders), return_exceptions=True)
        assert isinstance(bad, RunError)
        assert bad.facts == {"out_of_memory": True}
        assert isinstance(before, list)
        assert isinstance(after, list)
        with pytest.raises(ZeroDivisionError):
            await engine.draw(order(4, prompt="defect"))

    using(work, ray_pair.seen_as(1), observer=noted)
    assert noted.batches == [3, 1, 1, 1, 1]


@pytest.mark.slow
def test_what_hinders_a_start_is_said_in_time(ray_pair: Any) -> None:
    from sana_deploy.serve.ray_cluster import Cluster

    fails = Cluster(ray_pair.plan, 1, drain=1, name="broken", make=sleeping.broken)
    with pytest.raises(RunError, match=r"a replica could not be started: .*out of memory on cuda:0, 9\.00 GiB are"):
        fails.deploy(60, lambda: False)
    fails.remove()
    late = Cluster(ray_pair.plan, 1, drain=1, name="late", make=sleeping.slow)
    with pytest.raises(RunError, match="0 of 1 replicas were ready within 3 s") as caught:
        late.deploy(3, lambda: False)
    assert caught.value.hint == "serve.startup gives it more time"
    late.remove()
    resolved = two_small_gpus()
    with pytest.raises(UsageError, match="3 replicas of 2 GPUs take 6, Ray has 0"):
        Cluster(resolved.plan, 3, drain=1).deploy(60, lambda: False)


def test_a_start_can_be_given_up(ray_pair: Any) -> None:
    from sana_deploy.serve.ray_cluster import Cluster
    from sana_deploy.serve.ray_engine import RayEngine

    async def run() -> None:
        cluster = Cluster(ray_pair.plan, 1, drain=1, name="given up", make=sleeping.slow)
        engine = RayEngine(cluster, startup=60, queue=1, timeout=1)
        loading = asyncio.create_task(engine.start())
        await asyncio.sleep(2)
        loading.cancel()
        await asyncio.wait_for(engine.close(), 20)
        assert cluster.living() == 0

    asyncio.run(run())


def test_what_ray_listens_on_asks_for_a_token(ray_pair: Any) -> None:
    here = os.getpid()
    codes = [answered for pid in (here, *descendants(here)) for port in listening(pid) for answered in answers_of(port)]
    assert grpc.StatusCode.OK not in codes
    assert codes.count(grpc.StatusCode.UNAUTHENTICATED) >= 6, "store, scheduler, controller, replicas and this process"


def test_replicas_wait_no_longer_for_processors_than_the_service(ray_pair: Any) -> None:
    nice = [os.getpriority(os.PRIO_PROCESS, pid) for pid in (os.getpid(), *replicas_of(os.getpid()))]
    assert len(nice) == 3
    assert len(set(nice)) == 1


def test_ray_is_given_a_token_of_this_start_before_it_is_imported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    environment: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setitem(sys.modules, "ray", sys)
    prepare_ray()
    assert "RAY_AUTH_MODE" not in environment, "Ray is there and would not see it"
    assert "ask for no token" in caplog.text
    monkeypatch.delitem(sys.modules, "ray")
    tokens = set()
    for _ in range(2):
        environment.clear()
        prepare_ray()
        assert (environment["RAY_AUTH_MODE"], environment["RAY_USAGE_STATS_ENABLED"]) == ("token", "0")
        tokens.add(environment["RAY_AUTH_TOKEN"])
    assert len(tokens) == 2
    prepare_ray()
    assert environment["RAY_AUTH_TOKEN"] in tokens, "a mode that is there is kept"


def test_plans_that_ray_cannot_keep_are_refused() -> None:
    unlike = compile_spec(compose_spec(["model=sana_1600m_controlnet", "machine=virtual", "hardware.replicas=2",
                                        "machine.gpus='rtx4090,h100'", "hardware=multi_gpu_balanced"]))  # fmt: skip
    with pytest.raises(UsageError, match="are all alike, those of this plan differ") as caught:
        check_for_ray(unlike, unlike.spec.resolve)
    assert caught.value.hint == "serve.engine=local serves replicas that differ"
    one = unlike.each()[0]
    check_for_ray(one, one.spec.resolve)
    with pytest.raises(UsageError, match="chooses GPUs, and with engine=ray Ray does"):
        check_for_ray(one, Resolve(bind={"0": "GPU-1"}))


def test_a_request_is_admitted_for_the_fullest_gpu_that_ray_may_give(machine: Callable[..., Machine]) -> None:
    first, second, other = machine(24, 24, 80).gpus
    busy = Machine("present", (first, replace(second, free_bytes=5), other), 1)
    assert [gpu.free_bytes for gpu in machine_for_ray(busy).gpus] == [5, 5, other.free_bytes]
