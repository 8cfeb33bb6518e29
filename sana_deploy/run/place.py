"""Places a pipeline by a plan, and takes that off again.

A placed pipeline refuses what would break later or in silence.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from accelerate.hooks import remove_hook_from_module
from diffusers import DiffusionPipeline
from torch import nn

from ..declare.hardware import SPLITS
from ..declare.knobs import completed
from ..declare.pipelines import PIPELINES, Component, PipelineDescription
from ..declare.runtime import RUNTIMES
from ..errors import RunError, UsageError
from ..plan.artifact import Plan, ResolvedPlan
from ..plan.units import component_of
from .border import Border
from .control_image_copies import Copies, watch_copies
from .decode_retry import put_back, vae_settings
from .guidance_split import further_units, split_guidance
from .hook import BorderHook, attach, find_border
from .host import Host, PresentHost
from .layers import deal_layers
from .mirror import Mirror
from .other_blocks import OtherBlocks, other_blocks
from .quantize import quantize_linears
from .residual_stream import stream_residuals
from .row_split import row_units, split_rows
from .rows.one_device import use_bands
from .weights import cast_module

log = logging.getLogger(__name__)


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


def place(pipeline: DiffusionPipeline, plan: Plan | ResolvedPlan | None = None) -> DiffusionPipeline:
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
    modules = _unplaced_components(pipeline, resolved.plan.pipeline)
    dtypes = {name: _dtype_of(module) for name, module in modules.items()}
    origins: dict[str, torch.device] = {name: next(module.parameters()).device for name, module in modules.items()}
    try:
        for name, module in modules.items():
            form = resolved.plan.components[name].format
            cast_module(module, getattr(torch, form.dtype))
            if form.quantization:
                quantize_linears(module, form.quantization)
            _move(module, waiting_device(resolved, name), other_blocks(resolved, name))
        border = bind(pipeline, resolved, PresentHost())
    except torch.OutOfMemoryError as problem:
        for moved, device in origins.items():
            getattr(pipeline, moved).to(device)
        raise RunError(f"out of memory while moving components: {problem}", where="place") from problem
    _log_casts(dtypes, modules)
    border.origins |= origins
    return pipeline


def _move(module: nn.Module, device: str, others: OtherBlocks | None) -> None:
    if others is None:
        module.to(device=device)
    else:
        others.move(module, torch.device(device))


def _unplaced_components(pipeline: DiffusionPipeline, description: PipelineDescription) -> dict[Component, nn.Module]:
    """The components of a pipeline that nothing has placed yet.

    Raises:
        RunError: it is placed or offloaded, of another class than planned, or it lacks a component.
    """
    if pipeline.hf_device_map is not None:
        raise RunError(
            "the pipeline already has a device map", hint="call unplace or pipeline.reset_device_map() first"
        )
    if (found := type(pipeline).__name__) != description.class_name and found in PIPELINES:
        raise RunError(f"the plan is for a {description.class_name}, the pipeline is a {found}", where="pipeline")
    modules: dict[Component, nn.Module] = {}
    for name in description.names:
        module = getattr(pipeline, name, None)
        if not isinstance(module, nn.Module):
            raise RunError(f"the pipeline has no {name}", where=name)
        if any(hasattr(child, "_hf_hook") for child in module.modules()):
            raise RunError(f"{name} has hooks of another placement", hint="call pipeline.remove_all_hooks() first")
        modules[name] = module
    return modules


def unplace(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Take a placement off: no hooks, the class's own methods, the VAE's own settings, components where they were.

    Components keep the dtype that they were placed in: what a cast rounded off cannot come back. Those that
    `load_pipeline` put on a device stay there, but for one that it dealt to two, which goes to the CPU.

    Returns:
        The same pipeline.

    Raises:
        UsageError: it is no pipeline.
        RunError: it is not placed.
    """
    _check_pipeline(pipeline, "unplace(pipeline)")
    border = find_border(pipeline)
    if border is None:
        raise RunError("the pipeline is not placed")
    for name in border.pipeline.names:
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
        hint = f"{usage}, where pipeline = load_pipeline(plan) or DiffusionPipeline.from_pretrained(...)"
        raise UsageError(f"a diffusers pipeline is needed, {given} was given", where="pipeline", hint=hint)


