"""Sums up a sweep from its jobs' files: rows, the Pareto front, and summary.json, .csv, .md, .html, .png and .svg.

    python -m sana_deploy summary FOLDER

Jobs may run in other processes and may be interrupted, so that nothing is remembered between them: the files are the
only source, and the summary can be written again at any time.
"""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._files import write_text
from .._units import fullness, human_bytes
from ..declare.formats import Format
from ..declare.pipelines import COMPONENTS
from .jobs import Job, read_jobs

COLUMNS = (
    "job", "overrides", "status", "exit_code", "front", "gpus", "replicas", "fullness", "worst_utilisation",
    "weights_bytes", "peak_bytes", "total_peak_bytes", "per_gpu", "bytes_per_step", "estimated_seconds_per_image",
    "images_per_second", "measured_images_per_second", "seconds", "compared_seconds", "compared_rate",
    "measured_peak_bytes", "psnr", "worst_error", "exactness", "knobs", "dtypes", "device_map", "workload", "report",
    "reason",
)  # fmt: skip
_NESTED = ("overrides", "knobs", "dtypes", "device_map", "per_gpu", "workload")
"""Columns that hold JSON in summary.csv."""
_PER_GPU = ("index", "gpu", "weights_bytes", "peak_bytes", "available_bytes", "capacity_bytes")
"""What a row says of each GPU."""
NUMBERS: Mapping[str, str] = {
    "job": "job", "GPUs": "gpus", "replicas": "replicas", "fullest": "fullness", "weights": "weights_bytes",
    "peak": "peak_bytes", "per step": "bytes_per_step", "~s/image": "estimated_seconds_per_image",
    "~images/s": "images_per_second", "images/s": "measured_images_per_second", "worst error": "worst_error",
    "seconds": "seconds", "measured peak": "measured_peak_bytes", "PSNR": "psnr",
}  # fmt: skip
"""Column titles that are aligned to the right and sort by number -> the key of a row."""


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Read one row per job, best first; one that left no sound outcome, or never started, is a row that says so.

    Rows on the Pareto front have `front` set; see `mark_front`. Rows that are done come first, by model and workload,
    then by seconds and memory.
    """
    rows = [_row(job) for job in read_jobs(folder)]
    mark_front(rows)
    return sorted(rows, key=_rank)


def _row(job: Job) -> dict[str, Any]:
    outcome, plan = job.outcome, job.plan
    workload, plan = _workload(plan, outcome), plan if plan.get("feasible", True) else {}  # a miss has no figures
    parts, each = plan.get("components", {}), [plan, *plan.get("replicas", [])]
    slots = sorted((slot for one in each for slot in one.get("slots", [])), key=lambda slot: int(slot["index"]))
    estimates, audit = plan.get("estimates", {}), outcome.get("audit") or {}
    estimated, measured = estimates.get("seconds_per_image"), outcome.get("measured", {})
    return {
        "job": job.number,
        "overrides": {key: value for key, _, value in (line.partition("=") for line in job.overrides)},
        "status": job.status,
        "exit_code": job.exit_code,
        "front": False,
        "gpus": len(slots),
        "replicas": len(each) if plan else None,
        "fullness": max((_fullness(slot) for slot in slots), default=None),
        "worst_utilisation": estimates.get("worst_utilisation"),
        "weights_bytes": _weights(each) if plan else None,
        "peak_bytes": max((slot["peak_bytes"] for slot in slots), default=None),
        "total_peak_bytes": sum(slot["peak_bytes"] for slot in slots) or None,
        "per_gpu": [{key: slot[key] for key in _PER_GPU} for slot in slots],
        "bytes_per_step": estimates.get("bytes_per_step"),
        "estimated_seconds_per_image": estimated,
        "images_per_second": plan.get("images_per_second") or (round(1 / estimated, 4) if estimated else None),
        "measured_images_per_second": measured.get("images_per_second"),
        "seconds": measured.get("seconds", {}).get("generate"),
        "compared_seconds": None,
        "compared_rate": None,
        "measured_peak_bytes": max(measured.get("peak_bytes", {}).values(), default=None),
        "psnr": audit.get("psnr"),
        "worst_error": max((border["relative_error"] for border in audit.get("borders", [])), default=None),
        "exactness": plan.get("exactness"),
        "knobs": plan.get("knobs", []),
        "dtypes": {name: str(_format(parts[name])) for name in COMPONENTS if name in parts},
        "device_map": outcome.get("device_map") or plan.get("device_map", {}),
        "workload": workload,
        "report": job.report,
        "reason": job.reason,
    }


def _fullness(slot: Mapping[str, Any]) -> float:
    return round(fullness(slot["peak_bytes"], slot["available_bytes"], slot["capacity_bytes"]), 6)


def _format(part: Mapping[str, Any]) -> Format:
    return Format(part["dtype"], part.get("quantization"))


def _weights(each: Sequence[Mapping[str, Any]]) -> int:
    """Bytes of the weights of all units of all replicas."""
    units = (unit for one in each for key in ("components", "units") for unit in one.get(key, {}).values())
    return sum(unit["weights_bytes"] for unit in units)


def _workload(plan: Mapping[str, Any], outcome: Mapping[str, Any]) -> dict[str, Any]:
    """What rows must share to be compared: the model and the request."""
    if not plan or not outcome:
        return {}
    keys = ("height", "width", "batch", "steps", "guidance_scale")
    return {"model": plan["checkpoint"]["source"], **{key: plan["spec"]["workload"][key] for key in keys}}


def mark_front(rows: Sequence[dict[str, Any]]) -> None:
    """Set `front` on the rows that no other beats, and `compared_seconds` and `compared_rate` to what they compare by.

    Rows are compared within a model and workload, by seconds per image, by images per second and by the peaks of all
    GPUs together: one is beaten by another that is no worse in all and better in one. Seconds are measured ones where
    all rows of the group have them, else estimates; rows without are left out.
    """
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["status"] == "done" and row["total_peak_bytes"]:
            groups[json.dumps(row["workload"], sort_keys=True)].append(row)
    for group in groups.values():
        key = "seconds" if all(row["seconds"] for row in group) else "estimated_seconds_per_image"
        for row in group:
            row["compared_seconds"] = row[key]
            row["compared_rate"] = _rate(row, key == "seconds")
        compared = [row for row in group if row[key] is not None]
        for row in compared:
            row["front"] = not any(_beats(other, row) for other in compared)


def _rate(row: Mapping[str, Any], measured: bool) -> float:
    """Images per second, of all replicas; of one pipeline they follow from the seconds that it is compared by."""
    if row["replicas"] == 1:
        batch = row["workload"]["batch"] if measured else 1
        return float(batch / row["compared_seconds"]) if row["compared_seconds"] else 0.0
    return float((row["measured_images_per_second"] if measured else row["images_per_second"]) or 0.0)


def _beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    pairs = [(one[key], other[key]) for key in ("compared_seconds", "total_peak_bytes")]
    pairs.append((-one["compared_rate"], -other["compared_rate"]))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def _rank(row: Mapping[str, Any]) -> tuple[Any, ...]:
    status = {"done": 0, "infeasible": 1, "not started": 3}.get(row["status"], 2)
    seconds = row["compared_seconds"] or row["estimated_seconds_per_image"] or float("inf")
    return status, json.dumps(row["workload"], sort_keys=True), seconds, row["total_peak_bytes"] or 0, row["job"]


def write_summary(folder: Path, rows: list[dict[str, Any]]) -> list[Path]:
    """Write all files beside the jobs and return them; .json and .csv have all values, the others what people read."""
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        nested = {key: json.dumps(row[key], ensure_ascii=False) for key in _NESTED}
        writer.writerow({**row, **nested})
    shown = cells_of(rows)
    from .html import sweep_page

    texts = {
        "json": json.dumps(rows, indent=2, ensure_ascii=False) + "\n",
        "csv": table.getvalue(),
        "md": _markdown(shown),
        "html": sweep_page(f"Sweep {folder.name}", rows, shown, NUMBERS),
    }
    written = [write_text(folder / f"summary.{suffix}", text) for suffix, text in texts.items()]
    if any(row["compared_seconds"] for row in rows):
        from .plots import plot_rows

        written += plot_rows(rows, folder)
    return written


def _markdown(cells: Sequence[Mapping[str, str]]) -> str:
    if not cells:
        return "no jobs\n"
    lines = [list(cells[0]), ["---"] * len(cells[0])]
    lines += [[value.replace("|", "\\|").replace("\n", " ") for value in row.values()] for row in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def swept_keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Overrides that differ between jobs."""
    keys = list(dict.fromkeys(key for row in rows for key in row["overrides"]))
    return [key for key in keys if len({row["overrides"].get(key) for row in rows}) > 1]


