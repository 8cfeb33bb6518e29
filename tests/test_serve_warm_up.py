"""What a replica draws before `/ready`: so that no client pays for it, and so that what cannot draw is seen."""

from __future__ import annotations

import asyncio
import pickle
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest
from family import planned
from sleeping import Sleeping
from test_serve_engine import Noted, order
from test_serve_process import sleeping

from sana_deploy.api import compile_spec
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import RunError
from sana_deploy.plan.artifact import Plan
from sana_deploy.serve.engine import Content, Made, OnStep, Replica, Settings
from sana_deploy.serve.local import LocalEngine
from sana_deploy.serve.replica import PipelineReplica
from sana_deploy.serve.warm_up import WarmUp

BROKEN = 'self.draw = lambda *given: (_ for _ in ()).throw(RunError("out of memory on cuda:0", hint="a smaller model"))'


@pytest.fixture(scope="module")
def plan() -> Plan:
    return compile_spec(compose_spec(["precision=fp32", "workload.height=64", "workload.width=96"]))


def warm_up(plan: Plan, seconds: float = 60) -> WarmUp:
    return WarmUp.of(plan, plan.spec.workload, seconds)


def started(replica: Replica, warm: WarmUp, noted: Noted | None = None) -> None:
    async def run() -> None:
        engine = LocalEngine([replica], queue=4, timeout=10, warm_up=warm, observer=noted)
        try:
            await engine.start()
            assert engine.standing.ready == 1
        finally:
            await engine.close()

    asyncio.run(run())


class Noting(Sleeping):
    """Notes what it is asked for."""

    def __init__(self) -> None:
        super().__init__(0)
        self.asked: list[tuple[Settings, str]] = []

    def draw(self, settings: Settings, contents: Sequence[Content], on_step: OnStep) -> Made:
        (content,) = contents
        assert content.control_image
        assert content.control_image.size == (settings.width, settings.height)
        self.asked.append((settings, content.prompt))
        return super().draw(settings, contents, on_step)


def test_a_replica_draws_the_plans_own_size_before_it_is_ready_and_nobody_counts_it(plan: Plan) -> None:
    replica, noted = Noting(), Noted()
    started(replica, warm_up(plan), noted)
    ((settings, _),) = replica.asked
    work = plan.spec.workload
    assert (settings.height, settings.width, settings.guidance_scale) == (64, 96, work.guidance_scale)
    assert 2 < settings.steps < work.steps, "a graph is captured in the second step and replayed in the third"
    assert noted.batches == []


def test_with_graphs_it_draws_two_prompts_so_that_the_text_encoders_call_is_captured(plan: Plan) -> None:
    replica = Noting()
    started(replica, warm_up(plan.model_copy(update={"runtime": "graphs"})))
    (_, first), (_, second) = replica.asked
    assert first != second, "a prompt that comes again is not encoded again"


def test_a_plan_of_fewer_steps_is_warmed_up_in_as_many(plan: Plan) -> None:
    work = plan.spec.workload.model_copy(update={"steps": 1})
    assert WarmUp.of(plan, work, 60).settings.steps == 1


def test_its_failure_is_the_start_s_with_the_reason(plan: Plan) -> None:
    class Poisoned(Sleeping):
        def draw(self, settings: Settings, contents: Sequence[Content], on_step: OnStep) -> Made:
            raise RunError("the transformer gave NaN", component="transformer", hint="precision=mixed_bf16")

    with pytest.raises(RunError, match="the warm-up drawing failed: the transformer gave NaN") as caught:
        started(Poisoned(), warm_up(plan))
    assert caught.value.hint == "precision=mixed_bf16"
    assert caught.value.facts == {"component": "transformer"}


def test_one_that_takes_too_long_is_given_up_after_a_step(plan: Plan) -> None:
    with pytest.raises(RunError, match=r"the warm-up drawing was not done within 0\.01 s") as caught:
        started(Sleeping(0.05), warm_up(plan, 0.01))
    assert "serve.warm_up=false" in caught.value.hint


def test_the_process_ends_with_the_code_of_the_failure_unless_it_is_not_to_warm_up(tmp_path: Path) -> None:
    with sleeping(tmp_path, load=BROKEN) as one:
        assert one.ended(60) == 6
        assert "error: serve.warm_up: the warm-up drawing failed: out of memory on cuda:0" in " ".join(one.said.split())
        assert "hint: a smaller model" in one.said
        assert "ready:" not in one.said
    with sleeping(tmp_path, "serve.warm_up=false", load=BROKEN) as one:
        one.url()


def test_one_that_hangs_within_a_step_does_not_keep_the_process_from_ending(tmp_path: Path) -> None:
    with sleeping(tmp_path, step=60) as one:
        assert httpx2.get(f"{one.url('loading')}/health", timeout=30).status_code == 200
        one.process.send_signal(signal.SIGTERM)
        assert one.ended() == 0
        assert "ready:" not in one.said


@pytest.mark.usefixtures("short_prompts")
def test_pictures_after_it_have_the_bits_of_those_without_it(small: Callable[..., DeploySpec], tiny: Path) -> None:
    plan = compile_spec(small("precision=fp32"))

    def drawn(warm: WarmUp | None) -> bytes:
        async def run() -> Any:
            replica = PipelineReplica(plan.resolve())
            engine = LocalEngine([replica], queue=4, timeout=60, warm_up=warm)
            await engine.start()
            try:
                return await engine.draw(order(5, steps=2))
            finally:
                await engine.close()

        (one,) = asyncio.run(run())
        return one.picture.tobytes()  # type: ignore[no-any-return]

    assert drawn(warm_up(plan)) == drawn(None)


@pytest.mark.parametrize("model", ["tiny_sana", "tiny_pag", "tiny_sprint", "tiny_sprint_img2img"])
def test_every_pipeline_can_be_warmed_up(model: str) -> None:
    plan = planned(model, "precision=fp32")
    replica = PipelineReplica(plan.resolve())
    replica.load()
    warm_up(plan)(replica)
    work = plan.spec.workload.model_copy(update={"steps": 20, "strength": 0.1})
    WarmUp.of(plan, work, 60)(replica)


def test_it_travels_to_other_processes(plan: Plan) -> None:
    warm = warm_up(plan)
    assert pickle.loads(pickle.dumps(warm)) == warm
