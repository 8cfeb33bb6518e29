"""Graphs in rehearsals: the memory that they keep is in the books in every phase, as plans say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from sana_deploy import rehearse
from sana_deploy._units import MIB
from sana_deploy.api import compile_spec
from sana_deploy.declare.spec import DeploySpec, VirtualMachine
from sana_deploy.errors import RunError
from sana_deploy.facts.virtual_machine import describe_machine
from sana_deploy.rehearsal.rehearse import open_host
from sana_deploy.run.generate import run_request
from sana_deploy.run.graphed_forward import GraphedForward
from sana_deploy.run.load import load_pipeline

Small = Callable[..., DeploySpec]
LARGE, GRAPHS = "model=sana_1600m_controlnet", "runtime=graphs"
ONE = ["machine=virtual", "machine.gpus=h100", "hardware=single_gpu"]
PLACES = {
    "together": "{text_encoder: 0, vae: 0, transformer: 0, controlnet: 0}",
    "loop alone": "{text_encoder: 0, vae: 1, transformer: 2, controlnet: 2}",
    "each alone": "{text_encoder: 0, vae: 1, transformer: 2, controlnet: 3}",
}


@pytest.mark.parametrize("precision", ["mixed_bf16", "nf4"])
@pytest.mark.parametrize("places", PLACES.values(), ids=list(PLACES))
def test_the_plan_counts_what_the_rehearsal_finds(small: Small, places: str, precision: str) -> None:
    chosen = ["machine=virtual", "machine.gpus=4xh100", "hardware=custom_map", f"hardware.device_map={places}"]
    plan = compile_spec(small(LARGE, GRAPHS, *chosen, f"precision={precision}", *side(512)))
    report = rehearse(plan).report
    for slot, gpu in zip(plan.slots, report.gpus, strict=True):
        assert abs(gpu.planned_error) < 0.02, gpu.device
        assert slot.pool_bytes > 0
        for phase, size in gpu.phase_activations.items():
            kept = slot.pool_bytes if slot.first_pool_bytes is None or phase != "prepare" else slot.first_pool_bytes
            assert size >= kept - MIB, phase
        assert "load" in gpu.phase_activations


def side(pixels: int) -> list[str]:
    return [f"workload.height={pixels}", f"workload.width={pixels}"]


def test_a_batch_of_four_is_counted_too(small: Small) -> None:
    plan = compile_spec(small(LARGE, GRAPHS, *ONE, *side(768), "workload.batch=4"))
    (gpu,) = rehearse(plan).report.gpus
    assert abs(gpu.planned_error) < 0.02
    eager = rehearse(compile_spec(small(LARGE, "runtime=eager", *ONE, *side(768), "workload.batch=4"))).report.gpus[0]
    saved = {phase: size - eager.phase_activations[phase] for phase, size in gpu.phase_activations.items()
             if phase in eager.phase_activations}  # fmt: skip
    assert plan.graphed_calls == ["vae.encode"], "four images at once keep the GPU busy in decode"
    pool, first = plan.slots[0].pool_bytes, plan.slots[0].first_pool_bytes
    assert first is not None
    assert saved["prepare"] == pytest.approx(first, abs=1024), "an encode is eager at first, beside what others keep"
    assert pool / 2 < saved["encode"] <= pool + 1024, "the text encoder works in it, the batch's prompts are beside it"
    assert pool / 2 < saved["decode"] < pool, "residuals that wait for nothing are in the pool"
    assert abs(saved["denoise"]) < pool, "it stands in the place of a step's activations"


@pytest.mark.usefixtures("short_prompts")
def test_in_numbers_the_picture_is_that_of_eager_bit_for_bit(small: Small) -> None:
    steps, spread = "workload.steps=4", ["machine=virtual", "machine.gpus=4xrtx4090", "hardware=custom_map"]
    for places in PLACES.values():
        chosen = [*spread, f"hardware.device_map={places}", "precision=fp32", steps]
        graphs, eager = (rehearse(compile_spec(small(*chosen, f"runtime={mode}"))) for mode in ("graphs", "eager"))
        assert graphs.report.fidelity == "numbers"
        assert graphs.images[0].tobytes() == eager.images[0].tobytes()
        assert graphs.report.transfers == eager.report.transfers
        kept = [gpu.phase_activations["encode"] for gpu in graphs.report.gpus if "encode" in gpu.phase_activations]
        assert kept


@pytest.mark.usefixtures("short_prompts")
def test_a_second_request_finds_the_pool_and_takes_no_more(small: Small) -> None:
    resolved = compile_spec(small(*ONE, GRAPHS)).resolve()
    host = open_host(resolved, "shapes")
    pipeline, workload = load_pipeline(resolved, host=host), resolved.plan.spec.workload
    live = []
    with host:
        for _ in range(4):
            run_request(pipeline, workload.bounds, workload.request)
            live.append((host.ledger.live(0), host.ledger.peaks[0].total_bytes))
    assert live[1] == live[-1]
    pool = resolved.plan.slots[0].pool_bytes
    assert pool <= host.ledger.activations[0] < pool + MIB
    forward = pipeline.transformer._old_forward
    assert isinstance(forward, GraphedForward)
    assert forward.replays == 4 * workload.steps - 1


def test_a_gpu_without_room_for_graphs_is_named_while_loading(small: Small) -> None:
    plan = compile_spec(small(*ONE, GRAPHS))
    weights = plan.slots[0].weights_bytes + plan.slots[0].allocator_bytes
    box = describe_machine(VirtualMachine(kind="virtual", gpus=f"{weights // MIB + 450 + 30}MiB"))
    with pytest.raises(RunError, match="out of memory while making room for graphs: vgpu:0 is out of memory") as caught:
        rehearse(replace(plan.resolve(), machine=box), "shapes")
    assert (caught.value.exit_code, caught.value.where) == (6, "runtime")
