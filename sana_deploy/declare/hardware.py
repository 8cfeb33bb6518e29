"""The group `hardware`: which GPUs may be taken, and who chooses the places on them, one model for each strategy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from .._models import Declared
from .._units import parse_bytes
from ..errors import InvalidSpecError
from .knobs import KNOBS, Exactness, Knob, MapKnob, clash, ordered
from .pipelines import ALWAYS, DEFAULT, HALVES, PipelineDescription, UnitName
from .sizes import Size

Objective = Literal["balance", "latency", "fit", "throughput"]


Replicas = Annotated[int, Field(ge=1, le=1024)] | Literal["auto", "max"]
"""How many whole pipelines are planned beside each other, on GPUs of their own."""


OnDecodeOom = Literal["tile", "bands", "raise"]
"""When the VAE runs out of memory in decode: again in bands of rows and, with `tile`, then in tiles; or give up."""


Split = Literal["none", "guidance", "rows", "guidance+rows", "layers"]
"""How one image is spread over GPUs."""


@dataclass(frozen=True)
class SplitDescription:
    """One way to spread an image over GPUs.

    Attributes:
        help: what it does, in a line.
        exactness: against one GPU.
        most_gpus: that can share a step.
        graphs: whether its calls can be graphs.
        last: whether it saves no seconds, so that it is chosen only where nothing else fits.
        least_gpus: that it takes.
        halves: the halves of guidance are apart.
        rows: units compute some rows of the image each; where halves are apart, as many units each half of guidance.
    """

    help: str
    exactness: Exactness
    most_gpus: int
    graphs: bool = True
    last: bool = False
    least_gpus: int = 2
    halves: bool = False
    rows: bool = False

    @property
    def teams(self) -> int:
        """Teams of units, each of which computes all rows of its part of a step."""
        return 2 if self.halves else 1


SPLITS: dict[Split, SplitDescription] = {
    "none": SplitDescription("one GPU computes a whole denoising step", "bitwise", 1, least_gpus=1),
    "guidance": SplitDescription(
        "two GPUs compute one half of classifier-free guidance each", "rounding", 2, halves=True
    ),
    "rows": SplitDescription(
        "up to eight GPUs compute some rows of the image each", "rounding", 8, graphs=False, rows=True
    ),
    "guidance+rows": SplitDescription(
        "two, three or four GPUs share the rows of each half of guidance",
        "rounding",
        8,
        graphs=False,
        least_gpus=4,
        halves=True,
        rows=True,
    ),
    "layers": SplitDescription(
        "two GPUs hold the first and the other blocks of the denoiser or the text encoder, and compute in turn",
        "bitwise",
        2,
        graphs=False,
        last=True,
    ),
}
"""By name, the plainest first. Libraries may choose kernels by batch size, so that halves may differ from the whole; so
may rows, and sums over all of them are added in another order."""


GpuIndex = Annotated[int, Field(ge=0, le=1023)]


class Placed(Declared):
    """What all strategies share.

    Attributes:
        on_decode_oom: when the VAE runs out of memory in decode, decode again in bands of rows and, with `tile`, where
            that does not do, in tiles, which can change pixels; both are said aloud. `raise` gives up.
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

    def of(self, pipeline: PipelineDescription) -> Self:
        """What it says of the units of `pipeline`.

        Raises:
            InvalidSpecError: it lacks one of them, or asks for what this pipeline cannot do.
        """
        return self


class Planned(Placed):
    """What strategies share that choose places themselves.

    Attributes:
        use: indices of the GPUs that may be taken; None means all.
        keep_free: what stays free on every GPU for others, e.g. `1GiB`.
        allow: knobs that may be turned on; those that can change pixels must be asked for.
        objective: `balance` (no knob without need; then the fewest seconds where the fullest GPU is at most 70 % full,
            else the emptiest fullest GPU), `latency` (seconds per image), `fit` (fewest knobs, then fewest GPUs),
            `throughput` (images per second of all replicas together).
        replicas: whole pipelines beside each other, each on GPUs of its own: exactly so many, `max` (as many as fit),
            or `auto` (for `throughput` as many as draw most images per second, else 1).
        on_shortfall: without any GPU, run on the CPU with a warning, or refuse.
    """

    use: Annotated[list[GpuIndex], Field(min_length=1)] | None = None
    keep_free: Size = "0GiB"
    on_shortfall: Literal["cpu", "error"] = "cpu"
    allow: list[Knob] = [name for name, knob in KNOBS.items() if not knob.asked]
    objective: Objective = "balance"
    replicas: Replicas = "auto"

    @property
    def keep_free_bytes(self) -> int:
        """`keep_free` in bytes. Not cached: a copy with another `keep_free` would keep the old value."""
        return parse_bytes(self.keep_free)

    @property
    def gpu_indices(self) -> frozenset[int] | None:
        """Those of `use`."""
        return None if self.use is None else frozenset(self.use)

    @property
    def may_replicate(self) -> bool:
        """Whether more than one replica may be planned."""
        return self.objective == "throughput" if self.replicas == "auto" else self.replicas != 1


class SingleGpu(Planned):
    """All components on one GPU: the one named by `gpu`, or the best one that fits; each replica on one of its own."""

    strategy: Literal["single_gpu"]
    gpu: GpuIndex | None = None

    @property
    def gpu_indices(self) -> frozenset[int] | None:
        """Only the GPU that is named, else those of `use`."""
        return super().gpu_indices if self.gpu is None else frozenset({self.gpu})


