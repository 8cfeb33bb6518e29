"""Sentences that the terminal and the pages share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .._units import GIB, human_bytes
from ..declare.hardware import SPLITS
from ..declare.knobs import KNOBS, Exactness
from ..declare.pipelines import DEFAULT, Component
from ..declare.runtime import RUNTIMES
from ..plan.artifact import Plan
from ..plan.records import Faster, Place, RejectionCount, Slot, ordered_places
from ..run.outcome import Audit

OTHERS_WORDS = "for others (used, or kept free)"
"""What is drawn of a GPU that is not the plan's to take."""


def groups_words(device_map: Mapping[Component, Place]) -> str:
    """Which components are together: `text_encoder | vae, transformer, controlnet`, by place."""
    places = ordered_places(device_map.values())
    return " | ".join(", ".join(name for name, at in device_map.items() if at == place) for place in places)


PICTURE: Mapping[Exactness, str] = {
    "bitwise": "same pixels",
    "rounding": "pixels differ in the last places",
    "changes": "other pixels",
}
"""What people read of an exactness."""


def model_words(plan: Plan) -> str:
    """Where the model comes from, and its pipeline where that is not the default one."""
    source = plan.checkpoint.source
    return source if plan.pipeline is DEFAULT else f"{source} ({plan.pipeline_class})"


def steps_words(plan: Plan) -> str:
    """`20 steps`, or `1 of 2 steps` where a pipeline that starts from an image leaves some out."""
    asked = plan.spec.workload.steps
    run = plan.pipeline.steps_run(plan.spec.workload.bounds)
    return f"{run} of {asked} steps" if run != asked else f"{asked} steps"


def runtime_words(plan: Plan) -> str:
    """How the denoising loop executes, and what that does to the picture."""
    rows = f" {', '.join(map(str, plan.rows))}" if plan.rows else ""
    rows += "".join(f" after block {first} of the {name}" for name, first in plan.layers.items())
    split = f", split {plan.split}{rows} ({SPLITS[plan.split].exactness})" if plan.split != "none" else ""
    return f"runtime {plan.runtime} ({RUNTIMES[plan.runtime].exactness}){split}"


def faster_sentence(one: Faster) -> str:
    """`2.4x faster: runtime=compiled (pixels differ in the last places)`."""
    return f"{one.times_faster:.1f}x faster: {' '.join(one.overrides)} ({PICTURE[one.exactness]})"


def replicas_words(plan: Plan) -> str:
    """`8 replicas, ~8.34 images/s`; empty for a plan of one."""
    rate = "" if plan.images_per_second is None else f", ~{plan.images_per_second:.3g} images/s"
    return f"{len(plan.replicas) + 1} replicas{rate}" if plan.replicas else ""


def overlap_words(plan: Plan) -> str:
    """`3 requests at once overlap to ~0.19 images/s`; empty where stages do not."""
    each = [one.overlap for one in plan.each()]
    if None in each:
        return ""
    known = [overlap for overlap in each if overlap is not None]
    rate = sum(overlap.images_per_second for overlap in known)
    return f"{sum(overlap.in_flight for overlap in known)} requests at once overlap to ~{rate:.3g} images/s"


def numbers_words(numbers: Sequence[int]) -> str:
    """`0`, `0-7`, or `0, 2, 5`."""
    whole = len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]}-{numbers[-1]}" if whole else ", ".join(map(str, numbers))


def pool_words(slot: Slot) -> str:
    """What graphs keep of a GPU, to be put after its peak; empty where they keep nothing."""
    return f", ~{human_bytes(slot.pool_bytes)} of it for graphs" if slot.pool_bytes else ""


def knob_words(knob: str) -> str:
    """What a knob does; empty for one that this version has not."""
    return KNOBS[knob].words if knob in KNOBS else ""


def knob_sentence(plan: Plan, knob: str) -> str:
    """What a knob that is on saves on the GPU that it helps most, and what it costs; seconds may be either."""
    price = plan.knob_prices.get(knob)
    if not price:
        return knob
    seconds = price.seconds_per_image
    saved = [f"~{human_bytes(price.bytes_saved)}"] if price.bytes_saved > 0 else []
    costs = []
    if price.bytes_per_image > 0:
        costs.append(f"moves ~{human_bytes(price.bytes_per_image)} per image")
    if seconds is not None and seconds < 0:
        saved.append(f"~{-seconds:.2g} s")
    elif seconds is not None:
        costs.append(f"costs ~{seconds:.2g} s")
    effects = [f"saves {' and '.join(saved)}"] if saved else []
    exactness = f" ({KNOBS[knob].exactness})" if knob in KNOBS else ""
    parts = f" of {plan.vae_band_count}" if knob in KNOBS and KNOBS[knob].counts and plan.vae_band_count else ""
    return f"{knob}{parts} {', '.join([*effects, *costs])}".rstrip() + exactness


def taken_words(peak_bytes: int, others_bytes: int, capacity_bytes: int, share: float) -> str:
    """`7.12 + 1.50 for others of 8.00 GiB (108%)`: the share counts both, others are named where they take any."""
    others = f" + {others_bytes / GIB:.2f} for others" if others_bytes else ""
    return f"{peak_bytes / GIB:.2f}{others} of {human_bytes(capacity_bytes)} ({share:.0%})"


def rejection_words(row: RejectionCount) -> str:
    """How many candidates were rejected, why and where."""
    return f"{row.count} for {row.reason}{f' on GPU {row.gpu}' if row.gpu >= 0 else ''}"


def image_words(audit: Audit) -> str:
    """How close the image is to float32's."""
    if audit.identical:
        return "identical"
    return "not a number" if audit.psnr is None else f"PSNR {audit.psnr:.1f} dB"


def considered_sentence(plan: Plan) -> str:
    """How many placements were looked at, and how many fit."""
    seen = plan.considered
    if not seen.placements:
        return "the map is the user's own: nothing else was considered"
    under = f" under {seen.settings} sets of knobs" if seen.settings > 1 else ""
    placements = f"{seen.placements} placement{'s' if seen.placements != 1 else ''}"
    return f"considered {placements}{under}: {seen.feasible} of {seen.placements * seen.settings} fit"
