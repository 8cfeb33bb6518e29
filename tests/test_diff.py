"""Two plans side by side: what was declared, decided, and what it costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sana_deploy.api import compile_spec
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.facts.machine import Machine
from sana_deploy.plan.artifact import Plan
from sana_deploy.plan.diff import compare, render
from sana_deploy.report.compare import main

LARGE = ["model=sana_1600m_controlnet", "workload.height=1024", "workload.width=1024"]


@pytest.fixture
def pair(small: Callable[..., DeploySpec], machine: Callable[..., Machine]) -> tuple[Plan, Plan]:
    together = compile_spec(small(*LARGE), machine(8, 8))
    split = compile_spec(small(*LARGE, "hardware.allow=[split_controlnet]"), machine(8, 8))
    return together, split


def test_it_tells_what_moved_and_what_that_costs(pair: tuple[Plan, Plan]) -> None:
    found = {one.where: one for one in compare(*pair)}
    assert found["hardware.allow"].kind == "declared"
    moved = found["components.controlnet.slot"]
    assert (moved.kind, moved.was, moved.now) == ("decided", pair[0].home, 1 - int(pair[0].home))
    assert (found["knobs"].was, found["knobs"].now) == ("encode_once", "split_controlnet")
    assert found["estimates.bytes_per_step"].was == 0
    assert "components.transformer.slot" not in found
    shown = render(compare(*pair))
    assert f"decided   components.controlnet.slot: GPU {moved.was} -> GPU {moved.now}" in shown
    assert "estimates.bytes_per_step: 0 B -> 61.38 MiB (+61.38 MiB)" in shown


def test_another_checkpoint_and_another_pipeline_are_declared_differences(
    small: Callable[..., DeploySpec], machine: Callable[..., Machine], pair: tuple[Plan, Plan]
) -> None:
    smaller = compile_spec(small("model=sana_600m_controlnet"), machine(8, 8))
    found = {one.where: one for one in compare(pair[0], smaller)}
    assert found["checkpoint"].kind == "declared"
    assert found["checkpoint"].now == smaller.checkpoint.fingerprint
    seconds = found["estimates.seconds_per_image"]
    assert f"{seconds.was:.2f} s -> {seconds.now:.2f} s (-{seconds.was - seconds.now:.2f} s)" in render([seconds])
    (other,) = compare(smaller, smaller.model_copy(update={"pipeline_class": "SanaPipeline"}))
    assert (other.kind, other.where, other.now) == ("declared", "pipeline_class", "SanaPipeline")
    assert compare(smaller, smaller) == []


def test_the_command_exits_with_1_only_when_asked(
    pair: tuple[Plan, Plan], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    was, now = (str(plan.save(tmp_path / f"{i}.json")) for i, plan in enumerate(pair))
    assert main([was, now]) == 0
    assert main([was, now, "--exit-code"]) == 1
    assert main([was, was, "--exit-code"]) == 0
    assert capsys.readouterr().out.endswith("no difference\n")
    assert main([was, now, "--json"]) == 0
    assert {one["kind"] for one in json.loads(capsys.readouterr().out)} == {"declared", "decided", "cost"}
    assert main([was, str(tmp_path / "none.json")]) == 5
    assert "there is no plan file" in capsys.readouterr().err
