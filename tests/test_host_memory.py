"""What runs or waits on the CPU counts against the host's memory: what does not fit is refused, unless it is forced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from sana_deploy._units import GIB
from sana_deploy.api import compile_spec
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import InfeasibleError
from sana_deploy.facts.machine import Machine

Small = Callable[..., DeploySpec]
Describe = Callable[..., Machine]
LARGE = ("model=sana_1600m_controlnet", "precision=fp32", "workload.height=1024", "workload.width=1024")
ALL_CPU = "hardware.device_map={text_encoder: cpu, vae: cpu, transformer: cpu, controlnet: cpu}"
SOME_CPU = "hardware.device_map={text_encoder: cpu, vae: 0, transformer: 0, controlnet: 0}"


def with_host(machine: Machine, gib: float) -> Machine:
    return replace(machine, host_bytes=int(gib * GIB))


@pytest.mark.parametrize(
    "hardware",
    [["hardware=multi_gpu_balanced"], ["hardware=single_gpu"], ["hardware=custom_map", ALL_CPU]],
    ids=["balanced", "single", "map"],
)
def test_a_cpu_plan_larger_than_the_host_is_refused_with_4(
    small: Small, machine: Describe, hardware: list[str]
) -> None:
    assert compile_spec(small(*LARGE, *hardware), with_host(machine(), 32)).home == "cpu"
    tight = with_host(machine(), 12)
    needs = r"the host needs \S+ GiB for what is on the CPU, it has 12.00 GiB, \S+ GiB too much"
    with pytest.raises(InfeasibleError, match=needs) as caught:
        compile_spec(small(*LARGE, *hardware), tight)
    assert caught.value.exit_code == 4
    assert caught.value.facts["shortfall_bytes"] > 0
    assert caught.value.hint.endswith("hardware.force=true goes on all the same")
    assert caught.value.plan is not None
    assert not caught.value.plan.feasible
    forced = compile_spec(small(*LARGE, *hardware, "hardware.force=true"), tight)
    assert forced.home == "cpu"
    (remark,) = [one for one in forced.diagnostics if one.type == "forced"]
    assert "the host needs" in remark.message


def test_the_hints_of_a_refused_cpu_plan_fit_when_they_are_taken(small: Small, machine: Describe) -> None:
    tight = with_host(machine(), 12)
    with pytest.raises(InfeasibleError) as caught:
        compile_spec(small(*LARGE), tight)
    changes = caught.value.hint.removeprefix("this fits: ").partition("; hardware.force")[0].split("; or ")
    assert len(changes) >= 2
    for change in changes:
        elsewhere = None if "machine=virtual" in change else tight
        overrides = change.partition(" (")[0].split()
        kept = [one for one in LARGE if not any(o.partition("=")[0] == one.partition("=")[0] for o in overrides)]
        assert compile_spec(small(*kept, *overrides), elsewhere).components, change


def test_a_knob_goes_on_where_only_with_it_the_host_suffices(small: Small, machine: Describe) -> None:
    four = (*LARGE, "workload.batch=4")
    assert compile_spec(small(*four), with_host(machine(), 64)).knobs == ["encode_once"]
    assert compile_spec(small(*four), with_host(machine(), 24)).knobs == ["encode_once", "vae_slicing"]


def test_components_on_the_cpu_beside_gpus_count(small: Small, machine: Describe) -> None:
    beside = (*LARGE, "hardware=custom_map", SOME_CPU)
    assert compile_spec(small(*beside), with_host(machine(24), 12)).device_map["text_encoder"] == "cpu"
    with pytest.raises(InfeasibleError, match=r"0 of 1 placements fit \(1 lacks memory on the host\)"):
        compile_spec(small(*beside), with_host(machine(24), 8))
    assert compile_spec(small(*beside, "hardware.force=true"), with_host(machine(24), 8)).slots


def test_offloaded_weights_count(small: Small, machine: Describe) -> None:
    one = ("model=sana_1600m_controlnet", "workload.height=1024", "workload.width=1024", "precision=mixed_bf16")
    alone = ("hardware=single_gpu", "hardware.allow=[encode_once,vae_slicing,text_encoder_offload]")
    offloaded = compile_spec(small(*one, *alone), with_host(machine(12), 5))
    assert "text_encoder_offload" in offloaded.knobs
    with pytest.raises(InfeasibleError, match="memory on the host"):
        compile_spec(small(*one, *alone), with_host(machine(12), 4))
    elsewhere = compile_spec(small(*one), with_host(machine(12, 6), 4))
    assert "text_encoder_offload" not in elsewhere.knobs
