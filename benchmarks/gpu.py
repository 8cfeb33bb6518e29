"""Predicted against measured memory on one real GPU, per phase: the plan, the rehearsal, and the card itself.

    python benchmarks/gpu.py OUT_FOLDER [--models sana_600m_controlnet,...] [--work FOLDER]

Needs one GPU of 24 GB or more and no network: full-size checkpoints with random weights are made in the work folder.
For every model, precision, resolution and batch it compiles a plan, rehearses it in shapes on a virtual copy of this
GPU, then runs the request for real (2 steps) and reads PyTorch's peak per phase, the peak reserved, and what the
driver reports. Writes gpu.json and gpu.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from make_checkpoint import make_checkpoint

from sana_deploy.boundary import border_of
from sana_deploy.compile import compile_spec
from sana_deploy.compose import compose_spec
from sana_deploy.cost import CONTEXT_BYTES
from sana_deploy.generate import PHASE_OF, PhaseClock, run_request
from sana_deploy.load import load_pipeline
from sana_deploy.machine import probe_torch
from sana_deploy.rehearsal import rehearse
from sana_deploy.units import GIB

CASES = [(512, 1), (1024, 1), (1024, 4), (2048, 1)]
PRECISIONS = ("mixed_bf16", "bf16")


class PhasePeaks:
    """Border observer: PyTorch's peak of allocated bytes in every phase."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self.phase = "load"

    def __call__(self, event: str, place: str) -> None:
        if event == "enter" and PHASE_OF[place] != self.phase:
            self.close()
            self.phase = PHASE_OF[place]

    def close(self) -> None:
        """Note the phase that ends, and begin anew."""
        torch.cuda.synchronize()
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()


def measure(source: Path, precision: str, side: int, batch: int) -> dict[str, Any]:
    """Plan, rehearse and run one case."""
    gpu = probe_torch().gpus[0]
    base = ["model=checkpoint", f"model.source={source}", f"precision={precision}", "hardware=single_gpu"]
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
    peaks, border = PhasePeaks(), border_of(pipeline)
    assert border is not None
    torch.cuda.reset_peak_memory_stats()
    border.observers.append(peaks)
    run_request(pipeline, plan.spec.workload)
    peaks.close()
    border.observers.remove(peaks)
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.max_memory_reserved()
    row = {
        "model": source.name, "precision": precision, "side": side, "batch": batch,
        "weights_bytes": weights, "planned_weights_bytes": plan.slots[0].weights_bytes,
        "measured_phase_bytes": {k: v for k, v in peaks.peaks.items() if k != "load"},
        "rehearsed_phase_bytes": {k: v for k, v in rehearsed.phase_peaks.items() if k != "load"},
        "planned_bytes": plan.slots[0].weights_bytes + plan.slots[0].activation_bytes,
        "reserved_bytes": reserved, "driver_bytes": total - free,
        "context_bytes": total - free - torch.cuda.memory_reserved(), "load_seconds": round(loaded, 3),
    }  # fmt: skip
    clock = PhaseClock([torch.device("cuda:0")])
    border.observers.append(clock)
    run_request(pipeline, plan.spec.workload)
    clock.switch(None)
    row["seconds"] = {phase: round(seconds, 4) for phase, seconds in clock.seconds.items()}
    pipeline.reset_device_map()
    del pipeline
    gc.collect()
    torch.cuda.empty_cache()
    return row


def markdown(facts: dict[str, Any]) -> str:
    """Render the rows: measured GiB per phase, and how far rehearsal and plan are from them."""
    lines = [
        f"{facts['gpu']}, torch {facts['torch']}, diffusers {facts['diffusers']}, transformers {facts['transformers']}",
        "",
        "| model | precision | px | batch | phase | measured GiB | rehearsed | plan | reserved GiB | context MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in facts["rows"]:
        fullest = max(row["measured_phase_bytes"].values())
        for phase, measured in row["measured_phase_bytes"].items():
            rehearsed = row["rehearsed_phase_bytes"].get(phase, 0) / measured - 1
            plan = f"{row['planned_bytes'] / measured - 1:+.1%}" if measured == fullest else ""
            lines.append(
                f"| {row['model']} | {row['precision']} | {row['side']} | {row['batch']} | {phase} "
                f"| {measured / GIB:.3f} | {rehearsed:+.1%} | {plan} "
                f"| {row['reserved_bytes'] / GIB:.2f} | {row['context_bytes'] / 2**20:.0f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all cases and write both files after each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", default="sana_600m_controlnet,sana_1600m_controlnet")
    parser.add_argument("--work", type=Path, default=Path("/tmp/sana_deploy_checkpoints"))
    options = parser.parse_args()
    facts: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "diffusers": diffusers.__version__,
        "transformers": transformers.__version__, "python": platform.python_version(),
        "assumed_context_bytes": CONTEXT_BYTES, "rows": [],
    }  # fmt: skip
    for model in options.models.split(","):
        started = time.perf_counter()
        source = make_checkpoint(model, options.work / model)
        print(f"made {model} in {time.perf_counter() - started:.0f} s", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        for precision in PRECISIONS:
            for side, batch in CASES:
                facts["rows"].append(measure(source, precision, side, batch))
                options.out.mkdir(parents=True, exist_ok=True)
                (options.out / "gpu.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
                (options.out / "gpu.md").write_text(markdown(facts), encoding="utf-8")
                print(f"{model} {precision} {side} x{batch} done", flush=True)
    print(markdown(facts))


if __name__ == "__main__":
    main()