def cells_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The rows as people read them: a column per override that differs between jobs; empty columns left out."""
    swept = swept_keys(rows)
    cells = [_cells(row, swept) for row in rows]
    used = [title for title in (cells[0] if cells else ()) if any(row[title] for row in cells)]
    return [{title: row[title] for title in used} for row in cells]


def _cells(row: Mapping[str, Any], swept: Sequence[str]) -> dict[str, str]:
    used, ended = row["fullness"], row["status"] == "done"
    return {
        "job": str(row["job"]),
        "front": "★" if row["front"] else "",
        "~s/image": _number(row["estimated_seconds_per_image"]),
        "seconds": _number(row["seconds"]),
        **{key: row["overrides"].get(key, "") for key in swept},
        "status": row["status"],
        "GPUs": str(row["gpus"]) if ended or row["gpus"] else "",
        "replicas": str(row["replicas"]) if (row["replicas"] or 1) > 1 else "",
        "fullest": f"{used:.0%}" if used else "",
        "peak": _size(row["peak_bytes"]),
        "weights": _size(row["weights_bytes"]),
        "weights per GPU": _each(row, "weights_bytes"),
        "peak per GPU": _each(row, "peak_bytes"),
        "per step": _size(row["bytes_per_step"]) if row["gpus"] else "",
        "~images/s": _number(row["images_per_second"]),
        "images/s": _number(row["measured_images_per_second"]),
        "measured peak": _size(row["measured_peak_bytes"]),
        "PSNR": _number(row["psnr"]),
        "worst error": "" if row["worst_error"] is None else f"{row['worst_error']:.1e}",
        "dtypes": ", ".join(f"{name} {form}" for name, form in row["dtypes"].items()),
        "exactness": row["exactness"] or "",
        "knobs": ", ".join(row["knobs"]),
        "reason": row["reason"],
    }


def _each(row: Mapping[str, Any], key: str) -> str:
    return ", ".join(f"{slot['index']}: {human_bytes(slot[key])}" for slot in row["per_gpu"])


def _size(count: int | None) -> str:
    return "" if count is None else human_bytes(count)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
