"""Drawings of the pages: bars, arcs and points as numbers, for the templates that write the SVG. Lengths are pixels."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .._units import GIB, human_bytes
from ..plan.artifact import Plan
from ..plan.records import Place, Slot, ordered_places, place_words
from ..plan.units import component_of
from ..run.outcome import Rehearsal, RehearsedGpu
from .wording import OTHERS_WORDS, pool_words, taken_words

LINE, GAP, LABEL, BOX = 760, 2, 110, 150
"""Width of a timeline, the gap between its bars, the widest label, and a slot's width in the drawing of transfers."""


_PART_NOTES = {"activations": "activations", "overhead": "overhead", "others": "capacity", "free": "peak"}
"""Part of a bar -> the note on its number; all others are weights."""


def legend(plan: Plan) -> list[tuple[str, str]]:
    """What the colours of the bars mean; others only where they take any."""
    others = [("others", OTHERS_WORDS)] if any(slot.others_bytes for slot in plan.all_slots) else []
    parts = [("activations", "activations ~"), ("overhead", "context and headroom ~"), *others, ("free", "free")]
    return [*((name, name) for name in plan.pipeline.names), *parts]


def ordered_parts(plan: Plan) -> list[str]:
    """Names of components and further units in the pipeline's order; a plan that was saved has them by name."""
    names = list(plan.pipeline.names)
    return sorted(plan.parts, key=lambda name: (names.index(component_of(name)), name))


def memory_bar(plan: Plan, slot: Slot) -> dict[str, Any]:
    """The bar of one GPU: weights of each component that is there at the peak, activations, overhead, others, free."""
    here: dict[str, int] = {name: plan.parts[name].weights_bytes for name in ordered_parts(plan)
                            if plan.parts[name].slot == slot.index}  # fmt: skip
    if sum(here.values()) > slot.weights_bytes:  # the peak is in a phase when offloaded weights wait on the CPU
        uploaded = {one.tensor for one in plan.transfers if one.src == "cpu"}
        here = {name: size for name, size in here.items() if f"{name} weights" not in uploaded}
    sizes: dict[str, int] = {**here, "activations": slot.activation_bytes, "overhead": slot.overhead_bytes,
                             "others": slot.others_bytes}  # fmt: skip
    total = max(slot.capacity_bytes, sum(sizes.values()))
    sizes["free"] = total - sum(sizes.values())
    parts = [
        {"name": component_of(name), "percent": round(100 * size / total, 3), "part": name, "size": human_bytes(size),
         "words": f"{name} {human_bytes(size)}", "note": _PART_NOTES.get(name, "weights")}
        for name, size in sizes.items()
        if size or name != "others"
    ]  # fmt: skip
    taken = taken_words(slot.peak_bytes, slot.others_bytes, slot.capacity_bytes, slot.fullness)
    summary = f"{slot.gpu}: ~{taken}, fullest in {slot.peak_phase}{pool_words(slot)}"
    words = f"GPU {slot.index}, {summary}: {', '.join(str(part['words']) for part in parts)}"
    return {"name": f"GPU {slot.index}", "summary": summary, "parts": parts, "words": words}


def bar_rows(bars: Iterable[Mapping[str, Any]], before: str = "") -> list[tuple[str, str, str, str]]:
    """The numbers of memory bars as rows of a table: GPU (after `before`), part, size, and the note on it."""
    return [
        (f"{before}{bar['name']}", part["part"], part["size"], part["note"]) for bar in bars for part in bar["parts"]
    ]


def timeline(gpu: RehearsedGpu, rehearsal: Rehearsal) -> dict[str, Any]:
    """One bar per turn of a component, as high as the GPU was full; a mark where a phase begins.

    Below the bars stands what is taken all along: by others, by the CUDA context and by the allocator.
    """
    taken = {"others": gpu.others_bytes, "overhead": gpu.context_bytes + gpu.allocator_bytes}
    whole = max(gpu.capacity_bytes, gpu.peak_bytes + gpu.others_bytes, 1)
    floor = 120 - 100 * sum(taken.values()) / whole
    moments = [moment for moment in rehearsal.timeline if moment.phase != "load"]
    pitch = max(8, LINE // max(len(moments), 1))
    bars: list[dict[str, Any]] = []
    for index, moment in enumerate(moments):
        live = moment.live_bytes.get(gpu.device, 0)
        height = round(100 * live / whole, 1)
        bars.append({
            "phase": moment.phase, "component": moment.component, "bytes": live, "x": index * pitch,
            "y": round(floor - height, 1), "width": pitch - GAP, "height": height,
            "name": component_of(moment.component), "words": f"{moment.phase}, {moment.component}: {human_bytes(live)}",
        })  # fmt: skip
    width = max(len(moments) * pitch, LINE)
    peak = f"peak {taken_words(gpu.peak_bytes, gpu.others_bytes, gpu.capacity_bytes, gpu.fullness)}"
    phases = ", ".join(f"{phase} {human_bytes(size)}" for phase, size in gpu.phase_peaks.items() if phase != "load")
    return {
        "caption": f"{gpu.device}, {gpu.gpu}: {peak}, in {gpu.component} during {gpu.phase}; "
        f"the plan estimated {gpu.planned_error:+.1%}",
        "capacity": f"{human_bytes(gpu.capacity_bytes)} in all",
        "capacity_y": round(120 - 100 * gpu.capacity_bytes / whole, 1),
        "words": f"Live bytes on {gpu.device} by phase: {phases}; taken all along: {_words(taken)}",
        "taken": _stacked(taken, whole),
        "device": gpu.device,
        "bars": bars,
        "marks": _marks(bars, width),
        "width": width,
    }


def _marks(bars: Iterable[Mapping[str, Any]], width: int) -> list[dict[str, Any]]:
    """Where phases begin; a label that would touch the one before it stands a line lower."""
    marks: list[dict[str, Any]] = []
    for bar in bars:
        if not marks or bar["phase"] != marks[-1]["phase"]:
            low = bool(marks) and bar["x"] - marks[-1]["x"] < LABEL and marks[-1]["label_y"] == 140
            marks.append({"x": bar["x"], "phase": bar["phase"], "label_x": bar["x"] + 3, "label_y": 140 + 26 * low,
                          "anchor": "start"})  # fmt: skip
    if marks and width - marks[-1]["x"] < LABEL:
        marks[-1] |= {"label_x": width, "anchor": "end"}
    return marks


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
    named = {"others": "for others", "overhead": "context and allocator"}
    return ", ".join(f"{named[name]} {human_bytes(size)}" for name, size in sizes.items() if size)


def flow(plan: Plan) -> dict[str, Any]:
    """Boxes for the places side by side, and an arc per direction: to the right above, to the left below."""
    sums: dict[tuple[Place, Place], list[int]] = defaultdict(lambda: [0, 0])
    for one in plan.transfers:
        sums[one.src, one.dst][0] += one.bytes_per_step
        sums[one.src, one.dst][1] += one.bytes_per_image
    places = ordered_places({place for pair in sums for place in pair} | {part.slot for part in plan.parts.values()})
    at = {place: index * (BOX + 90) for index, place in enumerate(places)}
    parts = {place: [name for name, part in plan.parts.items() if part.slot == place] for place in places}
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
    drawn = {"nodes": nodes, "top": top, "box": box, "width": max(at.values()) + BOX + 2,
            "height": 2 * top + box, "words": words}  # fmt: skip
    return {"flow": drawn, "edges": edges}


def chart(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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
         "note": "measured" if row["seconds"] is not None else "seconds",
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
