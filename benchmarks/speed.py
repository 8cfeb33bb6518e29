"""Seconds of a whole image with each runtime and split, beside diffusers' own eager pipeline in the same process.

    python benchmarks/speed.py FOLDER [--model sana_1600m_controlnet] [--pipeline SanaPAGPipeline] [--turns 7]
                              [--sides 512 1024] [--batches 1] [--allow encode_once]
    python benchmarks/speed.py FOLDER --endure 1000

FOLDER gets a checkpoint with random weights, unless it is there (`make_checkpoint.py`). Each case is drawn by diffusers
first, with another prompt in each turn and the same negative prompt; then the same pipeline is placed by a plan of each
runtime, and draws the same requests. Where there are two GPUs, plans that split guidance are drawn as well. A row has
the ratio of medians to diffusers; the seconds of the first picture, in which shapes are seen, captured and compiled;
the plan's seconds over those measured, of the image and of each phase; for each GPU what the plan counts over what
PyTorch's allocator had at most, and the pool of graphs that is planned over what the allocator keeps for them; whether
all pictures have the same bits, and how far they are apart; what ran eagerly and why; the seconds of each phase; and a
step over the FLOPs of its matrix products at the card's rate. A busy host makes diffusers slower, and ratios better.

The control image is encoded once, as by default: at some sizes that rounds otherwise than two at once. `--allow`
without a knob compares what keeps the bits.

`--endure` draws that many requests in turn with graphs, and prints what memory and eager calls grew by.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import DiffusionPipeline
from make_checkpoint import make_checkpoint

from sana_deploy import Plan, compile_plan, load_pipeline, place, unplace
from sana_deploy.declare.control_image import read_control_image
from sana_deploy.declare.pipelines import COMPONENTS
from sana_deploy.declare.runtime import RUNTIMES
from sana_deploy.errors import InfeasibleError
from sana_deploy.facts.checkpoint import open_checkpoint
from sana_deploy.facts.machine import probe
from sana_deploy.plan.profile import profile_pipeline
from sana_deploy.run.generate import generate
from sana_deploy.run.hook import border_of
from sana_deploy.run.request_state import RequestState

CASES = ((512, 1), (1024, 1), (1024, 4), (2048, 1))
"""Side in pixels, and images of a request."""
PROMPTS = ("a lighthouse at dusk", "two cats on a wall", "a glass of water", "an old map", "rain over a city",
           "a red bicycle", "the sea in winter", "a loaf of bread", "a quiet library", "mountains and fog")  # fmt: skip


@dataclass(frozen=True)
class Way:
    """How a case is drawn: on one GPU, or with the halves of guidance on two."""

    runtime: str
    split: str = "none"
    allow: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """`graphs`, or `graphs+guidance`."""
        return self.runtime if self.split == "none" else f"{self.runtime}+{self.split}"

    def hardware(self, components: list[str]) -> tuple[str, ...]:
        """Overrides: everything on the first GPU, but for the second half of guidance."""
        allow = f"hardware.allow=[{','.join(self.allow)}]"
        if self.split == "none":
            return ("hardware=single_gpu", allow, "hardware.use=[0]")
        return ("hardware=multi_gpu_balanced", f"hardware.split={self.split}", "hardware.objective=latency",
                allow, *(f"hardware.pin.{name}=0" for name in components))  # fmt: skip


def planned(folder: Path, side: int, batch: int, way: Way, *more: str) -> Plan:
    """The documented recipe, in one way."""
    listed = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    where = way.hardware([name for name in COMPONENTS if name in listed])
    return compile_plan([
        "model=checkpoint", f"model.source={folder}", *where, "precision=mixed_bf16", f"runtime={way.runtime}",
        "workload.prompt=a lighthouse", "workload.negative_prompt=blurry", "workload.seed=1",
        f"workload.height={side}", f"workload.width={side}", f"workload.batch={batch}", *more,
    ])  # fmt: skip


def drawer(pipeline: DiffusionPipeline, plan: Plan) -> Callable[[int], torch.Tensor]:
    """Draws the plan's request with the pipeline as it is, and the prompt of a turn: pixels (batch, 3, side, side)."""
    work, description = plan.spec.workload, plan.pipeline
    picture = read_control_image(work, work.bounds)

    def draw(turn: int) -> torch.Tensor:
        request = work.request.model_copy(update={"prompt": f"{PROMPTS[turn % len(PROMPTS)]}, number {turn}"})
        given = description.arguments(request, work.bounds, picture)
        generator = torch.Generator().manual_seed(work.seed)
        images: torch.Tensor = pipeline(**given, generator=generator, output_type="pt").images
        for number in range(torch.cuda.device_count()):
            torch.cuda.synchronize(number)
        return images.float().cpu()

    return draw


