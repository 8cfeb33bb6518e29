"""Seconds that no placement is below: they hold, nothing is planned otherwise for them, and few searches are left."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_row_split_rehearsed import search_all

from sana_deploy.api import compile_plan
from sana_deploy.declare.compose import compose_spec
from sana_deploy.errors import InfeasibleError
from sana_deploy.facts.checkpoint import open_checkpoint
from sana_deploy.plan import compiler
from sana_deploy.plan.compiler import WaysOn, machine_of
from sana_deploy.plan.least import LeastSeconds
from sana_deploy.plan.splits import least_of

UNLIKE = "machine.gpus=[h100,a100,l40s,rtx4090,rtx3090,a10,l4,t4]"
LARGE = ("workload.height=4096", "workload.width=4096")
THROUGHPUT, LATENCY = "hardware.objective=throughput", "hardware.objective=latency"
MACHINES = st.lists(st.sampled_from(["h100", "a100", "rtx3090", "l4", "t4"]), min_size=2, max_size=3)
SIDES = st.sampled_from([1024, 2048, 4096])


def declared(gpus: list[str], side: int, *more: str) -> list[str]:
    shape = [f"workload.height={side}", f"workload.width={side}"]
    return ["model=sana_600m_controlnet", "machine=virtual", f"machine.gpus=[{','.join(gpus)}]", *shape, *more]


def plan_or_why(overrides: list[str]) -> list[object]:
    try:
        plan = compile_plan(overrides)
    except InfeasibleError as problem:
        return [problem.message, problem.hint]
    return [plan.digest, *(one.considered for one in plan.each()), *(one.message for one in plan.diagnostics)]


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(MACHINES, SIDES, st.sampled_from([THROUGHPUT, LATENCY, "hardware.split=rows"]))
def test_plans_are_those_of_a_search_that_leaves_nothing_out(gpus: list[str], side: int, more: str) -> None:
    pruned = plan_or_why(declared(gpus, side, more))
    with pytest.MonkeyPatch.context() as patch:
        search_all(patch)
        patch.setattr(LeastSeconds, "__call__", lambda *_: 0.0)
        assert plan_or_why(declared(gpus, side, more)) == pruned


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(MACHINES, SIDES, st.sampled_from(["none", "guidance", "rows"]))
def test_no_pipeline_on_any_of_the_gpus_takes_fewer(gpus: list[str], side: int, split: str) -> None:
    spec = compose_spec(declared(gpus, side, "precision=mixed_bf16"))
    ways = WaysOn(lambda *_: {}, spec, open_checkpoint(spec.model))
    least = least_of(spec, ways(machine_of(spec)), ways.rows)
    every = machine_of(spec).gpus
    for some in (some for count in (1, 2, 3) for some in combinations(every, count)):
        use = f"hardware.use={[gpu.index for gpu in some]}".replace(" ", "")
        try:
            plan = compile_plan(declared(gpus, side, "precision=mixed_bf16", LATENCY, f"hardware.split={split}", use))
        except InfeasibleError:
            continue
        assert least(some) <= sum(plan.estimates.seconds.values()) + 1e-4


@pytest.mark.parametrize("more", [(), LARGE], ids=["1024 px", "4096 px"])
def test_few_groups_of_eight_unlike_gpus_are_searched(monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]) -> None:
    usual, searched = compiler._search, list[object]()

    def counted(*args: object) -> object:
        searched.append(args)
        return usual(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(compiler, "_search", counted)
    plan = compile_plan(["model=sana_1600m_controlnet", "machine=virtual", UNLIKE, THROUGHPUT, *more])
    assert len(plan.replicas) == 6
    assert len(searched) < 80, "247 groups have several ways each"
