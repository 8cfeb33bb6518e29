"""Images per second of all GPUs of a host: one pipeline on each, in threads of one process and in processes.

    python benchmarks/replicas.py FOLDER [--model sana_1600m_controlnet] [--side 1024] [--turns 7]

FOLDER gets a checkpoint with random weights, unless it is there (`make_checkpoint.py`). The plan is that of
`hardware.objective=throughput`. Its first replica draws alone, then all draw at once in threads of this process
(`generate_each`), then each in a process of its own. Printed as JSON are medians of images per second, as multiples of
one pipeline alone and beside the plan's; whether all replicas draw the same bits for the same request; and what
PyTorch's allocator had at most on each GPU over what the plan counts there, context and headroom left out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from make_checkpoint import make_checkpoint

from sana_deploy import Plan, compile_plan, load_pipeline, load_pipelines
from sana_deploy.run.generate import generate
from sana_deploy.run.replicas import generate_each

WARM = 3
"""Requests before the clock starts: libraries start, and graphs are captured in the second one."""


def drawn(pipelines: list[Any], plan: Plan, turns: int) -> tuple[list[float], list[bytes]]:
    """Images per second of each turn, and the first picture of each pipeline, all for the same request."""
    work = plan.spec.workload
    rates = []
    for turn in range(WARM + turns):
        started = time.perf_counter()
        images, _ = generate_each(pipelines, work.bounds, work.request)
        if turn >= WARM:
            rates.append(len(images) / (time.perf_counter() - started))
    same = [generate(pipeline, work.bounds, work.request)[0][0].tobytes() for pipeline in pipelines]
    return rates, same


def peaks(plan: Plan) -> dict[int, float]:
    """What the allocator had at most on each GPU over what the plan counts there without context and headroom."""
    found = {}
    for slot in plan.all_slots:
        counted = slot.weights_bytes + slot.activation_bytes + slot.allocator_bytes
        found[slot.index] = round(torch.cuda.max_memory_reserved(slot.index) / counted - 1, 4)
    return found


def alone(path: str, number: int, turns: int, barrier: Any, rates: Any) -> None:
    """Draw with one replica in a process of its own; every turn begins when all are ready."""
    plan = Plan.load(path).each()[number]
    pipeline, work = load_pipeline(plan), plan.spec.workload
    for turn in range(WARM + turns):
        barrier.wait()
        started = time.perf_counter()
        images, _ = generate(pipeline, work.bounds, work.request)
        barrier.wait()
        if turn >= WARM and number == 0:
            rates.put(len(images) * barrier.parties / (time.perf_counter() - started))


def in_processes(plan: Plan, folder: Path, turns: int) -> list[float]:
    """Images per second of each turn with a process for each replica; a turn lasts until the slowest has ended."""
    spawn, count = multiprocessing.get_context("spawn"), len(plan.each())
    path, barrier, rates = str(plan.save(folder / "replicas.json")), spawn.Barrier(count), spawn.Queue()
    workers = [spawn.Process(target=alone, args=(path, number, turns, barrier, rates)) for number in range(count)]
    for worker in workers:
        worker.start()
    found = [rates.get(timeout=500) for _ in range(turns)]
    for worker in workers:
        worker.join()
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="sana_1600m_controlnet")
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args()
    source = options.folder / options.model
    if not (source / "model_index.json").is_file():
        make_checkpoint(options.model, source)
    plan = compile_plan([
        "model=checkpoint", f"model.source={source}", "hardware=multi_gpu_balanced", "hardware.objective=throughput",
        f"workload.height={options.side}", f"workload.width={options.side}",
    ])  # fmt: skip
    pipelines = load_pipelines(plan)
    one, _ = drawn(pipelines[:1], plan, options.turns)
    threads, pictures = drawn(pipelines, plan, options.turns)
    found = {
        "gpus": [slot.gpu for slot in plan.all_slots],
        "runtime": plan.runtime,
        "replicas": len(pipelines),
        "planned": plan.images_per_second,
        "one": round(median(one), 3),
        "threads": round(median(threads), 3),
        "threads_over_one": round(median(threads) / median(one), 3),
        "same_bits": len(set(pictures)) == 1,
        "peak_over_plan": peaks(plan),
    }
    del pipelines
    torch.cuda.empty_cache()
    processes = median(in_processes(plan, options.folder, options.turns))
    found |= {"processes": round(processes, 3), "processes_over_one": round(processes / median(one), 3)}
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
