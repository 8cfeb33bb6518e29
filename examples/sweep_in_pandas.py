"""Sweep machines and placements, and read the table in pandas.

    python examples/sweep_in_pandas.py [FOLDER]

FOLDER is that of a sweep which has run, e.g. outputs/multirun/DATE/TIME; without it a small one is run.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd

SWEEP = ["hardware=single_gpu,multi_gpu_balanced", "machine=2x8gb,2xt4,1xrtx4090", "model=sana_1600m_controlnet"]


def read(folder: Path) -> pd.DataFrame:
    """One row a job; what was swept has a column for each key."""
    jobs = pd.read_json(folder / "summary.json", orient="records")
    return jobs.join(pd.json_normalize(jobs.pop("overrides").tolist()))


def main() -> None:
    """Print the fastest deployment of each machine, and why others do not fit."""
    if sys.argv[1:]:
        folder = Path(sys.argv[1])
    else:
        folder = Path("sweep")
        command = [sys.executable, "-m", "sana_deploy", "-m", *SWEEP, "until=compile", f"hydra.sweep.dir={folder}"]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    jobs = read(folder)
    done = jobs[jobs["status"] == "done"].sort_values("estimated_seconds_per_image")
    best = done.groupby("machine", sort=False).first().reset_index()
    print(best[["machine", "hardware", "gpus", "estimated_seconds_per_image", "fullness"]].to_string(index=False))
    for job in jobs[jobs["status"] == "infeasible"].itertuples():
        print(f"{job.machine}, {job.hardware}: {job.reason}")


if __name__ == "__main__":
    main()
