"""What other code relies on: the public names, the README's commands and snippet, the wheel."""

from __future__ import annotations

import os
import re
import site
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKOUT

import sana_deploy
from sana_deploy import errors

README = (CHECKOUT / "README.md").read_text(encoding="utf-8")


def test_every_public_name_is_there_and_listed() -> None:
    for name in sana_deploy.__all__:
        assert getattr(sana_deploy, name) is not None
    assert set(sana_deploy.__all__) <= set(dir(sana_deploy))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sana_deploy.nothing


def test_a_public_name_that_moved_is_still_found_and_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = {"Declaration": "sana_deploy.DeploySpec", "PlanError": "sana_deploy.errors.PlanError"}
    monkeypatch.setattr(sana_deploy, "_MOVED", moved)
    for old, kind in (("Declaration", sana_deploy.DeploySpec), ("PlanError", errors.PlanError)):
        with pytest.warns(DeprecationWarning, match=rf"^sana_deploy\.{old} is now {moved[old]}; ") as caught:
            assert getattr(sana_deploy, old) is kind
        assert caught[0].filename == __file__, "the warning points to the line that uses the old name"
        assert old not in dir(sana_deploy)
    with pytest.warns(DeprecationWarning, match="is now"):
        exec("from sana_deploy import Declaration")


def test_the_readme_s_python_runs(tiny: Path, tmp_path: Path) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "lighthouse.png").is_file()


def test_ci_runs_the_readme_s_two_commands_as_written() -> None:
    commands = re.findall(r"```sh\n(pip install .*?)\n```", README)
    assert len(commands) == 2
    script = (CHECKOUT / ".ci" / "run").read_text(encoding="utf-8")
    reads = script[script.index("mapfile") : script.index('echo "+ ${commands[0]}')]
    shown = f"set -euo pipefail\n{reads}\nprintf '%s\\n' \"${{commands[@]}}\""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    taken = subprocess.run(["bash", "-c", shown], cwd=CHECKOUT, capture_output=True, text=True, check=True,
                           env={**os.environ, "PATH": path})  # fmt: skip
    assert taken.stdout.splitlines() == commands
    for number in (0, 1):
        assert re.search(rf'^\(?eval "\$\{{commands\[{number}\]\}}"', script, re.MULTILINE), number


@pytest.mark.parametrize("overrides", ["precision=fp32", [1], 3, None, b"precision=fp32", ["until=compile", None]])
def test_overrides_that_are_no_list_of_texts_are_refused(overrides: Any) -> None:
    with pytest.raises(errors.UsageError, match="was given") as caught:
        sana_deploy.compile_plan(overrides)
    assert caught.value.hint.startswith("compile_plan([")
    if isinstance(overrides, str):
        plan = eval(caught.value.hint, {"compile_plan": sana_deploy.compile_plan})
        assert plan.spec.precision.name == "fp32"


def test_what_is_no_pipeline_and_what_is_no_plan_is_refused(tiny: Path) -> None:
    plan = sana_deploy.compile_plan(["precision=fp32", "workload.height=64", "workload.width=64"])
    text: Any = "plan.json"
    nothing: Any = {}
    refusals: tuple[Callable[[], Any], ...] = (
        lambda: sana_deploy.place("x"), lambda: sana_deploy.place("x", plan), lambda: sana_deploy.unplace(None),
    )  # fmt: skip
    for refused in refusals:
        with pytest.raises(errors.UsageError, match="a diffusers pipeline is needed") as caught:
            refused()
        assert "load_pipeline(plan)" in caught.value.hint
    pipeline = sana_deploy.unplace(sana_deploy.load_pipeline(plan))
    calls: tuple[Callable[[], Any], ...] = (
        lambda: sana_deploy.place(pipeline), lambda: sana_deploy.place(pipeline, text),
        lambda: sana_deploy.load_pipeline(text), lambda: sana_deploy.rehearse(nothing),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(errors.UsageError, match="a plan is needed") as caught:
            call()
        assert "compile_plan" in caught.value.hint
    assert sana_deploy.place(pipeline, plan) is pipeline, "a plan is taken as load_pipeline takes it"
    assert pipeline.hf_device_map == dict(plan.resolve().device_map)


def test_errors_survive_pickling() -> None:
    import pickle

    error = errors.InfeasibleError("too large", where="hardware", hint="smaller", shortfall_bytes=3)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.hint, again.facts) == (str(error), "smaller", {"shortfall_bytes": 3})
    closest = errors.InfeasibleError("nothing fits", where="hardware")
    closest.plan = {"knobs": ["vae_slicing"]}
    assert pickle.loads(pickle.dumps(closest)).plan == closest.plan


def test_the_wheel_carries_conf_and_works_outside_the_checkout(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", tmp_path, CHECKOUT], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "sana_deploy/conf/config.yaml" in names
    assert "sana_deploy/facts/architectures/sana_600m_controlnet.json" in names
    assert "sana_deploy/plan/plan.schema.json" in names
    assert {"sana_deploy/advise/prices.csv", "sana_deploy/conf/advise/default.yaml"} <= {*names}
    assert not [name for name in names if name.startswith(("tests", "outputs", "conf/"))]
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    inside = home / "bin" / "python"
    target = subprocess.run([inside, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True,
                            text=True, check=True).stdout.strip()  # fmt: skip
    zipfile.ZipFile(wheel).extractall(target)
    # Dependencies come from this environment; a .pth inside it (an editable install) is not followed from here.
    (Path(target) / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    done = subprocess.run(
        [inside, "-m", "sana_deploy", "until=compile", "model=sana_600m_controlnet"],
        cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    where = subprocess.run([inside, "-c", "import sana_deploy; print(sana_deploy.__file__)"], cwd=tmp_path,
                           capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert str(home) in where
