"""Loads each component once, straight to its device and dtype, and assembles the one integrated pipeline."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from diffusers import DiffusionPipeline, SanaControlNetPipeline
from torch import nn

from ..declare.pipelines import COMPONENTS, Component
from ..declare.spec import Model
from ..errors import PlanError, RunError, UsageError
from ..facts.checkpoint import Checkpoint, open_checkpoint
from ..plan.artifact import Plan
from ..plan.bind import ResolvedPlan
from ..plan.identity import check_checkpoint
from .border import Border, attach, border_of, vae_settings
from .copies import Copies, watch_copies
from .host import Host, PresentHost
from .placed import dtype_of, refuse_group_offload, tell_casts
from .quantize import quantize_linears
from .weights import LoadRequest, Progress, cast_module


def load_pipeline(
    plan: Plan | ResolvedPlan, progress: Progress | None = None, host: Host | None = None
) -> SanaControlNetPipeline:
    """Load the plan's checkpoint and place it.

    Args:
        plan: a plan (resolved against the GPUs present) or a resolved plan.
        progress: called with the bytes read of each component.
        host: whose devices the plan was resolved to; this machine's unless given.

    Returns:
        An ordinary `SanaControlNetPipeline`, each component on its device in its dtype.

    Raises:
        CheckpointError: the weights are missing or damaged.
        PlanError: the checkpoint is not the one that the plan was compiled for.
        RunError: loading failed, or the plan is for another host.
    """
    resolved, host = resolved_plan(plan, "load_pipeline(plan)"), host or PresentHost()
    host.check(resolved)
    check_checkpoint(resolved.plan, resolved.allowed)
    checkpoint = open_checkpoint(_pinned(resolved.plan), weights=host.reads_weights)
    _check_same(resolved.plan, checkpoint)
    requests = {
        name: LoadRequest(
            checkpoint.components[name], resolved.plan.components[name].format, waiting_place(resolved, name)
        )
        for name in COMPONENTS
    }
    notes: list[str] = []
    modules = host.load_components(requests, progress, notes)
    pipeline = SanaControlNetPipeline(**modules, **host.load_helpers(checkpoint))
    _bind(pipeline, resolved)
    border = border_of(pipeline)
    assert border is not None
    border.notes += notes
    return pipeline


def resolved_plan(plan: Plan | ResolvedPlan | None, usage: str) -> ResolvedPlan:
    """Return a plan as it is resolved, resolving one that is not.

    Args:
        usage: the call as it should read, for the hint.

    Raises:
        UsageError: `plan` is something else.
        PlanError: see `Plan.resolve`.
    """
    if isinstance(plan, Plan):
        return plan.resolve()
    if not isinstance(plan, ResolvedPlan):
        given = "nothing" if plan is None else f"a {type(plan).__name__}"
        hint = f"{usage}, where plan = compile_plan([...]) or Plan.load(PATH)"
        raise UsageError(f"a plan is needed, {given} was given", where="plan", hint=hint)
    return plan


def place(pipeline: SanaControlNetPipeline, plan: Plan | ResolvedPlan | None = None) -> SanaControlNetPipeline:
    """Place a pipeline that is already in memory: cast and move each component, then hook its border.

    Args:
        pipeline: a pipeline with all components in memory, not placed yet.
        plan: a plan (resolved against the GPUs present) or a resolved plan. It must be given: None, too, ends in
            the sentence on what to give.

    `unplace` undoes it; `pipeline.reset_device_map()` does too, and moves everything to the CPU.

    Returns:
        The same pipeline.

    Raises:
        UsageError: `pipeline` is no pipeline, or `plan` no plan.
        PlanError: the plan cannot be resolved here.
        RunError: it is already placed or offloaded, it lacks a component, or a GPU is out of memory.
    """
    _check_pipeline(pipeline, "place(pipeline, plan)")
    resolved = resolved_plan(plan, "place(pipeline, plan)")
    if pipeline.hf_device_map is not None:
        raise RunError(
            "the pipeline already has a device map", hint="call unplace or pipeline.reset_device_map() first"
        )
    modules: dict[Component, nn.Module] = {}
    for name in COMPONENTS:
        module = getattr(pipeline, name, None)
        if not isinstance(module, nn.Module):
            raise RunError(f"the pipeline has no {name}", where=name)
        if any(hasattr(child, "_hf_hook") for child in module.modules()):
            raise RunError(f"{name} has hooks of another placement", hint="call pipeline.remove_all_hooks() first")
        modules[name] = module
    dtypes = {name: dtype_of(module) for name, module in modules.items()}
    origins: dict[str, torch.device] = {name: next(module.parameters()).device for name, module in modules.items()}
    try:
        for name, module in modules.items():
            cast_module(module, _dtype(resolved, name))
            if quantization := resolved.plan.components[name].quantization:
                quantize_linears(module, quantization)
            module.to(device=waiting_place(resolved, name))
    except torch.OutOfMemoryError as problem:
        for moved, device in origins.items():
            getattr(pipeline, moved).to(device)
        raise RunError(f"out of memory while moving components: {problem}", where="place") from problem
    tell_casts(dtypes, modules)
    _bind(pipeline, resolved, origins)
    return pipeline


def unplace(pipeline: SanaControlNetPipeline) -> SanaControlNetPipeline:
    """Take a placement off: no hooks, the class's own methods, the VAE's own settings, components where they were.

    Components keep the dtype that they were placed in: what a cast rounded off cannot come back. Those that
    `load_pipeline` put on a device stay there.

    Returns:
        The same pipeline.

    Raises:
        UsageError: it is no pipeline.
        RunError: it is not placed.
    """
    _check_pipeline(pipeline, "unplace(pipeline)")
    border = border_of(pipeline)
    if border is None:
        raise RunError("the pipeline is not placed")
    for name in COMPONENTS:
        module = getattr(pipeline, name)
        remove_hook_from_module(module)
        module.__dict__.pop("forward", None)
        if name in border.origins:
            module.to(border.origins[name])
    pipeline.hf_device_map = None
    return pipeline


def _check_pipeline(pipeline: object, usage: str) -> None:
    if not isinstance(pipeline, DiffusionPipeline):
        given = f"a {type(pipeline).__name__}"
        hint = f"{usage}, where pipeline = load_pipeline(plan) or SanaControlNetPipeline.from_pretrained(...)"
        raise UsageError(f"a diffusers pipeline is needed, {given} was given", where="pipeline", hint=hint)


def _bind(
    pipeline: SanaControlNetPipeline, resolved: ResolvedPlan, origins: Mapping[str, torch.device] | None = None
) -> None:
    border = Border(
        home=torch.device(resolved.home),
        on_decode_oom=resolved.plan.spec.hardware.on_decode_oom,
        origins=dict(origins or {}),
        expected={
            resolved.slot_devices[slot.index]: (slot.peak_bytes, slot.available_bytes)
            for slot in resolved.plan.slots
            if slot.index in resolved.slot_devices
        },
    )
    for name in COMPONENTS:
        visits = waiting_place(resolved, name) != resolved.device_map[name]
        attach(getattr(pipeline, name), name, torch.device(resolved.device_map[name]), border, visits)
    settings = vae_settings(pipeline.vae)
    border.restore.append(lambda: pipeline.vae.__dict__.update(settings))
    if "encode_once" in resolved.plan.knobs:
        _encode_once(pipeline, border)
    if "vae_slicing" in resolved.plan.knobs:
        pipeline.vae.enable_slicing()
    if tile := resolved.plan.vae_tile:
        pipeline.vae.enable_tiling(tile.height, tile.width, tile.stride_height, tile.stride_width)
    refuse_group_offload(pipeline, border)
    if resolved.device_map["controlnet"] != resolved.home:
        _cast_prompt_once(pipeline, border)
    pipeline.hf_device_map = dict(resolved.device_map)


def _encode_once(pipeline: SanaControlNetPipeline, border: Border) -> None:
    def told(copies: Copies) -> None:
        border.copies = copies

    if undo := watch_copies(pipeline, told):
        border.restore.append(undo)


def _cast_prompt_once(pipeline: SanaControlNetPipeline, border: Border) -> None:
    """Have `encode_prompt` return embeddings in the denoiser's dtype, where the pipeline would cast them in each step.

    The values are the same; the tensor is too, in every step, so that it crosses to the ControlNet once.
    """
    encode = pipeline.encode_prompt

    @functools.wraps(encode)
    def encode_prompt(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        embeds, mask, negative, negative_mask = encode(*args, **kwargs)
        dtype = pipeline.controlnet.dtype  # asked in each call: `pipeline.controlnet.half()` changes it
        if dtype != pipeline.transformer.dtype:
            return embeds, mask, negative, negative_mask
        return embeds.to(dtype), mask, None if negative is None else negative.to(dtype), negative_mask

    pipeline.encode_prompt = encode_prompt
    border.restore.append(lambda: pipeline.__dict__.pop("encode_prompt", None))


def _dtype(resolved: ResolvedPlan, name: Component) -> torch.dtype:
    return getattr(torch, resolved.plan.components[name].dtype)  # type: ignore[no-any-return]


def waiting_place(resolved: ResolvedPlan, name: Component) -> str:
    """The device where a component's weights are between its turns: its own, or the CPU if it is offloaded."""
    offloaded = name == "text_encoder" and "text_encoder_offload" in resolved.plan.knobs
    return "cpu" if offloaded else resolved.device_map[name]


def _pinned(plan: Plan) -> Model:
    """The plan's model at the commit that it was compiled for, where it comes from the hub."""
    model, commit = plan.spec.model, plan.checkpoint.revision
    return model if commit is None else model.model_copy(update={"revision": commit})


def _check_same(plan: Plan, checkpoint: Checkpoint) -> None:
    """Refuse weights whose shapes are not the planned ones; configs may carry other bookkeeping keys."""
    for name, facts in checkpoint.components.items():
        planned, found = plan.components[name].weights_bytes, facts.weights_bytes(plan.components[name].format)
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
