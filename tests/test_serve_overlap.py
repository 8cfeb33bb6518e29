"""Engines over replicas that draw several batches at once: a placed pipeline whose stages overlap."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sleeping import Sleeping
from test_serve_engine import Loaded, Noted, no_thread_is_left, order, using  # noqa: F401

from sana_deploy._units import GIB
from sana_deploy.api import compile_spec
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.serving import Serving
from sana_deploy.declare.spec import Resolve
from sana_deploy.errors import RunError
from sana_deploy.facts.machine import Gpu, Machine
from sana_deploy.plan.artifact import ResolvedPlan
from sana_deploy.serve.engine import Content, Made, Observer, OnStep, Order, Progress, QueueFullError, Settings
from sana_deploy.serve.engines import engine_of
from sana_deploy.serve.local import LocalEngine
from sana_deploy.serve.replica import PipelineReplica

pytestmark = pytest.mark.usefixtures("short_prompts")
APART = ("hardware=multi_gpu_balanced", "hardware.pin.transformer=1", "hardware.pin.controlnet=1",
         "hardware.pin.vae=0", "hardware.pin.text_encoder=0", "precision=fp32", "runtime=graphs",
         "workload.height=64", "workload.width=96", "workload.steps=3")  # fmt: skip


@pytest.fixture(scope="module")
def resolved(tiny: Path) -> ResolvedPlan:
    """A plan for two GPUs that runs on the CPU, for want of GPUs."""
    gpus = tuple(Gpu(i, "NVIDIA GeForce RTX 3060", 8 * GIB, 8 * GIB, (8, 6), 28) for i in range(2))
    return compile_spec(compose_spec(APART), Machine("present", gpus, 64 * GIB)).resolve()


@pytest.fixture(scope="module")
def real(resolved: ResolvedPlan) -> PipelineReplica:
    replica = PipelineReplica(resolved, overlap=True)
    replica.load()
    return replica


class Several(Loaded):
    """A loaded replica that draws as many batches at once as its plan says."""

    @property
    def at_once(self) -> int:
        return self.replica.at_once


class Hands(Sleeping):
    """Sleeps in three threads at once."""

    at_once = 3


def test_a_replica_draws_as_many_batches_at_once_as_it_says() -> None:
    together = threading.Barrier(3)

    class Meeting(Hands):
        def draw(self, settings: Settings, contents: Sequence[Content], on_step: OnStep) -> Made:
            together.wait(20)  # each waits until the others draw too
            return super().draw(settings, contents, on_step)

    async def work(engine: LocalEngine) -> None:
        drawn = await asyncio.gather(*(engine.draw(order(seed)) for seed in range(6)))
        assert [one.picture.getpixel((0, 0))[0] for (one,) in drawn] == list(range(6))  # type: ignore[index]
        assert (engine.standing.ready, engine.standing.replicas) == (1, 1)

    using(work, Meeting())


def test_a_full_queue_says_sooner_to_come_again_where_more_is_drawn_at_once() -> None:
    async def seconds(engine: LocalEngine) -> float:
        asked = [asyncio.create_task(engine.draw(order(seed, steps=20))) for seed in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError) as full:
            engine.admit(9)
        for one in asked:
            one.cancel()
        return full.value.seconds

    async def noted(engine: LocalEngine) -> None:
        found.append(await seconds(engine))

    found: list[float] = []
    for replica in (Sleeping(), Hands()):
        using(noted, replica, pace=6.0)
    assert found == [12.0, 4.0]


def test_a_replica_is_lost_once_and_another_one_draws_all_that_it_had() -> None:
    together, noted = threading.Barrier(3), Noted()

    class Dying(Hands):
        def draw(self, settings: Settings, contents: Sequence[Content], on_step: OnStep) -> Made:
            together.wait(20)
            raise RunError("the request failed: CUDA error: device-side assert")

        def recover(self) -> bool:
            return False

    class Other(Sleeping):
        def draw(self, settings: Settings, contents: Sequence[Content], on_step: OnStep) -> Made:
            while engines[0].standing.ready > 1:
                time.sleep(0.001)
            return super().draw(settings, contents, on_step)

    async def work(engine: LocalEngine) -> None:
        engines.append(engine)
        drawn = await asyncio.gather(*(engine.draw(order(seed)) for seed in range(8)))
        assert [one.picture.getpixel((0, 0))[0] for (one,) in drawn] == list(range(8))  # type: ignore[index]
        assert (engine.standing.ready, engine.standing.replicas) == (1, 2)

    engines: list[LocalEngine] = []
    using(work, Dying(), Other(), observer=noted)
    assert noted.again == 3


def test_orders_that_overlap_have_the_bits_of_orders_one_by_one(real: PipelineReplica, resolved: ResolvedPlan) -> None:
    orders = [order(1), order(2, steps=5), order(3, prompt="a lighthouse"), order(4, steps=2), order(5)]
    flying: list[int] = []

    async def one_by_one(engine: LocalEngine) -> None:
        exact.extend([(await engine.draw(one))[0].picture.tobytes() for one in orders])

    async def at_once(engine: LocalEngine) -> None:
        told: list[Progress] = []

        def on_progress(progress: Progress) -> None:
            told.append(progress)
            assert real._overlapped is not None
            flying.append(len(real._overlapped.turns._flying))

        previewed = order(6, steps=4, previews=2)
        *drawn, last = await asyncio.gather(*(engine.draw(one, on_progress) for one in [*orders, previewed]))
        assert [one[0].picture.tobytes() for one in drawn] == exact
        assert sum(one.preview is not None for one in told) == 2
        assert last[0].seconds.keys() == {"encode", "prepare", "denoise", "decode", "generate"}

    exact: list[bytes] = []
    alone = PipelineReplica(resolved, load=lambda _: real.pipeline)
    using(one_by_one, alone)
    using(at_once, Several(real))
    assert alone.at_once == 1
    assert max(flying) > 1


def test_one_order_that_runs_out_of_memory_leaves_those_beside_it_right(
    real: PipelineReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_layer = real.pipeline.vae.decoder.conv_in
    convolve = first_layer.forward

    def full(latents: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        if latents.shape[-1] == 2:  # the one of 64 pixels, in bands and in tiles, too
            raise torch.OutOfMemoryError("tried to allocate 9 GiB")
        result: torch.Tensor = convolve(latents, *given, **named)
        return result

    async def work(engine: LocalEngine) -> None:
        exact = [(await engine.draw(order(seed)))[0].picture.tobytes() for seed in (1, 2, 3)]
        edges = Image.new("RGB", (64, 64))
        edges.paste("white", (8, 8, 40, 40))
        small = Order("small", Settings(64, 64, 3, 4.5, 1.0), [Content("a red fox", "", 9, edges)])
        with monkeypatch.context() as patch:
            patch.setattr(first_layer, "forward", full)
            first, second, problem, third = await asyncio.gather(
                engine.draw(order(1)), engine.draw(order(2)), engine.draw(small), engine.draw(order(3)),
                return_exceptions=True,
            )  # fmt: skip
        assert isinstance(problem, RunError)
        assert "out of memory" in str(problem)
        assert [one[0].picture.tobytes() for one in (first, second, third)] == exact  # type: ignore[index]

    using(work, Several(real))


def test_a_client_that_leaves_frees_its_stage_for_the_others(real: PipelineReplica) -> None:
    async def work(engine: LocalEngine) -> None:
        (before,) = await engine.draw(order(1))
        for _ in range(3):
            left = [asyncio.create_task(engine.draw(order(seed, steps=200))) for seed in (2, 3, 4, 5)]
            while engine.standing.working < 3:
                await asyncio.sleep(0.01)
            for one in left:
                one.cancel()
            (after,) = await engine.draw(order(1))
            assert before.picture.tobytes() == after.picture.tobytes()

    using(work, Several(real))


@pytest.mark.parametrize(("option", "at_once"), [("auto", 3), ("off", 1)])
def test_the_service_overlaps_stages_where_the_plan_does_unless_it_is_turned_off(
    resolved: ResolvedPlan, option: str, at_once: int
) -> None:
    engine = engine_of(
        resolved, Serving.from_mapping({"overlap": option}), Resolve(), resolved.plan.spec.workload, Observer()
    )
    (replica,) = engine._replicas
    assert replica.at_once == at_once  # type: ignore[attr-defined]
