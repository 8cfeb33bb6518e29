"""The contract of engines: one suite for replicas that sleep and for the real tiny pipeline."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serving import engine_over
from sleeping import Sleeping

from sana_deploy.api import compile_spec
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.workload import Request
from sana_deploy.errors import RunError
from sana_deploy.run.asked import Drawing
from sana_deploy.run.generate import generate
from sana_deploy.serve.engine import (
    Content,
    Drawn,
    Made,
    NotServingError,
    Observer,
    OnStep,
    Order,
    Preview,
    Progress,
    QueueFullError,
    Replica,
    Settings,
    TooLateError,
)
from sana_deploy.serve.local import LocalEngine
from sana_deploy.serve.replica import PipelineReplica

pytestmark = pytest.mark.usefixtures("short_prompts")
STEP = 0.02


@pytest.fixture(scope="module")
def real(tiny: Path) -> PipelineReplica:
    replica = PipelineReplica(compile_spec(compose_spec(["precision=fp32"])).resolve())
    replica.load()
    return replica


class Loaded:
    """A replica whose pipeline is loaded already, for many engines."""

    def __init__(self, replica: PipelineReplica) -> None:
        self.replica = replica

    def draw(self, settings: Settings, contents: Sequence[Content], on_step: OnStep) -> Made:
        return self.replica.draw(settings, contents, on_step)

    def recover(self) -> bool:
        return self.replica.recover()

    def load(self) -> None:
        pass


@pytest.fixture(params=["sleeping", "pipeline", "ray"])
def replica(request: pytest.FixtureRequest) -> Any:
    """A replica for an engine of this process, or what an engine on Ray has instead."""
    match request.param:
        case "sleeping":
            return Sleeping()
        case "pipeline":
            return Loaded(request.getfixturevalue("real"))
        case _:
            return request.getfixturevalue("ray_pair").seen_as(1)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    gc.collect()
    assert not [one.name for one in threading.enumerate() if one.name.startswith("replica")]


class Noted(Observer):
    """What an engine told."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.gone = self.again = 0

    def began(self, waited: Sequence[float]) -> None:
        self.batches.append(len(waited))

    def cancelled(self, pictures: int) -> None:
        self.gone += pictures

    def retried(self, pictures: int) -> None:
        self.again += pictures


def order(*seeds: int, prompt: str = "a red fox", steps: int = 3, name: str = "r", **given: Any) -> Order:
    settings = Settings(height=64, width=96, steps=steps, guidance_scale=4.5, conditioning_scale=1.0)
    edges = Image.new("RGB", (96, 64))
    edges.paste("white", (8, 8, 40, 40))
    return Order(name, settings, [Content(prompt, "", seed, edges) for seed in seeds], **given)


def using(
    work: Callable[[LocalEngine], Awaitable[None]],
    *replicas: Replica,
    queue: int = 8,
    timeout: float = 60,
    **given: Any,
) -> None:
    """Run `work` with an engine that has started, and end it."""

    async def run() -> None:
        engine = engine_over(replicas, queue=queue, timeout=timeout, **given)
        await engine.start()
        try:
            await asyncio.wait_for(work(engine), 60)
        finally:
            await engine.close()

    asyncio.run(run())


def test_an_order_ends_in_its_pictures_and_progress_is_told_in_order(replica: Replica) -> None:
    async def work(engine: LocalEngine) -> None:
        told: list[Progress] = []
        first, second = await engine.draw(order(1, 2, previews=1), told.append)
        assert first.picture.size == second.picture.size == (96, 64)
        assert first.picture.tobytes() != second.picture.tobytes()
        assert [(one.number, one.done, one.steps) for one in told] == [(n, d, 3) for n in (0, 1) for d in (1, 2, 3)]
        shown = [one for one in told if one.preview]
        assert [(one.number, one.done) for one in shown] == [(0, 2), (1, 2)]
        assert all(one.preview.size == (96, 64) for one in shown if one.preview)
        assert first.waited < 5
        assert first.seconds["generate"] > 0

    using(work, replica)


