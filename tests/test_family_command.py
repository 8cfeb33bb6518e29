"""The command with SANA's other pipelines: each tiny one draws, says what changes nothing, and is swept over."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SMALL
from family import CLASSES, MODELS
from PIL import Image

from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.request_remarks import request_remarks
from sana_deploy.facts.checkpoint import settled
from sana_deploy.plan.artifact import Plan

Run = Callable[..., subprocess.CompletedProcess[str]]
SIZE = [one for one in SMALL if "steps" not in one]


@pytest.mark.usefixtures("short_prompts")
@pytest.mark.parametrize("model", MODELS)
def test_each_tiny_pipeline_is_planned_drawn_and_drawn_again_from_its_plan(
    here: Run, tmp_path: Path, model: str
) -> None:
    common = [f"model={model}", "machine=2xrtx3060", *SIZE]
    compiled = here(*common, "until=compile", "hydra.run.dir=first")
    assert compiled.returncode == 0, compiled.stderr
    assert f"model tiny ({CLASSES[model]})" in compiled.stderr
    plan = Plan.load(tmp_path / "first" / "plan.json")
    assert plan.pipeline_class == CLASSES[model]
    assert "controlnet" not in (tmp_path / "first" / "plan.json").read_text().replace("split_controlnet", "").replace(
        '"controlnet": null', ""
    )
    drawn = here(*common, "hydra.run.dir=second", "workload.steps=2")
    assert drawn.returncode == 0, drawn.stderr
    assert Image.open(tmp_path / "second" / "image-000.png").size == (96, 64)
    assert "control image" not in drawn.stderr.lower()
    page = (tmp_path / "second" / "report.html").read_text()
    assert "control image" not in page.lower()
    saved = f"plan_file={tmp_path / 'second' / 'plan.json'}"
    again = here(saved, "workload.seed=4", "workload.steps=1", "hydra.run.dir=third")
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "third" / "outcome.json").read_text())["seed"] == 4


def test_a_sweep_goes_over_models_of_several_pipelines(here: Run, tmp_path: Path) -> None:
    models = ",".join(["tiny", *MODELS])
    swept = here("-m", f"model={models}", "machine=2xrtx3060", "until=compile", *SIZE)
    assert swept.returncode == 0, swept.stderr
    (table,) = tmp_path.glob("outputs/multirun/*/*/summary.json")
    rows = json.loads(table.read_text())
    assert {row["overrides"]["model"] for row in rows} == {"tiny", *MODELS}
    assert {row["status"] for row in rows} == {"done"}


@pytest.mark.parametrize(("overrides", "said"), [
    (["model=tiny_sana", "workload.conditioning_scale=0.5"], ["a SANA pipeline does not read conditioning_scale"]),
    (["model=tiny_sana", "workload.control_image=a.png"], ["a SANA pipeline does not read control_image"]),
    (["model=tiny_sprint", "workload.negative_prompt=fog"], ["a SANA-Sprint pipeline does not read negative_prompt"]),
    (["model=tiny_sprint", "workload.steps=20"], ["is made for 1 to 4 steps, 20 are asked for"]),
    (["model=tiny_sprint_img2img"], ["with strength 0.6 all 2 steps run, from noise alone: the image changes nothing"]),
    (["model=tiny_sprint_img2img", "workload.strength=0.5"], []),
    (["model=tiny_sprint"], []),
    (["model=tiny_pag", "workload.pag_scale=2"], []),
    (["model=tiny", "workload.strength=0.5"], ["a SANA ControlNet pipeline does not read strength"]),
])  # fmt: skip
def test_what_of_a_request_changes_nothing_is_said(tiny: Path, overrides: list[str], said: list[str]) -> None:
    spec = settled(compose_spec(overrides))
    found = request_remarks(spec.pipeline, spec.workload)
    assert len(found) == len(said)
    for remark, words in zip(found, said, strict=True):
        assert words in remark.message


@pytest.mark.parametrize("steps", range(2, 9))
def test_the_strength_of_the_hint_leaves_a_step_out(steps: int) -> None:
    common = ["model=tiny_sprint_img2img", f"workload.steps={steps}"]
    spec = settled(compose_spec([*common, "workload.strength=1"]))
    (hint,) = [one.hint for one in request_remarks(spec.pipeline, spec.workload) if one.type == "unused_image"]
    other = settled(compose_spec([*common, hint.partition(" ")[0]]))
    assert other.pipeline.steps_run(other.workload.bounds) == steps - 1