def bind(pipeline: DiffusionPipeline, resolved: ResolvedPlan, host: Host) -> Border:
    """Hook a pipeline whose components are where the plan wants them, and turn its knobs on.

    Args:
        pipeline: with every component at its `waiting_device`.
        resolved: the plan.
        host: whose devices they are.

    Returns:
        What the hooks share.

    Raises:
        torch.OutOfMemoryError: there is no room for further units; the pipeline has no hooks then.
        RunError: there is no memory for graphs.
    """
    plan, border = resolved.plan, _new_border(resolved, host)
    hook = functools.partial(_hook, plan=plan, border=border)
    split = SPLITS[plan.split]
    mirrors: dict[str, Mirror] = {}
    if not plan.layers:
        mirrors = row_units(pipeline, border) if split.rows else further_units(pipeline, border, hook)
    for name in plan.pipeline.names:
        device = torch.device(resolved.device_map[name])
        hook(getattr(pipeline, name), name, device, offloaded=waiting_device(resolved, name) != str(device))
    if plan.layers:
        deal_layers(pipeline, resolved, border)
    if not split.rows:
        split_guidance(pipeline, border, mirrors)
    _stream_residuals(pipeline, plan, border)
    _set_vae(getattr(pipeline, plan.pipeline.of("vae")), plan, border)
    if split.rows:
        split_rows(pipeline, border, mirrors, plan.rows, split.teams)
    if "encode_once" in plan.knobs:
        _encode_once(pipeline, border)
    _refuse_group_offload(pipeline, border)
    if plan.pipeline.casts_prompt:
        _cast_prompt_once(pipeline, border)
    pipeline.hf_device_map = {**resolved.device_map, **resolved.unit_devices}
    return border


def _new_border(resolved: ResolvedPlan, host: Host) -> Border:
    plan = resolved.plan
    return Border(
        home=torch.device(resolved.home),
        pipeline=plan.pipeline,
        host=host,
        units={name: torch.device(device) for name, device in resolved.unit_devices.items()},
        on_decode_oom=plan.spec.hardware.on_decode_oom,
        most_graphs=plan.spec.runtime.most_graphs,
        expected={
            resolved.slot_devices[slot.index]: (slot.peak_bytes, slot.available_bytes)
            for slot in plan.slots
            if slot.index in resolved.slot_devices
        },
    )


def _hook(
    module: nn.Module, unit: str, device: torch.device, plan: Plan, border: Border, offloaded: bool = False
) -> BorderHook:
    """Put the hook of a component, or of one of its further units, on a module: it executes as the plan says."""
    part, runtime = plan.pipeline.by_name[component_of(unit)], RUNTIMES[plan.runtime]
    graphed = runtime.graphs and part.graphed and not offloaded
    remembered = plan.spec.runtime.prompt_cache if part.role == "text_encoder" else 0
    methods = [name.rpartition(".")[2] for name in plan.graphed_calls if name.rpartition(".")[0] == unit]
    return attach(module, unit, device, border, offloaded, graphed, runtime.compiles, remembered, methods)


def _set_vae(vae: Any, plan: Plan, border: Border) -> None:
    """Turn slicing, bands and tiling on as the plan says, which counts what a knob includes; the border undoes it."""
    border.restore.append(functools.partial(put_back, vae, vae_settings(vae)))
    if "vae_slicing" in completed(plan.knobs):
        vae.enable_slicing()
    if plan.vae_band_count:
        use_bands(vae, plan.vae_band_count)
    if tile := plan.vae_tile:
        vae.enable_tiling(tile.height, tile.width, tile.stride_height, tile.stride_width)


