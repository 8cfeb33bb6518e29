"""Other code imports compiled plans: light to inspect, safe in threads, picklable, and usable from asyncio."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sana_deploy import Plan, compile_plan
from sana_deploy.api import compile_spec
from sana_deploy.declare.spec import DeploySpec

SERVICE = Path(__file__).parent / "service"
FIXTURE = Path(__file__).parent / "plans" / "1.1.json"


def run(script: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(SERVICE)}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_service_inspects_a_plan_with_neither_torch_nor_diffusers() -> None:
    script = """
import sys
from pathlib import Path
from lighthouse_service import Service
print(Service(Path(sys.argv[1])).memory())
heavy = {"torch", "diffusers", "transformers", "accelerate", "hydra", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    plan = Plan.load(FIXTURE)
    assert run(script, str(FIXTURE)).strip() == str({slot.name: slot.peak_bytes for slot in plan.slots})


def test_a_service_loads_resolves_applies_and_draws_without_blocking_its_loop(
    small: Callable[..., DeploySpec], tiny: Path, tmp_path: Path
) -> None:
    path = compile_spec(small("precision=fp32")).save(tmp_path / "plan.json")
    script = """
import asyncio, sys
from pathlib import Path
from PIL import Image
import sana_deploy
from sana_deploy.run.hook import border_of
from sana_deploy.run.load import load_pipeline
from lighthouse_service import Service

async def main():
    service, answers = Service(Path(sys.argv[1])), 0
    edges, loop = Image.new("RGB", (96, 64), "white"), asyncio.get_running_loop()

    async def answer():
        nonlocal answers
        answers += 1

    def ask(event, place):
        # From the thread that draws: were the loop blocked until the picture is there, no answer would come.
        asyncio.run_coroutine_threadsafe(answer(), loop).result(60)

    def load_asking(resolved):
        ask("load", "")
        pipeline = load_pipeline(resolved)
        border_of(pipeline).observers.append(ask)
        return pipeline

    sana_deploy.load_pipeline = load_asking
    first, second, again = await asyncio.gather(*(service.draw("a lighthouse", edges, seed) for seed in (1, 2, 1)))
    assert first.tobytes() == again.tobytes() != second.tobytes()
    assert answers > 3 * 8, answers
    print(first.size)

asyncio.run(main())
"""
    assert run(script, str(path)).strip().endswith("(96, 64)")


def test_plans_are_picklable_and_equal_after(small: Callable[..., DeploySpec]) -> None:
    plan = compile_spec(small("model=sana_1600m_controlnet", "machine=2xrtx3060"))
    resolved = plan.resolve()
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert pickle.loads(pickle.dumps(resolved)) == resolved


def test_threads_compile_load_and_resolve_side_by_side(tmp_path: Path) -> None:
    def work(number: int) -> str:
        model = ("sana_600m_controlnet", "sana_1600m_controlnet")[number % 2]
        plan = compile_plan([f"model={model}", "machine=2xrtx3090"])
        again = Plan.load(plan.save(tmp_path / f"{number}.json"))
        assert again.resolve().plan == plan
        return plan.digest

    with ThreadPoolExecutor(8) as pool:
        digests = list(pool.map(work, range(16)))
    assert len(set(digests)) == 2
    assert digests[0::2] == [digests[0]] * 8
