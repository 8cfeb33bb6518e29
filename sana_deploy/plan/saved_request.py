"""A saved plan that is applied with another request: what a request may change, and what would plan anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..declare.free_text import key_of
from ..declare.spec import DeploySpec
from ..declare.workload import DeclaredWorkload
from ..errors import UsageError
from .artifact import Plan

_REQUEST = ("prompt", "prompt_file", "negative_prompt", "seed", "control_image", "control_fit", "conditioning_scale")
"""Keys of the workload that a saved plan leaves open; `_keeps_plan` names those that it bounds."""


def _keeps_plan(name: str, given: DeclaredWorkload, planned: Plan) -> bool:
    """Whether a key of the request leaves bytes and places as planned: fewer steps, another value of guidance."""
    pipeline, bounds = planned.pipeline, planned.spec.workload
    if name == "steps":
        return given.steps <= bounds.steps
    if name == "guidance_scale":
        return given.guided == bounds.guided or not pipeline.counts_guidance
    if name == "strength":
        asked = bounds.model_copy(update={"strength": given.strength})
        return pipeline.steps_run(asked.bounds) <= pipeline.steps_run(bounds.bounds)
    return name in _REQUEST or name in pipeline.reads


def saved_plan(spec: DeploySpec, overrides: Sequence[str]) -> tuple[Plan, DeploySpec]:
    """Return the saved plan, and its declaration with what was given of the request.

    Raises:
        UsageError: an override would plan anew; all of them are named.
    """
    assert spec.plan_file is not None
    plan = Plan.load(spec.plan_file)
    given: dict[str, Any] = {}
    clashing = []
    for override in overrides:
        key = key_of(override)
        group, _, name = key.partition(".")
        if group == "workload" and _keeps_plan(name, spec.workload, plan):
            name = "prompt" if name == "prompt_file" else name  # a file is read when the declaration is composed
            given[name] = getattr(spec.workload, name)
        elif group.partition("@")[0] in ("model", "hardware", "precision", "machine", "workload", "runtime"):
            clashing.append(override)
    if clashing:
        bounds = plan.spec.workload
        guided = "above 1" if bounds.guided else "up to 1"
        raise UsageError(
            f"plan_file applies a saved plan exactly; {', '.join(clashing)} would change it",
            where="plan_file",
            hint=f"leave them out, or compile a new plan without plan_file; this one leaves {', '.join(_REQUEST)}, "
            f"workload.steps up to {bounds.steps} and workload.guidance_scale {guided} open",
        )
    planned = plan.spec
    workload = planned.workload.model_copy(update=given)
    return plan, spec.model_copy(
        update={
            "workload": workload,
            "model": plan.model,
            "hardware": planned.hardware,
            "precision": planned.precision,
            "machine": planned.machine,
            "runtime": planned.runtime,
        }
    )
