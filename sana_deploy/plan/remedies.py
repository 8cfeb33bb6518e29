"""Changes that would help where nothing fits: each one is planned before it is offered."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import get_args

from .._units import MIB, human_bytes
from ..declare.formats import Quantization
from ..declare.hardware import CustomMap, MultiGpuBalanced
from ..declare.knobs import KNOBS, Knob, ordered
from ..declare.pipelines import Component
from ..declare.policies import POLICIES, QUANTIZED, dtypes_of, fragile_components, quantization_of
from ..declare.runtime import RUNTIMES
from ..declare.spec import DeploySpec, VirtualMachine
from ..declare.workload import VAE_FACTOR
from ..errors import SanaDeployError
from ..facts.checkpoint import Checkpoint
from ..facts.machine import Machine
from ..facts.virtual_machine import describe_machine
from .artifact import Plan
from .needs import all_shipped

Fits = Callable[[DeploySpec, Checkpoint, Machine], bool]
"""Whether some placement of a declaration fits a machine."""

LADDER = ("1xrtx3060", "2xrtx3060", "1xrtx4090", "2xrtx4090", "1xa100", "2xa100")
"""Machines that are offered when this one is too small, cheapest first."""


def working_changes(spec: DeploySpec, checkpoint: Checkpoint, machine: Machine, fits: Fits) -> str:
    """Return up to four changes that fit, of a kind each: room kept, knobs, strategy or precision, image size, and
    another machine or whole steps on one GPU.

    Quantised weights are offered where neither knobs nor another policy help, and another machine where this one does
    not hold everything, also if nothing of it is kept free.
    """
    less = _less_kept_free(spec, checkpoint, machine, fits)
    runtime = _first(_less_kept_by_graphs(spec), checkpoint, machine, fits)
    whole = _first(_free_split(spec), checkpoint, machine, fits)
    found = [
        runtime or less,
        _first(_more_knobs(spec), checkpoint, machine, fits),
        _first(_on_this_machine(spec), checkpoint, machine, fits),
        _largest_image(spec, checkpoint, machine, fits),
        ""
        if runtime or less or whole or isinstance(spec.hardware, CustomMap)
        else _first_machine(spec, checkpoint, fits),
    ]
    if not any(found[:3]) and all_shipped(checkpoint):
        found.insert(3, _first(_quantized(spec), checkpoint, machine, fits))
    if not any(found[:-1]):
        found.insert(0, _first(_fragile_precisions(spec), checkpoint, machine, fits))
    changes = [change for change in (*found, whole) if change]
    return f"this fits: {'; or '.join(changes)}" if changes else ""


Change = tuple[str, DeploySpec]


def _less_kept_by_graphs(spec: DeploySpec) -> Iterator[Change]:
    """Graphs only where their memory fits, where they were asked for everywhere."""
    if spec.runtime.asked and RUNTIMES[spec.runtime.asked].graphs:
        yield "runtime=auto", spec.model_copy(update={"runtime": spec.runtime.model_copy(update={"mode": "auto"})})


def _free_split(spec: DeploySpec) -> Iterator[Change]:
    """A split only where it is worth it, or any where nothing fits without, where another one or none was asked for."""
    hardware = spec.hardware
    if isinstance(hardware, MultiGpuBalanced) and hardware.split != "auto":
        yield "hardware.split=auto", spec.model_copy(update={"hardware": hardware.model_copy(update={"split": "auto"})})


def _first(changes: Iterator[Change], checkpoint: Checkpoint, machine: Machine, fits: Fits) -> str:
    return next((words for words, changed in changes if fits(changed, checkpoint, machine)), "")


def _less_kept_free(spec: DeploySpec, checkpoint: Checkpoint, machine: Machine, fits: Fits) -> str:
    """The most that can be kept free on every GPU, in steps of 256 MiB, where less than what was asked for fits."""
    hardware = spec.hardware

    def words(step: int) -> str:
        return f"{step * 256}MiB" if step % 4 else f"{step // 4}GiB"

    def freed(step: int) -> DeploySpec:
        return spec.model_copy(update={"hardware": hardware.model_copy(update={"keep_free": words(step)})})

    steps = range(-(-hardware.keep_free_bytes // (256 * MIB)))
    fitting = bisect.bisect_left(steps, True, key=lambda step: not fits(freed(step), checkpoint, machine))
    return f"hardware.keep_free={words(fitting - 1)}" if fitting else ""


def with_all_knobs(spec: DeploySpec) -> DeploySpec:
    """Return the declaration with every knob allowed (turned on, for a custom map)."""
    *_, (_, changed) = [("", spec), *_more_knobs(spec)]
    return changed


def _more_knobs(spec: DeploySpec) -> Iterator[Change]:
    """One more knob than allowed, cheapest first, then all of them."""
    hardware = spec.hardware
    field = "knobs" if isinstance(hardware, CustomMap) else "allow"
    on: list[Knob] = [*getattr(hardware, field)]
    possible = [knob for knob in KNOBS if knob not in on and _makes_sense(knob, spec)]
    tries = [[knob] for knob in possible] + ([possible] if len(possible) > 1 else [])
    for more in tries:
        chosen = ordered([*on, *more])
        change = f"hardware.{field}=[{','.join(chosen)}]"
        note = next((f" ({words})" for knob in more if (words := KNOBS[knob].changes_pixels)), "")
        yield change + note, spec.model_copy(update={"hardware": hardware.model_copy(update={field: list(chosen)})})


def _makes_sense(knob: Knob, spec: DeploySpec) -> bool:
    """Whether the strategy may take a knob, and there is something for it to do."""
    one, hardware = KNOBS[knob], spec.hardware
    if isinstance(hardware, CustomMap):
        idle = one.needs_gpu and hardware.device_map[spec.pipeline.of(one.role)] == "cpu"
        return one.in_maps and not idle
    return one.apart is None or isinstance(hardware, MultiGpuBalanced)


def _on_this_machine(spec: DeploySpec) -> Iterator[Change]:
    """Another policy for the same strategy first, then the balanced strategy with each policy."""
    shared = {"use", "keep_free", "allow", "objective", "replicas", "split"}
    kept = {} if isinstance(spec.hardware, CustomMap) else spec.hardware.model_dump(include=shared)
    balanced = MultiGpuBalanced(strategy="multi_gpu_balanced", **kept)
    for hardware, words in ((spec.hardware, ""), (balanced, "hardware=multi_gpu_balanced")):
        placed = spec.model_copy(update={"hardware": hardware})
        if words:
            yield words, placed
        for name, changed in _policies(placed, fragile=False):
            yield f"{words} precision={name}".strip(), changed


def _quantized(spec: DeploySpec) -> Iterator[Change]:
    """Quantised weights, least changing first: the text encoder's in the dtypes declared, then whole policies."""
    given = spec.precision
    for kept in get_args(Quantization):
        text_encoder = spec.pipeline.of("text_encoder")
        quantization = {**given.quantization, text_encoder: kept}
        changed = given.model_copy(update={"quantization": quantization})
        yield f"precision.quantization.{text_encoder}={kept}", spec.model_copy(update={"precision": changed})
    for name in ("int8", "nf4"):
        dtypes = dtypes_of(QUANTIZED[name].dtypes, spec.pipeline)
        update = {"name": name, "components": dtypes, "quantization": quantization_of(name, spec.pipeline)}
        yield f"precision={name}", spec.model_copy(update={"precision": given.model_copy(update=update)})


