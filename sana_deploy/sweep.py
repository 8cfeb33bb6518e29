"""The Hydra callback of a multirun: reads each job's files, writes summary.json, .csv and .md, prints the table.

Jobs may run in other processes, so that nothing is remembered between them: the files are the only source.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from .files import write_text
from .units import human_bytes

log = logging.getLogger(__name__)
COLUMNS = (
    "job", "overrides", "status", "exit_code", "gpus", "worst_utilisation", "weights_bytes", "peak_bytes",
    "bytes_per_step", "estimated_seconds_per_image", "seconds", "psnr", "knobs", "dtypes", "device_map", "reason",
)  # fmt: skip
_NESTED = ("overrides", "knobs", "dtypes", "device_map")
"""Columns that hold JSON in summary.csv."""
_NUMBERS = ("job", "fullest", "weights", "peak", "per step", "~seconds", "seconds", "PSNR")
"""Column titles that are aligned to the right."""


class SweepSummary(Callback):  # type: ignore[misc]
    """Sums up a multirun once its last job has ended."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write and print the summary of every job folder below the sweep's."""
        from .report import console

        folder = Path(str(OmegaConf.select(config, "hydra.sweep.dir"))).absolute()
        rows = read_rows(folder)
        write_summary(folder, rows)
        if not rows:
            return
        out = console()
        out.print(render_rows(rows))
        if OmegaConf.select(config, "output") == "json":
            sys.stdout.write(json.dumps(rows, ensure_ascii=False) + "\n")
        for suffix in ("md", "csv", "json"):
            out.print(f"saved: {folder / f'summary.{suffix}'}", soft_wrap=True)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Read one row per job folder, in job order; a job that left no outcome is a row that says so."""
    jobs = [path for path in folder.iterdir() if path.is_dir() and path.name.isdigit()] if folder.is_dir() else []
    return [_row(job) for job in sorted(jobs, key=lambda path: int(path.name))]


def _row(job: Path) -> dict[str, Any]:
    outcome, plan = _read(job / "outcome.json"), _read(job / "plan.json")
    error = outcome.get("error") or {}
    plan = plan if plan.get("feasible", True) else {}  # a closest miss has no figures to compare
    slots = plan.get("slots", [])
    parts = plan.get("components", {})
    estimates, audit = plan.get("estimates", {}), outcome.get("audit") or {}
    return {
        "job": int(job.name),
        "overrides": _overrides(job),
        "status": outcome.get("status", "failed"),
        "exit_code": outcome.get("exit_code", 1),
        "gpus": len(slots),
        "worst_utilisation": estimates.get("worst_utilisation"),
        "weights_bytes": sum(part["weights_bytes"] for part in parts.values()) if plan else None,
        "peak_bytes": max((slot["peak_bytes"] for slot in slots), default=None),
        "bytes_per_step": estimates.get("bytes_per_step"),
        "estimated_seconds_per_image": estimates.get("seconds_per_image"),
        "seconds": outcome.get("measured", {}).get("seconds", {}).get("generate"),
        "psnr": audit.get("psnr"),
        "knobs": plan.get("knobs", []),
        "dtypes": {name: part["dtype"] for name, part in parts.items()},
        "device_map": outcome.get("device_map") or plan.get("device_map", {}),
        "reason": error.get("message", "" if outcome else "the job left no outcome.json"),
    }


def _overrides(job: Path) -> dict[str, str]:
    """The job's overrides as Hydra wrote them, key -> value."""
    try:
        lines = [str(line) for line in OmegaConf.load(job / ".hydra" / "overrides.yaml")]
    except (OSError, ValueError):
        return {}
    return {key: value for key, _, value in (line.partition("=") for line in lines)}


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_summary(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write summary.json (all values), summary.csv and summary.md beside the jobs."""
    write_text(folder / "summary.json", json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        nested = {key: json.dumps(row[key], ensure_ascii=False) for key in _NESTED}
        writer.writerow({**row, **nested})
    write_text(folder / "summary.csv", table.getvalue())
    write_text(folder / "summary.md", _markdown(cells_of(rows)))


def _markdown(cells: list[dict[str, str]]) -> str:
    if not cells:
        return "no jobs\n"
    lines = [list(cells[0]), ["---"] * len(cells[0])]
    lines += [[value.replace("|", "\\|").replace("\n", " ") for value in row.values()] for row in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def cells_of(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The rows as people read them: a column per override that differs between jobs; empty columns left out."""
    keys = list(dict.fromkeys(key for row in rows for key in row["overrides"]))
    swept = [key for key in keys if len({row["overrides"].get(key) for row in rows}) > 1]
    cells = [_cells(row, swept) for row in rows]
    used = [title for title in (cells[0] if cells else ()) if any(row[title] for row in cells)]
    return [{title: row[title] for title in used} for row in cells]


def _cells(row: dict[str, Any], swept: list[str]) -> dict[str, str]:
    used = row["worst_utilisation"]
    places = sorted({f"GPU {place}" if isinstance(place, int) else place for place in row["device_map"].values()})
    return {
        "job": str(row["job"]),
        **{key: row["overrides"].get(key, "") for key in swept},
        "status": row["status"],
        "devices": ", ".join(places),
        "fullest": f"{used:.0%}" if used else "",
        "weights": _size(row["weights_bytes"]),
        "peak": _size(row["peak_bytes"]),
        "per step": _size(row["bytes_per_step"]),
        "~seconds": _number(row["estimated_seconds_per_image"]),
        "seconds": _number(row["seconds"]),
        "PSNR": _number(row["psnr"]),
        "knobs": ", ".join(row["knobs"]),
        "reason": row["reason"],
    }


def _size(count: int | None) -> str:
    return "" if count is None else human_bytes(count)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def render_rows(rows: list[dict[str, Any]]) -> Any:
    """Return a rich table of the rows, and below it why jobs did not end well."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    styles = {"done": "green", "infeasible": "yellow"}
    table = Table(box=None, header_style="dim")
    shown = cells_of(rows)
    reasons = [Text(f"job {cells['job']}: {why}", style="dim") for cells in shown if (why := cells.pop("reason", ""))]
    for title in shown[0]:
        table.add_column(title, overflow="fold", justify="right" if title in _NUMBERS else "left")
    for cells in shown:
        style = styles.get(cells["status"], "red")
        table.add_row(*(Text(value, style=style if title == "status" else "") for title, value in cells.items()))
    return Group(table, *reasons)
