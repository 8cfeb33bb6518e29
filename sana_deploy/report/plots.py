"""The plot of a sweep as PNG and SVG: seconds per image against memory, the Pareto front marked."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._files import write_bytes
from .._units import GIB


def plot_rows(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Write summary.png and summary.svg into `folder`: one colour per model and workload; matplotlib draws.

    Args:
        rows: as `summary.read_rows` gives them; those without seconds or GPUs are left out.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["compared_seconds"] and row["total_peak_bytes"]:
            groups.setdefault(_title(row["workload"]), []).append(row)
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for title, group in groups.items():
        points = axes.scatter(*_coordinates(group), s=24, alpha=0.6, label=title)
        front = sorted((row for row in group if row["front"]), key=lambda row: row["compared_seconds"])
        seconds, memory = _coordinates(front)
        axes.plot(seconds, memory, drawstyle="steps-post", color=points.get_facecolor()[0], alpha=1, lw=1)
        axes.scatter(seconds, memory, s=60, color=points.get_facecolor(), edgecolor="black", alpha=1)
        for point, text in _labels(front).items():
            axes.annotate(text, point, xytext=(5, 5), textcoords="offset points", fontsize=8)
    axes.set(xlabel="seconds per image", ylabel="GiB on all GPUs, at their peaks", xscale="log", ylim=(0, None))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_title("Deployments; outlined, with job number: on the Pareto front", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    written = []
    with mpl.rc_context({"svg.hashsalt": "sana_deploy", "svg.fonttype": "none"}):
        for suffix in ("png", "svg"):
            drawn = io.BytesIO()
            figure.savefig(drawn, format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else {})
            written.append(write_bytes(folder / f"summary.{suffix}", drawn.getvalue()))
    return written


def _labels(front: Sequence[Mapping[str, Any]]) -> dict[tuple[float, float], str]:
    """Job numbers by the point that they share; three at most."""
    jobs: dict[tuple[float, float], list[str]] = {}
    for x, y, row in zip(*_coordinates(front), front, strict=True):
        jobs.setdefault((x, y), []).append(str(row["job"]))
    return {point: ", ".join(names[:3]) + (" ..." if len(names) > 3 else "") for point, names in jobs.items()}


def _title(workload: Mapping[str, Any]) -> str:
    return f"{workload['model']}, {workload['width']}x{workload['height']}, batch {workload['batch']}"


def _coordinates(rows: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    return [row["compared_seconds"] for row in rows], [row["total_peak_bytes"] / GIB for row in rows]
