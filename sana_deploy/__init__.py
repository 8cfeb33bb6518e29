"""Compile where and how a SANA ControlNet pipeline runs into a checked placement plan, and run it.

    from sana_deploy import compile_plan, load_pipeline
    plan = compile_plan(["hardware=multi_gpu_balanced"])
    pipeline = load_pipeline(plan.resolve())

Names are imported on first use: `import sana_deploy` itself imports nothing heavy, and never torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .compile import compile_plan as compile_plan
    from .errors import SanaDeployError as SanaDeployError
    from .load import load_pipeline as load_pipeline
    from .load import place as place
    from .load import unplace as unplace
    from .outcome import Outcome as Outcome
    from .plan import Plan as Plan
    from .rehearsal import rehearse as rehearse
    from .resolve import ResolvedPlan as ResolvedPlan
    from .spec import DeploySpec as DeploySpec

_HOMES = {
    "DeploySpec": "spec",
    "Outcome": "outcome",
    "Plan": "plan",
    "ResolvedPlan": "resolve",
    "SanaDeployError": "errors",
    "compile_plan": "compile",
    "load_pipeline": "load",
    "place": "load",
    "rehearse": "rehearsal",
    "unplace": "load",
}

__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sana_deploy' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
