"""Pipelines whose halves of guidance are on one CPU, pictures of them, and how far these are apart."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline

from sana_deploy.api import compile_spec
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.plan.artifact import ResolvedPlan
from sana_deploy.run.generate import run_request
from sana_deploy.run.request_state import RequestState

UNITS = {"transformer.1": "cpu", "controlnet.1": "cpu"}
ROUNDING = 2e-6
"""Pixels of the whole and of its halves on a CPU in float32: it computes other last places for other row counts."""


def resolved_plan(spec: DeploySpec, split: bool = True, runtime: str = "eager") -> ResolvedPlan:
    """A plan for the CPU, which would not be split."""
    resolved = compile_spec(spec).resolve()
    plan = resolved.plan.model_copy(update={"runtime": runtime})
    return replace(resolved, plan=plan, unit_devices=UNITS if split else {})


def drawn(
    pipeline: DiffusionPipeline, spec: DeploySpec, state: RequestState | None = None, **shape: Any
) -> torch.Tensor:
    """Pixels of the declared request, with other bounds where they are given."""
    workload = spec.workload.bounds.model_copy(update=shape)
    guidance = {} if workload.guided else {"guidance_scale": 1.0}
    request = spec.workload.request.model_copy(update=guidance)
    pixels, _ = run_request(pipeline, workload, request, state=state)
    return pixels


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference."""
    return float((one - other).abs().max())


def called(pipeline: DiffusionPipeline, spec: DeploySpec, **shape: Any) -> Counter[str]:
    """How often a request calls each unit."""
    state = RequestState()
    drawn(pipeline, spec, state, **shape)
    return state.calls
