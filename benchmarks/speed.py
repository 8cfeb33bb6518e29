"""Seconds of a whole image with each runtime, beside diffusers' own eager pipeline in the same process. Needs a GPU.

    python benchmarks/speed.py FOLDER [--model sana_1600m_controlnet] [--turns 7]

FOLDER gets a checkpoint with random weights, unless it is there (`make_checkpoint.py`). Each case is drawn by diffusers
first; then the same pipeline is placed by a plan of each runtime, and draws the same request. A row has the ratio of
medians to diffusers, the plan's seconds over those measured, what PyTorch's allocator had at most over what the plan
counts, and whether the pictures have the same bits. A busy host makes diffusers slower, and ratios better.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import DiffusionPipeline
from make_checkpoint import make_checkpoint

from sana_deploy import Plan, compile_plan, load_pipeline, place, unplace
from sana_deploy.declare.control_image import read_control_image

CASES = ((512, 1), (1024, 1), (1024, 4), (2048, 1))
"""Side in pixels, and images of a request."""
RUNTIMES = ("eager", "graphs", "auto")


def planned(folder: Path, side: int, batch: int, runtime: str) -> Plan:
    """Everything on one GPU in the documented recipe, without knobs, as diffusers has it."""
    return compile_plan([
        "model=checkpoint", f"model.source={folder}", "hardware=single_gpu", "hardware.allow=[]",
        "precision=mixed_bf16", f"runtime={runtime}", "workload.prompt=a lighthouse at dusk, oil on canvas",
        f"workload.height={side}", f"workload.width={side}", f"workload.batch={batch}", "workload.seed=1",
    ])  # fmt: skip


def drawer(pipeline: DiffusionPipeline, plan: Plan) -> Callable[[], torch.Tensor]:
    """Draws the plan's request with the pipeline as it is: pixels of (batch, 3, side, side)."""
    work, description = plan.spec.workload, plan.pipeline
    given = description.arguments(work.request, work.bounds, read_control_image(work, work.bounds))

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(work.seed)
        images: torch.Tensor = pipeline(**given, generator=generator, output_type="pt").images
        torch.cuda.synchronize()
        return images

    return draw


def seconds_of(draw: Callable[[], torch.Tensor], turns: int) -> float:
    """Median seconds of a call."""
    found = []
    for _ in range(turns):
        started = time.perf_counter()
        draw()
        found.append(time.perf_counter() - started)
    return median(found)


def measure(pipeline: Any, plan: Plan, reference: torch.Tensor, base: float, turns: int) -> dict[str, Any]:
    """Place the pipeline by `plan`, draw, and take the placement off again."""
    place(pipeline, plan)
    draw = drawer(pipeline, plan)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = reference.nbytes  # what this benchmark keeps there
    equal = all(torch.equal(draw(), reference) for _ in range(3))  # the first call of a shape, its capture, a replay
    seconds = seconds_of(draw, turns)
    peak = torch.cuda.max_memory_allocated() - held
    unplace(pipeline)
    (slot,) = plan.slots
    counted = slot.weights_bytes + slot.activation_bytes + slot.allocator_bytes
    return {
        "runtime": plan.runtime,
        "over_diffusers": round(seconds / base, 3),
        "seconds": round(seconds, 4),
        "planned_over_measured": round((plan.estimates.seconds_per_image or 0) * plan.spec.workload.batch / seconds, 3),
        "counted_over_peak": round(counted / peak, 4),
        "same_bits": equal,
    }


def main() -> None:
    """Print one JSON line per case and runtime."""
    parser = argparse.ArgumentParser(description="seconds of whole images with each runtime, beside diffusers")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="sana_1600m_controlnet")
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args()
    if not (options.folder / "model_index.json").is_file():
        make_checkpoint(options.model, options.folder)
    pipeline = unplace(load_pipeline(planned(options.folder, 512, 1, "eager")))
    pipeline.set_progress_bar_config(disable=True)
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "model": options.model}))
    for side, batch in CASES:
        plans = {runtime: planned(options.folder, side, batch, runtime) for runtime in RUNTIMES}
        draw = drawer(pipeline, plans["eager"])
        turns = options.turns if side * side * batch < 2**21 else max(3, options.turns // 2)
        reference = draw()
        base = seconds_of(draw, turns)
        for asked, plan in plans.items():
            row = {"side": side, "batch": batch, "asked": asked}
            print(json.dumps(row | measure(pipeline, plan, reference, base, turns)), flush=True)


if __name__ == "__main__":
    main()
