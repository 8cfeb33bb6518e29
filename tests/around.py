"""A pipeline with every component on a virtual GPU of its own, in numbers, beside diffusers' own on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import SanaControlNetPipeline
from drawing import encode_one_at_a_time
from PIL import Image

from sana_deploy import load_pipeline
from sana_deploy.api import compile_spec
from sana_deploy.declare.spec import DeploySpec, Fidelity
from sana_deploy.plan.artifact import ResolvedPlan
from sana_deploy.rehearsal.host import VirtualHost
from sana_deploy.rehearsal.rehearse import open_host

Small = Callable[..., DeploySpec]
FOUR = ["machine=virtual", "machine.gpus=4xrtx4090", "hardware=custom_map"]
EACH_ALONE = "hardware.device_map={text_encoder: 0, vae: 1, transformer: 2, controlnet: 3}"
STRIPES = Image.fromarray(np.tile(np.array([0, 255], np.uint8).repeat(8), (64, 6)), "L").convert("RGB")


@dataclass
class Placed:
    """A pipeline over four virtual GPUs beside the same on the CPU."""

    pipeline: SanaControlNetPipeline
    reference: SanaControlNetPipeline
    host: VirtualHost
    resolved: ResolvedPlan

    def images(self, **options: Any) -> Any:
        with self.host:
            return call(self.pipeline, **options)


def place_apart(tiny: Path, small: Small, *overrides: str, fidelity: Fidelity = "numbers") -> Placed:
    resolved = compile_spec(small(*(overrides or ("precision=fp32",)), *FOUR, EACH_ALONE)).resolve()
    host = open_host(resolved, fidelity)
    return Placed(load_pipeline(resolved, host=host), diffusers_own(tiny), host, resolved)


def diffusers_own(tiny: Path, **options: Any) -> SanaControlNetPipeline:
    """diffusers' pipeline, which encodes control images one at a time as plans do."""
    return encode_one_at_a_time(SanaControlNetPipeline.from_pretrained(tiny, **options))


def call(pipeline: SanaControlNetPipeline, **options: Any) -> Any:
    """Images of one request, or the tuple that `return_dict=False` gives.

    Its prompt is short, since the text encoder takes most of the time on a CPU.
    """
    arguments: dict[str, Any] = dict(
        prompt="a lighthouse", control_image=STRIPES, height=64, width=96, num_inference_steps=2, guidance_scale=4.5,
        use_resolution_binning=False, generator=torch.Generator().manual_seed(0), output_type="np",
        max_sequence_length=32, complex_human_instruction=[],
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(**{**arguments, **options})
    return drawn if isinstance(drawn, tuple) else drawn.images


def same(one: Any, other: Any) -> bool:
    a, b = (np.asarray(value.cpu() if isinstance(value, torch.Tensor) else value) for value in (one, other))
    return a.shape == b.shape and np.array_equal(a, b)
