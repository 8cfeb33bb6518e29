"""Draws pictures for one plan: inspected at start without torch, applied on the first request, one at a time."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_deploy import Plan

if TYPE_CHECKING:
    from PIL.Image import Image


class Service:
    """A pipeline behind a lock. Loading and drawing block, so that they run in a worker thread."""

    def __init__(self, plan_file: Path) -> None:
        self.plan = Plan.load(plan_file)
        self._pipeline: Any = None
        self._turn = asyncio.Lock()

    def memory(self) -> dict[str, int]:
        """Peak bytes per slot, for a scheduler that looks for a machine."""
        return {slot.name: slot.peak_bytes for slot in self.plan.slots}

    async def draw(self, prompt: str, control_image: Image, seed: int) -> Image:
        """Draw one picture."""
        async with self._turn:
            return await asyncio.to_thread(self._draw, prompt, control_image, seed)

    def _draw(self, prompt: str, control_image: Image, seed: int) -> Image:
        import torch

        from sana_deploy import load_pipeline

        if self._pipeline is None:
            self._pipeline = load_pipeline(self.plan.resolve())
            self._pipeline.set_progress_bar_config(disable=True)
        work = self.plan.spec.workload
        images: list[Image] = self._pipeline(
            prompt, control_image=control_image, height=work.height, width=work.width, num_inference_steps=work.steps,
            generator=torch.Generator().manual_seed(seed), use_resolution_binning=False,
        ).images  # fmt: skip
        return images[0]
