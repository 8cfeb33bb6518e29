"""A plan as a task of SkyPilot, which rents the machine and starts the service (docs.skypilot.co, Task YAML)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..declare.serving import Serving
from ..plan.artifact import Plan
from ..serve.kuberay import NAME, folder_of
from .prices import Price

_KNOWN = """
aws azure cudo do fluidstack gcp hyperbolic ibm lambda mithril nebius oci paperspace primeintellect runpod scp seeweb
shadeform vast verda vsphere yotta
"""
_CLOUDS = frozenset(_KNOWN.split())
"""Providers as SkyPilot 0.14 names them; a task for another one leaves the choice to SkyPilot."""
_ACCELERATORS = {"H100-PCIE": "H100"}
"""GPUs that SkyPilot's catalogue does not tell apart."""
_DECIMAL_GB = 10**9


def task(plan: Plan, price: Price, host_bytes: int, command: str, options: Serving, version: str) -> dict[str, Any]:
    """The task.

    Args:
        price: of the machine; SkyPilot looks for the cheapest one with such GPUs itself.
        host_bytes: host memory that the service takes.
        command: what serves the plan.
        options: of the group `serve`.
        version: of this package.
    """
    resources: dict[str, Any] = {}
    if price.provider in _CLOUDS:
        resources["infra"] = f"{price.provider}/{price.region}" if price.region else price.provider
    resources["accelerators"] = f"{_ACCELERATORS.get(price.gpu, price.gpu)}:{price.gpu_count}"
    resources["memory"] = f"{-(-host_bytes // _DECIMAL_GB)}+"
    resources["use_spot"] = price.spot
    resources["ports"] = options.port
    found: dict[str, Any] = {"name": NAME, "resources": resources}
    paths = [str(folder)] if (folder := folder_of(plan)) else []
    paths += [str(Path(options.keys))] if options.keys else []
    if paths:
        found["file_mounts"] = {path: path for path in paths}
    probe = {"path": "/ready", "initial_delay_seconds": options.startup}
    found["service"] = {"readiness_probe": probe, "replicas": 1}
    found["setup"] = f'pip install "sana-deploy[serve]=={version}"\n'
    found["run"] = f"{command}\n"
    return found
