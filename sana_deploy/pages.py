"""Pages for a browser: `report.html` of one plan and `summary.html` of a sweep, each one file that loads nothing.

Pure renderers: the numbers are those of the plan and the outcome, the layout is in `templates/`, which escape every
text. Lengths in the drawings are pixels.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from . import __version__
from .outcome import Outcome, Rehearsal, RehearsedGpu
from .plan import Place, Plan, Slot
from .sentences import (
    KNOB_WORDS,
    OTHERS_WORDS,
    considered_sentence,
    image_words,
    knob_sentence,
    place_words,
    rejection_words,
    taken_words,
)
from .spec import COMPONENTS, VirtualMachine
from .units import GIB, MIB, human_bytes

_LONG = ("dtypes", "knobs")
"""Columns of a sweep whose text may wrap."""
LINE, GAP, LABEL, BOX = 760, 2, 80, 150
"""Width of a timeline, the gap between its bars, the widest label, and a place's width in the drawing of transfers."""


@cache
def _template(name: str) -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True,
    )  # fmt: skip
    return environment.get_template(f"{name}.html.j2")


def plan_page(plan: Plan, outcome: Outcome, command: str, pictures: Sequence[str] = ()) -> str:
    """Render one plan and what became of it.

    Args:
        command: the command line of the run.
        pictures: images as data URLs.
    """
    spec, work = plan.spec, plan.spec.workload
    return _template("plan").render(
        title=f"{plan.checkpoint.source}, {spec.hardware.strategy}, {spec.precision.name}",
        status=outcome.status,
        error=outcome.error,
        workload=f"{work.width} x {work.height} px, batch {work.batch}, {work.steps} steps, guidance "
        f"{work.guidance_scale:g}",
        digest=plan.digest[7:19],
        version=__version__,
        command=command,
        legend=[*((name, name) for name in COMPONENTS), ("activations", "activations ~"),
                ("overhead", "context and headroom ~"), ("others", OTHERS_WORDS), ("free", "free")],
        gpus=[_gpu(plan, slot) for slot in plan.slots],
        components=_components(plan),
        seconds=_seconds(plan),
        knobs=[f"{knob_sentence(plan, knob)}: {KNOB_WORDS.get(knob, '')}" for knob in plan.knobs],
        timelines=[_timeline(gpu, outcome.rehearsal) for gpu in outcome.rehearsal.gpus] if outcome.rehearsal else [],
        rehearse=_rehearse(plan),
        measured=_measured(outcome),
        pictures=list(pictures),
        transfers=_transfers(plan),
        considered=considered_sentence(plan),
        runners=_runners(plan),
        rejections=[f"{rejection_words(row)}; closest: {row.closest}" for row in plan.rejections],
        remarks=[
            {"severity": one.severity, "text": f"{one.where}: {one.message}" if one.where else one.message,
             "hint": one.hint}
            for one in (*plan.diagnostics, *outcome.diagnostics)
        ],
        **_flow(plan),
    )  # fmt: skip


