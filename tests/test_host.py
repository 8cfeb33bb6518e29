"""A host loads a plan's components: this machine's devices, virtual GPUs, or whatever keeps the protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from sana_deploy import load_pipeline, place
from sana_deploy.api import compile_spec
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import InfeasibleError, RunError
from sana_deploy.facts.checkpoint import Checkpoint
from sana_deploy.rehearsal.host import VirtualHost
from sana_deploy.rehearsal.rehearse import open_host
from sana_deploy.run.generate import generate
from sana_deploy.run.hook import border_of
from sana_deploy.run.host import Host, PresentHost
from sana_deploy.run.phase_clock import PhaseClock
from sana_deploy.run.weights import LoadRequest, Progress

Small = Callable[..., DeploySpec]
VIRTUAL = ("machine=virtual", "machine.gpus=2xrtx4090", "precision=fp32")


class Noting(PresentHost):
    """The present host, which notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def load_components(
        self, requests: Mapping[str, LoadRequest], on_progress: Progress | None, notes: list[str]
    ) -> dict[str, nn.Module]:
        self.asked += [f"{name} in {request.format} on {request.device}" for name, request in requests.items()]
        notes.append("noted")
        return super().load_components(requests, on_progress, notes)

    def load_helpers(self, checkpoint: Checkpoint) -> Mapping[str, Any]:
        self.asked.append("helpers")
        return super().load_helpers(checkpoint)

    def synchronize(self, device: torch.device) -> None:
        self.asked.append(f"wait for {device}")

    def peak_bytes(self, device: torch.device) -> int | None:
        return 7


@pytest.mark.usefixtures("short_prompts")
def test_loading_phases_and_peaks_go_by_the_host_that_is_given(small: Small) -> None:
    host, spec = Noting(), small("precision=fp32")
    pipeline = load_pipeline(compile_spec(spec), host=host)
    names = border_of(pipeline).pipeline.names
    assert host.asked == [*(f"{name} in float32 on cpu" for name in names), "helpers"]
    assert border_of(pipeline).host is host
    assert border_of(pipeline).notes == ["noted"]
    host.asked.clear()
    _, measured = generate(pipeline, spec.workload.bounds, spec.workload.request)
    assert host.asked == ["wait for cpu"] * 5, "at the start of each phase, and at the end"
    assert measured.peak_bytes == {"cpu": 7}


def test_a_pipeline_placed_from_memory_is_on_the_present_host(small: Small) -> None:
    plan = compile_spec(small("precision=fp32"))
    pipeline = load_pipeline(plan, host=Noting())
    pipeline.reset_device_map()
    assert type(border_of(place(pipeline, plan)).host) is PresentHost


def test_each_host_refuses_the_plans_of_the_other(small: Small) -> None:
    virtual = compile_spec(small(*VIRTUAL)).resolve()
    with pytest.raises(RunError, match="the plan is for virtual GPUs"):
        load_pipeline(virtual)
    present = compile_spec(small("precision=fp32"))
    with pytest.raises(InfeasibleError, match="the plan is for this host's GPUs, a rehearsal needs virtual ones"):
        load_pipeline(present, host=open_host(virtual))


def test_only_gpus_are_waited_for_and_have_a_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def noting(name: str) -> Callable[[torch.device], int]:
        def note(device: torch.device) -> int:
            asked.append((name, str(device)))
            return 5

        return note

    for name in ("synchronize", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, noting(name))
    host, devices = PresentHost(), [torch.device("cpu"), torch.device("cuda:1")]
    for device in devices:
        host.reset_peak(device)
    assert [host.peak_bytes(device) for device in devices] == [None, 5]
    PhaseClock(pipeline=None, host=host, devices=devices).switch("denoise")  # type: ignore[arg-type]
    assert asked == [
        ("reset_peak_memory_stats", "cuda:1"), ("max_memory_allocated", "cuda:1"), ("synchronize", "cuda:1"),
    ]  # fmt: skip


@pytest.mark.parametrize("fidelity", ["shapes", "numbers"])
def test_a_virtual_host_says_how_full_its_gpus_were(small: Small, fidelity: Any) -> None:
    resolved = compile_spec(small(*VIRTUAL, "hardware=single_gpu")).resolve()
    host: Host = open_host(resolved, fidelity)
    assert isinstance(host, VirtualHost)
    assert host.reads_weights == (fidelity == "numbers")
    load_pipeline(resolved, host=host)
    weights = sum(part.weights_bytes for part in resolved.plan.components.values())
    peak = host.peak_bytes(torch.device("vgpu:0"))
    assert peak is not None
    assert weights <= peak - host.pools[0] < 1.1 * weights
    assert host.peak_bytes(torch.device("cpu")) is None