def test_pictures_are_the_same_whatever_was_drawn_or_cancelled_before(replica: Replica) -> None:
    async def work(engine: LocalEngine) -> None:
        (before,) = await engine.draw(order(1))
        left = asyncio.create_task(engine.draw(order(2, steps=200)))
        while not engine.standing.working:
            await asyncio.sleep(0.01)
        left.cancel()
        (after,) = await engine.draw(order(1, previews=2), lambda progress: None)
        assert before.picture.tobytes() == after.picture.tobytes()

    using(work, replica)


def test_a_client_that_leaves_frees_its_places_within_a_step(replica: Replica) -> None:
    noted = Noted()

    async def work(engine: LocalEngine) -> None:
        began = asyncio.Event()
        running = asyncio.create_task(engine.draw(order(1, steps=500), lambda _: began.set()))
        waiting = asyncio.create_task(engine.draw(order(2, 3)))
        await began.wait()
        assert (engine.standing.waiting, engine.standing.working) == (2, 1)
        waiting.cancel()
        await asyncio.sleep(0)
        assert engine.standing.waiting == 0
        running.cancel()
        since = time.monotonic()
        await engine.draw(order(4, steps=1))
        assert time.monotonic() - since < 5, "500 steps would take longer"
        for task in (running, waiting):
            with pytest.raises(asyncio.CancelledError):
                await task
        assert noted.gone == 3

    using(work, replica, observer=noted)


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again(replica: Replica) -> None:
    async def work(engine: LocalEngine) -> None:
        running = asyncio.create_task(engine.draw(order(1, steps=500)))
        while not engine.standing.working:
            await asyncio.sleep(0.01)
        accepted = [asyncio.create_task(engine.draw(order(2, 3))) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match="4 of 5 places in the queue are taken and 2 are needed") as caught:
            await engine.draw(order(4, 5))
        assert caught.value.seconds == pytest.approx(5 * 7.0)
        engine.admit(1)
        running.cancel()
        assert [len(pictures) for pictures in await asyncio.gather(*accepted)] == [2, 2]

    using(work, replica, queue=5, pace=7.0)


def test_an_order_that_is_late_ends_wherever_it_is(replica: Replica) -> None:
    async def work(engine: LocalEngine) -> None:
        both = await asyncio.gather(engine.draw(order(1, steps=900)), engine.draw(order(2)), return_exceptions=True)
        assert all(isinstance(one, TooLateError) for one in both)
        assert "0 of 1 pictures were done within 0.5 s" in str(both[0])

    using(work, replica, timeout=0.5)


def test_drain_finishes_what_was_accepted_and_takes_nothing_more(replica: Replica) -> None:
    async def work(engine: LocalEngine) -> None:
        accepted = [asyncio.create_task(engine.draw(order(seed))) for seed in range(3)]
        await asyncio.sleep(0)
        draining = asyncio.create_task(engine.drain(60))
        await asyncio.sleep(0)
        with pytest.raises(NotServingError, match="is stopping"):
            await engine.draw(order(9))
        assert await draining
        assert [len(await one) for one in accepted] == [1, 1, 1]

    using(work, replica)


def test_drain_ends_in_an_error_for_what_takes_too_long(replica: Replica) -> None:
    async def work(engine: LocalEngine) -> None:
        slow = asyncio.create_task(engine.draw(order(1, steps=900)))
        await asyncio.sleep(0.05)
        assert not await engine.drain(0.1)
        with pytest.raises(NotServingError, match="stopped before this request was done"):
            await slow

    using(work, replica)


def test_nothing_is_taken_before_it_is_loaded() -> None:
    async def run() -> None:
        engine = LocalEngine([Sleeping()], queue=1, timeout=1)
        loading = asyncio.create_task(engine.start())
        await asyncio.sleep(0)
        with pytest.raises(NotServingError, match="still loading"):
            await engine.draw(order(1))
        await loading
        await engine.draw(order(1))
        await engine.close()

    asyncio.run(run())


def test_a_replica_that_cannot_load_is_an_error_of_the_start() -> None:
    class Broken(Sleeping):
        def load(self) -> None:
            raise RunError("out of memory on cuda:0")

    async def run() -> None:
        engine = LocalEngine([Broken()], queue=1, timeout=1)
        with pytest.raises(RunError, match="out of memory"):
            await engine.start()
        await engine.close()

    asyncio.run(run())


