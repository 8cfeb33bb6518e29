"""The halves of guidance on virtual GPUs: the bytes of both units, what crosses, and the picture of one GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from halved import ROUNDING, apart

from sana_deploy.api import compile_spec
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import RunError
from sana_deploy.plan.artifact import ResolvedPlan
from sana_deploy.rehearsal.host import VirtualHost
from sana_deploy.rehearsal.rehearse import Rehearsed, open_host, rehearse_request
from sana_deploy.run.generate import run_request
from sana_deploy.run.hook import border_of
from sana_deploy.run.load import load_pipeline
from sana_deploy.run.request_state import RequestState
from sana_deploy.run.traffic import by_pair

Small = Callable[..., DeploySpec]
pytestmark = pytest.mark.usefixtures("short_prompts")
THREE = ["precision=fp32", "workload.steps=3", "machine=virtual", "machine.gpus=3xrtx4090", "hardware=custom_map"]
BESIDE = "hardware.device_map={text_encoder: 1, vae: 2, transformer: 0, controlnet: 0}"
ELSEWHERE = "hardware.device_map={text_encoder: 1, vae: 1, transformer: 0, controlnet: 2}"
TOGETHER = {"transformer.1": "vgpu:1", "controlnet.1": "vgpu:1"}
PARTED = {"transformer.1": "vgpu:1", "controlnet.1": "vgpu:2"}


def resolved_plan(spec: DeploySpec, units: dict[str, str]) -> ResolvedPlan:
    return replace(compile_spec(spec).resolve(), unit_devices=units)


def rehearsed(resolved: ResolvedPlan, fidelity: str = "numbers") -> tuple[Rehearsed, VirtualHost, RequestState]:
    host, state = open_host(resolved, fidelity), RequestState()  # type: ignore[arg-type]
    done = rehearse_request(load_pipeline(resolved, host=host), resolved, host, state=state)
    assert state.remarks == []
    return done, host, state


def pixels_of(resolved: ResolvedPlan) -> torch.Tensor:
    host, workload = open_host(resolved, "numbers"), resolved.plan.spec.workload
    pipeline = load_pipeline(resolved, host=host)
    with host:
        pixels, _ = run_request(pipeline, workload.bounds, workload.request)
        return pixels.cpu()


@pytest.mark.parametrize(("places", "units"), [(BESIDE, TOGETHER), (ELSEWHERE, PARTED)], ids=["beside", "elsewhere"])
@pytest.mark.parametrize("runtime", ["eager", "graphs"])
def test_the_picture_is_that_of_the_same_plan_without_halves(
    small: Small, places: str, units: dict[str, str], runtime: str
) -> None:
    spec = small(*THREE, places, f"runtime={runtime}")
    assert apart(pixels_of(resolved_plan(spec, units)), pixels_of(resolved_plan(spec, {}))) < ROUNDING


def test_latents_cross_in_each_step_and_what_stays_the_same_once(small: Small) -> None:
    _, _, state = rehearsed(resolved_plan(small(*THREE, BESIDE), TOGETHER))
    latents = 32 * 2 * 3 * 4
    out = {
        tensor: size for (src, dst, tensor), size in state.traffic.moved.items() if (src, dst) == ("vgpu:0", "vgpu:1")
    }
    back = {
        tensor: size for (src, dst, tensor), size in state.traffic.moved.items() if (src, dst) == ("vgpu:1", "vgpu:0")
    }
    assert back["noise_pred"] == 3 * latents, "half of the rows, each step"
    assert out["hidden_states"] == 2 * 3 * latents, "to the transformer and to the ControlNet"
    assert out["timestep"] == 2 * 3 * 8
    assert out["controlnet_cond"] == latents
    hidden = 256
    assert out["encoder_hidden_states"] == 2 * 32 * hidden * 4
    assert "controlnet_block_samples" not in {**out, **back}, "residuals stay where they are made"


@pytest.mark.parametrize("precision", ["bf16", "mixed_bf16", "nf4"])
def test_in_other_dtypes_the_embeddings_cross_once_too(small: Small, precision: str) -> None:
    done, _, _ = rehearsed(resolved_plan(small(*THREE, BESIDE, f"precision={precision}"), TOGETHER), "shapes")
    every_step = {moved.tensor for moved in done.report.transfers if moved.bytes_per_step}
    assert every_step == {"hidden_states", "timestep", "noise_pred"}


def test_residuals_go_from_each_controlnet_to_its_own_denoiser(small: Small) -> None:
    _, _, state = rehearsed(resolved_plan(small(*THREE, ELSEWHERE), PARTED))
    ways = {(src, dst): size for (src, dst, tensor), size in state.traffic.moved.items()
            if tensor == "controlnet_block_samples"}  # fmt: skip
    assert set(ways) == {("vgpu:2", "vgpu:0"), ("vgpu:2", "vgpu:1")}
    assert len(set(ways.values())) == 1, "half of them each"


def test_graphs_on_each_gpu_hand_residuals_on_without_a_copy(small: Small) -> None:
    resolved = resolved_plan(small(*THREE, BESIDE, "runtime=graphs"), TOGETHER)
    host = open_host(resolved, "shapes")
    pipeline = load_pipeline(resolved, host=host)
    rehearse_request(pipeline, resolved, host)
    residuals = len(pipeline.controlnet.controlnet_blocks)
    for number in range(2):
        graphs = border_of(pipeline).graphs[torch.device("vgpu", number)]
        assert graphs is not None
        reading = [sum(own is None for own in one.inputs) for one in graphs.graphs.values()]
        assert reading[-2:] == [0, residuals], "after the text encoder's, where that is"


@pytest.mark.parametrize("fidelity", ["numbers", "shapes"])
def test_copies_are_weights_of_their_units_on_their_gpus(small: Small, fidelity: str) -> None:
    spec = small(*THREE, BESIDE)
    plain, split = (open_host(resolved_plan(spec, units), fidelity) for units in ({}, TOGETHER))  # type: ignore[arg-type]
    kept = [load_pipeline(resolved_plan(spec, units), host=host) for host, units in ((plain, {}), (split, TOGETHER))]
    assert split.ledger.weights[1] - plain.ledger.weights[1] == plain.ledger.weights[0]
    assert split.ledger.weights[0] == plain.ledger.weights[0]
    assert split.ledger.activations == plain.ledger.activations
    assert split.ledger.traffic == plain.ledger.traffic, "laying weights out is no traffic of a request"
    assert kept, "what is dropped gives its weights back"


@pytest.mark.parametrize("runtime", ["eager", "graphs"])
def test_shapes_and_numbers_report_the_same_bytes_and_the_ledger_agrees(small: Small, runtime: str) -> None:
    resolved = resolved_plan(small(*THREE, ELSEWHERE, f"runtime={runtime}", "workload.steps=2"), PARTED)
    (numbers, host, state), (shapes, _, _) = (rehearsed(resolved, kind) for kind in ("numbers", "shapes"))
    assert numbers.report.gpus == shapes.report.gpus
    assert numbers.report.transfers == shapes.report.transfers
    between = {f"{a}->{b}": n for (a, b), n in host.ledger.traffic.items() if "cpu" not in (a, b)}
    assert by_pair(state.traffic.moved) == between


def test_the_timeline_and_the_work_show_both_units(small: Small) -> None:
    done, _, _ = rehearsed(resolved_plan(small(*THREE, BESIDE), TOGETHER), "shapes")
    order = [moment.component for moment in done.report.timeline if moment.phase == "denoise"]
    assert [name for name in order if name != "pipeline"] == [
        "controlnet.1",
        "controlnet",
        "transformer.1",
        "transformer",
    ] * 2
    assert {gpu.device for gpu in done.report.gpus} == {"vgpu:0", "vgpu:1", "vgpu:2"}
    for name in ("transformer", "controlnet"):
        assert done.report.work[f"{name}.1"] == done.report.work[name]


def test_quantised_copies_are_counted_as_they_are_stored(small: Small) -> None:
    pytest.importorskip("bitsandbytes")
    resolved = resolved_plan(small(*THREE, "precision=nf4", BESIDE), TOGETHER)
    host = open_host(resolved, "shapes")
    plain = open_host(resolved, "shapes")
    kept = load_pipeline(resolved, host=host), load_pipeline(replace(resolved, unit_devices={}), host=plain)
    assert all(kept), "what is gone is in no books"
    assert host.ledger.weights[1] - plain.ledger.weights[1] == plain.ledger.weights[0]


def test_weights_that_change_in_a_rehearsal_reach_the_copy(small: Small) -> None:
    resolved = resolved_plan(small(*THREE, BESIDE), TOGETHER)
    host, workload = open_host(resolved, "numbers"), resolved.plan.spec.workload
    pipeline = load_pipeline(resolved, host=host)
    pictures, weights = [], []
    with host:
        for change in (lambda _: None, lambda weight: weight.mul_(0.8), lambda weight: weight.data.mul_(1.25)):
            with torch.no_grad():
                change(pipeline.transformer.proj_out.weight)
            pictures.append(np.asarray(run_request(pipeline, workload.bounds, workload.request)[0].cpu()))
            weights.append(list(host.ledger.weights))
    assert np.abs(pictures[1] - pictures[0]).max() > 1e-4
    assert np.abs(pictures[2] - pictures[0]).max() < 2e-5
    assert weights[1] == weights[2] == weights[0], "the copy before is given back"


def test_a_denoiser_that_runs_whole_gets_the_residuals_of_both_halves(small: Small) -> None:
    spec, pictures, states = small(*THREE, ELSEWHERE), [], []
    for units in (PARTED, {}):
        resolved = resolved_plan(spec, units)
        host, workload, state = open_host(resolved, "numbers"), spec.workload, RequestState()
        pipeline = load_pipeline(resolved, host=host)
        pipeline.transformer.transformer_blocks[0].register_forward_hook(lambda *_: None)
        with host:
            pictures.append(run_request(pipeline, workload.bounds, workload.request, state=state)[0].cpu())
        states.append(state)
    assert apart(*pictures) < ROUNDING
    assert [state.calls[name] for state in states for name in ("controlnet.1", "transformer.1")] == [3, 0, 0, 0]


def test_a_second_gpu_that_is_too_small_is_an_error_of_loading(small: Small) -> None:
    resolved = resolved_plan(small(*THREE, BESIDE), TOGETHER)
    host = open_host(resolved, "shapes")
    host.ledger.capacities[1] = 30_000_000
    with pytest.raises(
        RunError, match="out of memory while copying components for the second half of guidance: vgpu:1"
    ):
        load_pipeline(resolved, host=host)
