"""The artifact: exact bytes, a digest that finds changes, and refusal of what is damaged or too new."""

from __future__ import annotations

import copy
import json
import operator
import pickle
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from sana_deploy.api import compile_spec
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import InputError, PlanError
from sana_deploy.facts.machine import Machine
from sana_deploy.plan.artifact import Plan
from sana_deploy.plan.basis import BASIS, OVERLAP_BASIS
from sana_deploy.plan.digest import digest_of


@pytest.fixture
def plan(small: Callable[..., DeploySpec], machine: Callable[..., Machine]) -> Plan:
    return compile_spec(small("model=sana_1600m_controlnet"), machine(5.8, 4.0, 4.0))


def test_saving_and_loading_gives_the_same_plan(plan: Plan, tmp_path: Path) -> None:
    path = plan.save(tmp_path / "deep" / "plan.json")
    assert Plan.load(path) == plan
    assert Plan.load(path).to_json() == path.read_text(encoding="utf-8")
    assert [entry.name for entry in path.parent.iterdir()] == ["plan.json"]


def test_two_processes_write_identical_bytes(tmp_path: Path) -> None:
    script = "from sana_deploy import compile_plan; print(compile_plan(['model=sana_600m_controlnet']).to_json())"
    texts = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        run = subprocess.run(
            [sys.executable, "-c", script], cwd=folder, env={"PYTHONHASHSEED": seed, "LC_ALL": "C"},
            capture_output=True, check=True,
        )  # fmt: skip
        texts.append(run.stdout)
    assert texts[0] == texts[1]
    assert json.loads(texts[0])["digest"].startswith("sha256:")


def test_the_digest_covers_decisions_and_not_this_host(
    small: Callable[..., DeploySpec], machine: Callable[..., Machine], tmp_path: Path
) -> None:
    digest = compile_spec(small(), machine(8)).digest
    assert compile_spec(small("until=resolve", "output=json"), machine(8)).digest == digest
    assert compile_spec(small(f"model.cache_dir={tmp_path}"), machine(8)).digest == digest
    assert compile_spec(small("precision=bf16"), machine(8)).digest != digest
    assert compile_spec(small("workload.steps=3"), machine(8)).digest != digest
    assert compile_spec(small(), machine(9)).digest != digest


def numbers(value: Any, path: str = "") -> list[str]:
    if isinstance(value, dict):
        return [place for key, item in value.items() for place in numbers(item, f"{path}.{key}")]
    if isinstance(value, list):
        return [place for item in value for place in numbers(item, f"{path}.*")]
    return [path[1:]] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def test_every_quantity_says_how_it_was_come_by(plan: Plan) -> None:
    values = json.loads(plan.to_json())
    values.pop("spec")
    counts = {"slots.*.index", "slots.*.compute_capability.*", "home", "device_map.*", "components.*.slot",
              "transfers.*.src", "transfers.*.dst", "considered.placements", "considered.feasible",
              "considered.settings", "considered.closest.device_map.*",
              "considered.runners_up.*.device_map.*", "rejections.*.gpu", "rejections.*.count",
              "overlap.in_flight", "overlap.stages.*.places.*", "overlap.slots.*.slot"}  # fmt: skip
    unknown = [place for place in numbers(values) if not any(fnmatch(place, known) for known in {*counts, *plan.basis})]
    assert unknown == []
    pools = {f"slots.*.{name}": "estimated" for name in ("pool_bytes", "first_pool_bytes")}
    further = {**pools, **OVERLAP_BASIS}
    assert values["basis"] == {**BASIS, **further}, (
        "its components and the VAE's calls execute as graphs, and its stages overlap"
    )


