"""Looks for NaN and infinity where components hand on their results, and names the first that made them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..declare.pipelines import Component, ComponentDescription, Phase, PipelineDescription
from ..errors import RunError
from ..plan.units import component_call, component_of
from .traffic import floating

GUARDED_STEPS = 2
"""Denoising steps that are looked at; a float16 overflow shows in the first."""


@dataclass
class NumericsGuard:
    """Called with every result: one reduction of each, kept on its device, and read together once per step.

    `dtypes` are those of the components, for the message.
    """

    pipeline: PipelineDescription
    dtypes: dict[Component, str]
    steps: int = 0
    _flags: list[tuple[str, Phase, torch.Tensor]] = field(default_factory=list)

    def __call__(self, name: str, method: str, output: Any) -> None:
        phase = self.pipeline.phase_of[component_call(f"{name}.{method}")]
        if phase == "denoise" and self.steps >= GUARDED_STEPS:
            return
        for tensor in floating(output):
            self._flags.append((name, phase, torch.isfinite(tensor).all()))

    def step_done(self) -> None:
        """A denoising step has ended.

        Raises:
            RunError: see `check`.
        """
        self.steps += 1
        self.check()

    def check(self) -> None:
        """Read what was found since the last check.

        Raises:
            RunError: a component's result holds NaN or infinity: which, in which dtype and phase, and what cures it.
        """
        found, self._flags = self._flags, []
        for name, phase, finite in found:
            if not bool(finite):
                component = component_of(name)
                dtype = self.dtypes[component]
                raise RunError(
                    f"the {name} gave NaN or infinity in {dtype} during {phase}",
                    where=f"precision.components.{component}",
                    hint=_cure(self.pipeline.by_name[component], dtype),
                    component=component,
                    dtype=dtype,
                    phase=phase,
                )


def image_cure(pipeline: PipelineDescription, dtypes: Mapping[Component, str]) -> str:
    """What helps where an image is not finite or flat though every result was finite; empty if no dtype explains it."""
    first_fragile = sorted(pipeline.components, key=lambda part: not part.fragile)
    suspects = [part for part in first_fragile if dtypes[part.name] == "float16"]
    return _cure(suspects[0], "float16") if suspects else ""


def _cure(part: ComponentDescription, dtype: str) -> str:
    if dtype == "float32":
        return "float32 does not overflow here: the weights or the inputs are damaged"
    if dtype == "bfloat16":
        change = f"precision.components.{part.name}=float32"
        return f"bfloat16 has float32's range: look at the weights and inputs, or try {change}"
    if part.fragile:
        return "precision=mixed_bf16, or precision=mixed_fp32 where bfloat16 is not native"
    return "precision=bf16, or precision=fp32 where bfloat16 is not native"
