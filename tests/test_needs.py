"""A checkpoint of any other shape is measured once, kept, and planned as well as the shipped ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import SMALL

from sana_deploy import Plan, rehearse
from sana_deploy.api import compile_spec
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.plan import needs
from sana_deploy.rehearsal import calibrate


@dataclass
class Measured:
    """A plan for a checkpoint whose ControlNet is shaped like no shipped one, made with an empty cache."""

    spec: DeploySpec
    plan: Plan
    told: list[tuple[int, int]]
    cache: Path


@pytest.fixture(scope="module")
def measured(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Measured]:
    from diffusers import SanaControlNetModel

    root = tmp_path_factory.mktemp("needs")
    folder = Path(shutil.copytree(tiny, root / "other"))
    config = json.loads((folder / "controlnet" / "config.json").read_text())
    shutil.rmtree(folder / "controlnet")
    SanaControlNetModel.from_config({**config, "num_layers": 3}).save_pretrained(folder / "controlnet")
    spec = compose_spec([*SMALL, "model=checkpoint", f"model.source={folder}", "machine=2xrtx4090", "precision=bf16"])
    told: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SANA_DEPLOY_CACHE", str(root / "cache"))
        needs._read.cache_clear()
        plan = compile_spec(spec, on_progress=lambda done, of: told.append((done, of)))
        yield Measured(spec, plan, told, root / "cache")
    needs._read.cache_clear()


@pytest.mark.slow
def test_it_is_measured_once_and_the_plan_holds(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = measured.plan
    assert measured.told[-1][0] == measured.told[-1][1] > 5
    for gpu in rehearse(plan, "shapes").report.gpus:
        assert abs(gpu.planned_error) < 0.03
    monkeypatch.setattr(calibrate, "calibrate", None)  # a second measurement would fail
    assert compile_spec(measured.spec) == plan
    needs._read.cache_clear()
    assert compile_spec(measured.spec) == plan


@pytest.mark.slow
def test_a_damaged_file_is_measured_again(measured: Measured) -> None:
    (kept,) = (measured.cache / "profiles").iterdir()
    before = kept.read_text()
    kept.write_text("{")
    needs._read.cache_clear()
    assert compile_spec(measured.spec) == measured.plan
    assert json.loads(kept.read_text()) == json.loads(before)
    assert json.loads(before)["controlnet"]["denoise"]
