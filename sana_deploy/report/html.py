"""Pages for a browser: `report.html` of one plan and `summary.html` of a sweep, each one file that loads nothing.

Pure renderers: the numbers are those of the plan and the outcome, the layout is in `templates/`, which escape every
text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._units import MIB, human_bytes
from .._version import __version__
from ..declare.spec import VirtualMachine
from ..plan.artifact import Plan
from ..plan.records import Place, place_words
from ..run.outcome import Outcome, Rehearsal
from .drawings import bar_rows, chart, flow, legend, memory_bar, ordered_parts, timeline
from .notes import COLUMN_NOTES, SWEEP_NOTES, notes_of
from .pages import template
from .wording import (
    PICTURE,
    considered_sentence,
    faster_sentence,
    groups_words,
    image_words,
    knob_sentence,
    knob_words,
    model_words,
    overlap_words,
    rejection_words,
    replicas_words,
    runtime_words,
    steps_words,
)

_LONG = ("dtypes", "knobs")
"""Columns of a sweep whose text may wrap."""


def plan_page(plan: Plan, outcome: Outcome, command: str, pictures: Sequence[str] = ()) -> str:
    """Render one plan and what became of it.

    Args:
        command: the command line of the run.
        pictures: images as data URLs.
    """
    spec, lines = plan.spec, _timelines(outcome.rehearsal)
    bars = [memory_bar(one, slot) for one in plan.each() for slot in one.slots]
    return template("plan").render(
        title=f"{model_words(plan)}, {spec.hardware.strategy}, {spec.precision.name}",
        status=outcome.status,
        error=outcome.error,
        workload=_workload(plan),
        digest=plan.digest[7:19],
        version=__version__,
        command=command,
        glance=_glance(plan, outcome),
        legend=legend(plan),
        gpus=bars,
        bar_rows=bar_rows(bars),
        replicas=_replicas(plan),
        components=_components(plan),
        seconds=_seconds(plan),
        faster=[faster_sentence(one) for one in plan.faster],
        knobs=[f"{knob_sentence(plan, knob)}: {knob_words(knob)}" for knob in plan.knobs],
        timelines=lines,
        turns=_turns(lines),
        sure=notes_of(plan, outcome),
        rehearse=_rehearse(plan),
        measured=_measured(outcome),
        pictures=list(pictures),
        transfers=_transfers(plan),
        considered=considered_sentence(plan),
        runners=_runners(plan),
        rejections=[f"{rejection_words(row)}; closest: {row.closest}" for row in plan.rejections],
        remarks=_remarks(plan, outcome),
        **flow(plan),
    )  # fmt: skip


def _turns(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Timelines as rows of a table: phase, component, and the live bytes on each GPU."""
    return [
        (turns[0]["phase"], turns[0]["component"], *(human_bytes(turn["bytes"]) for turn in turns))
        for turns in zip(*(line["bars"] for line in lines), strict=True)
    ]


def _remarks(plan: Plan, outcome: Outcome) -> list[dict[str, str]]:
    return [
        {"severity": one.severity, "text": f"{one.where}: {one.message}" if one.where else one.message,
         "hint": one.hint}
        for one in (*plan.diagnostics, *outcome.diagnostics)
    ]  # fmt: skip


def _glance(plan: Plan, outcome: Outcome) -> list[tuple[str, str, str]]:
    """What is read first: label, figure and note."""
    made, measured = plan.estimates, outcome.measured
    rows = [
        ("seconds per image", "" if made.seconds_per_image is None else f"~{made.seconds_per_image:.2f}", "seconds"),
        ("images per second", "" if plan.images_per_second is None else f"~{plan.images_per_second:.3g}", "seconds"),
        ("seconds in this run", f"{measured.seconds['generate']:.2f}" if "generate" in measured.seconds else "",
         "measured"),
        ("fullest GPU", "" if plan.fullness is None else f"~{plan.fullness:.0%}", "peak"),
        ("moved per step", f"~{human_bytes(made.bytes_per_step)}" if made.bytes_per_step else "", "moved"),
        ("moved per image", f"~{human_bytes(made.bytes_per_image)}" if made.bytes_per_image else "nothing", "moved"),
        ("weights", human_bytes(sum(part.weights_bytes for part in plan.parts.values())), "weights"),
        (PICTURE[plan.exactness] if plan.exactness else "", plan.exactness or "", ""),
    ]  # fmt: skip
    return [row for row in rows if row[1]]


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