def _without_unnamed_units(value: Any) -> Any:
    """Leave out units of the second half of guidance whose place is null."""
    if not isinstance(value, Mapping):
        return value
    return {key: place for key, place in value.items() if place is not None or key not in HALVES.values()}


class MultiGpuBalanced(Planned):
    """Whole components dealt over all GPUs: fast while no GPU is crowded, else so that the fullest is the emptiest.

    Attributes:
        pin: fixes single units to a GPU index; None leaves one free. One of the second half counts where it is planned.
        split: `guidance` (the halves of classifier-free guidance on two GPUs), `rows` (rows of the image on up to
            eight), `guidance+rows` (rows of each half on two to four), `layers` (consecutive blocks of one component on
            two), `none`, or `auto`: where the objective gains by it, and layers where nothing else fits.
    """

    strategy: Literal["multi_gpu_balanced"]
    pin: dict[UnitName, GpuIndex | None] = {}
    split: Literal["auto", "none", "guidance", "rows", "guidance+rows", "layers"] = "auto"

    _named = field_validator("pin", mode="before")(_without_unnamed_units)

    def of(self, pipeline: PipelineDescription) -> MultiGpuBalanced:
        """The pins of the units of `pipeline`; see `Placed`."""
        units = (*pipeline.names, *pipeline.second_units)
        return self.model_copy(update={"pin": {name: place for name, place in self.pin.items() if name in units}})

    @model_validator(mode="after")
    def _halves_apart(self) -> MultiGpuBalanced:
        for first, second in HALVES.items():
            if self.pin.get(first) is not None and self.pin.get(first) == self.pin.get(second):
                raise ValueError(
                    f"the halves of guidance work at the same time, pin has {first} and {second} on one GPU"
                )
        return self

    @model_validator(mode="after")
    def _pins_of_one(self) -> MultiGpuBalanced:
        pinned = [f"{name}={place}" for name, place in self.pin.items() if place is not None]
        if pinned and self.may_replicate:
            raise ValueError(
                f"pin puts {', '.join(pinned)}, and each of several replicas needs a GPU of its own there; "
                "replicas=1 plans one, with pins"
            )
        return self


class CustomMap(Placed):
    """Exactly what the user wrote: each component's GPU index, or `cpu`.

    Attributes:
        device_map: unit -> place. Where it names units of the second half of guidance, that is the split.
        knobs: memory savers to turn on; one that has nothing to do in the request stays off.
    """

    strategy: Literal["custom_map"]
    knobs: list[MapKnob] = [name for name, knob in KNOBS.items() if knob.in_maps and knob.always]
    device_map: dict[UnitName, GpuIndex | Literal["cpu"]]

    _named = field_validator("device_map", mode="before")(_without_unnamed_units)

    @property
    def split(self) -> Split:
        """`guidance` where the map names units of its second half."""
        return "guidance" if any(name in self.device_map for name in HALVES.values()) else "none"

    @property
    def gpu_indices(self) -> frozenset[int] | None:
        """Those of the map."""
        return frozenset(place for place in self.device_map.values() if place != "cpu")

    def of(self, pipeline: PipelineDescription) -> CustomMap:
        """The places of the components of `pipeline`; see `Placed`."""
        try:
            self._check_complete(pipeline.names)
            if self.split == "guidance":
                self._check_second_half(pipeline)
        except ValueError as problem:
            raise InvalidSpecError(str(problem), where="hardware") from None
        units = (*pipeline.names, *pipeline.second_units)
        return self.model_copy(
            update={"device_map": {name: place for name, place in self.device_map.items() if name in units}}
        )

    def _check_complete(self, names: Sequence[UnitName]) -> None:
        if missing := [name for name in names if name not in self.device_map]:
            raise ValueError(f"device_map has no entry for {', '.join(missing)}; every component needs one")

    @model_validator(mode="after")
    def _complete(self) -> CustomMap:
        self._check_complete(ALWAYS)
        for name in ordered(self.knobs):
            role = KNOBS[name].role
            if KNOBS[name].needs_gpu and self.device_map[DEFAULT.of(role)] == "cpu":
                words = role.replace("_", " ")
                raise ValueError(f"{name} needs the {words} on a GPU, device_map keeps it on the CPU")
        if pair := clash(self.knobs):
            raise ValueError(f"{pair[0]} and {pair[1]} exclude each other")
        return self

    def _check_second_half(self, pipeline: PipelineDescription) -> None:
        """Refuse a second half of guidance that is not whole, not on GPUs, or on the first one's."""
        second = pipeline.second_units
        if pipeline.second_half is None:
            raise ValueError(f"{pipeline.undivided}; leave {', '.join(HALVES.values())} out of device_map")
        if missing := [name for name in second if name not in self.device_map]:
            there = next(name for name in second if name in self.device_map)
            raise ValueError(f"device_map has {there} and no entry for {', '.join(missing)}: half a step needs both")
        if on_host := [name for name in (*pipeline.looped, *second) if self.device_map[name] == "cpu"]:
            raise ValueError(f"guidance is split between GPUs, device_map keeps {on_host[0]} on the CPU")
        for first, other in zip(pipeline.looped, second, strict=True):
            if self.device_map[first] == self.device_map[other]:
                raise ValueError(
                    f"the halves of guidance work at the same time, device_map has {first} and {other} on one GPU"
                )


Hardware = Annotated[SingleGpu | MultiGpuBalanced | CustomMap, Field(discriminator="strategy")]
