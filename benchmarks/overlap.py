"""Images per second of one pipeline on two GPUs: requests one after the other, and with stages that overlap.

    python benchmarks/overlap.py FOLDER [--model sana_1600m_controlnet] [--sides 512 1024] [--requests 12] [--turns 3]
    python benchmarks/overlap.py --tiny

FOLDER gets a checkpoint with random weights, unless it is there (`make_checkpoint.py`). Transformer and ControlNet are
on GPU 1, text encoder and VAE on GPU 0, as cards of 8 GiB have them; `--vae-with-denoiser` moves the VAE. Requests
have prompts, seeds, steps and guidance of their own. A row of JSON has medians of images per second both ways, and what
the plan says of both; whether all pictures have the same bits; seconds by phase both ways; and for each GPU what
PyTorch's allocator had at most over what the plan counts there without context and headroom. `--tiny` does it on the
CPU, whose stages are in each other's way, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch
from make_checkpoint import make_checkpoint

from sana_deploy import Plan, load_pipeline
from sana_deploy._units import GIB
from sana_deploy.api import compile_spec
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.workload import Request, Workload
from sana_deploy.facts.machine import Gpu, Machine
from sana_deploy.run.generate import generate
from sana_deploy.run.overlap import Overlapped

WARM = 2
"""Requests of each shape before the clock starts: graphs are captured in the second one."""
Case = tuple[Workload, Request]
Drawn = tuple[bytes, dict[str, float]]


def planned(options: argparse.Namespace, side: int) -> Plan:
    """The plan that is measured: for the GPUs that are here, or for two that the CPU stands for."""
    pins = {"transformer": 1, "controlnet": 1, "text_encoder": 0, "vae": int(options.vae_with_denoiser)}
    shape = [f"workload.height={side}", f"workload.width={side}", "workload.negative_prompt=blurry"]
    where = [f"hardware.pin.{name}={index}" for name, index in pins.items()]
    if options.tiny:
        gpus = tuple(Gpu(index, "NVIDIA GeForce RTX 3060", 8 * GIB, 8 * GIB, (8, 6), 28) for index in range(2))
        spec = compose_spec(["hardware=multi_gpu_balanced", *where, *shape, "workload.steps=4", "precision=fp32"])
        return compile_spec(spec, Machine("present", gpus, 64 * GIB))
    source = options.folder / options.model
    if not (source / "model_index.json").is_file():
        make_checkpoint(options.model, source)
    model = ["model=checkpoint", f"model.source={source}", f"runtime={options.runtime}", "precision=mixed_bf16"]
    return compile_spec(compose_spec([*model, "hardware=multi_gpu_balanced", "hardware.split=none", *where, *shape]))


def cases_of(plan: Plan, count: int) -> list[Case]:
    """Requests with prompts, seeds and guidance of their own; every third one has other steps."""
    work = plan.spec.workload
    cases = []
    for number in range(count):
        shape = work.bounds.model_copy(update={"steps": max(1, work.steps - (number % 3 == 2))})
        said = {"prompt": f"a lighthouse, number {number}", "seed": number, "guidance_scale": 3.0 + number % 4}
        cases.append((shape, work.request.model_copy(update=said)))
    return cases


def timed(draw: Callable[[], list[Drawn]], turns: int) -> tuple[float, list[Drawn]]:
    """The median of seconds of all requests, and what was drawn last."""
    seconds = []
    for _ in range(turns):
        started = time.perf_counter()
        drawn = draw()
        seconds.append(time.perf_counter() - started)
    return median(seconds), drawn


def peaks(plan: Plan, waiting: bool) -> dict[int, float]:
    """What the allocator had at most on each GPU over what the plan counts there."""
    beside = {use.slot: use.waiting_bytes for use in plan.overlap.slots} if plan.overlap and waiting else {}
    found = {}
    for slot in plan.slots if torch.cuda.device_count() > 1 else ():
        counted = slot.weights_bytes + slot.activation_bytes + slot.allocator_bytes + beside.get(slot.index, 0)
        found[slot.index] = round(torch.cuda.max_memory_allocated(slot.index) / counted, 4)
        torch.cuda.reset_peak_memory_stats(slot.index)
    return found


def phases(drawn: Sequence[Drawn]) -> dict[str, float]:
    """Medians of seconds by phase, and of whole requests."""
    return {name: round(median(seconds[name] for _, seconds in drawn), 4) for name in drawn[0][1]}


def measure(options: argparse.Namespace, side: int) -> dict[str, Any]:
    """A row."""
    plan = planned(options, side)
    resolved, overlap = plan.resolve(), plan.overlap
    row: dict[str, Any] = {"side": side, "runtime": plan.runtime, "places": plan.device_map}
    if overlap is None:
        return row | {"refused": "stages do not overlap in this plan"}
    pipeline, cases = load_pipeline(resolved), cases_of(plan, options.requests)
    whole = Overlapped(pipeline, resolved, overlap)

    def alone(case: Case) -> Drawn:
        images, measured = generate(pipeline, *case)
        return images[0].tobytes(), dict(measured.seconds)

    def flying(case: Case) -> Drawn:
        with whole.request(case[0]) as request:
            images, measured = request.generate(*case)
        return images[0].tobytes(), dict(measured.seconds)

    for case in cases[:WARM]:
        alone(case)
        flying(case)
    peaks(plan, False)
    apart, one_by_one = timed(lambda: [alone(case) for case in cases], options.turns)
    taken_apart = peaks(plan, False)
    with ThreadPoolExecutor(overlap.in_flight) as pool:
        list(pool.map(flying, cases))  # libraries start in each thread anew
        peaks(plan, True)
        together, at_once = timed(lambda: list(pool.map(flying, cases)), options.turns)
    count = len(cases)
    return row | {
        "in_flight": overlap.in_flight,
        "one_by_one": round(count / apart, 4),
        "overlapped": round(count / together, 4),
        "gain": round(apart / together, 3),
        "planned_one_by_one": plan.estimates.images_per_second,
        "planned_overlapped": overlap.images_per_second,
        "planned_gain": round(overlap.images_per_second * (plan.estimates.seconds_per_image or 0), 3),
        "same_bits": [picture for picture, _ in at_once] == [picture for picture, _ in one_by_one],
        "different_pictures": len({picture for picture, _ in one_by_one}),
        "phases_one_by_one": phases(one_by_one),
        "phases_overlapped": phases(at_once),
        "planned_phases": plan.estimates.seconds,
        "peak_over_plan_one_by_one": taken_apart,
        "peak_over_plan_overlapped": peaks(plan, True),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a row for each side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path())
    parser.add_argument("--model", default="sana_1600m_controlnet")
    parser.add_argument("--runtime", default="graphs")
    parser.add_argument("--sides", type=int, nargs="*", default=[512, 1024])
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--vae-with-denoiser", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="the tiny checkpoint on the CPU, of 64 px")
    options = parser.parse_args(arguments)
    for side in [64] if options.tiny else options.sides:
        print(json.dumps(measure(options, side)), flush=True)


if __name__ == "__main__":
    main()
