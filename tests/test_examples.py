"""Every file of `examples/` runs as its first lines say, and says what is true."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKOUT

from sana_deploy import Plan, compile_plan

EXAMPLES = CHECKOUT / "examples"
PLAN_OF_GPUS = CHECKOUT / "tests" / "plans" / "1.5.json"
SMALL = ["model=tiny_sana", "precision=fp32", "workload.height=64", "workload.width=96", "workload.steps=2"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run an example in this process, in an empty folder; what it prints."""

    def example(name: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return example


def test_every_example_is_run_here() -> None:
    here = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{path.stem}"' in here for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb"))


def test_plan_only(run: Any) -> None:
    small, two = map(json.loads, run("plan_only", "1x8GiB", "2x8GiB").splitlines())
    assert not small["fits"]
    assert "precision.quantization.text_encoder=nf4" in small["hint"]
    assert two["fits"]
    assert two["where"]["text_encoder"] != two["where"]["transformer"]


@pytest.mark.usefixtures("short_prompts")
def test_place_an_existing_pipeline(run: Any, tmp_path: Path) -> None:
    from PIL import Image

    assert "'transformer': 'cpu'" in run("place_pipeline")
    assert Image.open(tmp_path / "lighthouse.png").size == (128, 128)


@pytest.mark.usefixtures("short_prompts")
def test_an_own_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from starlette.testclient import TestClient

    service = runpy.run_path(str(EXAMPLES / "own_service.py"), run_name="own_service")
    client = TestClient(service["app"])
    monkeypatch.setenv("PLAN", str(PLAN_OF_GPUS))
    slots = Plan.load(PLAN_OF_GPUS).slots
    assert client.get("/memory").json() == {slot.name: slot.peak_bytes for slot in slots} != {}
    service["plan"].cache_clear()
    monkeypatch.setenv("PLAN", str(compile_plan(SMALL).save(tmp_path / "plan.json")))
    first, again, other = (client.post("/draw", params={"prompt": "a fox", "seed": seed}) for seed in (1, 1, 2))
    assert first.headers["content-type"] == "image/png"
    assert first.content == again.content != other.content


def test_a_sweep_in_pandas(run: Any) -> None:
    shown = run("sweep_in_pandas")
    assert re.search(r"^ *2x8gb multi_gpu_balanced +2 +\d+\.\d+ +0\.\d+$", shown, re.MULTILINE)
    assert re.search(r"^2x8gb, single_gpu: 0 of 2 placements fit", shown, re.MULTILINE)
    assert run("sweep_in_pandas", "sweep") == shown, "a sweep that has run is read as it is"


def test_rehearse_before_renting(run: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        run("rehearse_before_renting", "2xt4", "1xt4")
    assert ended.value.code == 0


def test_nothing_to_rent_ends_with_1(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("rehearse_before_renting", "1xt4")
    assert ended.value.code == 1
    assert "1xt4: does not fit. this fits: precision.quantization.text_encoder=int8" in capsys.readouterr().out


def test_the_notebook_for_two_t4_on_virtual_gpus(tmp_path: Path, tiny: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    name = "two_t4"
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "it is kept without outputs"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = "\n".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    assert "auto chose mixed_fp32" in shown
    assert all(float(off) < 1 for off in re.findall(r"plan off by [+-]([\d.]+)%", shown))
    assert len(re.findall("plan off by", shown)) == 2
    assert (tmp_path / "two_t4.png").is_file()
