"""The group `hardware`: which GPUs may be taken, and who chooses the places on them, one model for each strategy."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .._models import Declared
from .._units import parse_bytes
from .knobs import KNOBS, Knob, MapKnob, clash, ordered
from .pipelines import DEFAULT, Component
from .sizes import Size

Objective = Literal["balance", "latency", "fit"]


OnDecodeOom = Literal["tile", "raise"]
"""When the VAE runs out of memory in decode: decode once more in tiles and say so, or give up."""


GpuIndex = Annotated[int, Field(ge=0, le=1023)]


class Placed(Declared):
    """What all strategies share.

    Attributes:
        on_decode_oom: when the VAE runs out of memory in decode, decode once more in tiles and say so, or give up.
        force: go on where memory is expected to run out: on the GPUs of a custom map, or on the host.
    """

    on_decode_oom: OnDecodeOom = "tile"
    force: bool = False

    @property
    def keep_free_bytes(self) -> int:
        """What stays free on every GPU for others, in bytes; a custom map keeps nothing."""
        return 0

    @property
    def gpu_indices(self) -> frozenset[int] | None:
        """GPUs that may be taken; None means all."""
        return None


class Planned(Placed):
    """What strategies share that choose places themselves.

    Attributes:
        use: indices of the GPUs that may be taken; None means all.
        keep_free: what stays free on every GPU for others, e.g. `1GiB`.
        allow: knobs that may be turned on; those that can change pixels must be asked for.
        objective: `balance` (no knob without need; then the fewest seconds where the fullest GPU is at most 70 % full,
            else the emptiest fullest GPU), `latency` (seconds per image), `fit` (fewest knobs, then fewest GPUs).
        on_shortfall: without any GPU, run on the CPU with a warning, or refuse.
    """

    use: Annotated[list[GpuIndex], Field(min_length=1)] | None = None
    keep_free: Size = "0GiB"
    on_shortfall: Literal["cpu", "error"] = "cpu"
    allow: list[Knob] = [name for name, knob in KNOBS.items() if not knob.asked]
    objective: Objective = "balance"

    @property
    def keep_free_bytes(self) -> int:
        """`keep_free` in bytes. Not cached: a copy with another `keep_free` would keep the old value."""
        return parse_bytes(self.keep_free)

    @property
    def gpu_indices(self) -> frozenset[int] | None:
        """Those of `use`."""
        return None if self.use is None else frozenset(self.use)


class SingleGpu(Planned):
    """All components on one GPU: the one named by `gpu`, or the best one that fits."""

    strategy: Literal["single_gpu"]
    gpu: GpuIndex | None = None

    @property
    def gpu_indices(self) -> frozenset[int] | None:
        """Only the GPU that is named, else those of `use`."""
        return super().gpu_indices if self.gpu is None else frozenset({self.gpu})


class MultiGpuBalanced(Planned):
    """Whole components dealt over all GPUs: fast while no GPU is crowded, else so that the fullest is the emptiest.

    `pin` fixes single components to a GPU index; None leaves one free.
    """

    strategy: Literal["multi_gpu_balanced"]
    pin: dict[Component, GpuIndex | None] = {}


class CustomMap(Placed):
    """Exactly what the user wrote: each component's GPU index, or `cpu`.

    Attributes:
        knobs: memory savers to turn on; one that has nothing to do in the request stays off.
    """

    strategy: Literal["custom_map"]
    knobs: list[MapKnob] = [name for name, knob in KNOBS.items() if knob.in_maps and knob.always]
    device_map: dict[Component, GpuIndex | Literal["cpu"]]

    @property
    def gpu_indices(self) -> frozenset[int] | None:
        """Those of the map."""
        return frozenset(place for place in self.device_map.values() if place != "cpu")

    @model_validator(mode="after")
    def _complete(self) -> CustomMap:
        missing = [name for name in DEFAULT.names if name not in self.device_map]
        if missing:
            raise ValueError(f"device_map has no entry for {', '.join(missing)}; every component needs one")
        for name in ordered(self.knobs):
            role = KNOBS[name].role
            if KNOBS[name].needs_gpu and self.device_map[DEFAULT.of(role)] == "cpu":
                words = role.replace("_", " ")
                raise ValueError(f"{name} needs the {words} on a GPU, device_map keeps it on the CPU")
        if pair := clash(self.knobs):
            raise ValueError(f"{pair[0]} and {pair[1]} exclude each other")
        return self


Hardware = Annotated[SingleGpu | MultiGpuBalanced | CustomMap, Field(discriminator="strategy")]