def drawn(draw: Callable[[int], torch.Tensor], turns: int, warm: int) -> tuple[list[torch.Tensor], list[float]]:
    """The pictures of all turns, and their seconds; the first `warm` ones see a shape for the first time."""
    pictures, seconds = [], []
    for turn in range(warm + turns):
        started = time.perf_counter()
        pictures.append(draw(turn))
        seconds.append(time.perf_counter() - started)
    return pictures, seconds


def floor_seconds(plan: Plan) -> float:
    """Seconds of a step's FLOPs at the rate of GPU 0 for the denoiser's dtype."""
    spec = plan.spec
    profile = profile_pipeline(
        open_checkpoint(spec.model), spec.workload.bounds, spec.precision.formats, lambda *_: {}
    )  # a published architecture: nothing is measured
    flops = sum(part.work["denoise"].flops for part in profile.components.values() if "denoise" in part.work)
    return flops / (probe().gpus[0].rates.tflops_float16 * 1e12)


def pool_bytes(gpu: int) -> int:
    """Bytes that PyTorch's allocator keeps on a GPU for graphs."""
    segments: Any = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    return sum(one["total_size"] for one in segments if one["device"] == gpu and one["segment_pool_id"] != (0, 0))


def phases_of(pipeline: Any, plan: Plan, turns: int) -> tuple[dict[str, float], RequestState]:
    """Median seconds of each phase, of prompts that are new, and what the last request gathered."""
    found, work = [], plan.spec.workload
    for number in range(1 + turns):  # the first one imports what it needs
        state, prompt = RequestState(), f"{PROMPTS[number % len(PROMPTS)]}, by phase"
        request = work.request.model_copy(update={"prompt": prompt})
        found.append(generate(pipeline, work.bounds, request, state=state)[1].seconds)
    names = [name for name in found[-1] if name in plan.estimates.seconds]
    return {name: median(one[name] for one in found[1:]) for name in names}, state


WARM = 2
"""Requests that see a shape for the first time: in the first one, graphs are captured."""


def measure(
    pipeline: Any, plan: Plan, reference: list[torch.Tensor], base: float, turns: int
) -> Iterator[tuple[str, Any]]:
    """Place the pipeline by `plan`, draw, and take the placement off again."""
    place(pipeline, plan)
    draw = drawer(pipeline, plan)
    gc.collect()
    for slot in plan.slots:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(slot.index)
    pictures, seconds = drawn(draw, turns, WARM)
    peaks = {slot.index: torch.cuda.max_memory_allocated(slot.index) for slot in plan.slots}
    now = median(seconds[WARM:])
    yield "runtime", plan.runtime
    yield "over_diffusers", round(now / base, 3)
    yield "seconds", round(now, 4)
    yield "first_seconds", round(seconds[0], 2)
    batch = plan.spec.workload.batch
    yield "planned_over_measured", round((plan.estimates.seconds_per_image or 0) * batch / now, 3)
    counted = {s.index: s.weights_bytes + s.activation_bytes + s.allocator_bytes for s in plan.slots}
    yield "counted_over_peak", {i: round(counted[i] / peak, 4) for i, peak in peaks.items()}
    pools = {slot.index: pool_bytes(slot.index) for slot in plan.slots}
    yield "pool_over_kept", {s.index: round(s.pool_bytes / pools[s.index], 4) for s in plan.slots if pools[s.index]}
    yield "graphed_calls", plan.graphed_calls
    pairs = list(zip(pictures, reference, strict=True))
    yield "same_bits", all(torch.equal(one, other) for one, other in pairs)
    yield "largest_difference", round(max(float((one - other).abs().max()) for one, other in pairs), 5)
    phases, state = phases_of(pipeline, plan, turns)
    yield "eager", state.eager_sentences()
    yield "phases", {name: round(value, 4) for name, value in phases.items()}
    expected = plan.estimates.seconds
    yield "planned_phases", expected
    yield "planned_over_measured_phases", {name: round(expected[name] / value, 3) for name, value in phases.items()}
    yield "step_over_floor", round(phases["denoise"] / plan.spec.workload.steps / floor_seconds(plan), 2)
    unplace(pipeline)


