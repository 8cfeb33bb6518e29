"""Looks for NaN and infinity where components hand on their results, and names the first that made them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..declare.policies import FRAGILE
from ..declare.spec import Component
from ..errors import RunError
from ..plan.profile import Phase
from .generate import PHASE_OF
from .traffic import floating

GUARDED_STEPS = 2
"""Denoising steps that are looked at; a float16 overflow shows in the first."""


@dataclass
class NumericsGuard:
    """Border inspector: one reduction per result, kept on its device, and read together once per step.

    `dtypes` are those of the components, for the message.
    """

    dtypes: dict[Component, str]
    steps: int = 0
    _flags: list[tuple[Component, Phase, torch.Tensor]] = field(default_factory=list)

    def __call__(self, name: Component, method: str, output: Any) -> None:
        phase = PHASE_OF[f"{name}.{method}"]
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
                dtype = self.dtypes[name]
                raise RunError(
                    f"the {name} gave NaN or infinity in {dtype} during {phase}",
                    where=f"precision.components.{name}",
                    hint=_cure(name, dtype),
                    component=name,
                    dtype=dtype,
                    phase=phase,
                )


def image_cure(dtypes: Mapping[Component, str]) -> str:
    """What helps where an image is not finite or flat though every result was finite; empty if no dtype explains it."""
    suspects = [name for name in (*FRAGILE, *dtypes) if dtypes[name] == "float16"]
    return _cure(suspects[0], "float16") if suspects else ""


def _cure(name: Component, dtype: str) -> str:
    if dtype == "float32":
        return "float32 does not overflow here: the weights or the inputs are damaged"
    if dtype == "bfloat16":
        return (
            f"bfloat16 has float32's range: look at the weights and inputs, or try precision.components.{name}=float32"
        )
    if name in FRAGILE:
        return "precision=mixed_bf16, or precision=mixed_fp32 where bfloat16 is not native"
    return "precision=bf16, or precision=fp32 where bfloat16 is not native"
