"""Your own service over a saved plan, with FastAPI: the plan is data, the pipeline is loaded with the first request.

    sana-deploy until=compile                       # writes plan.json
    PLAN=outputs/DATE/TIME/plan.json uvicorn --app-dir examples own_service:app

`sana-deploy serve` is a whole service; this is for a service that you have already.
"""

from __future__ import annotations

import asyncio
import io
import os
from functools import cache
from typing import Any

from fastapi import FastAPI, Response

from sana_deploy import Plan

app = FastAPI()
turn = asyncio.Lock()


@cache
def plan() -> Plan:
    """Read the plan. This imports no torch, and checks the plan's digest."""
    return Plan.load(os.environ["PLAN"])


@cache
def pipeline() -> Any:
    """Load the pipeline to the devices that are here; a plan that does not match them is refused."""
    from sana_deploy import load_pipeline

    loaded = load_pipeline(plan().resolve())
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(prompt: str, seed: int) -> bytes:
    """Draw one picture, a PNG. This blocks."""
    import torch

    work = plan().spec.workload
    size = {"height": work.height, "width": work.width, "use_resolution_binning": False}
    generator = torch.Generator().manual_seed(seed)
    image = pipeline()(prompt, num_inference_steps=work.steps, generator=generator, **size).images[0]
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@app.get("/memory")
def memory() -> dict[str, int]:
    """Peak bytes of each GPU, for a scheduler that looks for a machine."""
    return {slot.name: slot.peak_bytes for slot in plan().slots}


@app.post("/draw")
async def draw_one(prompt: str, seed: int = 0) -> Response:
    """Draw in a worker thread, one request at a time."""
    async with turn:
        return Response(await asyncio.to_thread(draw, prompt, seed), media_type="image/png")
