"""Rows of an image on virtual GPUs: the picture of one GPU, what is exchanged, and the bytes of every unit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from halved import apart

from sana_deploy.api import compile_spec
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.plan.artifact import Plan
from sana_deploy.rehearsal.rehearse import Rehearsed, open_host, rehearse_request
from sana_deploy.run.generate import run_request
from sana_deploy.run.load import load_pipeline
from sana_deploy.run.request_state import RequestState

Small = Callable[..., DeploySpec]
pytestmark = pytest.mark.usefixtures("short_prompts")
ROUNDING = 2e-6
"""Of pixels in float32: sums over all rows are added in another order."""
ROWS = ["precision=fp32", "machine=virtual", "hardware.split=rows", "hardware.use=[0,1]"]


def planned(small: Small, gpus: str, *more: str) -> Plan:
    plan = compile_spec(small(*ROWS[:-1], f"machine.gpus={gpus}", *more))
    assert plan.split == "rows"
    return plan


def with_shares(plan: Plan, rows: list[int], places: dict[str, int]) -> Plan:
    """The same plan with other rows for its units, on other slots."""
    units = {name: plan.units[name].model_copy(update={"slot": slot}) for name, slot in places.items()}
    return plan.model_copy(update={"rows": rows, "units": units})


def pixels_of(plan: Plan, **shape: int) -> tuple[torch.Tensor, RequestState]:
    resolved, state = plan.resolve(), RequestState()
    host, workload = open_host(resolved, "numbers"), plan.spec.workload
    pipeline = load_pipeline(resolved, host=host)
    with host:
        bounds = workload.bounds.model_copy(update=shape)
        pixels, _ = run_request(pipeline, bounds, workload.request, state=state)
        return pixels.cpu(), state


def rehearsed(plan: Plan, fidelity: Any = "shapes") -> tuple[Rehearsed, RequestState]:
    resolved, state = plan.resolve(), RequestState()
    host = open_host(resolved, fidelity)
    return rehearse_request(load_pipeline(resolved, host=host), resolved, host, state=state), state


@pytest.mark.parametrize(
    ("gpus", "more"),
    [
        ("2xrtx4090", ["workload.height=96"]),
        ("3xrtx4090", ["workload.height=160"]),
        ("4xrtx4090", ["workload.height=224", "workload.batch=2"]),
        ("[h100,t4]", ["workload.height=352", "workload.width=32"]),
        ("2xrtx4090", ["workload.guidance_scale=1", "workload.height=128"]),
    ],
)
def test_the_picture_is_that_of_one_gpu(small: Small, gpus: str, more: list[str]) -> None:
    plan = planned(small, gpus, *more)
    whole = compile_spec(small(*ROWS[:2], "hardware.split=none", "runtime=eager", f"machine.gpus={gpus}", *more))
    found, state = pixels_of(plan)
    assert state.remarks == []
    assert len(plan.rows) == 2 or gpus.startswith(("3", "4"))
    assert apart(found, pixels_of(whole)[0]) < ROUNDING
