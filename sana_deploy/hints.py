"""Changes that would help where nothing fits: each one is planned before it is offered."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator

from .checkpoint import Checkpoint
from .describe import describe_machine
from .machine import Machine
from .precision import POLICIES, fragile_components
from .spec import VAE_FACTOR, CustomMap, DeploySpec, MultiGpuBalanced, VirtualMachine

Fits = Callable[[DeploySpec, Checkpoint, Machine], bool]
"""Whether some placement of a declaration fits a machine."""

LADDER = ("1xrtx3060", "2xrtx3060", "1xrtx4090", "2xrtx4090", "1xa100", "2xa100")
"""Machines that are offered when this one is too small, cheapest first."""


def working_changes(spec: DeploySpec, checkpoint: Checkpoint, machine: Machine, fits: Fits) -> str:
    """Return up to three changes that fit, one of each kind: strategy or precision, image size, machine."""
    found = [
        _first(_on_this_machine(spec), checkpoint, machine, fits),
        _largest_image(spec, checkpoint, machine, fits),
        "" if isinstance(spec.hardware, CustomMap) else _first_machine(spec, checkpoint, fits),
    ]
    if not any(found[:2]):
        found.insert(0, _first(_fragile_precisions(spec), checkpoint, machine, fits))
    changes = [change for change in found if change]
    return f"this fits: {'; or '.join(changes)}" if changes else ""


Change = tuple[str, DeploySpec]


def _first(changes: Iterator[Change], checkpoint: Checkpoint, machine: Machine, fits: Fits) -> str:
    return next((words for words, changed in changes if fits(changed, checkpoint, machine)), "")


def _on_this_machine(spec: DeploySpec) -> Iterator[Change]:
    """Another policy for the same strategy first, then the balanced strategy with each policy."""
    kept = {} if isinstance(spec.hardware, CustomMap) else spec.hardware.model_dump(include={"use", "keep_free"})
    balanced = MultiGpuBalanced(strategy="multi_gpu_balanced", **kept)
    for hardware, words in ((spec.hardware, ""), (balanced, "hardware=multi_gpu_balanced")):
        placed = spec.model_copy(update={"hardware": hardware})
        if words:
            yield words, placed
        for name, changed in _policies(placed, fragile=False):
            yield f"{words} precision={name}".strip(), changed


def _fragile_precisions(spec: DeploySpec) -> Iterator[Change]:
    """Policies that fit but are documented to be risky: offered when nothing else helps here."""
    for name, changed in _policies(spec, fragile=True):
        yield f"precision={name} (documented to be risky)", changed


def _policies(spec: DeploySpec, fragile: bool) -> Iterator[Change]:
    for name, components in POLICIES.items():
        if bool(fragile_components(components)) == fragile and components != spec.precision.components:
            precision = spec.precision.model_copy(update={"name": name, "components": dict(components)})
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