def _workload(plan: Plan) -> str:
    """What is drawn, how it executes, and how many replicas draw it."""
    work = plan.spec.workload
    shape = (
        f"{work.width} x {work.height} px, batch {work.batch}, {steps_words(plan)}, guidance {work.guidance_scale:g}"
    )
    exactness = f"in all {plan.exactness}" if plan.exactness else ""
    return ", ".join(filter(None, [shape, runtime_words(plan), exactness, replicas_words(plan), overlap_words(plan)]))


def _components(plan: Plan) -> list[tuple[str, ...]]:
    return [
        (
            f"{name} (home)" if name == plan.pipeline.denoiser else name,
            place_words(part.slot),
            str(part.format),
            human_bytes(part.weights_bytes),
            human_bytes(part.activation_bytes),
        )
        for name, part in ((name, plan.parts[name]) for name in ordered_parts(plan))
    ]


def _replicas(plan: Plan) -> list[tuple[str, ...]]:
    """A row for each replica; none for a plan of one."""
    return [
        (
            str(number),
            ", ".join(place_words(slot.index) for slot in one.slots),
            groups_words({name: part.slot for name, part in one.parts.items()}),
            ", ".join(one.knobs),
            one.runtime if one.split == "none" else f"{one.runtime}, split {one.split}",
            "" if one.fullness is None else f"{one.fullness:.0%}",
            "" if one.estimates.seconds_per_image is None else f"{one.estimates.seconds_per_image:.2f}",
            "" if one.images_per_second is None else f"{one.images_per_second:.3g}",
        )
        for number, one in enumerate(plan.each() if plan.replicas else [])
    ]


def _timelines(rehearsal: Rehearsal | None) -> list[dict[str, Any]]:
    """A timeline for each GPU of the first replica; those of the others are as it or were not kept."""
    kept = {device for moment in rehearsal.timeline for device in moment.live_bytes} if rehearsal else set()
    return [timeline(gpu, rehearsal) for gpu in rehearsal.gpus if gpu.device in kept] if rehearsal else []


def _seconds(plan: Plan) -> str:
    if plan.estimates.seconds_per_image is None:
        return ""
    phases = ", ".join(f"{phase} {value:.2f} s" for phase, value in plan.estimates.seconds.items())
    return f"{plan.estimates.seconds_per_image:.2f} s per image ({phases})"


def _rehearse(plan: Plan) -> str:
    """The command that rehearses a plan; none where it does not fit or uses no GPU."""
    if not plan.feasible or not plan.slots:
        return ""
    slots = sorted(plan.all_slots, key=lambda slot: slot.index)
    machine = ",".join(f"{slot.capacity_bytes // MIB}MiB" for slot in slots)
    elsewhere = "" if isinstance(plan.spec.machine, VirtualMachine) else f" 'resolve.machine=\"{machine}\"'"
    return f"python -m sana_deploy plan_file=plan.json{elsewhere}"


def _measured(outcome: Outcome) -> list[str]:
    measured = outcome.measured
    lines = [f"peak on {device}: {human_bytes(size)}" for device, size in measured.peak_bytes.items()]
    lines += [f"moved {pair}: {human_bytes(size)}, {human_bytes(measured.bytes_per_step.get(pair, 0))} per step"
              for pair, size in measured.bytes_moved.items()]  # fmt: skip
    if measured.images_per_second:
        lines.append(f"{measured.images_per_second:.3g} images per second, of all replicas at once")
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
            human_bytes(one.bytes_per_step) if one.bytes_per_step else "",
            human_bytes(one.bytes_per_image),
        )
        for one in plan.transfers
    ]


def _runners(plan: Plan) -> list[tuple[str, ...]]:
    """The chosen placement and those that came next, as the table of what was considered shows them."""
    made, places = plan.estimates, {name: part.slot for name, part in plan.parts.items()}
    chosen = _runner(places, plan.fullness, plan.knobs, made.bytes_per_image, made.seconds_per_image, True)
    rest = [
        _runner({**one.device_map, **one.units}, one.fullness, one.knobs, one.bytes_per_image, one.seconds_per_image)
        for one in plan.considered.runners_up
    ]
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
    return template("sweep").render(
        title=title,
        version=__version__,
        counts=f"{len(rows)} jobs: {counts}",
        statuses=statuses,
        titles=titles,
        numbers=set(numbers),
        noted=COLUMN_NOTES,
        sure=SWEEP_NOTES,
        rows=[_sweep_row(row, shown, titles, numbers) for row, shown in zip(rows, cells, strict=True)],
        **chart(rows),
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
