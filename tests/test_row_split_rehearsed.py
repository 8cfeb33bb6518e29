"""Rows of an image on virtual GPUs: the picture of one GPU, what is exchanged, and the bytes of every unit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from halved import apart
from test_rows import without

from sana_deploy.api import compile_plan, compile_spec
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import RunError
from sana_deploy.plan import row_gpus
from sana_deploy.plan.artifact import Plan
from sana_deploy.plan.search import Search
from sana_deploy.rehearsal.rehearse import Rehearsed, open_host, rehearse_request
from sana_deploy.run.generate import run_request
from sana_deploy.run.load import load_pipeline
from sana_deploy.run.request_state import RequestState
from sana_deploy.run.rows.exchange import Ask, Halo, Sum
from sana_deploy.run.traffic import by_pair

Small = Callable[..., DeploySpec]
ROUNDING = 2e-6
"""Of pixels in float32: sums over all rows are added in another order."""
ROWS = ["precision=fp32", "machine=virtual", "hardware.split=rows"]
WHOLE = ["precision=fp32", "machine=virtual", "hardware.split=none", "runtime=eager"]


def search_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Search every way to deal rows, also those that cannot take the fewest seconds."""
    usual = row_gpus.dealt_ways

    def unpruned(*args: Any) -> list[row_gpus.Dealt]:
        return [replace(one, least=float("-inf")) for one in usual(*args)]

    monkeypatch.setattr(row_gpus, "dealt_ways", unpruned)


@pytest.fixture
def all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deal rows to all GPUs, where fewer would take fewer seconds: Python launches a tiny model's kernels slowest."""

    def most_gpus(search: Search) -> tuple[bool, float]:
        return search.best is None, -len(set(search.best.placement.values())) if search.best else 0

    monkeypatch.setattr(row_gpus, "_rank", most_gpus)
    search_all(monkeypatch)


@pytest.fixture
def vae_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deal rows to all GPUs, and the VAE's as well."""

    def most_units(search: Search) -> tuple[bool, float]:
        return search.best is None, -len(search.best.placement) if search.best else 0

    monkeypatch.setattr(row_gpus, "_rank", most_units)
    search_all(monkeypatch)


@pytest.mark.usefixtures("vae_too", "short_prompts")
@pytest.mark.parametrize("height", [64, 160])
def test_with_the_vae_over_gpus_it_is_too_and_without_an_exchange_it_is_not(small: Small, height: int) -> None:
    more = ["machine.gpus=2xrtx4090", f"workload.height={height}"]
    plan = compile_spec(small(*ROWS, *more))
    assert {"vae.1", "transformer.1", "controlnet.1"} == set(plan.units)
    whole = pixels_of(compile_spec(small(*WHOLE, *more)))
    assert apart(pixels_of(plan), whole) < ROUNDING
    for kind in (Halo, Sum):
        with without(kind):
            assert apart(pixels_of(plan), whole) > 100 * ROUNDING


@pytest.mark.usefixtures("vae_too")
def test_every_byte_of_the_vae_s_units_is_planned(small: Small) -> None:
    for more in (["machine.gpus=3xrtx4090", "workload.height=160"], ["machine.gpus=2xrtx4090", "workload.height=64"]):
        plan = compile_spec(small(*ROWS, *more))
        done, _, _ = rehearsed(plan)
        found = Counter({(one.src, one.dst, one.tensor): one.bytes_per_image for one in done.report.transfers})
        assert found == moved(plan)
        assert any(tensor == "decoded_edge_rows" for _, _, tensor in found)


@pytest.mark.slow
@pytest.mark.usefixtures("vae_too")
def test_peaks_of_the_vae_s_units_are_planned_within_half_a_percent() -> None:
    shape = ["workload.height=1536", "workload.width=1024", "workload.steps=2"]
    plan = compile_plan(["model=sana_1600m_controlnet", "machine=virtual", "machine.gpus=2xh100", *ROWS[2:], *shape])
    done, _, _ = rehearsed(plan)
    for gpu in done.report.gpus:
        assert gpu.component == "vae"
        assert abs(gpu.planned_error) < 0.005, gpu


def pixels_of(plan: Plan, **shape: int) -> torch.Tensor:
    resolved, state = plan.resolve(), RequestState()
    host, workload = open_host(resolved, "numbers"), plan.spec.workload
    pipeline = load_pipeline(resolved, host=host)
    with host:
        bounds = workload.bounds.model_copy(update=shape)
        pixels, _ = run_request(pipeline, bounds, workload.request, state=state)
    assert state.remarks == []
    return pixels.cpu()


def rehearsed(plan: Plan, fidelity: Any = "shapes") -> tuple[Rehearsed, RequestState, Any]:
    resolved, state = plan.resolve(), RequestState()
    host = open_host(resolved, fidelity)
    return rehearse_request(load_pipeline(resolved, host=host), resolved, host, state=state), state, host


