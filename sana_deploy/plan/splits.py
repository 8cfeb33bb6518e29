"""`hardware.split=auto|none|guidance`: whether the halves of guidance get GPUs of their own, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from .._models import Diagnostic
from ..declare.hardware import CustomMap, MultiGpuBalanced, Split
from ..declare.spec import DeploySpec
from ..facts.checkpoint import Checkpoint
from ..facts.machine import Machine
from .guidance_split import split_guidance
from .needs import Measure
from .profile import PipelineProfile
from .runtimes import WORTH, choose_runtime
from .search import Search
from .ways import PLAINEST, Choice, Way, Ways


def ways_of(
    spec: DeploySpec,
    checkpoint: Checkpoint,
    profile: PipelineProfile,
    machine: Machine,
    measure: Measure,
    searched: Callable[[PipelineProfile], Search],
) -> Ways:
    """The ways that a declaration leaves open; a custom map leaves the runtime alone.

    Args:
        profile: of the declaration, without any split.
        machine: the GPUs that may be taken.
        searched: searches the placements of a profile.
    """
    halves = partial(split_guidance, profile, checkpoint, spec.workload.bounds, spec.precision.formats, measure)
    profiles: dict[Split, Callable[[], PipelineProfile]] = {"none": lambda: profile, "guidance": halves}
    if why_whole(spec, machine):
        del profiles["guidance"]
    elif isinstance(spec.hardware, CustomMap):
        del profiles["none"]
    return Ways(profiles, machine, searched)


def why_whole(spec: DeploySpec, machine: Machine) -> str:
    """Why guidance cannot be split between GPUs; empty where it can."""
    hardware, pipeline = spec.hardware, spec.pipeline
    if pipeline.second_half is None:
        return pipeline.undivided
    if not spec.workload.guided:
        return f"there is no guidance to split with workload.guidance_scale={spec.workload.guidance_scale:g}"
    if isinstance(hardware, CustomMap):
        return "" if hardware.split == "guidance" else "the map has no units for it"
    if not isinstance(hardware, MultiGpuBalanced):
        return f"hardware={hardware.strategy} takes one GPU"
    if len(machine.gpus) < 2:
        return f"guidance is split between two GPUs, {'one' if machine.gpus else 'none'} may be taken"
    return ""


def choose(spec: DeploySpec, machine: Machine, ways: Ways) -> Choice:
    """Choose runtime and split.

    `hardware.split=auto` takes the halves of guidance with `objective=latency` and `throughput` where they save 5 % of
    the seconds of an image, and, but with `objective=fit`, where nothing fits without. Whether two GPUs draw more
    images with a replica each is decided where GPUs are dealt, in `replicas.py`.
    """
    hardware, mode = spec.hardware, spec.runtime.mode
    asked = "none" if not isinstance(hardware, (CustomMap, MultiGpuBalanced)) else hardware.split
    if asked == "guidance":
        if why := why_whole(spec, machine):
            return _with(choose_runtime(mode, "none", ways), _not_split(spec, why))
        return choose_runtime(mode, "guidance", ways)
    whole = choose_runtime(mode, "none", ways)
    if asked == "none" or "guidance" not in ways.splits:
        return whole
    assert isinstance(hardware, MultiGpuBalanced)
    found = whole.search.best
    if hardware.objective == "fit" or (hardware.objective == "balance" and found):
        return whole
    halves = choose_runtime(mode, "guidance", ways)
    best = halves.search.best
    if found is None:
        return whole if best is None else _with(halves, _auto("guidance", "nothing fits without"))
    if best is None or best.seconds is None or found.seconds is None:
        return _with(whole, _auto("none", "the halves of guidance do not fit two GPUs"))
    now, then = (sum(one.values()) / spec.workload.batch for one in (found.seconds, best.seconds))
    if then > WORTH * now:
        return _with(whole, _auto("none", f"~{now:.2f} s an image, ~{then:.2f} s with the halves of guidance apart"))
    places = " and ".join(f"GPU {best.placement[name]}" for name in _denoisers(halves.profile))
    reason = f"~{then:.2f} s an image with half of guidance each on {places}, ~{now:.2f} s without; last places differ"
    return _with(halves, _auto("guidance", reason))


def open_ways(spec: DeploySpec, machine: Machine, ways: Ways) -> Iterator[Way]:
    """The ways that `choose` may end with where they fit; of the runtimes of `auto` the one that takes least memory."""
    hardware = spec.hardware
    runtime = PLAINEST if spec.runtime.mode == "auto" else spec.runtime.mode
    asked: Split | str = hardware.split if isinstance(hardware, (CustomMap, MultiGpuBalanced)) else "none"
    if asked == "guidance":
        return iter([Way(runtime, "none" if why_whole(spec, machine) else "guidance")])
    never = asked == "none" or (isinstance(hardware, MultiGpuBalanced) and hardware.objective == "fit")
    return (Way(runtime, split) for split in ways.splits if split == "none" or not never)


def _denoisers(profile: PipelineProfile) -> Iterator[str]:
    return (name for name, part in profile.parts.items() if part.name == profile.pipeline.denoiser)


def _with(choice: Choice, remark: Diagnostic) -> Choice:
    return Choice(choice.way, choice.profile, choice.search, (*choice.remarks, remark))


def _auto(split: Split, reason: str) -> Diagnostic:
    message = f"auto chose {split}: {reason}"
    return Diagnostic(type="auto_split", severity="info", message=message, where="hardware.split")


def _not_split(spec: DeploySpec, why: str) -> Diagnostic:
    where = "hardware.device_map" if isinstance(spec.hardware, CustomMap) else "hardware.split"
    message = f"{why}: one GPU computes whole steps"
    return Diagnostic(type="no_split", severity="warning", message=message, where=where)
