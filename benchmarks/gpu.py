"""Predicted against measured memory on one real GPU, per phase: the plan, the rehearsal, and the card itself.

    python benchmarks/gpu.py OUT_FOLDER [--models sana_600m_controlnet,...] [--work FOLDER]

Needs one GPU of 24 GB or more and no network: full-size checkpoints with random weights are made in the work folder.
For every model, precision, resolution, batch and set of knobs it compiles a plan, rehearses it in shapes on a virtual
copy of this GPU, then runs the request for real (2 steps), makes sure that the picture is lively, and reads PyTorch's
peak per phase, the peak reserved, what the driver reports, and the seconds of a second run. Then for each model:
whether VAE slicing changes a bit and what it costs, loading in GB/s beside the copy bandwidth, the denoising step with
and without the border hooks, a request with and without the search for NaN, and the step with compiled transformer
blocks, hooked and bare; pairs are interleaved.
Quantised precisions are left out where their libraries are not installed. Writes gpu.json and gpu.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import SanaControlNetPipeline
from host_memory import anonymous_peak
from lively import liveliness
from make_checkpoint import make_checkpoint

from sana_deploy import rehearse
from sana_deploy._units import GIB
from sana_deploy.api import compile_spec
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.control_image import read_control_image
from sana_deploy.declare.pipelines import DEFAULT
from sana_deploy.declare.policies import quantization_of
from sana_deploy.errors import InvalidSpecError
from sana_deploy.facts.allocator import context_bytes
from sana_deploy.facts.machine import probe_torch
from sana_deploy.run.generate import run_request
from sana_deploy.run.hook import border_of
from sana_deploy.run.load import load_pipeline
from sana_deploy.run.nan_guard import NumericsGuard
from sana_deploy.run.offload import pinned
from sana_deploy.run.phase_clock import PhaseClock
from sana_deploy.run.place import place, unplace
from sana_deploy.run.quantize import require

CASES = [
    ("mixed_bf16", 512, 1, ""),
    ("mixed_bf16", 1024, 1, ""),
    ("mixed_bf16", 1024, 1, "encode_once"),
    ("mixed_bf16", 1024, 1, "vae_slicing"),
    ("mixed_bf16", 1024, 4, ""),
    ("mixed_bf16", 1024, 4, "encode_once"),
    ("mixed_bf16", 1024, 4, "vae_slicing"),
    ("mixed_bf16", 1024, 1, "text_encoder_offload"),
    ("mixed_bf16", 2048, 1, "encode_once"),
    ("mixed_bf16", 2048, 1, "vae_slicing,vae_tiling"),
    ("bf16", 1024, 1, ""),
    ("fp16", 1024, 1, ""),
    ("mixed_fp32", 1024, 1, "encode_once"),
    ("fp32", 1024, 1, "encode_once"),
    ("bf16", 2048, 1, "vae_slicing,vae_tiling"),
    ("int8_text_encoder", 1024, 1, ""),
    ("int8", 1024, 1, ""),
    ("nf4", 1024, 1, ""),
]
"""Precision, side in pixels, batch, knobs."""


ON_ONE = "hardware.device_map={text_encoder: 0, vae: 0, transformer: 0, controlnet: 0}"


class PhasePeaks:
    """Border observer: PyTorch's peak of allocated bytes in every phase."""

    def __init__(self, phase_of: Mapping[str, str]) -> None:
        self.phase_of = phase_of
        self.peaks: dict[str, int] = {}
        self.phase = "load"

    def __call__(self, event: str, place: str) -> None:
        phase = self.phase_of.get(place)
        if event == "enter" and phase and phase != self.phase:
            self.close()
            self.phase = phase

    def close(self) -> None:
        """Note the phase that ends, and begin anew."""
        torch.cuda.synchronize()
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()


