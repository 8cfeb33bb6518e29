"""The tiny pipelines without a ControlNet, each component on a virtual GPU of its own, beside diffusers' own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from around import STRIPES
from conftest import SMALL
from diffusers import DiffusionPipeline

from sana_deploy import load_pipeline
from sana_deploy.api import compile_spec
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.pipelines import PIPELINES, PipelineDescription
from sana_deploy.facts.tiny import ensure_tiny
from sana_deploy.plan.artifact import Plan
from sana_deploy.rehearsal.host import VirtualHost
from sana_deploy.rehearsal.rehearse import open_host

CLASSES = {
    "tiny_sana": "SanaPipeline",
    "tiny_pag": "SanaPAGPipeline",
    "tiny_sprint": "SanaSprintPipeline",
    "tiny_sprint_img2img": "SanaSprintImg2ImgPipeline",
}
MODELS = tuple(CLASSES)
GUIDED = ("tiny_sana", "tiny_pag")
"""Those with classifier-free guidance."""
THREE = ("machine=virtual", "machine.gpus=3xrtx4090", "hardware=custom_map")
EACH_ALONE = "hardware.device_map={text_encoder: 0, vae: 1, transformer: 2}"
APART = (*THREE, EACH_ALONE)


def planned(model: str, *overrides: str) -> Plan:
    """A plan for a small request."""
    size = [one for one in SMALL if not one.startswith("workload.steps")]
    return compile_spec(compose_spec([f"model={model}", *size, *overrides]))


def diffusers_own(pipeline: PipelineDescription, **options: Any) -> DiffusionPipeline:
    """diffusers' pipeline of this class, from the same checkpoint."""
    cls = getattr(diffusers, pipeline.class_name)
    made: DiffusionPipeline = cls.from_pretrained(ensure_tiny(pipeline=pipeline), **options)
    return made


def call(pipeline: Any, **options: Any) -> Any:
    """Images of one request, or the tuple that `return_dict=False` gives; its prompt is short."""
    name = type(pipeline).__name__
    arguments: dict[str, Any] = dict(
        prompt="a lighthouse", height=64, width=96, num_inference_steps=2, guidance_scale=4.5,
        use_resolution_binning=False, generator=torch.Generator().manual_seed(0), output_type="np",
        max_sequence_length=32, complex_human_instruction=[],
    )  # fmt: skip
    if "strength" in PIPELINES[name].reads:
        arguments |= {"image": STRIPES, "strength": 0.5}
    if "Sprint" in name and options.get("num_inference_steps", 2) != 2:
        arguments["intermediate_timesteps"] = None
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(**{**arguments, **options})
    return drawn if isinstance(drawn, tuple) else drawn.images


@dataclass
class Placed:
    """A pipeline over three virtual GPUs beside the same on the CPU."""

    model: str
    plan: Plan
    pipeline: Any
    reference: Any
    host: VirtualHost

    def images(self, **options: Any) -> Any:
        with self.host:
            return call(self.pipeline, **options)

    def same(self, **options: Any) -> np.ndarray:
        """The images of a request, which are diffusers' own bit for bit."""
        ours = np.asarray(_host(self.images(**options)))
        theirs = np.asarray(_host(call(self.reference, **_again(options))))
        assert ours.shape == theirs.shape
        assert np.array_equal(ours, theirs)
        return ours


def _host(value: Any) -> Any:
    return value.cpu() if isinstance(value, torch.Tensor) else value


def _again(options: dict[str, Any]) -> dict[str, Any]:
    """The same options, with generators that begin anew."""
    if "generator" not in options:
        return options
    given = options["generator"]
    anew = [
        torch.Generator().manual_seed(one.initial_seed()) for one in ([given] if not isinstance(given, list) else given)
    ]
    return {**options, "generator": anew if isinstance(given, list) else anew[0]}


def place_apart(model: str, *overrides: str) -> Placed:
    plan = planned(model, *(overrides or ("precision=fp32",)), *APART)
    resolved = plan.resolve()
    host = open_host(resolved, "numbers")
    return Placed(model, plan, load_pipeline(resolved, host=host), diffusers_own(plan.pipeline), host)
