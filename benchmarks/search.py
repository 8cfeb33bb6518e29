"""Time and memory of the exact search on machines with many GPUs.

    python benchmarks/search.py [RUNS]

SANA 1.6B + ControlNet at 1024 px in float16, as one unit per component (4), or with a second unit of the transformer
and of ControlNet (6). GPUs that are alike are 24 GiB cards; GPUs that are unlike differ in their free memory, so that
no placement stands for others. Each search is a process of its own; the table gives the median of its seconds, and the
most memory that the process took beyond what it had before the search.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace

from sana_deploy._units import GIB, MIB
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.pipelines import Crossing
from sana_deploy.facts.checkpoint import open_checkpoint
from sana_deploy.facts.known_gpus import KNOWN_GPUS
from sana_deploy.facts.machine import Gpu
from sana_deploy.plan.grid import Rules
from sana_deploy.plan.needs import Measured
from sana_deploy.plan.profile import PipelineProfile, profile_pipeline
from sana_deploy.plan.search import search_balanced
from sana_deploy.plan.units import Unit

CASES = {
    "8 alike, 4 units": (8, True, 4),
    "8 unlike, 4 units": (8, False, 4),
    "16 alike, 6 units": (16, True, 6),
    "8 unlike, 6 units": (8, False, 6),
    "16 unlike, 6 units": (16, False, 6),
}


def profile(units: int) -> PipelineProfile:
    """Profile the pipeline; for 6 units, both halves of guidance have a transformer and a ControlNet of their own."""
    spec = compose_spec(["model=sana_1600m_controlnet", "precision=mixed_bf16"])
    whole = profile_pipeline(open_checkpoint(spec.model), spec.workload.bounds, spec.precision.formats, _no_measure)
    if units == 4:
        return whole
    home, controlnet = whole.pipeline.denoiser, whole.pipeline.of("controlnet")
    further = {Unit(name, 1): whole.components[name] for name in (home, controlnet)}
    second = {unit.component: unit.name for unit in further}
    beside = [
        replace(one, src=second.get(one.src, one.src), dst=second.get(one.dst, one.dst))
        for one in whole.crossings
        if {one.src, one.dst} == {home, controlnet}
    ]
    between = Crossing("noise_pred", second[home], home, 32 * MIB, True)
    return replace(whole, further=further, crossings=(*whole.crossings, *beside, between))


def _no_measure(*_: object) -> Measured:
    raise AssertionError("what this checkpoint needs ships with the package")


def gpus(count: int, alike: bool) -> list[Gpu]:
    """Describe the GPUs of one host."""
    row = KNOWN_GPUS["rtx4090"]
    free = [24 * GIB - (0 if alike else i * 64 * MIB) for i in range(count)]
    return [Gpu(i, row.name, 24 * GIB, free[i], row.capability, row.multiprocessors) for i in range(count)]


def search(case: str) -> dict[str, float]:
    """Search once, and say how long it took and what it found."""
    count, alike, units = CASES[case]
    what, machine = profile(units), gpus(count, alike)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    found = search_balanced(what, machine, Rules())
    seconds = time.perf_counter() - started
    extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": seconds, "extra_mib": extra / 1024, "placements": found.placements, "settings": found.settings,
            "feasible": found.feasible}  # fmt: skip


def main() -> None:
    """Run every case in processes of its own and print the table."""
    if len(sys.argv) > 2:
        print(json.dumps(search(sys.argv[2])))
        return
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    print("| GPUs and units | placements x sets of knobs | fit | seconds | peak MiB |\n|---|---|---|---|---|")
    for case in CASES:
        command = [sys.executable, __file__, str(runs), case]
        done = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(runs)]
        seconds, extra = (statistics.median(one[key] for one in done) for key in ("seconds", "extra_mib"))
        one = done[0]
        print(f"| {case} | {one['placements']:,} x {one['settings']} | {one['feasible']:,} | {seconds:.3f} "
              f"| {extra:.0f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
