"""Seconds of whole images against those measured on two H100s (docs/speed.md)."""

from __future__ import annotations

from functools import cache

import pytest

from sana_deploy import Plan, compile_plan
from sana_deploy.plan.seconds import HOST_CALL, HOST_STEP

EVERYTHING = ("text_encoder", "vae", "transformer", "controlnet")
MEASURED = {
    (512, "graphs", "none"): (0.345, 0.241), (512, "graphs", "guidance"): (0.305, 0.181),
    (512, "compiled", "none"): (0.300, 0.163), (512, "compiled", "guidance"): (0.315, 0.155),
    (1024, "graphs", "none"): (0.862, 0.685), (1024, "graphs", "guidance"): (0.537, 0.358),
    (1024, "compiled", "none"): (0.622, 0.442), (1024, "compiled", "guidance"): (0.477, 0.280),
}  # fmt: skip
"""Pixels of a side, runtime, split -> seconds of an image with the VAE eager, and of its 20 steps."""


@cache
def planned(side: int, runtime: str, split: str, *more: str) -> Plan:
    """A plan of benchmarks/speed.py."""
    one = ["machine.gpus=h100", "hardware=single_gpu"]
    pins = [f"hardware.pin.{name}=0" for name in EVERYTHING]
    two = ["machine.gpus=2xh100", "hardware=multi_gpu_balanced", f"hardware.split={split}", *pins]
    return compile_plan([
        "model=sana_1600m_controlnet", "machine=virtual", *(one if split == "none" else two), f"runtime={runtime}",
        "hardware.objective=latency", "hardware.allow=[encode_once]", "precision=mixed_bf16",
        "workload.negative_prompt=blurry",
        f"workload.height={side}", f"workload.width={side}", *more,
    ])  # fmt: skip


@pytest.mark.parametrize("key", MEASURED, ids=lambda key: " ".join(map(str, key)))
def test_loops_are_planned_within_a_tenth_of_what_was_measured(key: tuple[int, str, str]) -> None:
    assert planned(*key).estimates.seconds["denoise"] / MEASURED[key][1] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("key", MEASURED, ids=lambda key: " ".join(map(str, key)))
def test_images_are_planned_within_a_quarter_of_what_was_measured(key: tuple[int, str, str]) -> None:
    plan, eager = planned(*key), planned(key[0], "eager", "none")
    launched = {phase: eager.estimates.seconds[phase] for phase in ("prepare", "decode")}  # no graphs were measured
    whole = sum({**plan.estimates.seconds, **launched}.values())
    assert whole / MEASURED[key][0] == pytest.approx(1, abs=0.25)


def test_no_step_is_shorter_than_python_needs_for_it() -> None:
    few, many = (planned(512, "compiled", "guidance", f"workload.steps={steps}") for steps in (4, 40))
    each = (many.estimates.seconds["denoise"] - few.estimates.seconds["denoise"]) / 36
    assert each == pytest.approx(HOST_STEP + 4 * HOST_CALL, rel=1e-3)
    busy = planned(1024, "compiled", "guidance").estimates.seconds["denoise"] / 20
    assert busy > HOST_STEP + 4 * HOST_CALL, "the GPUs bind there"