def changed(plan: Plan, change: Callable[[dict[str, Any]], None], path: Path) -> Path:
    values = json.loads(plan.to_json())
    change(values)
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: v["device_map"].update(vae=0), "changed after it was compiled"),
        (lambda v: v["components"]["vae"].update(weights_bytes=1), "changed after it was compiled"),
        (lambda v: v.update(schema_version="2.0"), "schema version 2.0"),
        (lambda v: v.pop("schema_version"), "no plan file"),
        (lambda v: v.pop("slots"), "damaged at slots"),
        (lambda v: v["device_map"].update(vae="gpu"), "damaged at device_map.vae"),
        (lambda v: v["spec"]["workload"].update(steps=-1), "damaged at spec.workload.steps"),
    ],
)
def test_a_changed_or_damaged_plan_is_refused(plan: Plan, tmp_path: Path, change: Any, says: str) -> None:
    with pytest.raises(PlanError, match=says) as caught:
        Plan.load(changed(plan, change, tmp_path / "plan.json"))
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: v["device_map"].update(vae="cpu"), "contradicts itself about the place of vae"),
        (lambda v: v["slots"].clear(), "puts text_encoder on slot ., which it lacks"),
        (lambda v: v.update(home="cpu"), "home is cpu, the transformer is elsewhere"),
    ],
)
def test_a_plan_whose_parts_contradict_each_other_is_refused_though_its_digest_matches(
    plan: Plan, tmp_path: Path, change: Any, says: str
) -> None:
    def matching(values: dict[str, Any]) -> None:
        change(values)
        values["digest"] = digest_of(values)

    with pytest.raises(PlanError, match=says):
        Plan.load(changed(plan, matching, tmp_path / "plan.json"))


def test_a_later_minor_version_is_read(plan: Plan, tmp_path: Path) -> None:
    def later(values: dict[str, Any]) -> None:
        values.update(schema_version="1.7", novelty={"a": 1})
        values["digest"] = digest_of(values)

    assert Plan.load(changed(plan, later, tmp_path / "plan.json")).device_map == plan.device_map


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a component": lambda plan: operator.setitem(plan.components, "vae", None),
    "a place": lambda plan: plan.device_map.update(vae=0),
    "a knob": lambda plan: plan.knobs.append("vae_tiling"),
    "a slot": lambda plan: plan.slots.clear(),
    "a slot's capability": lambda plan: operator.setitem(plan.slots[0].compute_capability, 0, 9),
    "a runner-up's knobs": lambda plan: plan.considered.runners_up[0].knobs.extend(["vae_tiling"]),
    "the basis": lambda plan: plan.basis.pop("slots.*.peak_bytes"),
    "the declaration": lambda plan: plan.spec.hardware.allow.remove("vae_slicing"),
    "what auto decided": lambda plan: operator.delitem(plan.spec.precision.components, "vae"),
    "the tiles' prices": lambda plan: plan.knob_prices.__ior__({}),
    "a list in place": lambda plan: plan.transfers.__iadd__([None]),
}


@pytest.mark.parametrize("what", CHANGES)
def test_nothing_in_a_plan_can_be_changed(
    small: Callable[..., DeploySpec], machine: Callable[..., Machine], what: str
) -> None:
    plan = compile_spec(small("model=sana_1600m_controlnet", "precision=auto"), machine(5.6, 4.0, 4.0))
    before = plan.to_json()
    for one in (plan, pickle.loads(pickle.dumps(plan)), copy.deepcopy(plan), plan.model_copy(deep=True)):
        with pytest.raises(TypeError, match="is frozen"):
            CHANGES[what](one)
        assert one == plan
        assert one.to_json() == before
    assert Plan.model_validate(json.loads(before)) == plan
    assert {**plan.device_map, "vae": 0}["vae"] == 0, "a copy may be changed"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", '{"schema_version": 1}'])
def test_what_is_no_plan_at_all_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError):
        Plan.load(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="no plan file"):
        Plan.load(tmp_path / "absent.json")


def test_saving_where_nothing_can_be_written_leaves_nothing(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError):
        plan.save(tmp_path / "file" / "plan.json")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