def _fragile_precisions(spec: DeploySpec) -> Iterator[Change]:
    """Policies that fit but are documented to be risky: offered when nothing else helps here."""
    for name, changed in _policies(spec, fragile=True):
        yield f"precision={name} (documented to be risky)", changed


def _policies(spec: DeploySpec, fragile: bool) -> Iterator[Change]:
    own = quantization_of(spec.precision.name, spec.pipeline)  # another policy drops these, and keeps the user's
    kept = {name: word for name, word in spec.precision.quantization.items() if own.get(name) != word}
    for name in POLICIES:
        components = dtypes_of(name, spec.pipeline)
        if bool(fragile_components(components, spec.pipeline)) == fragile and components != spec.precision.components:
            update = {"name": name, "components": dict(components), "quantization": kept}
            precision = spec.precision.model_copy(update=update)
            yield name, spec.model_copy(update={"precision": precision})


def _largest_image(spec: DeploySpec, checkpoint: Checkpoint, machine: Machine, fits: Fits) -> str:
    """The largest picture of the same shape that fits, by bisection: memory grows with the number of pixels."""
    work = spec.workload
    longer = max(work.height, work.width)

    def scaled(side: int) -> DeploySpec:
        height, width = (max(VAE_FACTOR, part * side // longer // VAE_FACTOR * VAE_FACTOR)
                         for part in (work.height, work.width))  # fmt: skip
        return spec.model_copy(update={"workload": work.model_copy(update={"height": height, "width": width})})

    sides = range(VAE_FACTOR, longer, VAE_FACTOR)
    fitting = bisect.bisect_left(sides, True, key=lambda side: not fits(scaled(side), checkpoint, machine))
    if fitting == 0 or sides[fitting - 1] * 8 < longer:
        return ""
    smaller = scaled(sides[fitting - 1]).workload
    return f"workload.height={smaller.height} workload.width={smaller.width}"


def _first_machine(spec: DeploySpec, checkpoint: Checkpoint, fits: Fits) -> str:
    for gpus in LADDER:
        machine = VirtualMachine(kind="virtual", gpus=gpus)
        if fits(spec, checkpoint, describe_machine(machine)):
            return f"machine=virtual machine.gpus={gpus}"
    return ""


def roomier(plan: Plan, compiled: Callable[[DeploySpec], Plan]) -> str:
    """After a run out of memory: the first plan that needs less on its fullest GPU, as overrides; planned here."""
    hardware = plan.spec.hardware
    tries: Iterator[Change]
    if isinstance(hardware, CustomMap):
        tries = _more_knobs(plan.spec)
    else:
        room = ("512MiB", "1GiB", "2GiB", "4GiB")
        kept = ((f"hardware.keep_free={size}", {"keep_free": size}) for size in room)
        tries = (
            (words, plan.spec.model_copy(update={"hardware": hardware.model_copy(update=change)}))
            for words, change in kept
        )
    for words, changed in tries:
        try:
            other = compiled(changed)
        except SanaDeployError:
            continue
        if _fullest(other) < _fullest(plan):
            saved = human_bytes(_fullest(plan) - _fullest(other))
            return f"{words} plans {saved} less on the fullest GPU ({', '.join(other.knobs) or 'another placement'})"
    return ""


def out_of_float16(plan: Plan, suspects: Iterable[Component], compiled: Callable[[DeploySpec], Plan]) -> str:
    """The first policy that keeps those of `suspects` out of float16 that `plan` puts there, as an override.

    It is planned here. Empty where none of them is in float16, or nothing else fits.
    """
    names = [name for name in suspects if plan.components[name].dtype == "float16"]
    for policy, changed in _policies(plan.spec, fragile=False) if names else ():
        dtypes = dtypes_of(policy, plan.pipeline)
        emulated = not plan.slots and "bfloat16" in dtypes.values()  # a CPU takes it, and is slow with it
        if emulated or "float16" in (dtypes[name] for name in names):
            continue
        with contextlib.suppress(SanaDeployError):
            compiled(changed)
            return f"precision={policy} keeps {' and '.join(names)} out of float16"
    return ""


def _fullest(plan: Plan) -> int:
    return max((slot.peak_bytes for slot in plan.all_slots), default=0)
