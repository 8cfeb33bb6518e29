"""A compile sweep of 1,000 deployments beside the multirun of an empty Hydra app of the same size.

    python benchmarks/sweep.py [--jobs 1000] [--rounds 1]

Both compose the same configuration for the same jobs in one process; the empty app's task does nothing and it sums
nothing up. Prints the ratio of the two whole commands and, from a run under a profiler, the share of each stage.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sana_deploy.declare.compose import conf_dir

EMPTY = """
import hydra
@hydra.main(version_base="1.3", config_path={conf!r}, config_name="config")
def app(config): pass
app()
"""
STAGES = {
    "Hydra composes, twice a job": "load_sweep_config",
    "  once to check all jobs before the first": "validate_batch_is_legal",
    "Hydra's folders, logs and .hydra": "run_job",
    "our declaration": "spec_from_config",
    "our compile": "compile_spec",
    "our plan.json": "save",
    "our report.html": "_write_page",
    "our summary": "summarise",
}
"""Stage -> the function whose time it is, with all that it calls."""


def arguments(jobs: int) -> list[str]:
    """Overrides of at least `jobs` combinations: models x strategies x precisions x machines x image sizes."""
    sides = ",".join(str(32 * n) for n in range(8, 8 + -(-jobs // 100)))
    return [
        "-m", "until=compile", "model=sana_600m_controlnet,sana_1600m_controlnet",
        "hardware=single_gpu,multi_gpu_balanced", "precision=fp16,mixed_bf16,mixed_fp32,bf16,fp32",
        "machine=2xt4,2xrtx4090,8xh100,2xrtx3060,2xl4", f"workload.height={sides}",
    ]  # fmt: skip


def seconds(command: list[str], folder: Path) -> float:
    """Wall seconds of a whole command in an empty folder."""
    folder.mkdir()
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, capture_output=True, env={**os.environ, "NO_COLOR": "1"})
    return time.perf_counter() - started


def shares(jobs: int, folder: Path) -> dict[str, float]:
    """Seconds per stage of a sweep in this process, under a profiler."""
    from sana_deploy.__main__ import main

    folder.mkdir()
    os.chdir(folder)
    sys.argv = ["sana_deploy", *arguments(jobs)]
    profiler = cProfile.Profile()
    profiler.enable()
    try:
        main()
    except SystemExit:
        pass
    finally:
        profiler.disable()
    found = {"all": 0.0, **dict.fromkeys(STAGES, 0.0)}
    stats = pstats.Stats(profiler)
    for (file, _, name), (_, _, _, cumulative, _) in stats.stats.items():  # type: ignore[attr-defined]
        for stage, function in STAGES.items():
            if name == function and ("hydra" in file) == stage.strip().startswith(("Hydra", "once")):
                found[stage] = max(found[stage], cumulative)
        if name == "main" and file.endswith("__main__.py"):
            found["all"] = cumulative
    ours = sum(found[stage] for stage in ("our declaration", "our compile", "our plan.json", "our report.html"))
    found["Hydra's folders, logs and .hydra"] -= ours
    return found


def main() -> None:
    """Run both and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        script = root / "empty.py"
        script.write_text(EMPTY.format(conf=str(conf_dir())), encoding="utf-8")
        given = arguments(options.jobs)
        times: dict[str, list[float]] = {"ours": [], "empty": []}
        for number in range(options.rounds):
            ours = seconds([sys.executable, "-m", "sana_deploy", *given], root / f"ours{number}")
            empty = seconds([sys.executable, str(script), *given, "hydra.callbacks={}"], root / f"empty{number}")
            times["ours"].append(ours)
            times["empty"].append(empty)
            count = len(list((root / f"ours{number}").glob("outputs/multirun/*/*/*/plan.json")))
            print(f"{count} plans: {ours:.1f} s, empty {empty:.1f} s, {1000 * (ours - empty) / count:.1f} ms a plan")
        ratio = statistics.median(a / b for a, b in zip(times["ours"], times["empty"], strict=True))
        print(f"whole command over the empty app's, median of {options.rounds}: {ratio:.2f}")
        found = shares(100, root / "profiled")
        for stage, spent in found.items():
            print(f"{stage:<44} {spent / found['all']:6.1%}")


if __name__ == "__main__":
    main()
