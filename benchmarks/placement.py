"""Ours against diffusers' balanced placement on the same virtual machines: who fits, peaks, bytes per step.

    python benchmarks/placement.py [--out docs/placement.md] [--quick] [--models MODEL ...]

Every cell is rehearsed twice in this run, in shapes: once with our plan and border hooks, once with the map that
diffusers' `_get_final_device_map` gives for the same memory and dtypes, with the hooks that `load_sub_model` attaches
(`accelerate.dispatch_model(..., force_hooks=True)`). Both start from the same configs; a cell counts as
fitting when the whole request runs within every GPU's memory. A map that puts a component on the CPU, or loses one, is
not run.
Ours may turn on the knobs that change no pixel but in last places. Where it refuses, its closest miss is rehearsed too:
the plan is right to refuse if that runs out of memory.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from compile import write_configs

MACHINES = (
    "t4", "2xt4", "2x8GiB", "4x8GiB", "2x10GiB", "2xrtx3060", "rtx3090", "2xrtx3090", "rtx4090", "2xrtx4090", "2xl4",
    "4x24GiB", "[rtx4090,rtx3060]", "[rtx3090,rtx3070]", "2xv100", "a100", "8xh100",
)  # fmt: skip
MODELS = ("sana_600m_controlnet", "sana_1600m_controlnet")
"""What the page has; any catalogued model can be named."""
SIDES = (512, 1024, 2048, 4096)
STEPS = 2
KNOB_LETTERS = {
    "encode_once": "e", "vae_slicing": "s", "split_controlnet": "c", "text_encoder_offload": "o", "vae_bands": "b",
    "vae_tiling": "t",
}  # fmt: skip


@dataclass(frozen=True)
class Side:
    """What one side did in one cell: `verdict` is fits, or why not; shares and bytes as rehearsed."""

    verdict: str
    worst_share: float = 0.0
    step_bytes: int = 0
    placement: str = ""
    error: float = 0.0
    knobs: str = ""
    miss: str = ""
    total_bytes: int = 0


@dataclass(frozen=True)
class Cell:
    """One machine, model and resolution, both sides."""

    model: str
    machine: str
    side: int
    precision: str
    ours: Side
    theirs: Side


def cell(arguments: tuple[str, str, int]) -> Cell:
    """Rehearse one cell on both sides."""
    model, machine, side = arguments
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    from sana_deploy.declare.compose import compose_spec
    from sana_deploy.declare.spec import VirtualMachine
    from sana_deploy.facts.checkpoint import settled
    from sana_deploy.facts.virtual_machine import describe_machine

    base = [f"model={model}", "machine=virtual", f"machine.gpus={machine}", f"workload.steps={STEPS}"]
    base += [f"workload.height={side}", f"workload.width={side}"]
    machine_spec = compose_spec(base).machine
    assert isinstance(machine_spec, VirtualMachine)
    described = describe_machine(machine_spec)
    native = all(gpu.capability >= (8, 0) for gpu in described.gpus)
    precision = "mixed_bf16" if native else "mixed_fp32"
    spec = settled(compose_spec([*base, f"precision={precision}"]))
    return Cell(model, machine, side, precision, ours(spec), theirs(spec))


def ours(spec: Any) -> Side:
    """Compile and rehearse our plan."""
    from sana_deploy import rehearse
    from sana_deploy.api import compile_spec
    from sana_deploy.errors import InfeasibleError, RunError

    try:
        plan = compile_spec(spec)
    except InfeasibleError as problem:
        helped = "refused, fits with tiling" if problem.facts.get("fits_with_a_knob") else "refused"
        return Side(helped, miss=rehearse_miss(problem.plan))
    placement = layout(plan.device_map)
    try:
        report = rehearse(plan, "shapes").report
    except RunError as problem:
        return Side(verdict_of(problem), placement=placement)
    shares = [gpu.peak_bytes / gpu.capacity_bytes for gpu in report.gpus]
    step = sum(moved.bytes_per_step for moved in report.transfers)
    error = max((gpu.planned_error for gpu in report.gpus), key=abs)
    return Side("fits", max(shares), step, placement, error, letters_of(plan))


def letters_of(plan: Any) -> str:
    """The knobs that are on, with the number of bands."""
    return "+".join(KNOB_LETTERS[knob].replace("b", f"b{plan.vae_band_count}") for knob in plan.knobs)


def rehearse_miss(plan: Any) -> str:
    """Rehearse a plan that was refused: what becomes of it if it is applied all the same."""
    from sana_deploy import rehearse
    from sana_deploy.errors import InfeasibleError, RunError
    from sana_deploy.facts.virtual_machine import describe_machine
    from sana_deploy.plan.artifact import ResolvedPlan

    machine = describe_machine(plan.spec.machine)
    devices = {slot.index: f"vgpu:{slot.index}" for slot in plan.slots}
    places = {name: "cpu" if place == "cpu" else devices[place] for name, place in plan.device_map.items()}
    try:
        rehearse(ResolvedPlan(plan, machine, places, devices, places["transformer"]), "shapes")
    except (RunError, InfeasibleError) as problem:
        return verdict_of(problem)
    return "fits within the headroom"


def theirs(spec: Any) -> Side:
    """Place with diffusers' map and hooks, and run the same request."""
    import torch

    from sana_deploy.facts.virtual_machine import describe_machine

    names = spec.pipeline.names
    dtypes = {name: getattr(torch, dtype) for name, dtype in spec.precision.components.items() if name in names}
    memory = {gpu.index: gpu.free_bytes for gpu in describe_machine(spec.machine).gpus}
    found = balanced_map(spec.model.name, dtypes, memory, spec.pipeline.class_name)
    if "cpu" in found.values() or set(found) != set(names):
        return Side("CPU offload" if set(found) == set(names) else "loses a component")
    return accelerated(spec, found)


