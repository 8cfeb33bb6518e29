"""Loads each component once, straight to its device and dtype, and assembles the one integrated pipeline."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import diffusers
import torch
import transformers
from diffusers import SanaControlNetPipeline
from torch import nn

from .boundary import Border, attach
from .checkpoint import CLASSES, Checkpoint, ComponentFacts, open_checkpoint
from .errors import PlanError, RunError
from .plan import Plan
from .resolve import ResolvedPlan
from .spec import COMPONENTS, Component
from .standin import StandInTokenizer, stand_in
from .virtual import VirtualHost

log = logging.getLogger(__name__)
Progress = Callable[[Component, int, int], None]
"""Called before each component is loaded: its name, its position from 0, and how many there are."""


def load_pipeline(
    plan: Plan | ResolvedPlan, progress: Progress | None = None, host: VirtualHost | None = None
) -> SanaControlNetPipeline:
    """Load the plan's checkpoint and place it.

    Args:
        plan: a plan (resolved against the GPUs present) or a resolved plan.
        progress: told before each component is loaded.
        host: the virtual GPUs, for a plan that was resolved to such.

    Returns:
        An ordinary `SanaControlNetPipeline`, each component on its device in its dtype.

    Raises:
        CheckpointError: the weights are missing or damaged.
        PlanError: the checkpoint is not the one that the plan was compiled for.
        RunError: loading failed.
    """
    resolved = plan.resolve() if isinstance(plan, Plan) else plan
    if resolved.machine.kind == "virtual" and host is None:
        raise RunError("the plan is for virtual GPUs", hint="use rehearse(plan), or machine=present")
    shapes_only = host is not None and host.fidelity == "shapes"
    checkpoint = open_checkpoint(resolved.plan.spec.model, weights=not shapes_only)
    _check_same(resolved.plan, checkpoint)
    parts: dict[str, Any] = {}
    with _quiet_libraries():
        for position, name in enumerate(COMPONENTS):
            if progress:
                progress(name, position, len(COMPONENTS))
            dtype, device = getattr(torch, resolved.plan.components[name].dtype), waiting_place(resolved, name)
            facts = checkpoint.components[name]
            if host is None:
                parts[name] = _load_component(facts, dtype, device)
            else:
                module = stand_in(facts, dtype) if shapes_only else _load_component(facts, dtype, "cpu")
                parts[name] = _place_virtually(host, module, name, device)
        parts |= load_helpers(checkpoint)
    pipeline = SanaControlNetPipeline(**parts)
    _bind(pipeline, resolved)
    return pipeline


def place(pipeline: SanaControlNetPipeline, resolved: ResolvedPlan) -> SanaControlNetPipeline:
    """Place a pipeline that is already in memory: cast and move each component, then hook its border.

    `pipeline.reset_device_map()` undoes the hooks and moves everything to the CPU.

    Returns:
        The same pipeline.

    Raises:
        RunError: it is already placed, or it lacks a component.
    """
    if pipeline.hf_device_map is not None:
        raise RunError("the pipeline already has a device map", hint="call pipeline.reset_device_map() first")
    for name in COMPONENTS:
        module = getattr(pipeline, name, None)
        if not isinstance(module, nn.Module):
            raise RunError(f"the pipeline has no {name}", where=name)
        module.to(dtype=getattr(torch, resolved.plan.components[name].dtype), device=waiting_place(resolved, name))
    _bind(pipeline, resolved)
    return pipeline


def _bind(pipeline: SanaControlNetPipeline, resolved: ResolvedPlan) -> None:
    border = Border(home=torch.device(resolved.home))
    for name in COMPONENTS:
        visits = waiting_place(resolved, name) != resolved.device_map[name]
        attach(getattr(pipeline, name), name, torch.device(resolved.device_map[name]), border, visits)
    if "vae_slicing" in resolved.plan.knobs:
        pipeline.vae.enable_slicing()
    if tile := resolved.plan.vae_tile:
        pipeline.vae.enable_tiling(tile.height, tile.width, tile.stride_height, tile.stride_width)
    pipeline.hf_device_map = dict(resolved.device_map)


def waiting_place(resolved: ResolvedPlan, name: Component) -> str:
    """The device where a component's weights are between its turns: its own, or the CPU if it is offloaded."""
    offloaded = name == "text_encoder" and "text_encoder_offload" in resolved.plan.knobs
    return "cpu" if offloaded else resolved.device_map[name]


def _check_same(plan: Plan, checkpoint: Checkpoint) -> None:
    """Refuse weights whose shapes are not the planned ones; configs may carry other bookkeeping keys."""
    for name, facts in checkpoint.components.items():
        planned, found = plan.components[name].weights_bytes, facts.weights_bytes(plan.components[name].dtype)
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


def _place_virtually(host: VirtualHost, module: nn.Module, name: Component, device: str) -> nn.Module:
    try:
        return host.place_module(module, name, torch.device(device))
    except torch.OutOfMemoryError as problem:
        raise RunError(f"out of memory while loading {name}: {problem}", where=name) from problem


def _load_component(facts: ComponentFacts, dtype: torch.dtype, device: str) -> nn.Module:
    if facts.folder is None:
        raise RunError(f"the weights of {facts.name} are not on this host", where="model.source")
    library: Any = transformers if facts.name == "text_encoder" else diffusers
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "use_safetensors": True}
    if device != "cpu":
        options["device_map"] = {"": device}
    if facts.variant and any(facts.folder.glob(f"*.{facts.variant}*")):
        options["variant"] = facts.variant
    try:
        module = getattr(library, CLASSES[facts.name]).from_pretrained(str(facts.folder), **options)
    except torch.OutOfMemoryError as problem:
        raise RunError(
            f"out of memory while loading {facts.name} to {device}: {problem}", where=facts.name
        ) from problem
    except (OSError, RuntimeError, ValueError, KeyError) as problem:
        raise RunError(
            f"{facts.name} could not be loaded from {facts.folder}: {problem}", where=facts.name
        ) from problem
    module.eval()
    log.info("loaded %s to %s in %s", facts.name, device, dtype)
    return module  # type: ignore[no-any-return]


def load_helpers(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Load tokenizer and scheduler, of whatever class the checkpoint names; stand-ins where nothing of it is here.

    Raises:
        RunError: the scheduler is of a class that diffusers does not have.
    """
    import json

    from transformers import AutoTokenizer

    folder = checkpoint.folder
    if folder is None:
        return _stand_in_helpers()
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    class_name = index["scheduler"][1]
    scheduler = getattr(diffusers, class_name, None)
    if scheduler is None or not issubclass(scheduler, diffusers.SchedulerMixin):
        raise RunError(f"diffusers {diffusers.__version__} has no scheduler {class_name}", where="scheduler")
    return {
        "scheduler": scheduler.from_pretrained(str(folder), subfolder="scheduler"),
        "tokenizer": AutoTokenizer.from_pretrained(str(folder / "tokenizer"), local_files_only=True),
    }


def _stand_in_helpers() -> Mapping[str, Any]:
    """A tokenizer that counts words and SANA's scheduler, for a catalogued model of which nothing is here."""
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return {"scheduler": diffusers.DPMSolverMultistepScheduler(**flow), "tokenizer": StandInTokenizer()}


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep the libraries' own progress bars and notices out of our output while loading."""
    bar = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if bar:
            transformers.utils.logging.enable_progress_bar()
