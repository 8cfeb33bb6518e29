"""Applying a plan, ours beside diffusers in one run: bytes moved, hook cost, loading, and equal numbers.

    python benchmarks/apply.py [--out docs/apply.md] [--work FOLDER] [--skip-loading]

Bytes are counted on virtual GPUs (1.6B, 1024 px, 20 steps). The hook's cost is the denoising loop of the tiny model on
this CPU, placed, unplaced and with accelerate's hooks (as `device_map="balanced"` attaches them), interleaved; medians
of ratios. Loading is a full-size checkpoint with random weights, about 10 GB, made in the work folder and deleted
afterwards, to the CPU in `mixed_bf16`, each run in a process of its own; the usual recipe is `from_pretrained` in
float16, then two `.to(bfloat16)`. *Resident* counts the mapped files' pages too, *own* memory does not.
Of files in float16 both sides cast the text encoder and the VAE and map the rest: little is left to win there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

MIB, GIB = 2**20, 2.0**30
PLACEMENTS = {
    "text_encoder, vae / transformer, controlnet": {"text_encoder": 0, "vae": 0, "transformer": 1, "controlnet": 1},
    "text_encoder, controlnet / transformer, vae": {"text_encoder": 0, "vae": 1, "transformer": 1, "controlnet": 0},
}
STORED = {"as the plan wants it": [], "bfloat16": ["--dtype", "bfloat16"], "float16": ["--dtype", "float16"]}


def traffic() -> list[str]:
    """Bytes between GPUs, ours and accelerate's hooks on the same placement."""
    import diffusers
    from placement import accelerated

    from sana_deploy import rehearse
    from sana_deploy.api import compile_spec
    from sana_deploy.declare.compose import compose_spec

    diffusers.utils.logging.set_verbosity_error()
    lines = ["| placement | per step, ours | theirs | per image, ours | theirs |", "|---|---|---|---|---|"]
    for words, found in PLACEMENTS.items():
        places = ", ".join(f"{name}: {place}" for name, place in found.items())
        spec = compose_spec(
            ["model=sana_1600m_controlnet", "machine=virtual", "machine.gpus=2xa100", "hardware=custom_map",
             f"hardware.device_map={{{places}}}"]
        )  # fmt: skip
        report = rehearse(compile_spec(spec)).report
        step = sum(moved.bytes_per_step for moved in report.transfers)
        image = sum(moved.bytes_per_image for moved in report.transfers)
        other = accelerated(spec, found)
        cells = (step, other.step_bytes, image, other.total_bytes)
        lines.append(f"| {words} | {' | '.join(f'{value / MIB:.1f} MiB' for value in cells)} |")
    return lines


def hooks(rounds: int) -> list[str]:
    """Seconds of the denoising loop with our hooks and with accelerate's, over those without any."""
    from accelerate import dispatch_model
    from diffusers import SanaControlNetPipeline

    from sana_deploy.api import compile_spec
    from sana_deploy.declare.compose import compose_spec
    from sana_deploy.declare.control_image import read_control_image
    from sana_deploy.declare.pipelines import COMPONENTS
    from sana_deploy.facts.tiny import ensure_tiny
    from sana_deploy.run.place import place

    spec = compose_spec(["precision=fp32", "workload.height=256", "workload.width=256"])
    sides = {name: SanaControlNetPipeline.from_pretrained(ensure_tiny()) for name in ("plain", "ours", "theirs")}
    place(sides["ours"], compile_spec(spec).resolve())
    for name in COMPONENTS:
        dispatch_model(getattr(sides["theirs"], name), device_map={"": "cpu"}, force_hooks=True)
    picture = read_control_image(spec.workload, spec.workload.bounds)

    def run(pipeline: Any) -> tuple[float, Any]:
        times: list[float] = []

        def step_end(_: Any, __: int, ___: Any, values: dict[str, Any]) -> dict[str, Any]:
            times.append(time.perf_counter())
            return values

        pipeline.set_progress_bar_config(disable=True)
        result = pipeline(
            "a lighthouse", control_image=picture, height=256, width=256, num_inference_steps=20, output_type="pt",
            use_resolution_binning=False, generator=torch.Generator().manual_seed(0), callback_on_step_end=step_end,
        )  # fmt: skip
        return times[-1] - times[0], result.images

    seconds: dict[str, list[float]] = {name: [] for name in sides}
    images = {}
    for _ in range(rounds + 1):
        for name, pipeline in sides.items():
            took, images[name] = run(pipeline)
            seconds[name].append(took)
    lines = ["| hooks | loop over the unplaced one, median | modules hooked |", "|---|---|---|"]
    for name in ("ours", "theirs"):
        ratio = statistics.median(a / b for a, b in zip(seconds[name][1:], seconds["plain"][1:], strict=True))
        count = sum(hasattr(m, "_hf_hook") for part in COMPONENTS for m in getattr(sides[name], part).modules())
        lines.append(f"| {name} | {ratio:.3f} | {count} |")
    same = torch.equal(images["ours"], images["plain"])
    return [*lines, "", f"Image of the placed pipeline equal to the unplaced one, bit for bit: {same}."]