def test_orders_of_the_same_settings_share_batches_in_their_order() -> None:
    replica, noted = Sleeping(), Noted()

    async def work(engine: LocalEngine) -> None:
        asked = [order(1), *(order(seed, batch=4) for seed in (2, 3)), order(4, steps=2, batch=4), order(5, 6, batch=4)]
        drawn = await asyncio.gather(*map(engine.draw, asked))
        assert replica.batches == [[1], [2, 3, 5, 6], [4]]
        assert [[one.picture.getpixel((0, 0))[0] for one in each] for each in drawn] == [[1], [2], [3], [4], [5, 6]]  # type: ignore[index]
        assert [each[0].batch for each in drawn] == [1, 4, 4, 1, 4]

    using(work, replica, observer=noted)
    assert noted.batches == [1, 4, 1]


def test_batches_have_few_sizes_where_each_is_a_form_of_its_own() -> None:
    replica = Sleeping()

    async def work(engine: LocalEngine) -> None:
        await engine.draw(order(*range(1, 8), batch=8))
        assert replica.batches == [[1, 2, 3, 4], [5, 6], [7]]

    using(work, replica, few_sizes=True)


def test_a_real_batch_draws_what_each_order_draws_alone(real: PipelineReplica) -> None:
    async def work(engine: LocalEngine) -> None:
        together = await asyncio.gather(*(engine.draw(order(seed, prompt=f"fox {seed}", batch=2)) for seed in (1, 2)))
        alone = [await engine.draw(order(seed, prompt=f"fox {seed}")) for seed in (1, 2)]
        assert [one.batch for (one,) in together] == [2, 2]
        for (one,), (other,) in zip(together, alone, strict=True):
            pairs = zip(one.picture.tobytes(), other.picture.tobytes(), strict=True)
            assert max(abs(a - b) for a, b in pairs) <= 2

    using(work, Loaded(real))


def test_the_engine_draws_the_bits_of_a_run(real: PipelineReplica) -> None:
    asked = order(5)
    (content,) = asked.contents
    request = Request(prompt=content.prompt, seed=5, guidance_scale=4.5)
    drawing = Drawing(request, content.control_image)
    (picture,), _ = generate(real.pipeline, asked.settings.workload(), [drawing])

    async def work(engine: LocalEngine) -> None:
        (drawn,) = await engine.draw(asked)
        assert drawn.picture.tobytes() == picture.tobytes()

    using(work, Loaded(real))


@pytest.mark.parametrize(("prompt", "kind"), [("poison", RunError), ("defect", ZeroDivisionError)])
def test_one_poisoned_order_fails_alone(prompt: str, kind: type[Exception]) -> None:
    replica, noted = Sleeping(), Noted()

    async def work(engine: LocalEngine) -> None:
        orders = [order(1, batch=4), order(2, prompt=prompt, batch=4), order(3, 4, batch=4)]
        before, bad, after = await asyncio.gather(*map(engine.draw, orders), return_exceptions=True)
        assert isinstance(bad, kind)
        assert [len(one) for one in (before, after) if isinstance(one, list)] == [1, 2]
        assert await engine.draw(order(5)), "the engine goes on"
        assert replica.batches == [[1, 2, 3, 4], [1], [2], [3], [4], [5]]

    using(work, replica, observer=noted)
    assert noted.again == 4


@pytest.mark.parametrize("on", ["GPU", "host", "host by numpy"])
def test_out_of_memory_ends_one_order_and_not_the_engine(
    real: PipelineReplica, monkeypatch: pytest.MonkeyPatch, on: str
) -> None:
    import torch

    def full(*_: Any, **__: Any) -> None:
        match on:
            case "GPU":
                raise torch.OutOfMemoryError("tried to allocate 9 GiB")
            case "host":
                torch.empty(2**50)
            case _:
                np.empty(2**50)

    async def work(engine: LocalEngine) -> None:
        (before,) = await engine.draw(order(1))
        with monkeypatch.context() as patch:
            patch.setattr(real.pipeline.vae.decoder.conv_in, "forward", full)  # in bands and in tiles, too
            with pytest.raises(RunError, match="out of memory on cpu, in vae during decode") as caught:
                await engine.draw(order(2))
            assert caught.value.facts["out_of_memory"]
        (after,) = await engine.draw(order(1))
        assert before.picture.tobytes() == after.picture.tobytes()

    using(work, Loaded(real))


