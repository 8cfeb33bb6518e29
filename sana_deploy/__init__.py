"""Compile where and how a SANA pipeline runs into a checked placement plan, and run it.

    from sana_deploy import compile_plan, load_pipeline
    plan = compile_plan(["hardware=multi_gpu_balanced"])
    pipeline = load_pipeline(plan.resolve())

Names are imported on first use: `import sana_deploy` itself imports nothing heavy, and never torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__

if TYPE_CHECKING:
    from .api import compile_plan as compile_plan
    from .declare.spec import DeploySpec as DeploySpec
    from .errors import SanaDeployError as SanaDeployError
    from .plan.artifact import Plan as Plan
    from .plan.artifact import ResolvedPlan as ResolvedPlan
    from .rehearsal.replicas import rehearse as rehearse
    from .run.load import load_pipeline as load_pipeline
    from .run.outcome import Outcome as Outcome
    from .run.place import place as place
    from .run.place import unplace as unplace
    from .run.replicas import load_pipelines as load_pipelines

_HOMES = {
    "DeploySpec": "declare.spec",
    "Outcome": "run.outcome",
    "Plan": "plan.artifact",
    "ResolvedPlan": "plan.artifact",
    "SanaDeployError": "errors",
    "compile_plan": "api",
    "load_pipeline": "run.load",
    "load_pipelines": "run.replicas",
    "place": "run.place",
    "rehearse": "rehearsal.replicas",
    "unplace": "run.place",
}

_MOVED: dict[str, str] = {}
"""Public names that moved -> where they are now in full, e.g. `sana_deploy.run.place.place`; for one minor version."""

__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _MOVED:
        import warnings

        new = _MOVED[name]
        message = f"sana_deploy.{name} is now {new}; the old name goes with the next minor version"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        module, _, attribute = new.rpartition(".")
        return getattr(import_module(module), attribute)
    if name not in _HOMES:
        raise AttributeError(f"module 'sana_deploy' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
