"""Calibrates what components need as functions of the request.

`python -m sana_deploy.rehearsal.calibrate [MODEL ...]` writes the shipped needs anew, of all models or of those named.

SANA's parts are linear in batch and in batch x pixels, so that four measured points (`measure.py`) determine each
quantity, with and without guidance (which doubles the batch everywhere but in decode, where it adds rows):

    quantity = constant + per_image x batch + per_pixel x pixels + per_image_pixel x batch x pixels

Layers that are alike add the same each, so that two small numbers of them tell what all take (`_depths`).

Quantities are `activation_bytes`, and per step of the phase `flops`, `product_bytes` and `other_bytes`; `operations`
do not change with size. The VAE has three more: `sliced_bytes` is the peak when images pass one at a time,
`tiling_bytes` what collecting tiles adds to a tile's own peak, as constant + per_pixel + per_image_pixel of the
pixels that tiles cover, and `banded` all quantities when an image passes in bands, as `plan/bands.py` says.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import numpy as np

from ..declare.compose import compose_spec
from ..declare.formats import Dtype, Format, Quantization
from ..declare.pipelines import Component, Phase, PipelineDescription
from ..facts import catalogue
from ..facts.catalogue import FOLDER, NAMES
from ..facts.checkpoint import Checkpoint, open_checkpoint
from ..plan.bands import WORK, memory_terms, work_terms
from ..plan.needs import OnProgress, measured_as
from ..plan.passing import VAE_TILE, VaeMode, covered_pixels, linear
from .measure import Measurement, Measurements, Point, Profiler, layers_of

PLAIN = (Point(512, 1), Point(1024, 1), Point(512, 2), Point(1024, 2))
SLICED = tuple(Point(side, batch, VaeMode(sliced=True)) for side, batch in ((512, 2), (1024, 2), (512, 3), (1024, 3)))
TILED = tuple(Point(side, batch, VaeMode(sliced=True, tiled=True)) for side, batch in ((1280, 1), (2304, 1), (1280, 2)))
BANDED = tuple(
    Point(side, batch, VaeMode(bands=bands))
    for side, batch, bands in ((512, 1, 2), (1024, 1, 2), (1024, 1, 4), (512, 2, 8))
)
GUIDANCE = {"guided": True, "unguided": False}
MODELS = ("tiny", "tiny_sana", "tiny_pag", "tiny_sprint", "tiny_sprint_img2img", *NAMES)
_ALL = (Format(dtype, kept) for dtype in get_args(Dtype) for kept in (None, *get_args(Quantization)))
_STRIDE = 2
"""Layers that repeat: those of the text encoder attend near and far by turns."""
FORMATS = tuple(dict.fromkeys(measured_as(form) for form in _ALL))
"""What shipped components are measured in."""


def calibrate(
    checkpoint: Checkpoint,
    formats: Mapping[Component, Format],
    guided: bool,
    on_progress: OnProgress = lambda done, of: None,
    only: Collection[Component] | None = None,
) -> dict[Component, dict[Phase, dict[str, Any]]]:
    """Measure and solve all quantities of every component in the given formats; see the module docstring.

    The VAE is never quantised: in a format that is, its needs are those of the dtype.

    Args:
        only: the components wanted; None wants all.

    Raises:
        CheckpointError: a config is incomplete.
        RunError: this PyTorch has no virtual GPUs.
    """
    pipeline = checkpoint.pipeline
    wanted = pipeline.names if only is None else only
    vae = pipeline.of("vae")
    found = _measured(checkpoint, {**formats, vae: Format(formats[vae].dtype)}, guided, on_progress, wanted)
    calibrated: dict[Component, dict[Phase, dict[str, Any]]] = {name: {} for name in wanted}
    for name, phase in found[PLAIN[0]]:
        if name in wanted:
            calibrated[name][phase] = _solve_work([found[point][name, phase] for point in PLAIN])
    for phase, entry in calibrated[vae].items() if vae in wanted else ():
        sliced, tiled = ([found[point][vae, phase].activation_bytes for point in points] for points in (SLICED, TILED))
        entry["sliced_bytes"] = _solve(SLICED, sliced)
        rows = [_rows(pipeline, point, guided, phase) for point in TILED]
        entry["tiling_bytes"] = _solve_tiling(entry, tiled, rows)
        shared = phase == "prepare" and pipeline.image is not None and not pipeline.image.each_row
        entry["banded"] = _solve_bands([found[point][vae, phase] for point in BANDED], shared)
    return calibrated


def _measured(
    checkpoint: Checkpoint,
    formats: Mapping[Component, Format],
    guided: bool,
    on_progress: OnProgress,
    wanted: Collection[Component],
) -> dict[Point, Measurements]:
    """Measure at PLAIN, and in its other modes where the VAE is wanted."""
    vae = checkpoint.pipeline.of("vae")
    depths = _depths(checkpoint, wanted)
    others = (*SLICED, *TILED, *BANDED) if vae in wanted else ()
    count = itertools.count(1)
    total = len(PLAIN) * (2 if depths else 1) + len(others)

    def run(points: Sequence[Point], layers: Mapping[Component, int]) -> dict[Point, Measurements]:
        profiler, found = Profiler(checkpoint, formats, layers), {}
        for point in points:
            found[point] = profiler.run(point, guided)
            on_progress(next(count), total)
        return found

    # What the other looped components give waits beside the denoiser.
    kept = {*wanted, *(checkpoint.pipeline.looped if checkpoint.pipeline.denoiser in wanted else ())}
    single = {name: 1 for name in checkpoint.components if name not in kept}
    found = run(PLAIN, {**single, **{name: depth.more for name, depth in depths.items()}})
    if depths:
        fewer = run(PLAIN, {**single, vae: 1, **{name: depth.fewer for name, depth in depths.items()}})
        found = {point: _deepened(found[point], fewer[point], depths) for point in PLAIN}
    return found | run(others, {name: 1 for name in checkpoint.components if name != vae} if others else {})


class _Depth(NamedTuple):
    """Two numbers of layers to measure, and by how many times their difference the component has more."""

    fewer: int
    more: int
    times: int


def _depths(checkpoint: Checkpoint, wanted: Collection[Component]) -> dict[Component, _Depth]:
    """Components of alike layers of which few are measured: each adds the same, and peaks stay where they are.

    Where several components work in a step, results of one wait in the other from some layer on: these are whole.
    """
    found: dict[Component, _Depth] = {}
    for name in wanted:
        layers = layers_of(checkpoint.components[name])
        if layers is None or (name in checkpoint.pipeline.looped and len(checkpoint.pipeline.looped) > 1):
            continue
        fewer = _STRIDE + layers % _STRIDE
        if layers > fewer + _STRIDE:
            found[name] = _Depth(fewer, fewer + _STRIDE, (layers - fewer - _STRIDE) // _STRIDE)
    return found


def _deepened(more: Measurements, fewer: Measurements, depths: Mapping[Component, _Depth]) -> Measurements:
    """What whole components need, given what they need with two numbers of layers."""

    def deepened(one: Measurement, other: Measurement, times: int) -> Measurement:
        work = {key: value + times * (value - getattr(other.work, key)) for key, value in vars(one.work).items()}
        grown = one.activation_bytes + times * (one.activation_bytes - other.activation_bytes)
        return Measurement(grown, replace(one.work, **work))

    return {
        (name, phase): deepened(one, fewer[name, phase], depths[name].times) if name in depths else one
        for (name, phase), one in more.items()
    }


def _solve_work(measured: Sequence[Measurement]) -> dict[str, Any]:
    """Solve what was measured at PLAIN of one component in one phase."""
    work = {key: _solve(PLAIN, [getattr(one.work, key) for one in measured]) for key in WORK}
    activations = _solve(PLAIN, [one.activation_bytes for one in measured])
    return {"activation_bytes": activations, "operations": measured[0].work.operations, **work}


def _solve(points: Sequence[Point], values: Sequence[int]) -> list[float]:
    terms = [[1, p.batch, p.pixels, p.batch * p.pixels] for p in points]
    return [round(float(value), 6) for value in np.linalg.solve(np.array(terms, float), np.array(values, float))]


def _rows(pipeline: PipelineDescription, point: Point, guided: bool, phase: Phase) -> int:
    """Images that pass the VAE in a phase."""
    workload = point.workload(guided)
    return pipeline.image_rows(workload) if phase == "prepare" else workload.batch


def _solve_tiling(entry: Mapping[str, Any], values: Sequence[int], rows: Sequence[int]) -> list[float]:
    """Solve what exceeds the peak of one tile; a single image passes unsliced."""
    tile = VAE_TILE[0] * VAE_TILE[1]
    alone = [entry["sliced_bytes" if count > 1 else "activation_bytes"] for count in rows]
    excess = [value - linear(of, p.batch, tile) for value, of, p in zip(values, alone, TILED, strict=True)]
    covered = [covered_pixels(p.side, p.width or p.side) for p in TILED]
    terms = [[1, pixels, p.batch * pixels] for p, pixels in zip(TILED, covered, strict=True)]
    return [round(float(value), 6) for value in np.linalg.solve(np.array(terms, float), np.array(excess, float))]


def _solve_bands(measured: Sequence[Measurement], shared: bool) -> dict[str, list[float]]:
    """Solve what was measured at BANDED in one phase; operations from the first points of two numbers of bands.

    Args:
        shared: one image passes, whatever the batch. Terms that are then the same share their coefficient.
    """
    points = [(p.side, p.width or p.side, 1 if shared else p.batch, p.mode.bands) for p in BANDED]

    def solved(terms: Sequence[Sequence[float]], values: Sequence[int]) -> list[float]:
        table, wanted = np.array(terms, float), np.array(values, float)
        if not shared:
            return [round(float(value), 6) for value in np.linalg.solve(table, wanted)]
        scale = np.abs(table).max(axis=0)
        return [round(float(value), 6) for value in np.linalg.lstsq(table / scale, wanted, rcond=1e-9)[0] / scale]

    few, more = measured[1].work.operations, measured[2].work.operations
    each = (more - few) / (BANDED[2].mode.bands - BANDED[1].mode.bands)
    return {
        "activation_bytes": solved([memory_terms(*point) for point in points], [m.activation_bytes for m in measured]),
        **{key: solved([work_terms(*p) for p in points], [getattr(m.work, key) for m in measured]) for key in WORK},
        "operations": [few - each * BANDED[1].mode.bands, each],
    }


def shipped(checkpoint: Checkpoint, known: Collection[str]) -> dict[str, Any]:
    """Calibrate all dtypes, with and without guidance, of the components whose keys are not in `known` yet."""
    pipeline = checkpoint.pipeline
    entries: dict[str, Any] = {
        name: {"key": checkpoint.needs_key(name), "needs": {}}
        for name in pipeline.names
        if checkpoint.needs_key(name) not in known
    }
    for form in FORMATS if entries else ():
        wanted = [name for name in entries if form.quantization is None or not pipeline.by_name[name].unquantized]
        for key, guided in GUIDANCE.items() if wanted else ():
            if guided and not pipeline.counts_guidance:
                continue
            for name, phases in calibrate(checkpoint, dict.fromkeys(pipeline.names, form), guided, only=wanted).items():
                for phase, entry in phases.items():
                    entries[name]["needs"].setdefault(phase, {}).setdefault(str(form), {})[key] = entry
    return entries


def checkpoints(model: str) -> Iterator[Checkpoint]:
    """A shipped model under each pipeline that can run it, its own first."""
    for pipeline in catalogue.pipelines(model) if model in catalogue.NAMES else [None]:
        chosen = [] if pipeline is None else [f"model.pipeline={pipeline}"]
        yield open_checkpoint(compose_spec([f"model={model}", *chosen]).model)


def main(named: Sequence[str] = ()) -> None:
    """Calibrate shipped models anew, all or those named; what several of them share is kept once, with the first."""
    if unknown := sorted(set(named) - set(MODELS)):
        sys.exit(f"no model is called {', '.join(unknown)}; there are {', '.join(MODELS)}")
    anew = [name for name in MODELS if name in named or not named]
    files = (path for path in FOLDER.glob("*.needs.json") if path.name.partition(".")[0] not in anew)
    known = {part["key"] for path in files for part in json.loads(path.read_text(encoding="utf-8")).values()}
    for name in anew:
        started = time.monotonic()
        entries: dict[str, Any] = {}
        for checkpoint in checkpoints(name):
            found = shipped(checkpoint, known)
            known |= {entry["key"] for entry in found.values()}
            entries |= {f"{checkpoint.pipeline.class_name}.{part}": entry for part, entry in found.items()}
        path = FOLDER / f"{name}.needs.json"
        path.unlink(missing_ok=True)
        if entries:
            path.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        print(f"calibrated {name} in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
