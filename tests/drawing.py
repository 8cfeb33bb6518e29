"""One request as diffusers' own pipeline takes it, for tests that compare images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import SanaControlNetPipeline

from sana_deploy.declare.control_image import read_control_image
from sana_deploy.declare.spec import DeploySpec


def draw(pipeline: SanaControlNetPipeline, spec: DeploySpec, **options: Any) -> np.ndarray:
    work = spec.workload
    pipeline.set_progress_bar_config(disable=True)
    arguments = dict(
        max_sequence_length=32, complex_human_instruction=[],  # the text encoder takes most of the time on a CPU
        prompt=work.prompt, control_image=read_control_image(work, work.bounds), height=work.height, width=work.width,
        num_inference_steps=work.steps, guidance_scale=work.guidance_scale, use_resolution_binning=False,
        generator=torch.Generator().manual_seed(work.seed), output_type="np",
    )  # fmt: skip
    return np.asarray(pipeline(**{**arguments, **options}).images)


def encode_one_at_a_time(pipeline: SanaControlNetPipeline) -> SanaControlNetPipeline:
    """Have diffusers' own pipeline encode control images as its slicing does; decode stays as it is."""
    vae = pipeline.vae
    encode = vae.encode

    def sliced(*args: Any, **kwargs: Any) -> Any:
        vae.enable_slicing()
        try:
            return encode(*args, **kwargs)
        finally:
            vae.disable_slicing()

    vae.encode = sliced
    return pipeline
