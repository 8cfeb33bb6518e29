"""SANA's pipelines without a ControlNet in rehearsals: memory, work and traffic are those that their plans say."""

from __future__ import annotations

import numpy as np
import pytest
from family import APART, GUIDED, MODELS, planned
from PIL import Image

from sana_deploy import load_pipeline, rehearse
from sana_deploy.declare.compose import compose_spec
from sana_deploy.facts.checkpoint import open_checkpoint, settled
from sana_deploy.plan.admission import _different
from sana_deploy.plan.profile import profile_pipeline
from sana_deploy.rehearsal.calibrate import calibrate
from sana_deploy.rehearsal.rehearse import LedgerClock, open_host
from sana_deploy.run.asked import Drawing
from sana_deploy.run.generate import run_request
from sana_deploy.run.request_state import RequestState


def test_perturbed_attention_is_planned_with_its_third_row() -> None:
    plain, perturbed = (_profile(model) for model in ("tiny_sana", "tiny_pag"))
    assert perturbed["flops"] == pytest.approx(1.5 * plain["flops"], rel=0.02)
    assert perturbed["activation"] == pytest.approx(1.5 * plain["activation"], rel=0.1)
    one, two = (_profile(model, "workload.guidance_scale=1") for model in ("tiny_sana", "tiny_pag"))
    assert two["flops"] == pytest.approx(2 * one["flops"], rel=0.02)


def _profile(model: str, *overrides: str) -> dict[str, float]:
    spec = settled(compose_spec([f"model={model}", "precision=bf16", *overrides]))
    profile = profile_pipeline(open_checkpoint(spec.model), spec.workload.bounds, spec.precision.formats, calibrate)
    part = profile.components["transformer"]
    return {"flops": part.work["denoise"].flops, "activation": part.activations["denoise"]}


def test_needs_go_by_pipeline_and_shapes_together() -> None:
    sana, pag = (open_checkpoint(settled(compose_spec([f"model={model}"])).model) for model in GUIDED)
    assert {name: one.shapes_digest for name, one in sana.components.items()} == {
        name: one.shapes_digest for name, one in pag.components.items()
    }
    assert not {sana.needs_key(name) for name in sana.components} & {pag.needs_key(name) for name in pag.components}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("more", [(), ("workload.batch=2", "workload.guidance_scale=1", "workload.strength=0.5")])
def test_plans_count_what_a_rehearsal_finds(model: str, more: tuple[str, ...]) -> None:
    size = ["workload.height=512", "workload.width=768", "workload.steps=4"]
    plan = planned(model, *APART, "precision=mixed_bf16", *size, *more)
    report = rehearse(plan, "shapes").report
    for gpu in report.gpus:
        assert abs(gpu.planned_error) < 0.02, (gpu.device, gpu.planned_bytes, gpu)
    moved = {(one.src, one.dst, one.tensor): (one.bytes_per_step, one.bytes_per_image) for one in report.transfers}
    assert moved == {
        (f"vgpu:{one.src}", f"vgpu:{one.dst}", one.tensor): (one.bytes_per_step, one.bytes_per_image)
        for one in plan.transfers
    }
    left_out = (2 if more else 1) if model == "tiny_sprint_img2img" else 0
    assert report.steps == 4 - left_out, "of an image those before the noise that strength asks for"


@pytest.mark.usefixtures("short_prompts")
def test_halves_of_guidance_go_over_two_gpus_without_a_controlnet() -> None:
    two = ["machine=virtual", "machine.gpus=2xh100", "hardware.split=guidance", "precision=mixed_bf16"]
    plan = planned("tiny_sana", *two, "workload.steps=3")
    assert (plan.split, list(plan.units)) == ("guidance", ["transformer.1"])
    ended = rehearse(plan)
    whole = rehearse(planned("tiny_sana", *two[:2], "hardware.split=none", "precision=mixed_bf16", "workload.steps=3"))
    ours, theirs = (np.asarray(one.images[0], np.int16) for one in (ended, whole))
    assert np.abs(ours - theirs).max() <= 3, "but for the last places"
    moved = {(one.tensor, one.bytes_per_step) for one in ended.report.transfers if one.bytes_per_step}
    assert moved == {(one.tensor, one.bytes_per_step) for one in plan.transfers if one.bytes_per_step}
    assert {tensor for tensor, _ in moved} == {"hidden_states", "timestep", "noise_pred"}
    for gpu in ended.report.gpus:
        assert abs(gpu.planned_error) < 0.02, gpu


@pytest.mark.usefixtures("short_prompts")
@pytest.mark.parametrize("count", [1, 3])
def test_images_that_several_drawings_start_from_all_pass_the_vae(count: int) -> None:
    size = ["workload.height=512", "workload.width=768", f"workload.batch={count}"]
    plan = planned("tiny_sprint_img2img", *APART, "precision=mixed_bf16", "runtime=eager", *size)
    resolved, work = plan.resolve(), plan.spec.workload
    host, state = open_host(resolved, "shapes"), RequestState()
    pipeline = load_pipeline(resolved, host=host)
    state.observers.append(LedgerClock(host.ledger, plan.pipeline))
    drawings = [Drawing(work.request, Image.new("RGB", (768, 512), colour)) for colour in ("red", "green", "blue")]
    with host:
        run_request(pipeline, work.bounds, drawings[:count], state=state)
    formats = {name: part.format for name, part in plan.components.items()}
    profile = profile_pipeline(open_checkpoint(plan.model), work.bounds, formats, calibrate)
    estimated = _different(profile, count).components["vae"].activations["prepare"]
    assert host.ledger.phase_peaks[1, "prepare"].activation_bytes == pytest.approx(estimated, rel=0.02)