CASES: dict[str, list[str]] = {
    "2 GPUs": ["machine.gpus=2xrtx4090", "workload.height=96"],
    "3 GPUs": ["machine.gpus=3xrtx4090", "workload.height=160"],
    "4 GPUs, batch 2": ["machine.gpus=4xrtx4090", "workload.height=160", "workload.batch=2", "workload.width=32"],
    "unlike GPUs, without guidance": ["machine.gpus=[h100,t4]", "workload.height=352", "workload.guidance_scale=1"],
}


@pytest.mark.usefixtures("all_gpus", "short_prompts")
@pytest.mark.parametrize("more", CASES.values(), ids=list(CASES))
def test_the_picture_is_that_of_one_gpu(small: Small, more: list[str]) -> None:
    plan, whole = compile_spec(small(*ROWS, *more)), compile_spec(small(*WHOLE, *more))
    assert plan.split == "rows"
    assert len(plan.rows) == len(plan.slots)
    assert sum(plan.rows) == plan.spec.workload.height // 32
    assert apart(pixels_of(plan), pixels_of(whole)) < ROUNDING


@pytest.mark.usefixtures("short_prompts")
@pytest.mark.parametrize("kind", [Halo, Sum])
def test_a_picture_without_an_exchange_is_another_one(small: Small, kind: type[Ask]) -> None:
    more = CASES["2 GPUs"]
    whole = pixels_of(compile_spec(small(*WHOLE, *more)))
    with without(kind):
        assert apart(pixels_of(compile_spec(small(*ROWS, *more))), whole) > 100 * ROUNDING


def moved(plan: Plan) -> Counter[tuple[str, str, str]]:
    found = Counter[tuple[str, str, str]]()
    for one in plan.transfers:
        found[f"vgpu:{one.src}", f"vgpu:{one.dst}", one.tensor] += one.bytes_per_image
    return found


@pytest.mark.usefixtures("all_gpus")
@pytest.mark.parametrize("fidelity", ["numbers", "shapes"])
def test_every_byte_that_crosses_is_planned_and_in_the_ledger(small: Small, fidelity: str) -> None:
    plan = compile_spec(small(*ROWS, "machine.gpus=3xrtx4090", "workload.height=160"))
    done, state, host = rehearsed(plan, fidelity)
    found = Counter({(one.src, one.dst, one.tensor): one.bytes_per_image for one in done.report.transfers})
    assert found == moved(plan)
    assert {"attention_sums", "edge_rows", "noise_pred", "hidden_states"} <= {tensor for _, _, tensor in found}
    assert "controlnet_block_samples" not in {tensor for _, _, tensor in found}, "they stay where they are made"
    between = {f"{a}->{b}": n for (a, b), n in host.ledger.traffic.items() if "cpu" not in (a, b)}
    assert by_pair(state.traffic.moved) == between


LARGE: dict[str, list[str]] = {
    "1.6B, 1024 px": ["model=sana_1600m_controlnet", "machine.gpus=2xh100"],
    "1.6B, 1024 px, all else elsewhere": ["model=sana_1600m_controlnet", "machine.gpus=2xh100",
                                          "hardware.pin={vae: 1, text_encoder: 1}"],
    "1.6B, 2048 px, unlike, nf4": ["model=sana_1600m_controlnet", "machine.gpus=[h100,a100]", "workload.height=2048",
                              "workload.width=1024", "precision=nf4"],
    "0.6B, 2048 px, float32, batch 2": ["model=sana_600m_controlnet", "machine.gpus=3xh100", "precision=fp32",
                                        "workload.height=2048", "workload.width=1024", "workload.batch=2"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("all_gpus")
@pytest.mark.parametrize("name", LARGE)
def test_peaks_are_planned_within_half_a_percent(name: str) -> None:
    plan = compile_plan(["machine=virtual", "hardware.split=rows", "workload.steps=2", *LARGE[name]])
    done, _, _ = rehearsed(plan)
    assert len(done.report.gpus) == len(plan.rows)
    assert {gpu.phase for gpu in done.report.gpus} > {"denoise"}
    for gpu in done.report.gpus:
        assert abs(gpu.planned_error) < 0.005, gpu
    found = Counter({(one.src, one.dst, one.tensor): one.bytes_per_image for one in done.report.transfers})
    assert found == moved(plan)


def test_a_gpu_that_is_too_small_for_its_unit_is_an_error_of_loading(small: Small) -> None:
    resolved = compile_spec(small(*ROWS, *CASES["2 GPUs"])).resolve()
    host = open_host(resolved, "shapes")
    host.ledger.capacities[1] = 10_000_000
    with pytest.raises(RunError, match="out of memory while copying components for rows of the image: vgpu:1"):
        load_pipeline(resolved, host=host)


def test_quantised_units_are_quantised_on_every_gpu(small: Small) -> None:
    pytest.importorskip("bitsandbytes")
    more = [*CASES["2 GPUs"], "precision=nf4"]
    plan, whole = compile_spec(small(*ROWS, *more)), compile_spec(small(*WHOLE, *more))
    _, _, host = rehearsed(plan)
    assert host.ledger.weights[1] == pytest.approx(plan.slots[1].weights_bytes, rel=0.01)
    assert whole.components["transformer"].quantization == plan.components["transformer"].quantization == "nf4"
