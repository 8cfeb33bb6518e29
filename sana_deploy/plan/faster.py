"""What would draw the same request faster on the same machine: other ways than the one that was chosen."""

from __future__ import annotations

from ..declare.hardware import SPLITS, MultiGpuBalanced
from ..declare.knobs import EXACTNESSES, KNOBS, least_exact
from ..declare.spec import DeploySpec
from .records import Faster
from .runtimes import WORTH, choose_runtime
from .ways import Choice, Way, Ways


def faster_ways(spec: DeploySpec, choice: Choice, ways: Ways) -> list[Faster]:
    """The fastest way of each exactness that fits and saves 5 % of the seconds of an image, the most exact first.

    One that is less exact than another is listed where it is faster than that, too. Nothing is where a component of
    the plan is on the CPU, whose seconds are not known.
    """
    others = [way for way in ways if way != choice.way and not SPLITS[way.split].last]
    offers = [offer for way in others if (offer := _offer(spec, choice, way, ways))]
    best: list[Faster] = []
    for exactness in EXACTNESSES:
        fastest = min(
            (offer for offer in offers if offer.exactness == exactness),
            key=lambda offer: offer.seconds_per_image,
            default=None,
        )
        if fastest and all(fastest.seconds_per_image <= WORTH * one.seconds_per_image for one in best):
            best.append(fastest)
    return best


def _offer(spec: DeploySpec, choice: Choice, way: Way, ways: Ways) -> Faster | None:
    """What a way would save; None where it does not fit or is not worth it."""
    chosen, other = choice.search.best, ways.search(way).best
    if chosen is None or other is None or not chosen.seconds or not other.seconds or ways.short_of(other):
        return None
    if ways.older_than(way.runtime, other):
        return None
    now, then = (sum(seconds.values()) / spec.workload.batch for seconds in (chosen.seconds, other.seconds))
    if then > WORTH * now:
        return None
    further = (KNOBS[knob].exactness for knob in other.knobs if knob not in chosen.knobs)
    return Faster(
        runtime=way.runtime,
        split=way.split,
        exactness=least_exact((way.exactness, *further)),
        seconds_per_image=round(then, 4),
        times_faster=round(now / then, 2),
        overrides=_overrides(spec, way, ways),
    )


def _overrides(spec: DeploySpec, way: Way, ways: Ways) -> list[str]:
    """What to add to a declaration so that it is planned this way; what would be chosen anyway is not named."""
    hardware, mode = spec.hardware, spec.runtime.mode
    runtime = choose_runtime(mode, way.split, ways).way.runtime if mode == "auto" else mode
    found = [] if runtime == way.runtime else [f"runtime={way.runtime}"]
    if isinstance(hardware, MultiGpuBalanced) and hardware.split != way.split:
        splits = sum(not SPLITS[split].last for split in ways.splits) > 1 and hardware.objective in (
            "latency",
            "throughput",
        )
        whole = way.split == "none" and hardware.split == "auto" and not splits
        found += [] if whole else [f"hardware.split={way.split}"]
    return found
