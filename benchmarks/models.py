"""Every catalogued model on machines of one and two GPUs: does it fit, how fast, how full, and does a rehearsal agree.

    python benchmarks/models.py [--out docs/models.md] [--models MODEL ...] [--machines MACHINE ...] [--kept FILE]

Each cell is compiled with `precision=auto` and the knobs that change no picture, for one image in the pipeline's own
steps at the model's own resolution, and what fits is rehearsed in shapes. Seconds are the plan's. Beside ours is what
diffusers does with `device_map="balanced"` for the same memory and dtypes, rehearsed with its hooks as in
`placement.py`. Where 16 bits do not fit, `precision=int8` and `nf4` are tried, which change the picture.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from placement import KNOB_LETTERS, Side, layout, theirs, write_page

MACHINES = ("2xrtx3070", "2xrtx3060", "rtx4090")
ALL_PIPELINES = ("sana_1600m", "sana15_4800m", "sana_sprint_1600m")
"""Models that are shown under every pipeline that they are made for; others under their own."""
QUANTIZED = ("int8", "nf4")
"""Policies to try where 16 bits do not fit, least changing first."""


@dataclass(frozen=True)
class Cell:
    """A model under one of its pipelines on one machine: our plan, if there is one, and diffusers' map."""

    model: str
    pipeline: str
    machine: str
    side: int
    precision: str
    fits: bool
    placement: str = ""
    knobs: str = ""
    seconds: float | None = None
    fullest: float = 0.0
    step_bytes: int = 0
    image_bytes: int = 0
    error: float | None = None
    theirs: Side | None = None


def cell(arguments: tuple[str, str, str]) -> Cell:
    """Compile and rehearse one cell, in 16 bits or the first quantised policy that fits."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    model, pipeline, machine = arguments
    from sana_deploy.api import compile_spec
    from sana_deploy.declare.compose import compose_spec
    from sana_deploy.errors import InfeasibleError
    from sana_deploy.facts.checkpoint import settled

    base = [f"model={model}", f"model.pipeline={pipeline}", "machine=virtual", f"machine.gpus={machine}"]
    for precision in ("auto", *QUANTIZED):
        spec = settled(compose_spec([*base, f"precision={precision}"]))
        try:
            plan = compile_spec(spec)
        except InfeasibleError:
            continue
        return rehearsed(Cell(model, pipeline, machine, spec.workload.height, plan.spec.precision.name, True), plan)
    return Cell(model, pipeline, machine, spec.workload.height, "none", False)


def rehearsed(cell: Cell, plan: Any) -> Cell:
    """Rehearse a plan in shapes, and the map of diffusers in the same dtypes where nothing is quantised."""
    from dataclasses import replace

    from sana_deploy import rehearse

    report = rehearse(plan, "shapes").report
    return replace(
        cell,
        placement=layout(plan.device_map),
        knobs="+".join(KNOB_LETTERS.get(knob, knob) for knob in plan.knobs),
        seconds=plan.estimates.seconds_per_image,
        fullest=max(gpu.peak_bytes / gpu.capacity_bytes for gpu in report.gpus),
        step_bytes=plan.estimates.bytes_per_step,
        image_bytes=plan.estimates.bytes_per_image,
        error=max((gpu.planned_error for gpu in report.gpus), key=abs),
        theirs=None if any(plan.spec.precision.quantization.values()) else theirs(plan.spec),
    )


def line(cell: Cell) -> str:
    """One row of the table."""
    what = [cell.pipeline.removesuffix("Pipeline"), cell.model, str(cell.side), cell.machine]
    if not cell.fits:
        return f"| {' | '.join([*what, 'no', *[''] * 5])} |"
    seconds = "" if cell.seconds is None else f"{cell.seconds:.2f}"
    moved = f"{cell.image_bytes / 2**20:.1f}, {cell.step_bytes / 2**20:.1f}"
    other = "" if cell.theirs is None else f"{cell.theirs.verdict} {cell.theirs.placement}".strip()
    peak = f"{cell.theirs.worst_share:.0%}" if cell.theirs and cell.theirs.verdict == "fits" else ""
    ours = f"{cell.precision}: {cell.placement} {cell.knobs}".strip()
    columns = [ours, seconds, f"{cell.fullest:.0%}", moved, f"{cell.error:+.2%}", other + (f", {peak}" if peak else "")]
    return f"| {' | '.join([*what, *columns])} |"


HEAD = (
    "| pipeline | model | px | machine | ours | s an image | fullest GPU | MiB moved, an image and a step of it "
    "| planned against rehearsed | balanced, fullest GPU |\n|---|---|---|---|---|---|---|---|---|---|"
)


def summary(cells: Sequence[Cell]) -> str:
    """How many fit, and how far the plans are from rehearsals."""
    fits = [one for one in cells if one.fits]
    plain = [one for one in fits if one.theirs is not None]
    theirs_fit = sum(one.theirs is not None and one.theirs.verdict == "fits" for one in plain)
    worst = max((one.error or 0.0 for one in fits), key=abs, default=0.0)
    return (
        f"{len(cells)} cells: {len(plain)} fit in 16 bits, {len(fits) - len(plain)} more quantised, "
        f"{len(cells) - len(fits)} not at all. Diffusers' balanced map of whole components fits in {theirs_fit} of the "
        f"{len(plain)} in 16 bits. Planned peaks of weights and activations against rehearsed ones, worst GPU of all "
        f"cells: {worst:+.2%}."
    )


def read(path: Path | None) -> dict[tuple[str, str, str], Cell]:
    """The cells of an earlier run."""
    found = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path and path.is_file() else ():
        values = json.loads(text)
        done = Cell(**{**values, "theirs": values["theirs"] and Side(**values["theirs"])})
        found[done.model, done.pipeline, done.machine] = done
    return found


def main() -> None:
    """Work through the cells and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the page to a file, and its table as CSV")
    parser.add_argument("--models", nargs="+", help="catalogued models; all unless given")
    parser.add_argument("--machines", nargs="+", default=MACHINES)
    parser.add_argument("--kept", type=Path, help="a file that cells go to, and are taken from where they are in it")
    options = parser.parse_args()
    from sana_deploy.facts import catalogue

    started = time.monotonic()
    cases = [
        (model, pipeline, machine)
        for model, machine in itertools.product(options.models or catalogue.NAMES, options.machines)
        for pipeline in catalogue.pipelines(model)[: None if model in ALL_PIPELINES else 1]
    ]
    kept = read(options.kept)
    with ProcessPoolExecutor(2) as pool:
        for done in pool.map(cell, [case for case in cases if case not in kept]):
            kept[done.model, done.pipeline, done.machine] = done
            print(line(done), flush=True)
            if options.kept:
                with options.kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(done)) + "\n")
    cells = sorted((kept[case] for case in cases), key=lambda one: one.pipeline)
    table = "\n".join([HEAD, *map(line, cells), "", summary(cells)])
    print(f"{summary(cells)}\n{time.monotonic() - started:.0f} s")
    if options.out:
        head = "# Models: where each fits, and how fast\n\n" + str(__doc__).replace("    python", "    $ python")
        legend = f"\nLetters of ours: {layout.__doc__} After it the knobs that are on: "
        legend += ", ".join(f"{letter} {knob}" for knob, letter in KNOB_LETTERS.items()) + ".\n\n"
        write_page(options.out, head + legend + table + "\n")


if __name__ == "__main__":
    main()
