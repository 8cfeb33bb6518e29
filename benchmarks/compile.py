"""Whole-process time to a placement of SANA 1.6B + ControlNet: ours against diffusers' own balanced map.

    python benchmarks/compile.py [RUNS]

Both start a new Python. Ours is `python -m sana_deploy until=compile model=sana_1600m_controlnet`; the peer imports
diffusers and calls `_get_final_device_map` on the same configs with two 24 GiB GPUs. Runs alternate; the table
gives medians and the ratio pair by pair.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sana_deploy.declare.pipelines import PIPELINES
from sana_deploy.facts import catalogue
from sana_deploy.facts.published import PUBLISHED

NAME = "sana_1600m_controlnet"
PEER = """
import sys, torch, diffusers
from diffusers import SanaControlNetPipeline
from diffusers.pipelines.pipeline_loading_utils import _get_final_device_map
folder = sys.argv[1]
init = {name: entry for name, entry in SanaControlNetPipeline.load_config(folder).items() if isinstance(entry, list)}
dtype = {"default": torch.bfloat16, "transformer": torch.float16, "controlnet": torch.float16}
memory = {0: 24 * 2**30, 1: 24 * 2**30}
print(_get_final_device_map("balanced", SanaControlNetPipeline, {}, init, diffusers, memory, dtype=dtype,
                            cached_folder=folder, local_files_only=True))
"""


def write_configs(folder: Path, model: str = NAME) -> None:
    """Lay out the shipped configs of `model` as a checkpoint without weights."""
    pipeline = PIPELINES[PUBLISHED[model].pipeline]
    index: dict[str, object] = {"_class_name": pipeline.class_name, "_diffusers_version": "0.42.1"}
    for name, facts in catalogue.load(model).items():
        index[name] = [pipeline.by_name[name].library, facts["class_name"]]
        (folder / name).mkdir()
        config = {**facts["config"], "_class_name": facts["class_name"]}
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def seconds(command: list[str], cwd: Path) -> float:
    """Wall seconds of one whole process."""
    started = time.perf_counter()
    subprocess.run(command, cwd=cwd, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    """Run the pairs and print the table."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "configs").mkdir()
        write_configs(folder / "configs")
        ours = [sys.executable, "-m", "sana_deploy", "until=compile", f"model={NAME}"]
        peer = [sys.executable, "-c", PEER, str(folder / "configs")]
        pairs = [(seconds(ours, folder), seconds(peer, folder)) for _ in range(runs + 1)][1:]
    print(f"{runs} pairs of whole processes after one warm-up, medians")
    print(f"sana_deploy until=compile      {statistics.median(a for a, _ in pairs):6.2f} s")
    print(f"diffusers balanced device map  {statistics.median(b for _, b in pairs):6.2f} s")
    print(f"ratio ours/diffusers, median   {statistics.median(a / b for a, b in pairs):6.3f}")


if __name__ == "__main__":
    main()