def measure(source: Path, precision: str, side: int, batch: int, knobs: str) -> dict[str, Any]:
    """Plan, rehearse and run one case."""
    gpu = probe_torch().gpus[0]
    base = ["model=checkpoint", f"model.source={source}", f"precision={precision}", "hardware=custom_map", ON_ONE]
    base += [f"hardware.knobs=[{knobs}]"]
    base += [f"workload.height={side}", f"workload.width={side}", f"workload.batch={batch}", "workload.steps=2"]
    twin = ["machine=virtual", f"machine.gpus={gpu.total_bytes // 2**20}MiB", "machine.fidelity=shapes"]
    rehearsed = rehearse(compile_spec(compose_spec([*base, *twin]))).report.gpus[0]
    plan = compile_spec(compose_spec(base))
    gc.collect()
    torch.cuda.empty_cache()
    started = time.perf_counter()
    pipeline = load_pipeline(plan)
    torch.cuda.synchronize()
    loaded = time.perf_counter() - started
    weights = torch.cuda.memory_allocated()
    peaks, border = PhasePeaks(plan.pipeline.phase_of), border_of(pipeline)
    torch.cuda.reset_peak_memory_stats()
    border.observers.append(peaks)
    run_request(pipeline, plan.spec.workload.bounds, plan.spec.workload.request)
    peaks.close()
    border.observers.remove(peaks)
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.max_memory_reserved()
    row = {
        "model": source.name, "precision": precision, "side": side, "batch": batch, "knobs": knobs,
        "planned_seconds": plan.estimates.seconds,
        "weights_bytes": weights, "planned_weights_bytes": plan.slots[0].weights_bytes,
        "measured_phase_bytes": {k: v for k, v in peaks.peaks.items() if k != "load"},
        "rehearsed_phase_bytes": {k: v for k, v in rehearsed.phase_peaks.items() if k != "load"},
        "planned_bytes": plan.slots[0].weights_bytes + plan.slots[0].activation_bytes + plan.slots[0].allocator_bytes,
        "allocator_bytes": plan.slots[0].allocator_bytes, "reserved_bytes": reserved, "driver_bytes": total - free,
        "context_bytes": total - free - torch.cuda.memory_reserved(), "load_seconds": round(loaded, 3),
    }  # fmt: skip
    clock = PhaseClock(plan.pipeline, border.host, [torch.device("cuda:0")])
    border.observers.append(clock)
    pixels, _ = run_request(pipeline, plan.spec.workload.bounds, plan.spec.workload.request)
    clock.switch(None)
    border.observers.remove(clock)
    asked = plan.spec.workload
    uncontrolled, _ = run_request(pipeline, asked.bounds, asked.request.model_copy(update={"conditioning_scale": 0.0}))
    row["picture"] = liveliness(pixels, uncontrolled)
    row["seconds"] = {phase: round(seconds, 4) for phase, seconds in clock.seconds.items()}
    pipeline.reset_device_map()
    del pipeline, pixels, uncontrolled
    gc.collect()
    torch.cuda.empty_cache()
    return row


def timed(work: Callable[[], Any], rounds: int = 7) -> float:
    """Median seconds of `work` on the GPU, after one run to warm up."""
    times = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def extras(source: Path) -> dict[str, Any]:
    """Slicing, loading, hooks, guard and compiled blocks of one model at 1024 px in mixed_bf16."""
    base = ["model=checkpoint", f"model.source={source}", "precision=mixed_bf16", "hardware=single_gpu"]
    plan = compile_spec(compose_spec([*base, "workload.height=1024", "workload.width=1024", "workload.steps=20"]))
    found = {"model": source.name, "copy_gbps": copy_rate(), **load_costs(plan, source)}
    pipeline = load_pipeline(plan)
    found |= {"slicing": slicing_cost(pipeline.vae), "step_seconds": hook_cost(pipeline, plan)}
    found["guarded_ratio"] = guard_cost(pipeline, plan)
    for block in pipeline.transformer.transformer_blocks:  # diffusers 0.42 names no repeated blocks for SANA
        block.compile()
    return {**found, "compiled_step_seconds": hook_cost(pipeline, plan)}


def copy_rate() -> float:
    """GB/s of copying 1 GiB of pinned memory to the GPU."""
    host = pinned(torch.empty(2**30, dtype=torch.uint8))
    there = torch.empty_like(host, device="cuda")

    def copy() -> None:
        there.copy_(host, non_blocking=True)

    return host.nbytes / timed(copy) / 1e9


