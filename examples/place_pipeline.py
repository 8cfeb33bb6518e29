"""Place a pipeline that your code has made already, and take the plan off again.

    python examples/place_pipeline.py [FOLDER]

FOLDER is a checkpoint of `SanaPipeline` in diffusers' layout; without it a small one is generated. The plan is for the
GPUs that are here, or for the CPU.
"""

from __future__ import annotations

import sys

import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler

from sana_deploy import compile_plan, place, unplace
from sana_deploy.declare.pipelines import PIPELINES
from sana_deploy.facts.tiny import ensure_tiny


def main() -> None:
    """Make a pipeline, place it, draw."""
    folder = sys.argv[1] if sys.argv[1:] else ensure_tiny(pipeline=PIPELINES["SanaPipeline"])
    size = ["workload.height=128", "workload.width=128", "workload.steps=4"]
    plan = compile_plan(["model=checkpoint", f"model.source={folder}", *size])

    # Your own pipeline, with what you have changed of it: here another scheduler.
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)

    place(pipeline, plan)
    print(pipeline.hf_device_map)
    generator = torch.Generator().manual_seed(7)
    asked = {"height": 128, "width": 128, "num_inference_steps": 4, "use_resolution_binning": False}
    image = pipeline("a lighthouse", generator=generator, **asked).images[0]
    image.save("lighthouse.png")

    unplace(pipeline)  # as it was


if __name__ == "__main__":
    main()
