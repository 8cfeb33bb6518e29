"""A checkpoint of any other shape is measured once, kept, and planned as well as the shipped ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sana_deploy import fit, needs, rehearse
from sana_deploy.compile import compile_spec
from sana_deploy.spec import DeploySpec

Small = Callable[..., DeploySpec]


@pytest.fixture
def other(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose ControlNet is shaped like no shipped one, and an empty cache."""
    from diffusers import SanaControlNetModel

    folder = Path(shutil.copytree(tiny, tmp_path / "other"))
    config = json.loads((folder / "controlnet" / "config.json").read_text())
    shutil.rmtree(folder / "controlnet")
    SanaControlNetModel.from_config({**config, "num_layers": 3}).save_pretrained(folder / "controlnet")
    monkeypatch.setenv("SANA_DEPLOY_CACHE", str(tmp_path / "cache"))
    return folder


def test_it_is_measured_once_and_the_plan_holds(small: Small, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small("model=checkpoint", f"model.source={other}", "machine=2xrtx4090", "precision=bf16")
    told: list[tuple[int, int]] = []
    plan = compile_spec(spec, told=lambda done, of: told.append((done, of)))
    assert told[-1][0] == told[-1][1] > 5
    for gpu in rehearse(plan, "shapes").report.gpus:
        assert abs(gpu.planned_error) < 0.03
    monkeypatch.setattr(fit, "fit", None)  # a second measurement would fail
    assert compile_spec(spec) == plan
    needs._read.cache_clear()
    assert compile_spec(spec) == plan


def test_a_damaged_file_is_measured_again(small: Small, other: Path) -> None:
    spec = small("model=checkpoint", f"model.source={other}", "machine=2xrtx4090", "precision=bf16")
    plan = compile_spec(spec)
    (kept,) = (other.parent / "cache" / "profiles").iterdir()
    kept.write_text("{")
    needs._read.cache_clear()
    assert compile_spec(spec) == plan
    assert json.loads(kept.read_text())["controlnet"]["denoise"]
