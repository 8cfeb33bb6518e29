"""From a declaration and facts to plan.json: the search, its prices, and the artifact. Imports no torch.

`sana_deploy.plan.Plan` is the artifact; importing this package alone imports nothing else of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .artifact import Plan as Plan

__all__ = ["Plan"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sana_deploy.plan' has no attribute {name!r}")
    from . import artifact

    return getattr(artifact, name)
