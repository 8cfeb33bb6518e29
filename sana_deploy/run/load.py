"""Loads each component once, straight to its device and dtype, and assembles the one integrated pipeline."""

from __future__ import annotations

import diffusers
import torch
from diffusers import DiffusionPipeline

from ..declare.hardware import SPLITS
from ..declare.spec import Model
from ..errors import PlanError, RunError
from ..facts.checkpoint import Checkpoint, open_checkpoint
from ..plan.artifact import Plan, ResolvedPlan
from ..plan.identity import check_checkpoint
from .border import Border
from .host import Host, PresentHost
from .other_blocks import other_blocks
from .place import bind, resolved_plan, waiting_device
from .weights import LoadRequest, Progress


def load_pipeline(
    plan: Plan | ResolvedPlan, progress: Progress | None = None, host: Host | None = None
) -> DiffusionPipeline:
    """Load the plan's checkpoint and place it.

    Args:
        plan: a plan (resolved against the GPUs present) or a resolved plan.
        progress: called with the bytes read of each component.
        host: whose devices the plan was resolved to; this machine's unless given.

    Returns:
        An ordinary pipeline of the plan's class in diffusers, each component on its device in its dtype.

    Raises:
        CheckpointError: the weights are missing or damaged.
        PlanError: the checkpoint is not the one that the plan was compiled for.
        RunError: loading failed, or the plan is for another host.
    """
    resolved, host = resolved_plan(plan, "load_pipeline(plan)"), host or PresentHost()
    host.check(resolved)
    planned = resolved.plan
    check_checkpoint(planned.checkpoint, planned.model, planned.wholes, resolved.allowed)
    checkpoint = open_checkpoint(_pinned(resolved.plan), weights=host.reads_weights)
    _check_same(resolved.plan, checkpoint)
    requests = {
        name: LoadRequest(
            checkpoint.components[name],
            resolved.plan.components[name].format,
            waiting_device(resolved, name),
            other_blocks(resolved, name),
        )
        for name in resolved.plan.pipeline.names
    }
    notes: list[str] = []
    modules = host.load_components(requests, progress, notes)
    pipeline_class = getattr(diffusers, resolved.plan.pipeline.class_name)
    pipeline = pipeline_class(**modules, **host.load_helpers(checkpoint))
    _bind(pipeline, resolved, host).notes += notes
    return pipeline


def _bind(pipeline: DiffusionPipeline, resolved: ResolvedPlan, host: Host) -> Border:
    try:
        return bind(pipeline, resolved, host)
    except torch.OutOfMemoryError as problem:
        part = "rows of the image" if SPLITS[resolved.plan.split].rows else "the second half of guidance"
        message = f"out of memory while copying components for {part}: {problem}"
        raise RunError(message, where="hardware.split", hint="hardware.split=none", out_of_memory=True) from problem


def _pinned(plan: Plan) -> Model:
    """The plan's model at the commit that it was compiled for, where it comes from the hub."""
    model, commit = plan.model, plan.checkpoint.revision
    return model if commit is None else model.model_copy(update={"revision": commit})


def _check_same(plan: Plan, checkpoint: Checkpoint) -> None:
    """Refuse weights whose shapes are not the planned ones; configs may carry other bookkeeping keys."""
    wholes = plan.wholes
    for name, facts in checkpoint.components.items():
        planned, found = wholes[name].weights_bytes, facts.weights_bytes(wholes[name].format)
        if planned != found:
            raise PlanError(
                f"the {name} of {checkpoint.source} has {found} bytes of weights, the plan was made for {planned}",
                where="model.source",
                hint="compile the plan for this checkpoint",
            )
    if plan.checkpoint.kind != "catalogue" and plan.checkpoint.fingerprint != checkpoint.fingerprint:
        raise PlanError(
            f"{checkpoint.source} changed since the plan was compiled (another architecture or config)",
            where="model.source",
            hint="compile the plan again",
        )