def load_costs(plan: Any, source: Path) -> dict[str, dict[str, float]]:
    """GB/s of weights from the page cache to the GPU, and the host's own memory at its peak, ours and diffusers'."""
    dtypes = {name: getattr(torch, part.dtype) for name, part in plan.components.items()}
    weights = sum(part.weights_bytes for part in plan.components.values())
    sides: dict[str, Callable[[], Any]] = {
        "ours": lambda: load_pipeline(plan),
        "from_pretrained": lambda: SanaControlNetPipeline.from_pretrained(source, dtype=dtypes, device_map="cuda"),
    }
    rates, own = {}, {}
    for side, load in sides.items():
        seconds = []
        with anonymous_peak() as peak:
            load()
        own[side] = peak.bytes
        for _ in range(3):
            gc.collect()
            torch.cuda.empty_cache()
            started = time.perf_counter()
            pipeline = load()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
            del pipeline
        rates[side] = weights / min(seconds) / 1e9
    return {"load_gbps": rates, "load_own_bytes": own}


def slicing_cost(vae: Any) -> dict[str, Any]:
    """Whether one image at a time gives the same bits, and its seconds over those of two at once."""
    pixels = torch.randn(1, 3, 1024, 1024, device="cuda", dtype=torch.bfloat16).repeat(2, 1, 1, 1)
    results, seconds = [], []
    with torch.no_grad():
        for sliced in (False, True):
            (vae.enable_slicing if sliced else vae.disable_slicing)()
            results.append(vae.encode(pixels).latent)
            seconds.append(timed(lambda: vae.encode(pixels)))
    vae.disable_slicing()
    whole, apart = results
    return {
        "bit_identical": torch.equal(whole, apart),
        "ratio": seconds[1] / seconds[0],
        "largest_difference": float((whole - apart).abs().max()),
        "largest": float(whole.abs().max()),
    }


def hook_cost(pipeline: Any, plan: Any) -> dict[str, float]:
    """Median seconds of a denoising step with the border hooks and without, rounds interleaved."""
    resolved, steps = plan.resolve(), plan.spec.workload.steps
    picture = read_control_image(plan.spec.workload, plan.spec.workload.bounds)
    found: dict[str, list[float]] = {"hooked": [], "bare": []}

    def run() -> float:
        times: list[float] = []

        def step_end(_: Any, __: int, ___: Any, values: dict[str, Any]) -> dict[str, Any]:
            torch.cuda.synchronize()
            times.append(time.perf_counter())
            return values

        pipeline.set_progress_bar_config(disable=True)
        pipeline("a lighthouse", control_image=picture, height=1024, width=1024, num_inference_steps=steps,
                 use_resolution_binning=False, output_type="latent", callback_on_step_end=step_end)  # fmt: skip
        return (times[-1] - times[0]) / int(steps - 1)

    run()
    for _ in range(5):
        found["hooked"].append(run())
        unplace(pipeline)
        found["bare"].append(run())
        place(pipeline, resolved)
    ratio = statistics.median(a / b for a, b in zip(found["hooked"], found["bare"], strict=True))
    return {**{key: statistics.median(values) for key, values in found.items()}, "ratio": ratio}


def guard_cost(pipeline: Any, plan: Any, rounds: int = 7) -> float:
    """Median over pairs of a whole request with the search for NaN over one without."""
    border, workload = border_of(pipeline), plan.spec.workload
    ratios: list[float] = []

    def seconds(inspected: bool) -> float:
        guard = NumericsGuard(plan.pipeline, dict.fromkeys(plan.components, ""))
        border.on_outputs[:] = [guard] if inspected else []
        torch.cuda.synchronize()
        started = time.perf_counter()
        on_step = (lambda done, of: guard.step_done()) if inspected else None
        run_request(pipeline, workload.bounds, workload.request, on_step)
        guard.check()
        torch.cuda.synchronize()
        border.on_outputs.clear()
        return time.perf_counter() - started

    for _ in range(rounds):
        ratios.append(seconds(True) / seconds(False))
    return statistics.median(ratios)


