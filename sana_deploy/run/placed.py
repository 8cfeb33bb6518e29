"""What a placed pipeline refuses, since it would break later or in silence, and what placing says of casts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from ..declare.pipelines import COMPONENTS, Component
from .border import Border

log = logging.getLogger(__name__)


def refuse_group_offload(pipeline: Any, border: Border) -> None:
    """Refuse group offloading as diffusers refuses its other offloads on a device map; undone with the border."""
    owners = [pipeline, *(getattr(pipeline, name) for name in COMPONENTS)]
    for owner in owners:
        if hasattr(type(owner), "enable_group_offload"):
            owner.enable_group_offload = _refuse
            border.restore.append(_forgetting(owner))


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise ValueError(
        "The pipeline is placed: it has a device mapping strategy, so calling `enable_group_offload()` isn't allowed. "
        "You can call `reset_device_map()` first and then call `enable_group_offload()`."
    )


def _forgetting(owner: Any) -> Callable[[], object]:
    return lambda: owner.__dict__.pop("enable_group_offload", None)


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of the first floating-point parameter; float32 where there is none."""
    return next((value.dtype for value in module.parameters() if value.is_floating_point()), torch.float32)


def tell_casts(before: Mapping[Component, torch.dtype], modules: Mapping[Component, nn.Module]) -> None:
    """Log in one line which components were cast on placing, from `before` to the dtype that they have now."""
    groups: dict[str, list[str]] = {}
    for name, module in modules.items():
        now = dtype_of(module)
        if now != before[name]:
            pair = " to ".join(str(dtype).removeprefix("torch.") for dtype in (before[name], now))
            groups.setdefault(pair, []).append(name)
    if groups:
        cast = "; ".join(f"{', '.join(names)} from {pair}" for pair, names in groups.items())
        log.warning("place cast %s, as the plan says; unplace does not bring back what this rounded off", cast)