def accelerated(spec: Any, found: dict[str, int]) -> Side:
    """Run the request with accelerate's hooks on a given map of whole components."""
    import diffusers
    import torch
    from accelerate import dispatch_model

    from sana_deploy.declare.control_image import read_control_image
    from sana_deploy.facts.allocator import context_bytes, workspace_bytes
    from sana_deploy.facts.checkpoint import open_checkpoint
    from sana_deploy.facts.virtual_machine import describe_machine
    from sana_deploy.rehearsal.host import VirtualHost
    from sana_deploy.rehearsal.meta_modules import stand_in
    from sana_deploy.rehearsal.virtual_tensor import VirtualTensor

    machine = describe_machine(spec.machine)
    checkpoint = open_checkpoint(spec.model)
    facts = checkpoint.components
    outside = [context_bytes(gpu.capability) + workspace_bytes(gpu.capability) for gpu in machine.gpus]
    for name, index in found.items():
        outside[index] += facts[name].unsplit_bytes(spec.precision.formats[name])
    host = VirtualHost([gpu.free_bytes - taken for gpu, taken in zip(machine.gpus, outside, strict=True)], "shapes")
    steps: list[Counter[tuple[str, str]]] = []

    def step_end(_: Any, __: int, ___: Any, values: dict[str, Any]) -> dict[str, Any]:
        steps.append(Counter({pair: n for pair, n in host.ledger.traffic.items() if "cpu" not in pair}))
        return values

    try:
        modules = {}
        for name in checkpoint.pipeline.names:
            device = torch.device("vgpu", found[name])
            modules[name] = host.place_module(stand_in(facts[name], spec.precision.formats[name]), name, device)
            # Looking for tied parameters, accelerate asks for addresses, which shapes have not.
            with patch.object(VirtualTensor, "data_ptr", lambda tensor: id(tensor)):
                dispatch_model(modules[name], device_map={"": device}, force_hooks=True)
        pipeline = getattr(diffusers, checkpoint.pipeline.class_name)(**modules, **host.load_helpers(checkpoint))
        pipeline.set_progress_bar_config(disable=True)
        work = spec.workload
        picture = read_control_image(work, work.bounds) if checkpoint.pipeline.image else None
        arguments = checkpoint.pipeline.arguments(work.request, work.bounds, picture)
        with host:
            pipeline(**arguments, output_type="pt", callback_on_step_end=step_end)
    except (torch.OutOfMemoryError, UnboundLocalError, RuntimeError) as problem:
        return Side(verdict_of(problem), placement=layout(found))
    shares = [
        (peak.total_bytes + outside[gpu.index]) / gpu.total_bytes
        for gpu, peak in zip(machine.gpus, host.ledger.peaks, strict=True)
        if gpu.index in found.values()
    ]
    step = sum((steps[1] - steps[0]).values())
    total = sum(bytes_ for pair, bytes_ in host.ledger.traffic.items() if "cpu" not in pair)
    return Side("fits", max(shares), step, layout(found), total_bytes=total)


def balanced_map(
    model: str, dtypes: dict[str, Any], memory: dict[int, int], class_name: str = "SanaControlNetPipeline"
) -> dict[str, Any]:
    """Ask diffusers for its own map."""
    import diffusers
    from diffusers.pipelines.pipeline_loading_utils import _get_final_device_map

    pipeline = getattr(diffusers, class_name)
    with tempfile.TemporaryDirectory() as folder:
        write_configs(Path(folder), model)
        config = pipeline.load_config(folder)
        init = {name: entry for name, entry in config.items() if isinstance(entry, list)}
        return dict(
            _get_final_device_map("balanced", pipeline, {}, init, diffusers, memory, dtype=dtypes,
                                  cached_folder=folder, local_files_only=True)
        )  # fmt: skip


def verdict_of(problem: BaseException) -> str:
    """Name a failure in two words."""
    text = str(problem)
    if "same device" in text:
        return "mixed devices"
    return "out of memory" if "memory" in text or isinstance(problem, UnboundLocalError) else text[:60]


