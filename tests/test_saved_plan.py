"""What a request may change under a saved plan, and what would plan anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sana_deploy.api import compile_spec
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.plan.artifact import Plan
from sana_deploy.run.outcome import Outcome
from sana_deploy.stages import deploy

Small = Callable[..., DeploySpec]


@pytest.fixture
def plan(tiny: Path, small: Small, tmp_path: Path) -> Path:
    return compile_spec(small("precision=fp32")).save(tmp_path / "plan.json")


def applied(plan: Path, folder: Path, *overrides: str) -> Outcome:
    outcome, _ = deploy(compose_spec([f"plan_file={plan}", *overrides]), folder, overrides)
    return outcome


@pytest.mark.usefixtures("short_prompts")
@pytest.mark.parametrize(
    "given",
    [
        "workload.steps=1", "workload.guidance_scale=2.5", "workload.conditioning_scale=0.3", "workload.prompt=fox",
        "workload.negative_prompt=blue", "workload.seed=9",
    ],
)  # fmt: skip
def test_a_request_that_keeps_the_plan_is_taken_and_drawn(plan: Path, tmp_path: Path, given: str) -> None:
    usual = applied(plan, tmp_path / "usual")
    outcome = applied(plan, tmp_path / "changed", given)
    assert (usual.exit_code, outcome.exit_code) == (0, 0), outcome.error
    assert outcome.plan_digest == Plan.load(plan).digest
    first, second = (np.asarray(Image.open(tmp_path / name / "image-000.png")) for name in ("usual", "changed"))
    assert not np.array_equal(first, second), "the request was drawn"
    key, value = given.removeprefix("workload.").split("=")
    anew = compile_spec(
        compose_spec(["workload.height=64", "workload.width=96", "workload.steps=2", "precision=fp32", given])
    )
    assert str(getattr(anew.spec.workload, key)) == value
    planned = Plan.load(plan)
    assert (anew.device_map, anew.knobs, anew.components) == (planned.device_map, planned.knobs, planned.components)


@pytest.mark.parametrize(
    "given",
    [
        "workload.steps=3", "workload.guidance_scale=1", "workload.height=96", "workload.width=64", "workload.batch=2",
        "workload=default", "precision=bf16", "hardware=single_gpu", "model.resolution=512", "machine=2xt4",
    ],
)  # fmt: skip
def test_what_would_plan_anew_is_refused_with_what_may_change(plan: Path, tmp_path: Path, given: str) -> None:
    outcome = applied(plan, tmp_path, given)
    assert outcome.exit_code == 2
    assert outcome.error is not None
    assert f"{given} would change it" in outcome.error.message
    assert "workload.steps up to 2 and workload.guidance_scale above 1 open" in outcome.error.hint


def test_a_plan_without_guidance_stays_without(tiny: Path, small: Small, tmp_path: Path) -> None:
    plan = compile_spec(small("workload.guidance_scale=1")).save(tmp_path / "plan.json")
    assert applied(plan, tmp_path / "a", "workload.guidance_scale=0.5", "until=resolve").exit_code == 0
    assert applied(plan, tmp_path / "b", "workload.guidance_scale=1.5", "until=resolve").exit_code == 2
