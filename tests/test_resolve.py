"""Slots are bound to GPUs that can carry them, or the plan is refused with each difference."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sana_deploy.api import compile_spec
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import InfeasibleError, InvalidSpecError, PlanError
from sana_deploy.facts.machine import Machine
from sana_deploy.plan.artifact import Plan

Describe = Callable[..., Machine]


@pytest.fixture
def plan(small: Callable[..., DeploySpec], machine: Describe) -> Plan:
    spec = small("model=sana_1600m_controlnet", "workload.height=1024", "workload.width=1024")
    return compile_spec(spec, machine(8, 8))


def test_slots_bind_to_the_gpus_of_the_same_index(plan: Plan, machine: Describe) -> None:
    resolved = plan.resolve(machine(8, 8))
    assert resolved.device_map == {name: f"cuda:{place}" for name, place in plan.device_map.items()}
    assert resolved.home == f"cuda:{plan.home}"
    assert resolved.drift == ()


def test_larger_and_more_gpus_are_listed_and_taken(plan: Plan, machine: Describe) -> None:
    resolved = plan.resolve(machine(24, 24, 24))
    assert len(resolved.drift) == 2
    assert "was GPU 0: Test 8 GiB" in resolved.drift[0].message


def test_a_slot_moves_to_another_gpu_when_its_own_is_busy(plan: Plan, machine: Describe) -> None:
    full = machine(8, 8, 8)
    busy = full.gpus[0].__class__(0, "busy", full.gpus[0].total_bytes, 0, (8, 6), 30)
    resolved = plan.resolve(Machine("present", (busy, *full.gpus[1:]), full.host_bytes))
    assert "cuda:0" not in resolved.device_map.values()


@pytest.mark.parametrize(
    ("sizes", "options", "says"),
    [
        ((8,), {}, "no GPU is left here for it"),
        ((8, 8), {"used": 4}, r"was Test 8 GiB, 8.00 GiB free, is GPU 0 \(Test 8 GiB\), 4.00 GiB free: it needs"),
        ((8, 8), {"capability": (7, 5)}, "only emulates"),
    ],
)
def test_what_cannot_carry_the_plan_is_refused(
    plan: Plan, machine: Describe, sizes: tuple[float, ...], options: dict[str, object], says: str
) -> None:
    with pytest.raises(PlanError, match=says) as caught:
        plan.resolve(machine(*sizes, **options))
    assert caught.value.exit_code == 5


def test_without_gpus_a_balanced_plan_falls_back_to_the_cpu_and_a_custom_map_does_not(
    plan: Plan, small: Callable[..., DeploySpec], machine: Describe
) -> None:
    resolved = plan.resolve(machine())
    assert set(resolved.device_map.values()) == {"cpu"}
    assert resolved.drift[0].type == "no_gpu"
    custom = compile_spec(small("hardware=custom_map"), machine(8, 8))
    with pytest.raises(PlanError, match="has no GPU"):
        custom.resolve(machine())


def test_the_machine_is_probed_through_torch_by_default(plan: Plan) -> None:
    import torch

    from sana_deploy.facts.machine import probe_torch

    assert len(probe_torch().gpus) == torch.cuda.device_count()


def test_each_difference_is_on_a_line_of_its_own(plan: Plan, machine: Describe) -> None:
    old = plan.model_copy(update={"libraries": {**plan.libraries, "torch": "1.13.0"}})
    with pytest.raises(PlanError) as caught:
        old.resolve(machine(8))
    lines = caught.value.message.splitlines()
    assert lines[1].startswith("  torch: was 1.13.0, is 2.")
    assert lines[2].startswith("  slot gpu1: was Test 8 GiB, 8.00 GiB free; no GPU is left here for it")
    assert "resolve.allow=[library_versions]" in caught.value.hint


def test_another_library_version_is_refused_until_it_is_allowed_by_name(plan: Plan, machine: Describe) -> None:
    old = plan.model_copy(update={"libraries": {**plan.libraries, "diffusers": "0.1.0"}})
    with pytest.raises(PlanError, match=r"diffusers: was 0\.1\.0, is 0\."):
        old.resolve(machine(8, 8))
    resolved = old.resolve(machine(8, 8), allow=["library_versions"])
    assert [remark.message.split(",")[0] for remark in resolved.drift] == ["diffusers: was 0.1.0"]
    assert plan.digest == old.digest, "versions are no decision"


def test_slots_can_be_bound_by_uuid(plan: Plan, machine: Describe) -> None:
    box = machine(8, 8, 8)
    named = Machine("present", tuple(replace(gpu, uuid=f"uuid-{gpu.index}") for gpu in box.gpus), box.host_bytes)
    resolved = plan.resolve(named, bind={"0": "GPU-uuid-2", "1": "uuid-0"})
    assert resolved.slot_devices == {0: "cuda:2", 1: "cuda:0"}
    with pytest.raises(InfeasibleError, match="no GPU here has the UUID GPU-none") as caught:
        plan.resolve(named, bind={"0": "GPU-none"})
    assert "GPU-uuid-0, GPU-uuid-1" in caught.value.hint
    with pytest.raises(InvalidSpecError, match="the plan has no slot 7"):
        plan.resolve(named, bind={"7": "uuid-0"})


def test_a_matching_is_found_where_taking_the_first_that_will_do_fails(plan: Plan, machine: Describe) -> None:
    small_peak, large_peak = sorted(slot.peak_bytes for slot in plan.slots)
    large = next(slot for slot in plan.slots if slot.peak_bytes == large_peak)
    box = machine(8, 8)
    tight = [replace(gpu, free_bytes=small_peak) for gpu in box.gpus]
    tight[1 - large.index] = replace(box.gpus[1 - large.index], free_bytes=large_peak)
    resolved = plan.resolve(Machine("present", tuple(tight), box.host_bytes))
    assert resolved.slot_devices[large.index] == f"cuda:{1 - large.index}"


def test_allowances_and_bindings_are_declared_and_stay_out_of_the_plan_s_decisions(
    small: Callable[..., DeploySpec],
) -> None:
    declared = small("resolve.allow=[library_versions]", "resolve.bind={0: GPU-abc}", "machine=2xrtx3060")
    assert declared.resolve.bind == {"0": "GPU-abc"}
    assert compile_spec(declared).digest == compile_spec(small("machine=2xrtx3060")).digest
    with pytest.raises(InvalidSpecError, match=r"'everything' is not one of library_versions"):
        small("resolve.allow=[everything]")


def test_a_saved_plan_is_tried_on_other_machines_from_the_command_line(
    here: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    made = here("model=sana_1600m_controlnet", "machine=2x8gb", "until=compile", "hydra.run.dir=made")
    assert made.returncode == 0, made.stderr
    apply = ["plan_file=made/plan.json", "until=resolve"]
    same, fewer, larger = (here(*apply, f"resolve.machine={gpus}") for gpus in ("2x8GiB", "1x8GiB", "2xa100"))
    assert same.returncode == 0
    assert "resolve: slot" not in same.stderr
    assert fewer.returncode == 5
    assert "no GPU is left here for it" in " ".join(fewer.stderr.split())
    assert larger.returncode == 0
    assert "is GPU 0: NVIDIA A100-SXM4-80GB" in " ".join(larger.stderr.split())
    values = json.loads((tmp_path / "made" / "plan.json").read_text())
    values["libraries"]["diffusers"] = "0.1.0"
    (tmp_path / "made" / "plan.json").write_text(json.dumps(values))
    assert here(*apply).returncode == 5
    allowed = here(*apply, "resolve.allow=[library_versions]")
    assert allowed.returncode == 0
    assert "note: resolve: diffusers: was 0.1.0, is 0." in allowed.stderr
