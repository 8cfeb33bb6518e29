"""Rehearse a deployment on machines that you might rent: does it run there, how full are the cards, how fast is it.

    python examples/rehearse_before_renting.py [MACHINE ...]

The real diffusers pipeline runs on virtual GPUs, in shapes: no card, no weights, some seconds for each machine.
"""

from __future__ import annotations

import sys

from sana_deploy import compile_plan, rehearse
from sana_deploy.errors import InfeasibleError


def main() -> None:
    """Print a line for each machine, and exit with 1 where nothing fits."""
    fits = 0
    for machine in sys.argv[1:] or ("1xt4", "2xt4", "1xl4"):
        try:
            plan = compile_plan(["model=sana_1600m_controlnet", "machine=virtual", f"machine.gpus={machine}"])
        except InfeasibleError as problem:
            print(f"{machine}: does not fit. {problem.hint}")
            continue
        report = rehearse(plan, "shapes").report
        sizes = [(gpu.peak_bytes / 2**30, gpu.capacity_bytes / 2**30) for gpu in report.gpus]
        peaks = ", ".join(f"{peak:.2f} of {capacity:.2f} GiB" for peak, capacity in sizes)
        wrong = max(abs(gpu.planned_error) for gpu in report.gpus)
        print(f"{machine}: {peaks}; some {plan.estimates.seconds_per_image:.1f} s an image; plan off by {wrong:.1%}")
        fits += 1
    sys.exit(0 if fits else 1)


if __name__ == "__main__":
    main()
