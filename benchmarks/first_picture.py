"""Seconds from the command to the first picture in a fresh process, with each runtime, cold and warm. Needs a GPU.

    python benchmarks/first_picture.py FOLDER [--model sana_1600m_controlnet] [--sides 512 1024] [--turns 3]

FOLDER gets a checkpoint with random weights, unless it is there (`make_checkpoint.py`). A row has the wall seconds of
a process and what outcome.json says of its stages and phases; `compile` are the calls in which blocks were compiled.
The cold process finds a new cache folder, the warm ones what it compiled: the last of them is shown, and the median of
their wall seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from make_checkpoint import make_checkpoint

RUNTIMES = ("eager", "graphs", "compiled")


def drawn(folder: Path, side: int, runtime: str, cache: str) -> dict[str, Any]:
    """Draw one picture by a process of its own that keeps what it compiles in `cache`."""
    environment = {**os.environ, "SANA_DEPLOY_CACHE": cache}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    command = [
        sys.executable, "-m", "sana_deploy", "model=checkpoint", f"model.source={folder}", "hardware=single_gpu",
        "hardware.allow=[]", "precision=mixed_bf16", f"runtime={runtime}", "workload.prompt=a lighthouse",
        f"workload.height={side}", f"workload.width={side}", "workload.seed=1", "output=json",
        f"hydra.run.dir={cache}/run",
    ]  # fmt: skip
    started = time.perf_counter()
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    wall, outcome = time.perf_counter() - started, json.loads(ended.stdout)
    said = [one["message"] for one in outcome["diagnostics"] if one["type"] in ("uncompiled", "eager_calls")]
    return {"wall": round(wall, 2), **outcome["measured"]["seconds"], "said": said, "error": outcome["error"]}


def main() -> None:
    """Print one JSON line per case and runtime."""
    parser = argparse.ArgumentParser(description="seconds to the first picture of a fresh process")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="sana_1600m_controlnet")
    parser.add_argument("--sides", type=int, nargs="*", default=[512, 1024])
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    if not (options.folder / "model_index.json").is_file():
        make_checkpoint(options.model, options.folder)
    for side in options.sides:
        for runtime in RUNTIMES:
            with tempfile.TemporaryDirectory() as cache:
                cold, *warm = (drawn(options.folder, side, runtime, cache) for _ in range(1 + options.turns))
            row = {"side": side, "runtime": runtime, "cold": cold, "warm": warm[-1]}
            print(json.dumps(row | {"warm_wall": median(one["wall"] for one in warm)}), flush=True)


if __name__ == "__main__":
    main()
