"""Two GPUs of one host: seconds per step and image of three placements, ours beside diffusers' hooks.

    python benchmarks/gpus.py OUT_FOLDER [--model sana_1600m_controlnet] [--side 1024] [--steps 20] [--rounds 7]
    python benchmarks/gpus.py OUT_FOLDER --virtual        # tiny, on two virtual GPUs: proves the script, not the speed

All pipelines are loaded at once from one checkpoint with random weights and run in turns. diffusers' side loads the
same dtypes and attaches accelerate's hooks to the same placement, as its `device_map` does to whole components; its
own `device_map="balanced"` runs too. All draw the same request; latents and pictures are compared bit for bit, after it
is made sure that the picture is lively and that the ControlNet changes it (`lively.py`). The floor of a placement is
one GPU's seconds plus what crosses per step over the measured copy rate between the two. Writes gpus.json and gpus.md;
needs about 60 GiB on GPU 0 for 1.6B.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model
from diffusers import SanaControlNetPipeline
from lively import liveliness

from sana_deploy.api import compile_spec
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.control_image import read_control_image
from sana_deploy.declare.pipelines import COMPONENTS
from sana_deploy.facts.tiny import ensure_tiny
from sana_deploy.rehearsal.rehearse import open_host
from sana_deploy.run.hook import find_border
from sana_deploy.run.load import load_pipeline
from sana_deploy.run.request_state import RequestState

ONE = {"text_encoder": 0, "vae": 0, "transformer": 0, "controlnet": 0}
PLACEMENTS = {
    "all on one": ONE,
    "text_encoder, vae / transformer, controlnet": {"text_encoder": 0, "vae": 0, "transformer": 1, "controlnet": 1},
    "transformer, vae / text_encoder, controlnet": {"text_encoder": 1, "vae": 0, "transformer": 0, "controlnet": 1},
}


@dataclass
class Side:
    """A pipeline that takes its turns, and what they told: seconds per step and per image."""

    name: str
    pipeline: Any
    steps: list[float]
    images: list[float]
    bytes_per_step: int | None = None
    result: Any = None
    latents: Any = None


class Bench:
    """Two GPUs, real ones or virtual ones, and the pipelines on them."""

    def __init__(self, options: argparse.Namespace, source: Path) -> None:
        self.options, self.source, self.virtual = options, source, options.virtual
        self.overrides = [
            "model=checkpoint", f"model.source={source}", "precision=mixed_bf16", "hardware=custom_map",
            "hardware.knobs=[]",  # diffusers' own arithmetic, so that bits can be compared
            f"workload.height={options.side}", f"workload.width={options.side}", f"workload.steps={options.steps}",
        ]  # fmt: skip
        if self.virtual:
            self.overrides += ["machine=2xrtx4090", "machine.fidelity=numbers"]
        self.spec = compose_spec([*self.overrides, _map(ONE)])
        self.dtypes = {name: getattr(torch, dtype) for name, dtype in self.spec.precision.components.items()}
        self.host = open_host(compile_spec(self.spec).resolve(), "numbers") if self.virtual else None

    def ours(self, placement: dict[str, int]) -> Any:
        """Our pipeline on a placement."""
        plan = compile_spec(compose_spec([*self.overrides, _map(placement)]))
        return load_pipeline(plan.resolve(), host=self.host)

    def theirs(self, placement: dict[str, int]) -> Any:
        """diffusers' pipeline with accelerate's hooks on every submodule."""
        pipeline = SanaControlNetPipeline.from_pretrained(self.source, dtype=self.dtypes)
        for name in COMPONENTS:
            module, device = getattr(pipeline, name), torch.device("vgpu" if self.virtual else "cuda", placement[name])
            if self.host is not None:
                self.host.place_module(module, name, device)
            dispatch_model(module, device_map={"": device}, force_hooks=True)
        return pipeline

    def balanced(self) -> Any:
        """diffusers' own choice; real GPUs only."""
        return SanaControlNetPipeline.from_pretrained(self.source, dtype=self.dtypes, device_map="balanced")

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Operations on the GPUs are seen while the block runs, and have ended after it."""
        with self.host or contextlib.nullcontext():
            yield
            self.wait()

    def wait(self) -> None:
        """Until both GPUs are idle."""
        if not self.virtual:
            for index in range(2):
                torch.cuda.synchronize(index)

    def turn(self, side: Side, **options: Any) -> None:
        """Run one request; `options` go to the pipeline."""
        times: list[float] = []

        def step_end(_: Any, __: int, ___: Any, values: dict[str, Any]) -> dict[str, Any]:
            self.wait()
            times.append(time.perf_counter())
            side.latents = values["latents"]
            return values

        work = self.spec.workload
        side.pipeline.set_progress_bar_config(disable=True)
        border, state = find_border(side.pipeline), RequestState()
        with self.working(), border.states.opened(state) if border else contextlib.nullcontext():
            started = time.perf_counter()
            result = side.pipeline(
                work.prompt, control_image=read_control_image(work, work.bounds), height=work.height, width=work.width,
                num_inference_steps=work.steps, guidance_scale=work.guidance_scale, output_type="pt",
                use_resolution_binning=False, generator=torch.Generator().manual_seed(0),
                callback_on_step_end=step_end, **options,
            )  # fmt: skip
            self.wait()
            side.images.append(time.perf_counter() - started)
            side.steps.append((times[-1] - times[0]) / (len(times) - 1))
            side.result, side.latents = result.images.float().cpu(), side.latents.float().cpu()
        if border is not None:
            side.bytes_per_step = sum(state.traffic.moved.values()) // work.steps

    def peer_rate(self) -> float | None:
        """Bytes per second of copies between the two GPUs; None on virtual ones."""
        if self.virtual:
            return None
        here = torch.empty(2**28, dtype=torch.uint8, device="cuda:0")
        there = torch.empty_like(here, device="cuda:1")
        for rounds in (3, 20):
            self.wait()
            started = time.perf_counter()
            for _ in range(rounds):
                there.copy_(here, non_blocking=True)
            self.wait()
        return 20 * here.nbytes / (time.perf_counter() - started)


def _map(placement: dict[str, int]) -> str:
    return f"hardware.device_map={{{', '.join(f'{name}: {index}' for name, index in placement.items())}}}"


def measure(bench: Bench) -> dict[str, Any]:
    """Load every side, run them in turns, and return medians, ratios and whether the images are the same."""
    sides = []
    for words, placement in PLACEMENTS.items():
        sides += [Side(f"{words}: ours", bench.ours(placement), [], []),
                  Side(f"{words}: diffusers' hooks", bench.theirs(placement), [], [])]  # fmt: skip
    if not bench.virtual:
        sides.append(Side("diffusers' balanced", bench.balanced(), [], []))
    for number in range(bench.options.rounds + 1):
        for side in sides:
            bench.turn(side)
        if number == 0:  # the first turn warms up
            for side in sides:
                side.steps.clear()
                side.images.clear()
    rate, alone = bench.peer_rate(), sides[0]
    uncontrolled = Side("without ControlNet", alone.pipeline, [], [])
    bench.turn(uncontrolled, controlnet_conditioning_scale=0.0)
    picture = liveliness(alone.result, uncontrolled.result)
    rows = []
    for side in sides:
        floor = side.bytes_per_step / rate if rate and side.bytes_per_step is not None else None
        rows.append({
            "side": side.name,
            "step_seconds": statistics.median(side.steps),
            "image_seconds": statistics.median(side.images),
            "step_over_one_gpu": statistics.median(a / b for a, b in zip(side.steps, alone.steps, strict=True)),
            "bytes_per_step": side.bytes_per_step,
            "floor_seconds": floor,
            "identical": torch.equal(side.result, alone.result) and torch.equal(side.latents, alone.latents),
            "largest_difference": float((side.result - alone.result).abs().max()),
        })  # fmt: skip
    names = "virtual" if bench.virtual else " + ".join(torch.cuda.get_device_name(index) for index in range(2))
    return {"gpus": names, "torch": torch.__version__, "peer_bytes_per_second": rate, "picture": picture,
            "rows": rows}  # fmt: skip


def markdown(facts: dict[str, Any]) -> str:
    """One line per side."""
    rate = facts["peer_bytes_per_second"]
    picture = facts["picture"]
    lines = [f"{facts['gpus']}, torch {facts['torch']}" + (f", peer copy {rate / 1e9:.1f} GB/s" if rate else ""),
             f"The picture: standard deviation {picture['deviation']:.3f} of 1; the ControlNet moves a value by "
             f"{picture['control']:.3f} in the mean.", "",
             "| placement | ms per step | over one GPU | s per image | MiB moved / steps | latents and image |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for row in facts["rows"]:
        moved = "" if row["bytes_per_step"] is None else f"{row['bytes_per_step'] / 2**20:.1f}"
        same = "same bits as on one GPU" if row["identical"] else f"differs by {row['largest_difference']:.2g}"
        lines.append(f"| {row['side']} | {1000 * row['step_seconds']:.1f} | {row['step_over_one_gpu']:.3f} "
                     f"| {row['image_seconds']:.2f} | {moved} | {same} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make the checkpoint, measure, and write both files."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="sana_1600m_controlnet")
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--virtual", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("/tmp/sana_deploy_checkpoints"))
    options = parser.parse_args()
    if options.virtual:
        options.side, options.steps = 128, 4
        source = ensure_tiny()
    else:
        from make_checkpoint import make_checkpoint

        source = make_checkpoint(options.model, options.work / options.model)
    facts = measure(Bench(options, source))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpus.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    (options.out / "gpus.md").write_text(markdown(facts), encoding="utf-8")
    print(markdown(facts))


if __name__ == "__main__":
    main()
