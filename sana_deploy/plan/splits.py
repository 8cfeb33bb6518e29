"""`hardware.split=auto|none|guidance|rows|guidance+rows|layers`: how one image is spread over GPUs, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from .._models import Diagnostic
from ..declare.hardware import SPLITS, CustomMap, MultiGpuBalanced, Split
from ..declare.spec import DeploySpec
from ..errors import InfeasibleError
from ..facts.checkpoint import Checkpoint
from ..facts.machine import Gpu, Machine
from .guidance_split import split_guidance
from .layer_cuts import best_layers, layers_words
from .layers import LayerSplit
from .least import LeastSeconds
from .needs import Measure
from .profile import PipelineProfile
from .row_gpus import best_rows, dealt_ways
from .row_split import RowSplit
from .runtimes import WORTH, choose_runtime, of_auto
from .search import Search
from .ways import PLAINEST, Choice, Way, Ways, runtimes_of

_NAMES: dict[Split, str] = {
    "guidance": "the halves of guidance",
    "rows": "the rows of an image",
    "guidance+rows": "the rows of both halves of guidance",
    "layers": "the blocks of a component",
}
"""What each split spreads."""
_LAST: tuple[Split, ...] = tuple(name for name, one in SPLITS.items() if one.last)
"""Those that are chosen only where nothing else fits."""
COUNTS = ("none", "one", "two", "three", "four")
"""GPUs in words."""


def ways_of(
    spec: DeploySpec,
    checkpoint: Checkpoint,
    profile: PipelineProfile,
    machine: Machine,
    measure: Measure,
    searched: Callable[[PipelineProfile], Search],
    rows: RowSplit,
) -> Ways:
    """The ways that a declaration leaves open; a custom map leaves the runtime alone.

    Args:
        profile: of the declaration, without any split.
        rows: deals the rows of the declaration's images.
        machine: the GPUs that may be taken.
        searched: searches the placements of a profile.
    """
    bounds, formats, hardware = spec.workload.bounds, spec.precision.formats, spec.hardware
    searched = _remembered(searched)
    halves = partial(split_guidance, profile, checkpoint, bounds, formats, measure)
    pins = hardware.pin if isinstance(hardware, MultiGpuBalanced) else {}
    fixed = {name: place for name, place in pins.items() if place is not None}
    by_rows = partial(best_rows, rows, machine.gpus, fixed, searched, spec.precision.allow_emulated)
    layers = LayerSplit(profile, checkpoint, bounds, formats)
    profiles: dict[Split, Callable[[], PipelineProfile]] = {
        "none": lambda: profile,
        "guidance": halves,
        "rows": by_rows,
        "guidance+rows": partial(by_rows, "guidance+rows"),
        "layers": lambda: best_layers(layers, machine.gpus, searched),
    }
    refused = {split: why for split in _NAMES if (why := why_not(split, spec, machine, rows, layers))}
    for split in refused:
        del profiles[split]
    if isinstance(hardware, CustomMap) and "guidance" in profiles:
        del profiles["none"]
    return Ways(profiles, machine, searched, refused)


def least_of(spec: DeploySpec, ways: Ways, rows: RowSplit) -> LeastSeconds:
    """Seconds that no pipeline on some of the GPUs of `ways` can be below.

    Args:
        rows: as the ways have it.
    """
    splits = [split for split in ways.splits if SPLITS[split].rows]
    mode, emulated = spec.runtime.mode, spec.precision.allow_emulated
    runtimes = {PLAINEST, *(of_auto() if mode == "auto" else [mode])}

    def dealt(gpus: Sequence[Gpu]) -> float:
        ways = (one.least for split in splits for one in dealt_ways(rows, gpus, {}, emulated, split))
        return min(ways, default=float("inf"))

    executed = {split: [ways.profile(Way(runtime, split)) for runtime in runtimes_of(split) if runtime in runtimes]
                for split in ways.splits if not (SPLITS[split].rows or split in _LAST)}  # fmt: skip
    return LeastSeconds(executed.get("none", []), executed.get("guidance", []), dealt)


def _remembered(searched: Callable[[PipelineProfile], Search]) -> Callable[[PipelineProfile], Search]:
    """Search a profile once, which the choice of GPUs for rows does before it is a way."""
    kept: list[tuple[PipelineProfile, Search]] = []

    def search(profile: PipelineProfile) -> Search:
        found = next((search for known, search in kept if known is profile), None)
        if found is None:
            found = searched(profile)
            kept.append((profile, found))
        return found

    return search


def why_not(split: Split, spec: DeploySpec, machine: Machine, rows: RowSplit, layers: LayerSplit) -> str:
    """Why an image cannot be spread so over GPUs; empty where it can."""
    hardware, way = spec.hardware, SPLITS[split]
    why = (_no_guidance(spec) if way.halves else "") or (_no_rows(spec, rows) if way.rows else "")
    if why := why or (_no_layers(spec, layers) if way.last else ""):
        return why
    if not isinstance(hardware, (CustomMap, MultiGpuBalanced)):
        return f"hardware={hardware.strategy} takes one GPU"
    if isinstance(hardware, MultiGpuBalanced) and len(machine.gpus) < way.least_gpus:
        subject = "guidance is" if split == "guidance" else f"{_NAMES[split]} are"
        most = COUNTS[way.least_gpus] + (" or more" if way.most_gpus > way.least_gpus else "")
        return f"{subject} split between {most} GPUs, {COUNTS[len(machine.gpus)]} may be taken"
    return ""


def _no_guidance(spec: DeploySpec) -> str:
    if spec.pipeline.second_half is None:
        return spec.pipeline.undivided
    if not spec.workload.guided:
        return f"there is no guidance to split with workload.guidance_scale={spec.workload.guidance_scale:g}"
    if isinstance(spec.hardware, CustomMap) and not SPLITS[spec.hardware.split].halves:
        return "the map has no units for it"
    return ""


def _no_rows(spec: DeploySpec, rows: RowSplit) -> str:
    if spec.pipeline.bands is None:
        return f"the components of a {spec.pipeline.title} cannot compute some rows of an image"
    if isinstance(spec.hardware, CustomMap):
        return "a map has no units for rows"
    if rows.rows < 2:
        return f"an image of workload.height={spec.workload.height} has one row of tokens"
    asked = spec.runtime.asked
    if asked and asked != PLAINEST:
        return f"rows are exchanged between kernels that Python launches, and runtime.mode={asked} records whole calls"
    return ""


def _no_layers(spec: DeploySpec, layers: LayerSplit) -> str:
    if not layers.blocks:
        return "no component has blocks whose sizes follow from its config"
    if isinstance(spec.hardware, CustomMap):
        return "a map has no units for layers"
    if spec.runtime.asked and spec.runtime.asked != PLAINEST and not SPLITS["layers"].graphs:
        return f"hidden states cross between two blocks, and runtime.mode={spec.runtime.asked} records whole calls"
    return ""


def choose(spec: DeploySpec, ways: Ways, at_last: bool = True) -> Choice:
    """Choose runtime and split.

    `hardware.split=auto` takes, with `objective=latency` and `throughput`, the halves of guidance, the rows of the
    image or those of both halves where they save 5 % of the seconds of an image that the plainer one takes. But with
    `objective=fit` it takes either where nothing fits without. Whether GPUs draw more images with a replica each is
    decided where GPUs are dealt, in `replicas.py`. Layers, which save no seconds, are taken where nothing else fits.

    Args:
        at_last: whether they may be.

    Raises:
        InfeasibleError: a split is asked for with a runtime that it does not have.
    """
    hardware, mode = spec.hardware, spec.runtime.mode
    asked = "none" if not isinstance(hardware, (CustomMap, MultiGpuBalanced)) else hardware.split
    if asked in _NAMES:
        if asked in ways.splits:
            found = choose_runtime(mode, asked, ways)
            return found if asked not in _LAST else _with_words(found)
        return _with(choose_runtime(mode, "none", ways), _not_split(spec, asked, ways.refused[asked]))
    whole = choose_runtime(mode, "none", ways)
    if asked == "none":
        return whole
    chosen = _gaining(spec, whole, ways)
    last = [split for split in ways.splits if split in _LAST] if at_last and chosen.search.best is None else []
    for split in last:
        found = choose_runtime(mode, split, ways)
        if found.search.best is not None:
            return _with(found, _auto(split, f"nothing fits without; {layers_words(found.profile, found.search.best)}"))
    return chosen


def _gaining(spec: DeploySpec, whole: Choice, ways: Ways) -> Choice:
    """The split by which the objective gains, or with which something fits at all; `whole` where there is none."""
    hardware, mode = spec.hardware, spec.runtime.mode
    assert isinstance(hardware, MultiGpuBalanced)
    found = whole.search.best
    if hardware.objective == "fit" or (hardware.objective == "balance" and found):
        return whole
    tried = [split for split in ways.splits if split != "none" and split not in _LAST]
    if not tried:
        return whole
    choices = [choose_runtime(mode, split, ways) for split in tried]
    fitting = [choice for choice in choices if choice.search.best is not None]
    if found is None:
        return _with(fitting[0], _auto(fitting[0].way.split, "nothing fits without")) if fitting else whole
    return _worth_most(spec, whole, fitting, tried)


def _worth_most(spec: DeploySpec, whole: Choice, fitting: Sequence[Choice], tried: Sequence[Split]) -> Choice:
    """The split that saves 5 % of the seconds of what is plainer, or none."""
    timed = [choice for choice in (whole, *fitting) if (best := choice.search.best) and best.seconds is not None]
    if whole not in timed or len(timed) == 1:
        spread = " and ".join(_NAMES[split] for split in tried)
        return _with(
            whole, _auto("none", f"{spread} do not fit {'two GPUs' if tried == ['guidance'] else 'these GPUs'}")
        )
    chosen, now = whole, _seconds(spec, whole)
    for choice in timed[1:]:
        if _seconds(spec, choice) <= WORTH * _seconds(spec, chosen):
            chosen = choice
    if chosen is whole:
        fastest = min(timed[1:], key=lambda choice: _seconds(spec, choice))
        reason = f"~{now:.2f} s an image, ~{_seconds(spec, fastest):.2f} s with {_NAMES[fastest.way.split]} apart"
        return _with(whole, _auto("none", reason))
    best, names = chosen.search.best, [*_denoisers(chosen.profile)]
    assert best is not None
    places = ", ".join(f"GPU {best.placement[name]}" for name in names[:-1]) + f" and GPU {best.placement[names[-1]]}"
    rows = f"{_listed(chosen.profile.rows)} rows" if chosen.profile.rows else "half of guidance each"
    each = f"{rows} of the halves of guidance" if chosen.profile.teams > 1 else rows
    reason = (
        f"~{_seconds(spec, chosen):.2f} s an image with {each} on {places}, ~{now:.2f} s without; last places differ"
    )
    return _with(chosen, _auto(chosen.way.split, reason))


_SPLIT_WITH_GRAPHS = ", or hardware.split=guidance"


def _listed(values: Sequence[int]) -> str:
    return f"{', '.join(map(str, values[:-1]))} and {values[-1]}"


def _seconds(spec: DeploySpec, choice: Choice) -> float:
    """Seconds of an image."""
    assert choice.search.best is not None
    return sum((choice.search.best.seconds or {}).values()) / spec.workload.batch


def _with_words(choice: Choice) -> Choice:
    """The choice of layers that were asked for, and which blocks are where."""
    if choice.search.best is None:
        return choice
    message = layers_words(choice.profile, choice.search.best)
    return _with(choice, Diagnostic(type="layers", severity="info", message=message, where="hardware.split"))


def open_ways(spec: DeploySpec, ways: Ways, at_last: bool = True) -> Iterator[Way]:
    """The ways that `choose` may end with where they fit; of the runtimes of `auto` the one that takes least memory."""
    hardware = spec.hardware
    runtime = PLAINEST if spec.runtime.mode == "auto" else spec.runtime.mode
    asked: Split | str = hardware.split if isinstance(hardware, (CustomMap, MultiGpuBalanced)) else "none"
    if asked in _NAMES:
        yield Way(runtime, asked if asked in ways.splits else "none")
        return
    never = asked == "none" or (isinstance(hardware, MultiGpuBalanced) and hardware.objective == "fit")
    first = [Way(runtime, split) for split in ways.splits if split == "none" or not (never or split in _LAST)]
    yield from first
    if asked != "none" and at_last and not any(ways.search(way).best for way in first):
        yield from (Way(PLAINEST, split) for split in ways.splits if split in _LAST)


def _denoisers(profile: PipelineProfile) -> Iterator[str]:
    return (name for name, part in profile.parts.items() if part.name == profile.pipeline.denoiser)


def _with(choice: Choice, remark: Diagnostic) -> Choice:
    return Choice(choice.way, choice.profile, choice.search, (*choice.remarks, remark))


def _auto(split: Split, reason: str) -> Diagnostic:
    message = f"auto chose {split}: {reason}"
    return Diagnostic(type="auto_split", severity="info", message=message, where="hardware.split")


def _not_split(spec: DeploySpec, split: Split, why: str) -> Diagnostic:
    where = "hardware.device_map" if isinstance(spec.hardware, CustomMap) else "hardware.split"
    asked = spec.runtime.asked
    by_rows = SPLITS[split].rows
    if not SPLITS[split].graphs and asked and asked != PLAINEST and (not by_rows or spec.pipeline.bands):
        raise InfeasibleError(why, where=where, hint=f"runtime=eager{_SPLIT_WITH_GRAPHS if by_rows else ''}")
    message = f"{why}: {'no component is dealt' if split in _LAST else 'one GPU computes whole steps'}"
    return Diagnostic(type="no_split", severity="warning", message=message, where=where)