def load_once(side: str, source: str, watched: bool) -> None:
    """Load in this process, touch every page, and print seconds and peaks as JSON; memory only where it is watched."""
    import resource

    from host_memory import Peak, anonymous_peak

    if side == "ours":
        from sana_deploy import compile_plan, load_pipeline

        plan = compile_plan(["model=checkpoint", f"model.source={source}", "hardware=single_gpu"])
    from diffusers import SanaControlNetPipeline

    started = time.perf_counter()
    with anonymous_peak() if watched else nullcontext(Peak()) as peak:
        if side == "ours":
            pipeline = load_pipeline(plan)
        else:
            pipeline = SanaControlNetPipeline.from_pretrained(source, dtype=torch.float16)
            pipeline.text_encoder.to(torch.bfloat16)
            pipeline.vae.to(torch.bfloat16)
        for name in ("text_encoder", "vae", "transformer", "controlnet"):
            for tensor in getattr(pipeline, name).parameters():
                tensor.data.view(torch.uint8).flatten()[::4096].sum().item()
    seconds = time.perf_counter() - started
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "resident": resident, "own": peak.bytes}))


def loading(work: Path, rounds: int) -> list[str]:
    """Seconds and memory of loading, for checkpoints stored in different dtypes."""
    lines = [
        "| stored in | seconds, ours / recipe | peak resident, ours / recipe | own memory, ours / recipe |",
        "|---|---|---|---|",
    ]
    source, script = work / "checkpoint", Path(__file__).with_name("make_checkpoint.py")
    for words, dtype in STORED.items():  # in a process of its own: what it needs is given back
        subprocess.run(
            [sys.executable, script, "sana_1600m_controlnet", source, *dtype], capture_output=True, check=True
        )
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
        for turn in range(rounds + 2):  # the first warms up, the last is watched
            for side, found in runs.items():
                command = [sys.executable, __file__, "--load", side, str(source)]
                command += ["--watched"] if turn > rounds else []
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found.append(json.loads(done.stdout.splitlines()[-1]))
        shutil.rmtree(source)
        cells = []
        for key, unit, kept in (
            ("seconds", 1.0, slice(1, -1)),
            ("resident", GIB, slice(1, -1)),
            ("own", GIB, slice(-1, None)),
        ):
            mine, other = (statistics.median(run[key] / unit for run in found[kept]) for found in runs.values())
            cells.append(f"{mine / other:.2f} ({mine:.1f} / {other:.1f}{'' if unit == 1 else ' GiB'})")
        lines.append(f"| {words} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Run all parts and print them as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the result, with this text before it, to a file")
    parser.add_argument("--work", type=Path, help="folder for the checkpoint; a temporary one unless given")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--skip-loading", action="store_true")
    parser.add_argument("--load", nargs=2, metavar=("SIDE", "SOURCE"), help=argparse.SUPPRESS)
    parser.add_argument("--watched", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        side, source = options.load
        load_once(side, source, options.watched)
        return
    parts = [["## Bytes between GPUs", "", *traffic()], ["## Hooks", "", *hooks(options.rounds)]]
    if not options.skip_loading:
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            parts.append(["## Loading", "", *loading(Path(folder), 3)])
    text = "\n\n".join("\n".join(part) for part in parts) + "\n"
    print(text)
    if options.out:
        head = "# Applying: ours beside diffusers\n\n" + str(__doc__).replace("    python", "    $ python")
        options.out.write_text(head + "\n" + text, encoding="utf-8")


if __name__ == "__main__":
    main()
