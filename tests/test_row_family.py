"""Rows of an image over virtual GPUs, every pipeline of the family: the picture of one GPU, and what is exchanged."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    PAGCFGSanaLinearAttnProcessor2_0,
    PAGIdentitySanaLinearAttnProcessor2_0,
)
from family import GUIDED, MODELS, planned
from halved import apart
from test_bands import check_needs
from test_row_split_rehearsed import ROUNDING, all_gpus, moved, pixels_of, rehearsed, vae_too
from test_rows import Double, far, without

from sana_deploy.declare.compose import compose_spec
from sana_deploy.facts.catalogue import NAMES, pipelines
from sana_deploy.facts.checkpoint import open_checkpoint
from sana_deploy.plan.artifact import Plan
from sana_deploy.plan.needs import needs_of
from sana_deploy.plan.passing import VaeMode
from sana_deploy.rehearsal.calibrate import calibrate
from sana_deploy.rehearsal.measure import Point
from sana_deploy.rehearsal.rehearse import open_host
from sana_deploy.run.generate import run_request
from sana_deploy.run.load import load_pipeline
from sana_deploy.run.request_state import RequestState
from sana_deploy.run.rows.denoiser import ATTENTIONS
from sana_deploy.run.rows.exchange import Group, Halo, Sum

__all__ = ["all_gpus", "vae_too"]
ROWS = ("machine=virtual", "hardware.split=rows")
WHOLE = ("machine=virtual", "hardware.split=none", "runtime=eager", "precision=fp32")
SIZES = ((2, 96), (3, 160))
"""GPUs, and rows of pixels."""


def dealt(model: str, gpus: int, height: int, *more: str) -> Plan:
    return planned(model, *ROWS, "precision=fp32", f"machine.gpus={gpus}xrtx4090", f"workload.height={height}", *more)


def whole(model: str, height: int, *more: str) -> torch.Tensor:
    return pixels_of(planned(model, *WHOLE, "machine.gpus=1xrtx4090", f"workload.height={height}", *more))


@pytest.mark.usefixtures("vae_too", "short_prompts")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("gpus", "height"), SIZES)
def test_the_picture_is_that_of_one_gpu_and_without_an_exchange_it_is_not(model: str, gpus: int, height: int) -> None:
    plan, picture = dealt(model, gpus, height), whole(model, height)
    assert plan.split == "rows"
    assert {*plan.units} == {f"{name}.{i}" for name in ("transformer", "vae") for i in range(1, gpus)}
    assert apart(pixels_of(plan), picture) < ROUNDING
    if gpus == 2:
        for kind in (Halo, Sum):
            with without(kind):
                assert apart(pixels_of(plan), picture) > 100 * ROUNDING


@pytest.mark.usefixtures("all_gpus", "short_prompts")
def test_perturbed_blocks_go_over_gpus_without_copying_anything_anew() -> None:
    plan = dealt("tiny_pag", 2, 96)
    resolved = plan.resolve()
    host = open_host(resolved, "numbers")
    pipeline, work = load_pipeline(resolved, host=host), plan.spec.workload
    (mirror,) = pipeline.transformer.forward.mirrors
    with host:
        copied, pictures = mirror._copy, []
        for layers in (["transformer_blocks.0"], ["transformer_blocks.0", "transformer_blocks.1"], []):
            pipeline.set_pag_applied_layers(layers, pipeline._pag_attn_processors)
            state = RequestState()
            pictures.append(run_request(pipeline, work.bounds, work.request, state=state)[0].cpu())
            assert state.remarks == []
        assert mirror._copy is copied
    assert apart(pictures[0], whole("tiny_pag", 96)) < ROUNDING
    assert apart(pictures[0], pictures[1]) > 1e-4
    assert apart(pictures[0], pictures[2]) > 1e-4


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("norm", [None, "rms_norm_across_heads"])
def test_perturbed_attention_of_bands_is_that_of_the_whole(parts: int, norm: str | None) -> None:
    torch.manual_seed(0)
    kind = {2: PAGIdentitySanaLinearAttnProcessor2_0, 3: PAGCFGSanaLinearAttnProcessor2_0}[parts]
    attention = Attention(6, heads=2, dim_head=3, kv_heads=2, qk_norm=norm, processor=kind()).double()
    tokens = torch.randn(2 * parts, 10, 6, dtype=torch.float64)
    group = Group([torch.device("cpu")] * 2)
    with torch.no_grad(), Double():
        found = group.run([ATTENTIONS[kind](attention, part) for part in (tokens[:, :4], tokens[:, 4:])])
        assert far(torch.cat(found, dim=1), attention(tokens)) < 1e-12


@pytest.mark.usefixtures("vae_too")
@pytest.mark.parametrize("model", MODELS)
def test_every_byte_that_crosses_is_planned(model: str) -> None:
    unguided = ("workload.batch=2", "workload.guidance_scale=1")
    for precision, more in (("fp32", ()), ("mixed_bf16", unguided)):
        plan = planned(
            model, *ROWS, f"precision={precision}", "machine.gpus=3xrtx4090", "workload.height=160", "workload.steps=3",
            *more,
        )  # fmt: skip
        done, _, _ = rehearsed(plan)
        found = {(one.src, one.dst, one.tensor): one.bytes_per_image for one in done.report.transfers}
        assert found == dict(moved(plan))
        exchanged = {tensor for _, _, tensor in found}
        assert {"attention_sums", "edge_rows", "decoded_edge_rows", "decoded_attention_sums"} <= exchanged
        assert ("start_edge_rows" in exchanged) == (model == "tiny_sprint_img2img")
        assert ("guidance" in exchanged) == (model not in GUIDED)


@pytest.mark.parametrize("bands", [2, 16])
def test_an_image_that_a_batch_shares_is_planned_in_bands(bands: int) -> None:
    check_needs("tiny_sprint_img2img", "bfloat16", Point(768, 3, VaeMode(bands=bands)), guided=False)


def test_every_model_may_have_its_vae_in_bands() -> None:
    for model in NAMES:
        for pipeline in pipelines(model):
            spec = compose_spec([f"model={model}", f"model.pipeline={pipeline}", "precision=mixed_bf16"])
            needs = needs_of(open_checkpoint(spec.model), spec.precision.formats, spec.workload.guided, calibrate)
            assert all("banded" in phase for phase in needs["vae"].values()), (model, pipeline)