def layout(device_map: dict[str, Any]) -> str:
    """The map in short: T text encoder, V VAE, D transformer (denoiser), C ControlNet, one group per GPU."""
    letters = {"text_encoder": "T", "vae": "V", "transformer": "D", "controlnet": "C"}
    places = sorted({str(place) for place in device_map.values()})
    return " ".join(
        "".join(letter for name, letter in letters.items() if str(device_map.get(name)) == place) for place in places
    )


def table(cells: list[Cell]) -> str:
    """Render the cells and the count of those won, tied and lost as Markdown."""
    lines = [
        "| model | machine | px | ours | theirs | fullest GPU, ours | theirs | MiB per step, ours | theirs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for item in cells:
        sides = (item.ours, item.theirs)
        verdicts = [f"{side.verdict} ({side.placement})" if side.placement else side.verdict for side in sides]
        verdicts[0] += f" {item.ours.knobs}" if item.ours.knobs else ""
        fullest = [f"{side.worst_share:.0%}" if side.verdict == "fits" else "" for side in sides]
        moved = [f"{side.step_bytes / 2**20:.1f}" if side.verdict == "fits" else "" for side in sides]
        columns = [
            item.model.removeprefix("sana_").removesuffix("_controlnet"),
            item.machine,
            str(item.side),
            *verdicts,
            *fullest,
            *moved,
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join([*lines, "", *summary(cells)])


def summary(cells: list[Cell]) -> list[str]:
    """Count who fits where, and who has the lower worst peak where both fit."""
    both = [item for item in cells if item.ours.verdict == item.theirs.verdict == "fits"]
    close = 0.005
    lower = sum(item.ours.worst_share < item.theirs.worst_share - close for item in both)
    higher = sum(item.ours.worst_share > item.theirs.worst_share + close for item in both)
    only_ours = sum(item.ours.verdict == "fits" != item.theirs.verdict for item in cells)
    only_theirs = sum(item.theirs.verdict == "fits" != item.ours.verdict for item in cells)
    refused = [item.ours for item in cells if item.ours.verdict.startswith("refused")]
    right = sum(side.miss == "out of memory" for side in refused)
    tiling = sum(side.verdict.endswith("tiling") for side in refused)
    worst = max((item.ours.error for item in cells if item.ours.verdict == "fits"), key=abs, default=0.0)
    return [
        f"{len(cells)} cells: both fit in {len(both)}, only ours in {only_ours}, only theirs in {only_theirs}, "
        f"neither in {len(cells) - len(both) - only_ours - only_theirs}.",
        f"Fullest GPU where both fit: ours lower in {lower}, equal within half a point in "
        f"{len(both) - lower - higher}, higher in {higher}.",
        f"Refused by ours: {len(refused)}, of which {tiling} fit once hardware.allow includes vae_tiling. Rehearsed "
        f"all the same, the closest misses of {right} run out of memory, the others eat into the headroom.",
        f"Our plan's peak of weights and activations against the rehearsed one, worst GPU of all cells: {worst:+.2%}.",
    ]


def write_page(path: Path, text: str) -> None:
    """Write a page, and its table as CSV in the folder `data` beside it."""
    path.write_text(text, encoding="utf-8")
    data = path.parent / "data" / f"{path.stem}.csv"
    data.parent.mkdir(exist_ok=True)
    with data.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows_of(text))


def rows_of(text: str) -> list[list[str]]:
    """The cells of the table in a page, its head first. Heads that come again are told apart by the one before."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    head, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    before = [name.removesuffix(", ours") for name in head]
    return [[f"{before[at - 1]}, {name}" if name in head[:at] else name for at, name in enumerate(head)], *rows]


def main() -> None:
    """Run the matrix on all cores and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the table to a page, with this text before it, and as CSV")
    parser.add_argument("--quick", action="store_true", help="two machines and one resolution only")
    parser.add_argument("--models", nargs="+", default=MODELS, help="catalogued models")
    options = parser.parse_args()
    machines, sides = (MACHINES[1:3], SIDES[1:2]) if options.quick else (MACHINES, SIDES)
    with ProcessPoolExecutor(2) as pool:
        cells = list(pool.map(cell, itertools.product(options.models, machines, sides)))
    text = table(cells)
    print(text)
    if options.out:
        head = "# Placement: ours beside diffusers' balanced\n\n" + str(__doc__).replace("    python", "    $ python")
        legend = f"\nLetters: {layout.__doc__} After it the knobs that are on: e control image encoded once, "
        legend += "s VAE slicing, c ControlNet split off, o text encoder offloaded, b4 VAE in 4 bands of rows. "
        legend += f"Steps rehearsed: {STEPS}.\n\n"
        write_page(options.out, head + legend + text + "\n")


if __name__ == "__main__":
    main()
