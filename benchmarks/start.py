"""From start to picture: the whole command in a fresh process, beside a script of ten lines over diffusers.

    python benchmarks/start.py OUT_FOLDER [--model sana_1600m_controlnet] [--rounds 3]
    python benchmarks/start.py OUT_FOLDER --model tiny        # on the CPU: proves the script

Both read the same checkpoint, draw the same request and write a PNG. Warm: the checkpoint's files are in the page
cache. Cold: they are dropped from it before each run (`posix_fadvise`); libraries stay warm. Sides take turns. Writes
start.json and start.md: medians, the ratio pair by pair, and what each side tells of its parts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image

SCRIPT = """
import time, sys
began = time.perf_counter()
import torch
from diffusers import SanaControlNetPipeline
from PIL import Image
source, picture, side, device, out = sys.argv[1:]
half, kept = (torch.float32,) * 2 if device == "cpu" else (torch.float16, torch.bfloat16)
dtypes = {"text_encoder": kept, "vae": kept, "transformer": half, "controlnet": half}
imported = time.perf_counter()
pipeline = SanaControlNetPipeline.from_pretrained(source, dtype=dtypes).to(device)
loaded = time.perf_counter()
pipeline("a lighthouse", control_image=Image.open(picture), height=int(side), width=int(side),
         num_inference_steps=20, use_resolution_binning=False).images[0].save(out)
print(f"import {imported - began:.2f}, load {loaded - imported:.2f}, generate {time.perf_counter() - loaded:.2f}")
"""


def commands(source: Path, side: int, device: str, work: Path) -> dict[str, list[str]]:
    """The two command lines."""
    picture = work / "control.png"
    Image.effect_noise((side, side), 80).convert("RGB").save(picture)
    precision = "fp32" if device == "cpu" else "mixed_bf16"
    ours = [
        sys.executable, "-m", "sana_deploy", "model=checkpoint", f"model.source={source}", "hardware=single_gpu",
        f"precision={precision}", f"workload.height={side}", f"workload.width={side}", "workload.prompt=a lighthouse",
        f"workload.control_image={picture}", f"hydra.run.dir={work / 'run'}",
    ]  # fmt: skip
    if device == "cpu":
        ours.append("hardware.on_shortfall=cpu")
    theirs = [sys.executable, "-c", SCRIPT, str(source), str(picture), str(side), device, str(work / "theirs.png")]
    return {"ours": ours, "diffusers": theirs}


def drop_from_page_cache(source: Path) -> None:
    """Have the next reader of the checkpoint's files wait for the disk."""
    for path in source.rglob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def run(command: list[str]) -> tuple[float, str]:
    """Seconds of one process, and the line in which it tells of its parts."""
    started = time.perf_counter()
    wide = {**os.environ, "COLUMNS": "200"}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=wide)
    seconds = time.perf_counter() - started
    if ended.returncode:
        raise SystemExit(ended.stdout[-2000:] + ended.stderr[-2000:])
    told = re.search(r"^(?:seconds: )?((?:import|load) \d.*)", ended.stdout + ended.stderr, re.MULTILINE)
    return seconds, told.group(1) if told else ""


def measure(options: argparse.Namespace, source: Path, device: str) -> dict[str, Any]:
    """Run both sides in turns, first warm, then cold; the first turn of each kind is not counted."""
    sides = commands(source, options.side, device, options.out)
    rows = []
    for cache in ("warm", "cold"):
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        parts: dict[str, str] = {}
        for number in range(options.rounds + 1):
            for name, command in sides.items():
                if cache == "cold":
                    drop_from_page_cache(source)
                took, parts[name] = run(command)
                if number or cache == "cold":
                    seconds[name].append(took)
        ratio = statistics.median(a / b for a, b in zip(seconds["ours"], seconds["diffusers"], strict=True))
        rows.append({"cache": cache, "seconds": {k: statistics.median(v) for k, v in seconds.items()}, "ratio": ratio,
                     "parts": parts})  # fmt: skip
    return {"model": options.model, "side": options.side, "rows": rows}


def markdown(facts: dict[str, Any]) -> str:
    """One line per state of the page cache."""
    lines = [f"{facts['model']}, {facts['side']} px, 20 steps, {facts['device']}", "",
             "| files | ours, s | diffusers, s | ratio | ours, its parts | diffusers, its parts |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for row in facts["rows"]:
        took, parts = row["seconds"], row["parts"]
        lines.append(f"| {row['cache']} | {took['ours']:.1f} | {took['diffusers']:.1f} | {row['ratio']:.2f} "
                     f"| {parts['ours']} | {parts['diffusers']} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make the checkpoint, measure, and write both files."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="sana_1600m_controlnet")
    parser.add_argument("--side", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("/tmp/sana_deploy_checkpoints"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    options.side = options.side or (512 if options.model == "tiny" else 1024)
    if options.model == "tiny":
        from sana_deploy.facts.tiny import ensure_tiny

        source, device, name = ensure_tiny(), "cpu", "CPU"
    else:
        import torch
        from make_checkpoint import make_checkpoint

        source, device = options.work / options.model, "cuda"
        name = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
        if not (source / "model_index.json").is_file():
            make_checkpoint(options.model, source)
    facts = {"device": name, **measure(options, source, device)}
    (options.out / "start.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    (options.out / "start.md").write_text(markdown(facts), encoding="utf-8")
    print(markdown(facts))


if __name__ == "__main__":
    main()