def test_a_lost_replica_s_orders_are_drawn_by_another_one() -> None:
    first, second, noted = Sleeping(), Sleeping(), Noted()

    async def work(engine: LocalEngine) -> None:
        deadly = asyncio.create_task(engine.draw(order(1, prompt="deadly")))
        while not engine.standing.working:
            await asyncio.sleep(0.001)
        asked = [asyncio.create_task(engine.draw(order(seed))) for seed in (2, 3)]
        with pytest.raises((RunError, NotServingError)):
            await deadly
        done = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(one, (list, RunError, NotServingError)) for one in done), "nothing is lost silently"
        lost = await asyncio.wait_for(engine.lost(), 5)
        assert "last replica was lost" in str(lost)
        with pytest.raises(NotServingError):
            await engine.draw(order(4))

    using(work, first, second, observer=noted)
    assert noted.again == 1, "a second replica is not given the same order more than once"


def test_a_lost_replica_leaves_the_others_serving() -> None:
    class Dying(Sleeping):
        def draw(self, settings: Settings, contents: Sequence[Content], on_step: OnStep) -> Made:
            raise RunError("the request failed: CUDA error: device-side assert")

        def recover(self) -> bool:
            return False

    async def work(engine: LocalEngine) -> None:
        drawn: list[Sequence[Drawn]] = await asyncio.gather(*(engine.draw(order(seed)) for seed in range(6)))
        assert [one.picture.getpixel((0, 0))[0] for (one,) in drawn] == list(range(6))  # type: ignore[index]
        assert (engine.standing.ready, engine.standing.replicas) == (1, 2)

    using(work, Dying(), Sleeping())


def test_a_pipeline_lost_in_the_middle_has_its_order_drawn_by_another_with_the_same_bits(real: PipelineReplica) -> None:
    broke, noted = threading.Event(), Noted()

    class Breaking(Loaded):
        """The real pipeline, whose GPU falls off the bus after a step."""

        def recover(self) -> bool:
            return False

        def draw(self, settings: Settings, contents: Sequence[Content], on_step: OnStep) -> Made:
            class Breaks:
                shown, check = on_step.shown, on_step.check

                def __call__(self, done: int, of: int, preview: Preview) -> None:
                    on_step(done, of, preview)
                    broke.set()
                    raise RunError("the request failed: CUDA error: device-side assert")

            return super().draw(settings, contents, Breaks())

    class Other(Loaded):
        """The same on another GPU, which draws once the first one is lost: one pipeline stands for both."""

        def draw(self, settings: Settings, contents: Sequence[Content], on_step: OnStep) -> Made:
            assert broke.wait(30)
            while engines[0].standing.ready > 1:
                time.sleep(0.001)
            return super().draw(settings, contents, on_step)

    engines: list[LocalEngine] = []

    async def lose(engine: LocalEngine) -> None:
        engines.append(engine)
        drawn = await asyncio.gather(*(engine.draw(order(seed)) for seed in range(4)))
        assert (engine.standing.ready, engine.standing.replicas) == (1, 2)
        pictures.append([one.picture.tobytes() for (one,) in drawn])

    async def alone(engine: LocalEngine) -> None:
        pictures.append([(await engine.draw(order(seed)))[0].picture.tobytes() for seed in range(4)])

    pictures: list[list[bytes]] = []
    using(lose, Breaking(real), Other(real), observer=noted)
    using(alone, Loaded(real))
    assert pictures[0] == pictures[1]
    assert len(set(pictures[0])) == 4
    assert noted.again == 1


def test_two_replicas_draw_at_the_same_time() -> None:
    both = threading.Barrier(2)

    class Meeting(Sleeping):
        def draw(self, settings: Settings, contents: Sequence[Content], on_step: OnStep) -> Made:
            both.wait(20)  # each waits until the other one draws too
            return super().draw(settings, contents, on_step)

    async def work(engine: LocalEngine) -> None:
        drawn = await asyncio.gather(*(engine.draw(order(seed)) for seed in range(4)))
        assert len(drawn) == 4

    using(work, Meeting(), Meeting())
