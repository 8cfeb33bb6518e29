"""How full a GPU is said to be: what others use counts, by one definition in every text, table and drawing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from sana_deploy import rehearse
from sana_deploy._units import GIB
from sana_deploy.api import compile_spec
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.facts.machine import Machine
from sana_deploy.plan.artifact import Plan
from sana_deploy.report.html import plan_page
from sana_deploy.report.summary import cells_of, read_rows
from sana_deploy.report.terminal import render_plan, render_rehearsal
from sana_deploy.run.outcome import Outcome

Small = Callable[..., DeploySpec]
LARGE = ("model=sana_1600m_controlnet", "workload.height=1024", "workload.width=1024")
FORCED = (*LARGE, "machine=2x8gb", "+machine.used=1.5GiB", "hardware=custom_map",
          "hardware.device_map={text_encoder: 0, vae: 1, transformer: 1, controlnet: 1}",
          "hardware.knobs=[vae_slicing]", "hardware.force=true")  # fmt: skip
DONE = Outcome(status="done", exit_code=0, stage="compile")


def text_of(plan: Plan) -> str:
    out = Console(width=200)
    with out.capture() as said:
        out.print(render_plan(plan))
    return said.get()


def test_a_map_that_cannot_fit_beside_others_is_drawn_over_full(small: Small) -> None:
    plan = compile_spec(small(*FORCED))
    (line,) = [line for line in text_of(plan).splitlines() if line.startswith("GPU 1")]
    (_, slot) = plan.slots
    share = (slot.peak_bytes / GIB + 1.5) / 8
    assert share > 1
    assert f"~{slot.peak_bytes / GIB:.2f} + 1.50 for others of 8.00 GiB ({share:.0%})" in line
    assert "▞" in line
    assert "░" not in line, "nothing is free"
    assert "▞ for others (used, or kept free)" in text_of(plan)
    (label,) = re.findall(r'aria-label="(GPU 1, [^"]*)"', plan_page(plan, DONE, "command"))
    assert "others 1.50 GiB" in label
    assert "free 0 B" in label


def test_a_gpu_that_is_ours_alone_is_drawn_without_others(small: Small) -> None:
    plan = compile_spec(small(*LARGE, "machine=2x8gb"))
    assert "others" not in text_of(plan)
    bars = re.findall(r'aria-label="(GPU \d, [^"]*)"', plan_page(plan, DONE, "command"))
    assert len(bars) == 2
    assert not [one for one in bars if "others" in one]
    assert "for others" not in plan_page(plan, DONE, "command")


@pytest.mark.parametrize("shared", [["machine.used=[1.5GiB,0.25GiB]"], ["hardware.keep_free=1GiB"], []])
def test_fullest_is_one_number_in_every_table(small: Small, tmp_path: Path, shared: list[str]) -> None:
    plan = compile_spec(small(*LARGE, "machine=virtual", "machine.gpus=2x10GiB", *shared))
    assert plan.fullness is not None
    fullest = f"{plan.fullness:.0%}"
    slots = {slot.index: (slot.capacity_bytes - slot.available_bytes + slot.peak_bytes) / slot.capacity_bytes
             for slot in plan.slots}  # fmt: skip
    assert fullest == f"{max(slots.values()):.0%}"
    lines = text_of(plan).splitlines()
    shown = [int(re.findall(r"\((\d+)%\)", line)[0]) for line in lines if line.startswith("GPU ")]
    assert f"{max(shown)}%" == fullest

    page = plan_page(plan, DONE, "command")
    assert page.count(f"({fullest}), fullest in") == 1, "the words of the bar"
    (chosen, *others) = re.findall(r'data-label="fullest GPU"[^>]*>(\d+%)<', page)
    assert chosen == fullest
    assert [one.fullness for one in plan.considered.runners_up] != []
    assert others == [f"{one.fullness:.0%}" for one in plan.considered.runners_up]
    (after,) = [line for line in lines if line.startswith("  next:")]
    assert f"fullest {others[0]}" in after

    job = tmp_path / "0"
    plan.save(job / "plan.json")
    (job / "outcome.json").write_text(DONE.to_json())
    (row,) = cells_of(read_rows(tmp_path))
    assert row["fullest"] == fullest


def test_a_runner_up_s_fullness_is_what_its_own_plan_says(small: Small, machine: Callable[..., Machine]) -> None:
    two = machine(10, 10, used=1.5)
    plan = compile_spec(small(*LARGE), two)
    other = plan.considered.runners_up[0]
    places = ", ".join(f"{name}: {place}" for name, place in other.device_map.items())
    knobs = [knob for knob in other.knobs if knob != "split_controlnet"]
    own = compile_spec(small(*LARGE, "hardware=custom_map", f"hardware.device_map={{{places}}}",
                             f"hardware.knobs=[{','.join(knobs)}]"), two)  # fmt: skip
    assert own.fullness == pytest.approx(other.fullness, abs=1e-6)


def test_the_phases_stand_on_what_is_taken_all_along(small: Small) -> None:
    plan = compile_spec(small(*LARGE, "machine=virtual", "machine.gpus=2x10GiB", "machine.used=1.5GiB",
                              "hardware.keep_free=0.5GiB"))  # fmt: skip
    report = rehearse(plan, "shapes").report
    assert [gpu.others_bytes for gpu in report.gpus] == [2 * 2**30] * 2
    with (out := Console(width=200)).capture() as said:
        out.print(render_rehearsal(report))
    assert said.get().count("+ 2.00 for others of 10.00 GiB") == 2
    page = plan_page(plan, DONE.model_copy(update={"rehearsal": report}), "command")
    strips = re.findall(r'y="([\d.]+)" width="760" height="([\d.]+)" fill="var\(--others\)"', page)
    assert strips == [("100.0", "20.0")] * 2, "a fifth of the GPU, at the bottom"
    for gpu, svg in zip(report.gpus, re.findall(r'<svg class="timeline".*?</svg>', page, re.DOTALL), strict=True):
        tops = [float(y) for y in re.findall(r'y="([\d.]+)" width="\d+" height="[\d.]+" fill', svg)]
        assert min(tops) == pytest.approx(120 - 100 * gpu.fullness, abs=0.2), "the highest bar is as high as it is full"


def test_plans_of_earlier_versions_show_no_share_for_placements_that_came_next() -> None:
    path = Path(__file__).parent / "plans" / "1.2.json"
    plan = Plan.load(path)
    assert json.loads(path.read_text())["considered"]["runners_up"]
    assert plan.considered.runners_up[0].fullness is None
    assert "fullest" not in "".join(line for line in text_of(plan).splitlines() if line.startswith("  next:"))
