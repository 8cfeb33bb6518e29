"""Slots are bound to GPUs that can carry them, or the plan is refused with each difference."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sana_deploy.compile import compile_spec
from sana_deploy.errors import PlanError
from sana_deploy.machine import Machine
from sana_deploy.plan import Plan
from sana_deploy.spec import DeploySpec

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
        ((8,), {}, "wants a GPU, none is left"),
        ((8, 8), {"used": 4}, "needs .* GiB, GPU"),
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

    from sana_deploy.machine import probe_torch

    assert len(probe_torch().gpus) == torch.cuda.device_count()