def ways(only: list[str] | None, allow: list[str]) -> list[Way]:
    """What is compared: every runtime on one GPU, and where there are two, each with graphs on both; `only` those."""
    found = [Way(name, allow=(*allow,)) for name in RUNTIMES]
    if torch.cuda.device_count() > 1:
        found += [Way(name, "guidance", (*allow,)) for name in RUNTIMES if name != "eager"]
    return [way for way in found if not only or way.name in only]


def compare(options: argparse.Namespace, pipeline: Any) -> None:
    """Print one JSON line per case and way."""
    asked = [(side, batch) for side in options.sides or () for batch in options.batches or [1]]
    more = [f"model.pipeline={options.pipeline}"] if options.pipeline else []
    for side, batch in asked or CASES:
        turns = options.turns if side * side * batch < 2**21 else max(3, options.turns // 2)
        draw = drawer(pipeline, planned(options.folder, side, batch, Way("eager"), *more))
        reference, seconds = drawn(draw, turns, WARM)
        base = median(seconds[WARM:])
        print(json.dumps({"side": side, "batch": batch, "way": "diffusers", "seconds": round(base, 4)}), flush=True)
        for way in ways(options.ways, options.allow):
            row = {"side": side, "batch": batch, "split": way.split}
            try:
                plan = planned(options.folder, side, batch, way, *more)
            except InfeasibleError as problem:
                print(json.dumps(row | {"asked": way.runtime, "refused": str(problem)}), flush=True)
                continue
            print(json.dumps(row | dict(measure(pipeline, plan, reference, base, turns))), flush=True)


def endure(options: argparse.Namespace, pipeline: Any) -> None:
    """Draw many small requests with graphs: memory and eager calls at the tenth and at the last."""
    plan = planned(options.folder, 512, 1, Way("graphs"), "workload.steps=4")
    place(pipeline, plan)
    work, marks = plan.spec.workload, []
    for number in range(options.endure):
        request = work.request.model_copy(update={"prompt": f"{PROMPTS[number % len(PROMPTS)]}, number {number}"})
        state = RequestState()
        generate(pipeline, work.bounds, request, state=state)
        if number in (10, options.endure - 1):
            gc.collect()
            held = [torch.cuda.memory_allocated(slot.index) for slot in plan.slots]
            kept = [torch.cuda.memory_reserved(slot.index) for slot in plan.slots]
            marks.append(
                {"request": number, "allocated": held, "reserved": kept, "eager": str(dict(state.eager_calls))}
            )
    graphs = {str(device): len(one.graphs) for device, one in border_of(pipeline).graphs.items() if one}
    print(json.dumps({"requests": options.endure, "marks": marks, "graphs": graphs}))


def main() -> None:
    """Parse, load once, and compare or endure."""
    parser = argparse.ArgumentParser(description="seconds of whole images with each runtime, beside diffusers")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="sana_1600m_controlnet")
    parser.add_argument("--pipeline", help="a class of diffusers, where the checkpoint is made for several")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--sides", type=int, nargs="*")
    parser.add_argument("--batches", type=int, nargs="*")
    parser.add_argument("--ways", nargs="*", help="e.g. graphs compiled graphs+guidance; all of them unless given")
    parser.add_argument("--allow", nargs="*", default=["encode_once"], help="knobs; none for the bits of diffusers")
    parser.add_argument("--endure", type=int, default=0)
    options = parser.parse_args()
    if not (options.folder / "model_index.json").is_file():
        make_checkpoint(options.model, options.folder)
    more = [f"model.pipeline={options.pipeline}"] if options.pipeline else []
    pipeline = unplace(load_pipeline(planned(options.folder, 512, 1, Way("eager"), *more)))
    pipeline.set_progress_bar_config(disable=True)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(json.dumps({"gpus": gpus, "torch": torch.__version__, "model": options.model}))
    (endure if options.endure else compare)(options, pipeline)


if __name__ == "__main__":
    main()