def thumbnail(path: Path) -> str:
    """An image file as a small JPEG in a data URL."""
    import base64
    import io

    from PIL import Image

    with Image.open(path) as picture:
        small = picture.convert("RGB")
    small.thumbnail((384, 384))
    drawn = io.BytesIO()
    small.save(drawn, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(drawn.getvalue()).decode()


def _gpu(plan: Plan, slot: Slot) -> dict[str, Any]:
    """The bar of one GPU: weights of each component that is there at the peak, activations, overhead, others, free."""
    here: dict[str, int] = {
        name: part.weights_bytes for name, part in plan.components.items() if part.slot == slot.index
    }
    if sum(here.values()) > slot.weights_bytes:  # the peak is in a phase when offloaded weights wait on the CPU
        here.pop("text_encoder", None)
    sizes: dict[str, int] = {**here, "activations": slot.activation_bytes, "overhead": slot.overhead_bytes,
                             "others": slot.others_bytes}  # fmt: skip
    total = max(slot.capacity_bytes, sum(sizes.values()))
    sizes["free"] = total - sum(sizes.values())
    parts = [
        {"name": name, "percent": round(100 * size / total, 3), "words": f"{name} {human_bytes(size)}"}
        for name, size in sizes.items()
        if size or name != "others"
    ]
    taken = taken_words(slot.peak_bytes, slot.others_bytes, slot.capacity_bytes, slot.fullness)
    summary = f"{slot.gpu}: ~{taken}, fullest in {slot.peak_phase}"
    words = f"GPU {slot.index}, {summary}: {', '.join(str(part['words']) for part in parts)}"
    return {"name": f"GPU {slot.index}", "summary": summary, "parts": parts, "words": words}


def _components(plan: Plan) -> list[tuple[str, ...]]:
    return [
        (
            f"{name} (home)" if name == "transformer" else name,
            place_words(part.slot),
            str(part.format),
            human_bytes(part.weights_bytes),
            human_bytes(part.activation_bytes),
        )
        for name, part in plan.components.items()
    ]


def _seconds(plan: Plan) -> str:
    if plan.estimates.seconds_per_image is None:
        return ""
    phases = ", ".join(f"{phase} {value:.2f}" for phase, value in plan.estimates.seconds.items())
    return f"{plan.estimates.seconds_per_image:.2f} s per image ({phases})"


def _timeline(gpu: RehearsedGpu, rehearsal: Rehearsal) -> dict[str, Any]:
    """One bar per turn of a component, as high as the GPU was full; a mark where a phase begins.

    Below the bars stands what is taken all along: by others, and by the CUDA context.
    """
    bars: list[dict[str, Any]] = []
    marks: list[dict[str, Any]] = []
    before = ""
    taken = {"others": gpu.others_bytes, "overhead": gpu.context_bytes}
    whole = max(gpu.capacity_bytes, gpu.peak_bytes + gpu.others_bytes, 1)
    floor = 120 - 100 * sum(taken.values()) / whole
    moments = [moment for moment in rehearsal.timeline if moment.phase != "load"]
    pitch = max(8, LINE // max(len(moments), 1))
    for index, moment in enumerate(moments):
        live = moment.live_bytes.get(gpu.device, 0)
        height = round(100 * live / whole, 1)
        x = index * pitch
        words = f"{moment.phase}, {moment.component}: {human_bytes(live)}"
        bars.append({"x": x, "y": round(floor - height, 1), "width": pitch - GAP, "height": height,
                     "name": moment.component, "words": words})  # fmt: skip
        if moment.phase != before:
            marks.append({"x": x, "phase": moment.phase, "label_x": x + 3, "anchor": "start"})
        before = moment.phase
    width = max(len(moments) * pitch, LINE)
    if marks and width - marks[-1]["x"] < LABEL:
        marks[-1] |= {"label_x": width, "anchor": "end"}
    peak = f"peak {taken_words(gpu.peak_bytes, gpu.others_bytes, gpu.capacity_bytes, gpu.fullness)}"
    phases = ", ".join(f"{phase} {human_bytes(size)}" for phase, size in gpu.phase_peaks.items() if phase != "load")
    return {
        "caption": f"{gpu.device}, {gpu.gpu}: {peak}, in {gpu.component} during {gpu.phase}; "
        f"the plan estimated {gpu.planned_error:+.1%}",
        "capacity": f"{human_bytes(gpu.capacity_bytes)} in all",
        "capacity_y": round(120 - 100 * gpu.capacity_bytes / whole, 1),
        "words": f"Live bytes on {gpu.device} by phase: {phases}; taken all along: {_words(taken)}",
        "taken": _stacked(taken, whole),
        "bars": bars,
        "marks": marks,
        "width": width,
    }


def _stacked(sizes: Mapping[str, int], whole: int) -> list[dict[str, Any]]:
    """Strips of a timeline, one on the other from the bottom; those of no bytes are left out."""
    strips, bottom = [], 120.0
    for name, size in sizes.items():
        height = 100 * size / whole
        bottom -= height
        if size:
            strips.append({"name": name, "y": round(bottom, 1), "height": round(height, 1),
                           "words": _words({name: size})})  # fmt: skip
    return strips


def _words(sizes: Mapping[str, int]) -> str:
    named = {"others": "for others", "overhead": "context"}
    return ", ".join(f"{named[name]} {human_bytes(size)}" for name, size in sizes.items() if size)


def _rehearse(plan: Plan) -> str:
    """The command that rehearses a plan; none where it does not fit or uses no GPU."""
    if not plan.feasible or not plan.slots:
        return ""
    machine = ",".join(f"{slot.capacity_bytes // MIB}MiB" for slot in plan.slots)
    elsewhere = "" if isinstance(plan.spec.machine, VirtualMachine) else f" 'resolve.machine=\"{machine}\"'"
    return f"python -m sana_deploy plan_file=plan.json{elsewhere}"


def _measured(outcome: Outcome) -> list[str]:
    measured = outcome.measured
    lines = [f"peak on {device}: {human_bytes(size)}" for device, size in measured.peak_bytes.items()]
    lines += [f"moved {pair}: {human_bytes(size)}, {human_bytes(measured.bytes_per_step.get(pair, 0))} per step"
              for pair, size in measured.bytes_moved.items()]  # fmt: skip
    if measured.seconds:
        lines.append("seconds: " + ", ".join(f"{phase} {value:.2f}" for phase, value in measured.seconds.items()))
    if outcome.audit:
        lines.append(f"image against float32: {image_words(outcome.audit)}")
        lines += [f"{row.component} in {row.phase}, {row.dtype}: relative error {row.relative_error:.1e}"
                  for row in outcome.audit.borders]  # fmt: skip
    return lines


def _transfers(plan: Plan) -> list[tuple[str, ...]]:
    return [
        (
            place_words(one.src),
            place_words(one.dst),
            one.tensor,
            human_bytes(one.bytes_per_step),
            human_bytes(one.bytes_per_image),
        )
        for one in plan.transfers
    ]


def _flow(plan: Plan) -> dict[str, Any]:
    """Boxes for the places side by side, and an arc per direction: to the right above, to the left below."""
    sums: dict[tuple[Place, Place], list[int]] = defaultdict(lambda: [0, 0])
    for one in plan.transfers:
        sums[one.src, one.dst][0] += one.bytes_per_step
        sums[one.src, one.dst][1] += one.bytes_per_image
    used = {place for pair in sums for place in pair} | set(plan.device_map.values())
    places = sorted(used, key=lambda place: -1 if place == "cpu" else place)
    at = {place: index * (BOX + 90) for index, place in enumerate(places)}
    parts = {place: [name for name, where in plan.device_map.items() if where == place] for place in places}
    reach = max((abs(places.index(src) - places.index(dst)) for src, dst in sums), default=1)
    top, box = 20 + 34 * reach, 30 + 17 * max(1, *(len(names) for names in parts.values()))
    edges = []
    for (src, dst), (step, image) in sums.items():
        right, far = at[dst] > at[src], abs(places.index(src) - places.index(dst))
        start, end = (at[src] + BOX - 20, at[dst] + 20) if right else (at[src] + 20, at[dst] + BOX - 20)
        y, bend = (top, -34 * far) if right else (top + box, 34 * far)
        label = f"{human_bytes(step)} per step" if step else f"{human_bytes(image)} per image"
        edges.append({
            "path": f"M{start} {y}Q{(start + end) / 2} {y + 1.6 * bend} {end} {y}",
            "x": (start + end) / 2, "y": y + 0.8 * bend + (-6 if right else 14), "label": label,
            "words": f"{place_words(src)} to {place_words(dst)} {label}",
        })  # fmt: skip
    words = "; ".join(str(edge["words"]) for edge in edges)
    nodes = [{"name": place_words(place), "x": at[place], "parts": parts[place]} for place in places]
    flow = {"nodes": nodes, "top": top, "box": box, "width": max(at.values()) + BOX + 2,
            "height": 2 * top + box, "words": words}  # fmt: skip
    return {"flow": flow, "edges": edges}


def _runners(plan: Plan) -> list[tuple[str, ...]]:
    """The chosen placement and those that came next, as the table of what was considered shows them."""
    made = plan.estimates
    chosen = _runner(plan.device_map, plan.fullness, plan.knobs, made.bytes_per_image, made.seconds_per_image, True)
    rest = [_runner(one.device_map, one.fullness, one.knobs, one.bytes_per_image, one.seconds_per_image)
            for one in plan.considered.runners_up]  # fmt: skip
    return [chosen, *rest] if plan.feasible and plan.considered.placements else rest


def _runner(
    device_map: Mapping[Any, Place], full: float | None, knobs: Sequence[str], moved: int, seconds: float | None,
    chosen: bool = False,
) -> tuple[str, ...]:  # fmt: skip
    places = ", ".join(f"{name} {place_words(place)}" for name, place in device_map.items())
    return (
        f"{places} (chosen)" if chosen else places,
        ", ".join(knobs),
        "" if full is None else f"{full:.0%}",
        human_bytes(moved),
        "" if seconds is None else f"{seconds:.2f}",
    )


def sweep_page(title: str, rows: Sequence[Mapping[str, Any]], cells: Sequence[Mapping[str, str]],
               numbers: Mapping[str, str]) -> str:  # fmt: skip
    """Render a sweep.

    Args:
        title: what was swept.
        rows: as `summary.read_rows` gives them.
        cells: the same as people read them, title -> text.
        numbers: titles whose column sorts by number -> the row's key.
    """
    titles = [title for title in cells[0] if title != "reason"] if cells else []
    statuses = list(dict.fromkeys(str(row["status"]) for row in rows))
    counts = ", ".join(f"{sum(row['status'] == status for row in rows)} {status}" for status in statuses)
    return _template("sweep").render(
        title=title,
        version=__version__,
        counts=f"{len(rows)} jobs: {counts}",
        statuses=statuses,
        titles=titles,
        numbers=set(numbers),
        rows=[_sweep_row(row, shown, titles, numbers) for row, shown in zip(rows, cells, strict=True)],
        **_chart(rows),
    )


def _sweep_row(
    row: Mapping[str, Any], shown: Mapping[str, str], titles: Sequence[str], numbers: Mapping[str, str]
) -> Any:
    cells = []
    for title in titles:
        value = row[numbers[title]] if title in numbers else None
        cells.append({
            "text": shown[title],
            "title": title,
            "kind": "n" if title in numbers else "wide" if title in _LONG else "",
            "value": ("" if value is None else value) if title in numbers else None,
            "link": row["report"] if title == "job" else "",
            "badge": row["status"] if title == "status" else "",
        })  # fmt: skip
    return {key: row[key] for key in ("job", "status", "front", "reason")} | {"cells": cells}


def _chart(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Seconds (logarithmic) against GiB on all GPUs, of the rows that have both."""
    drawn = [row for row in rows if row["compared_seconds"] and row["total_peak_bytes"]]
    if not drawn:
        return {"points": [], "chart": {"x": [], "y": [], "words": ""}}
    seconds: list[float] = [math.log10(row["compared_seconds"]) for row in drawn]
    low, high = min(seconds) - 0.05, max(seconds) + 0.05
    top: float = max(row["total_peak_bytes"] for row in drawn) * 1.08

    def x(value: float) -> float:
        return round(60 + 650 * (value - low) / (high - low), 1)

    def y(size: float) -> float:
        return round(290 - 280 * size / top, 1)

    points = [
        {"job": row["job"], "x": x(value), "y": y(row["total_peak_bytes"]), "best": row["front"],
         "words": f"job {row['job']}: {row['compared_seconds']:.2f} s, {human_bytes(row['total_peak_bytes'])}"}
        for row, value in zip(drawn, seconds, strict=True)
    ]  # fmt: skip
    marks = [mark * 10.0**power for power in range(-4, 7) for mark in (1, 2, 5)]
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**6) if top / GIB / step <= 6)
    best = [point["words"] for point in points if point["best"]]
    return {
        "points": sorted(points, key=lambda point: bool(point["best"])),
        "chart": {
            "x": [
                {"at": x(math.log10(mark)), "label": f"{mark:g}"} for mark in marks if low <= math.log10(mark) <= high
            ],
            "y": [{"at": y(mark * GIB), "label": str(mark)} for mark in range(0, int(top / GIB) + 1, step)],
            "words": f"{len(points)} deployments; on the Pareto front: {'; '.join(best)}",
        },
    }