def markdown(facts: dict[str, Any]) -> str:
    """Render the rows: measured GiB per phase, and how far rehearsal and plan are from them."""
    lines = [
        f"{facts['gpu']}, torch {facts['torch']}, diffusers {facts['diffusers']}, transformers {facts['transformers']}",
        "",
        "| model | precision | px | batch | knobs | phase | measured GiB | rehearsed | plan | seconds "
        "| estimated / measured | reserved GiB | context MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in facts["rows"]:
        fullest = max(row["measured_phase_bytes"].values())
        for phase, measured in row["measured_phase_bytes"].items():
            rehearsed = (row["rehearsed_phase_bytes"].get(phase, 0) + row["allocator_bytes"]) / measured - 1
            plan = f"{row['planned_bytes'] / measured - 1:+.1%}" if measured == fullest else ""
            lines.append(
                f"| {row['model']} | {row['precision']} | {row['side']} | {row['batch']} | {row['knobs']} | {phase} "
                f"| {measured / GIB:.3f} | {rehearsed:+.1%} | {plan} | {row['seconds'][phase]:.3f} "
                f"| {row['planned_seconds'][phase] / row['seconds'][phase]:.2f} "
                f"| {row['reserved_bytes'] / GIB:.2f} | {row['context_bytes'] / 2**20:.0f} |"
            )
    for found in facts["extras"]:
        cut, steps, loads = found["slicing"], found["step_seconds"], found["load_gbps"]
        compiled, own = found["compiled_step_seconds"], found["load_own_bytes"]
        lines += [
            "",
            f"{found['model']}: VAE slicing of the control image, bit-identical: {cut['bit_identical']} (largest "
            f"difference {cut['largest_difference']:.3g} of {cut['largest']:.3g}), seconds x {cut['ratio']:.2f}; "
            f"loading {loads['ours']:.2f} GB/s, from_pretrained {loads['from_pretrained']:.2f} GB/s, pinned copy "
            f"{found['copy_gbps']:.1f} GB/s, own host memory {own['ours'] / 2**20:.0f} and "
            f"{own['from_pretrained'] / 2**20:.0f} MiB; a step with border hooks over one without: "
            f"{steps['ratio']:.3f} ({1000 * steps['hooked']:.1f} ms); a request that is searched for NaN over one "
            f"that is not: {found['guarded_ratio']:.3f}; with compiled blocks a step takes "
            f"{1000 * compiled['hooked']:.1f} ms with border hooks, {1000 * compiled['bare']:.1f} without.",
        ]
    return "\n".join(lines) + "\n"


def save(facts: dict[str, Any], folder: Path) -> None:
    """Write both files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    (folder / "gpu.md").write_text(markdown(facts), encoding="utf-8")


def runs_here(precision: str) -> bool:
    """Whether the libraries that a precision needs are installed."""
    try:
        for quantization in quantization_of(precision, DEFAULT).values():
            require(quantization)
    except InvalidSpecError as problem:
        print(f"{precision} left out: {problem.message}", flush=True)
        return False
    return True


def main() -> None:
    """Run all cases and write both files after each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", default="sana_600m_controlnet,sana_1600m_controlnet")
    parser.add_argument("--precisions", help="only these, comma-separated")
    parser.add_argument("--work", type=Path, default=Path("/tmp/sana_deploy_checkpoints"))
    options = parser.parse_args()
    facts: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "diffusers": diffusers.__version__,
        "transformers": transformers.__version__, "python": platform.python_version(),
        "assumed_context_bytes": context_bytes(torch.cuda.get_device_capability()), "rows": [], "extras": [],
    }  # fmt: skip
    cases = [case for case in CASES if case[0] in (options.precisions or case[0]).split(",") and runs_here(case[0])]
    for model in options.models.split(","):
        started = time.perf_counter()
        source = make_checkpoint(model, options.work / model)
        print(f"made {model} in {time.perf_counter() - started:.0f} s", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        for case in cases:
            facts["rows"].append(measure(source, *case))
            save(facts, options.out)
            print(model, *case, "done", flush=True)
        facts["extras"].append(extras(source))
        save(facts, options.out)
    print(markdown(facts))


if __name__ == "__main__":
    main()
