"""Images per second of the service on the GPUs of a host, beside the plan and beside a loop over diffusers.

    python benchmarks/service.py FOLDER [--model sana_1600m_controlnet] [--side 1024] [--requests 24] [--gpus 1 2]

FOLDER gets a checkpoint with random weights, unless it is there (`make_checkpoint.py`). In a process each, one after
the other: a plain loop over diffusers' pipeline on one GPU; a loop over one pipeline of the plan; the command `serve`
with one replica, and with one on every GPU, under two requests in flight for each replica, without batches. Each
request has a prompt and a seed of its own, and all sides draw the same ones. A row of JSON has images per second,
for the service those of the plan, and over the loop over one pipeline, times the replicas; every code that was
answered, and latencies. `steady` are requests in flight over their median latency: the beginning and the end, when
replicas have nothing to do, do not count. PNG and HTTP count in the service's seconds and in no loop's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2
import serve as load_generator
import torch
from make_checkpoint import make_checkpoint

WARM = 3
"""Requests before the clock starts: libraries start, and graphs are captured in the second one."""
PROMPT = "a small lighthouse on a rocky shore at dusk"


def overrides(options: argparse.Namespace, gpus: int) -> list[str]:
    """The plan: a whole pipeline on each of the first GPUs."""
    side = [f"workload.height={options.side}", f"workload.width={options.side}"]
    wide = ["hardware=multi_gpu_balanced", f"hardware.use={[*range(gpus)]}", "hardware.objective=throughput"]
    wide.append(f"hardware.replicas={gpus}")
    source = options.folder / options.model
    return ["model=checkpoint", f"model.source={source}", "precision=mixed_bf16", *wide, *side]


def loop(options: argparse.Namespace) -> dict[str, Any]:
    """Draw one request after the other on one GPU: by diffusers alone, or by one pipeline of the plan."""
    from sana_deploy import compile_plan, load_pipeline, unplace
    from sana_deploy.declare.control_image import read_control_image

    plan = compile_plan([*overrides(options, 1), *(["runtime=eager"] if options.loop == "diffusers" else [])])
    pipeline: Any = load_pipeline(plan)
    if options.loop == "diffusers":
        pipeline = unplace(pipeline).to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    work = plan.spec.workload
    picture = read_control_image(work, work.bounds)
    for number in range(WARM + options.requests):
        if number == WARM:
            started = time.perf_counter()
        request = work.request.model_copy(update={"prompt": f"{PROMPT}, number {number}"})
        given = plan.pipeline.arguments(request, work.bounds, picture)
        pipeline(**given, generator=torch.Generator().manual_seed(number))
    seconds = time.perf_counter() - started
    return {"side": options.side, "way": options.loop, "images_per_second": round(options.requests / seconds, 4)}


def service(options: argparse.Namespace, gpus: int) -> dict[str, Any]:
    """Put the load on the command `serve`, and end it by SIGTERM."""
    from processes import started

    from sana_deploy.plan.records import Estimates, total_rate

    command = [sys.executable, "-m", "sana_deploy", "serve", *overrides(options, gpus)]
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        with started([*command, "serve.port=0", "serve.batch=1"], Path(folder)) as one:
            url = one.url(seconds=400)
            ready = time.perf_counter() - began
            plan = httpx2.get(f"{url}/plan").json()
            each = [plan, *(plan.get("replicas") or ())]
            count = len(each)
            asked = argparse.Namespace(prompt=PROMPT, size="auto", n=1, steps=None, retries=20, rate=0.0, vary=True)
            asked.concurrency = 2 * count
            asked.requests = WARM * count
            load_generator.measured(asked, url)
            asked.requests = options.requests * count
            found = load_generator.measured(asked, url)
            one.process.terminate()
            code = one.ended(120)
    kept = ("images_per_second", "codes", "latency", "mean_queue_seconds", "different_pictures")
    row = {"side": options.side, "way": "service", "replicas": count, "ready_seconds": round(ready, 1)}
    row |= {"exit_code": code, "planned": total_rate([Estimates(**one["estimates"]) for one in each])}
    row |= {key: found[key] for key in kept}
    return row | {"steady": round(asked.concurrency / found["latency"]["p50"], 3)}


def apart(options: argparse.Namespace, way: str) -> dict[str, Any]:
    """A loop in a process of its own."""
    command = [sys.executable, __file__, str(options.folder), "--model", options.model, "--side", str(options.side)]
    command += ["--requests", str(options.requests), "--loop", way]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure and print a row for each side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="sana_1600m_controlnet")
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--requests", type=int, default=24, help="on each GPU")
    every = sorted({1, max(1, torch.cuda.device_count())})
    parser.add_argument("--gpus", type=int, nargs="+", default=every, help="so many, a replica on each; 1 and all")
    parser.add_argument("--loop", choices=("diffusers", "pipeline"), help="only this loop, in this process")
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    if options.loop:
        print(json.dumps(loop(options)))
        return
    sys.path.insert(0, str(load_generator.TESTS))
    if not (options.folder / options.model / "model_index.json").is_file():
        make_checkpoint(options.model, options.folder / options.model)
        torch.cuda.empty_cache()
    print(json.dumps(apart(options, "diffusers")), flush=True)
    one = apart(options, "pipeline")
    print(json.dumps(one), flush=True)
    for gpus in options.gpus:
        row = service(options, gpus)
        loops = one["images_per_second"] * gpus
        row |= {
            "over_loop": round(row["images_per_second"] / loops, 3),
            "steady_over_loop": round(row["steady"] / loops, 3),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
