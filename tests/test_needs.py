"""A checkpoint of any other shape is measured once, kept, and planned as well as the shipped ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import SMALL

from sana_deploy import Plan, rehearse
from sana_deploy.api import compile_spec
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.formats import Dtype, Format
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.facts.checkpoint import Checkpoint, open_checkpoint
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


@pytest.fixture
def unknown(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Checkpoint]:
    """A checkpoint that no file ships needs for, and an empty cache."""
    monkeypatch.setenv("SANA_DEPLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sana_deploy.facts.catalogue.calibrated", dict)
    needs._read.cache_clear()
    yield open_checkpoint(compose_spec(["model=checkpoint", f"model.source={tiny}"]).model)
    needs._read.cache_clear()


def test_needs_that_are_not_shipped_are_measured_once_per_format_and_kept(unknown: Checkpoint, tmp_path: Path) -> None:
    asked: list[Format] = []

    def measure(checkpoint: Checkpoint, formats: Mapping[str, Format], guided: bool) -> needs.Measured:
        asked.append(next(iter(formats.values())))
        return {name: {"denoise": {"format": str(form), "guided": guided}} for name, form in formats.items()}

    def planned(dtype: Dtype, guided: bool = True) -> needs.Measured:
        return needs.needs_of(unknown, dict.fromkeys(unknown.components, Format(dtype)), guided, measure)

    assert not needs.all_shipped(unknown)
    first = planned("bfloat16")
    assert {str(entry["denoise"]["format"]) for entry in first.values()} == {"bfloat16"}
    assert planned("float16") == first, "it takes the same bytes"
    assert asked == [Format("bfloat16")]
    assert planned("float32") != first
    assert planned("bfloat16", guided=False) != first
    assert len(asked) == 3
    needs._read.cache_clear()
    assert planned("bfloat16") == first
    assert len(asked) == 3, "it was kept in a file"
    for kept in (tmp_path / "cache" / "profiles").iterdir():
        kept.write_text('{"vae": 1}')
    needs._read.cache_clear()
    assert planned("bfloat16") == first
    assert len(asked) == 4, "a file that lacks components is made anew"


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
