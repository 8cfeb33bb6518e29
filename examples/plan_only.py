"""Plan without a GPU, without weights and without importing torch: what fits where, as JSON.

python examples/plan_only.py [MACHINE ...]
"""

from __future__ import annotations

import json
import sys

from sana_deploy import compile_plan
from sana_deploy.errors import InfeasibleError


def what_fits(machine: str) -> dict[str, object]:
    """Plan SANA 1.6B with its ControlNet for a machine, e.g. `2x8GiB` or `1xrtx4090`."""
    try:
        plan = compile_plan(["model=sana_1600m_controlnet", "machine=virtual", f"machine.gpus={machine}"])
    except InfeasibleError as problem:
        return {"machine": machine, "fits": False, "why": problem.message, "hint": problem.hint}
    return {
        "machine": machine,
        "fits": True,
        "where": plan.device_map,
        "fullest": round(plan.fullness or 0.0, 2),
        "seconds": plan.estimates.seconds_per_image,
        "exactness": plan.exactness,
    }


def main() -> None:
    """Print one line for each machine."""
    for machine in sys.argv[1:] or ("1x8GiB", "2x8GiB", "1xrtx4090"):
        print(json.dumps(what_fits(machine)))


if __name__ == "__main__":
    main()