def _stream_residuals(pipeline: DiffusionPipeline, plan: Plan, border: Border) -> None:
    """Send residuals as they are made, where the denoiser computes in their dtype: a cast would wait for them all.

    Halves of guidance send theirs when all are made.
    """
    looped = (plan.pipeline.find("controlnet"), plan.pipeline.denoiser)
    if len({plan.components[name].format.dtype for name in looped if name}) == 1 and not border.units:
        stream_residuals(pipeline, border)


def _encode_once(pipeline: DiffusionPipeline, border: Border) -> None:
    def on_copies(copies: Copies) -> None:
        border.state.copies = copies

    if undo := watch_copies(pipeline, on_copies):
        border.restore.append(undo)


def _cast_prompt_once(pipeline: DiffusionPipeline, border: Border) -> None:
    """Have `encode_prompt` return embeddings in the denoiser's dtype, where the pipeline would cast them in each step.

    The values are the same; the tensor is too, in every step, so that it crosses to a ControlNet elsewhere once, is
    copied for graphs once, and what is made of it is made once. Nothing is cast where the loop computes in two dtypes.
    """
    encode, looped = pipeline.encode_prompt, border.pipeline.looped

    @functools.wraps(encode)
    def encode_prompt(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        embeds, mask, negative, negative_mask = encode(*args, **kwargs)
        dtypes = {
            getattr(pipeline, name).dtype for name in looped
        }  # in each call: `pipeline.controlnet.half()` changes it
        if len(dtypes) > 1:
            return embeds, mask, negative, negative_mask
        dtype = dtypes.pop()
        return embeds.to(dtype), mask, None if negative is None else negative.to(dtype), negative_mask

    pipeline.encode_prompt = encode_prompt
    border.restore.append(lambda: pipeline.__dict__.pop("encode_prompt", None))


def waiting_device(resolved: ResolvedPlan, name: Component) -> str:
    """The device where a component's weights are between its turns: its own, or the CPU if it is offloaded."""
    plan = resolved.plan
    offloaded = "text_encoder_offload" in plan.knobs and name == plan.pipeline.of("text_encoder")
    return "cpu" if offloaded else resolved.device_map[name]


def _refuse_group_offload(pipeline: DiffusionPipeline, border: Border) -> None:
    """Refuse group offloading as diffusers refuses its other offloads on a device map; undone with the border."""
    owners = [pipeline, *(getattr(pipeline, name) for name in border.pipeline.names)]
    for owner in owners:
        if hasattr(type(owner), "enable_group_offload"):
            owner.enable_group_offload = _refuse
            border.restore.append(_forgetting(owner))


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise ValueError(
        "The pipeline is placed: it has a device mapping strategy, so calling `enable_group_offload()` isn't allowed. "
        "You can call `reset_device_map()` first and then call `enable_group_offload()`."
    )


def _forgetting(owner: Any) -> Callable[[], object]:
    return lambda: owner.__dict__.pop("enable_group_offload", None)


def _dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of the first floating-point parameter; float32 where there is none."""
    return next((value.dtype for value in module.parameters() if value.is_floating_point()), torch.float32)


def _log_casts(before: Mapping[Component, torch.dtype], modules: Mapping[Component, nn.Module]) -> None:
    """Log in one line which components were cast on placing, from `before` to the dtype that they have now."""
    groups: dict[str, list[str]] = {}
    for name, module in modules.items():
        now = _dtype_of(module)
        if now != before[name]:
            pair = " to ".join(str(dtype).removeprefix("torch.") for dtype in (before[name], now))
            groups.setdefault(pair, []).append(name)
    if groups:
        cast = "; ".join(f"{', '.join(names)} from {pair}" for pair, names in groups.items())
        log.warning("place cast %s, as the plan says; unplace does not bring back what this rounded off", cast)
