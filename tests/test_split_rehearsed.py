"""Plans with the halves of guidance beside their rehearsals: bytes of every GPU, what crosses, the picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import pytest
import torch

from sana_deploy import rehearse
from sana_deploy.api import compile_plan, compile_spec
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.plan.artifact import Plan
from sana_deploy.rehearsal.rehearse import open_host
from sana_deploy.run.generate import run_request
from sana_deploy.run.load import load_pipeline
from sana_deploy.run.outcome import Rehearsal

Small = Callable[..., DeploySpec]
LARGE, GUIDANCE = "model=sana_1600m_controlnet", "hardware.split=guidance"
NF4 = "precision.quantization.text_encoder=nf4"
H100S = ["machine=virtual", "machine.gpus=4xh100"]
FOUR = "{text_encoder: 0, vae: 0, transformer: 0, controlnet: 1, transformer.1: 2, controlnet.1: 3}"
CROSSED = "{text_encoder: 2, vae: 2, transformer: 0, controlnet: 1, transformer.1: 1, controlnet.1: 0}"
PLANS: dict[str, list[str]] = {
    "batch 1 in graphs": [*H100S, GUIDANCE, "runtime=graphs"],
    "batch 4 in graphs": [*H100S, GUIDANCE, "runtime=graphs", "workload.batch=4"],
    "batch 4 eager": [*H100S, GUIDANCE, "runtime=eager", "workload.batch=4"],
    "8 GiB": ["machine=2x8gb", NF4, GUIDANCE],
    "T4": ["machine=2xt4", NF4, GUIDANCE],
    "int8": ["machine=virtual", "machine.gpus=2x8GiB", GUIDANCE, "workload.height=512", "workload.width=512",
                "precision=mixed_bf16", "precision.quantization.text_encoder=int8"],
    "four GPUs": [*H100S, "hardware=custom_map", f"hardware.device_map={FOUR}", "runtime=eager"],
    "crossed": [*H100S, "hardware=custom_map", f"hardware.device_map={CROSSED}", "runtime=graphs"],
    "three dtypes": [*H100S, GUIDANCE, "precision=mixed_bf16", "precision.components.controlnet=float32"],
    "nf4": [*H100S, GUIDANCE, "precision=nf4"],
}  # fmt: skip


QUICK = ("batch 4 in graphs", "crossed")


@pytest.mark.parametrize(
    "chosen",
    [pytest.param(chosen, id=name, marks=[] if name in QUICK else pytest.mark.slow) for name, chosen in PLANS.items()],
)
def test_bytes_and_traffic_are_planned_as_they_are_rehearsed(chosen: list[str]) -> None:
    plan = compile_plan([LARGE, *chosen])
    assert plan.split == "guidance"
    report = rehearse(plan).report
    assert len(report.gpus) == len(plan.slots)
    for gpu in report.gpus:
        assert abs(gpu.planned_error) < 0.03, (gpu.device, gpu.planned_error)
        assert gpu.peak_bytes <= gpu.capacity_bytes
    per_step, per_image = (_planned(plan, key) for key in ("bytes_per_step", "bytes_per_image"))
    assert _rehearsed(report, "bytes_per_step") == per_step
    assert _rehearsed(report, "bytes_per_image") == pytest.approx(per_image, abs=plan.spec.workload.batch)
    working = {moment.component for moment in report.timeline if moment.phase == "denoise"} - {"pipeline"}
    assert working == {"transformer", "controlnet", *plan.units}


Sums = dict[tuple[str, str, str], int]


def _planned(plan: Plan, key: str) -> Sums:
    found: Sums = defaultdict(int)
    for one in plan.transfers:
        found[f"vgpu:{one.src}", f"vgpu:{one.dst}", one.tensor] += getattr(one, key)
    return _without_tokens(found)


def _rehearsed(report: Rehearsal, key: str) -> Sums:
    found: Sums = defaultdict(int)
    for one in report.transfers:
        found[one.src, one.dst, one.tensor] += getattr(one, key)
    return _without_tokens(found)


def _without_tokens(sums: Sums) -> Sums:
    """What depends on the length of the prompt's instruction in tokens is an estimate."""
    estimated = ("input_ids", "attention_mask", "prompt_embeds")
    return {key: size for key, size in sums.items() if key[2] not in estimated and size}


TINY = ["precision=fp32", "workload.steps=4", "machine=virtual", "machine.gpus=2xrtx4090", "machine.fidelity=numbers"]


def pixels(spec: DeploySpec, conditioning_scale: float = 1.0) -> torch.Tensor:
    resolved = compile_spec(spec).resolve()
    host, workload = open_host(resolved), resolved.plan.spec.workload
    pipeline = load_pipeline(resolved, host=host)
    with host:
        request = workload.request.model_copy(update={"conditioning_scale": conditioning_scale})
        return run_request(pipeline, workload.bounds, request)[0].cpu()


@pytest.mark.usefixtures("short_prompts")
@pytest.mark.parametrize("runtime", ["eager", "graphs"])
def test_in_numbers_the_planned_halves_draw_the_picture_of_one_gpu(small: Small, runtime: str) -> None:
    whole, halves = (small(*TINY, f"runtime={runtime}", f"hardware.split={split}") for split in ("none", "guidance"))
    assert (pixels(whole) - pixels(halves)).abs().max() < 2e-6
    off = pixels(halves, 0.0)
    assert (off - pixels(halves)).abs().max() > 1e-4, "the ControlNet is at work"
    assert (off - pixels(whole, 0.0)).abs().max() < 2e-6
