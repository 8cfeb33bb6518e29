"""What a plan is made of: frozen records of slots, components, transfers, estimates and reasons. No logic."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from .._models import Diagnostic, Record
from .._units import fullness
from ..declare.formats import Dtype, Format, Quantization
from ..declare.hardware import Split
from ..declare.knobs import Exactness
from ..declare.pipelines import Component
from ..declare.runtime import Execution

Place = int | Literal["cpu"]
"""A slot index, or the host."""


def place_words(place: Place) -> str:
    """`GPU 1` or `CPU`."""
    return "CPU" if place == "cpu" else f"GPU {place}"


def ordered_places(places: Iterable[Place]) -> list[Place]:
    """The CPU, then slots by index; each once."""
    return sorted(set(places), key=lambda place: -1 if place == "cpu" else place)


class FileContent(Record):
    """What one file holds: its size, a digest of samples of it, and of the whole file where that was asked for."""

    bytes: int
    sampled: str
    whole: str | None = None


class PartContent(Record):
    """One folder of a checkpoint: file name -> content; for a component, class, config and shapes as `fingerprint`."""

    fingerprint: str | None = None
    files: dict[str, FileContent]


class CheckpointRecord(Record):
    """Which weights the plan was made for.

    What identifies their content is the commit (`revision`) of a hub repository, and `content` by folder for those
    that lie in a folder.
    """

    kind: str
    source: str
    revision: str | None
    fingerprint: str
    content: dict[str, PartContent] = {}


class Slot(Record):
    """A logical GPU and what it must offer; bytes.

    `overhead_bytes` are the CUDA context, headroom, and `allocator_bytes`: what PyTorch's allocator counts beyond
    tensors (unsplit blocks, cuBLAS's workspace). `pool_bytes` are the part of `activation_bytes` that graphs keep;
    `first_pool_bytes` are what they keep of it in a first request, None where that is all of it.
    """

    name: str
    index: int
    gpu: str
    compute_capability: list[int]
    capacity_bytes: int
    available_bytes: int
    weights_bytes: int
    activation_bytes: int
    overhead_bytes: int
    allocator_bytes: int = 0
    peak_bytes: int
    peak_phase: str
    pool_bytes: int = 0
    first_pool_bytes: int | None = None

    @property
    def others_bytes(self) -> int:
        """What others use of the GPU, or `hardware.keep_free` keeps for them."""
        return self.capacity_bytes - self.available_bytes

    @property
    def fullness(self) -> float:
        """Share of the GPU that is taken at the peak, by others and by the plan; see `_units.fullness`."""
        return fullness(self.peak_bytes, self.available_bytes, self.capacity_bytes)


class PlacedComponent(Record):
    """One component: class, dtype, what its linear layers are quantised to, bytes and place."""

    class_name: str
    dtype: Dtype
    quantization: Quantization | None = None
    weights_bytes: int
    activation_bytes: int
    slot: Place

    @property
    def format(self) -> Format:
        """What it computes in and keeps its linear layers in."""
        return Format(self.dtype, self.quantization)


class PlacedUnit(Record):
    """A unit beyond the first of its component: bytes and place. Class, dtype and quantisation are the component's."""

    component: Component
    weights_bytes: int
    activation_bytes: int
    slot: Place


class Transfer(Record):
    """A tensor that crosses from one place to another; bytes per denoising step and per image."""

    src: Place
    dst: Place
    tensor: str
    bytes_per_step: int
    bytes_per_image: int


class Estimates(Record):
    """Totals over the whole plan; `seconds` of one request by phase, empty where a component is on the CPU.

    `worst_utilisation` is the largest peak over what its GPU offers, by which the planner compares; people are shown
    `Plan.fullness`.
    """

    worst_utilisation: float
    bytes_per_step: int
    bytes_per_image: int
    seconds: dict[str, float] = {}
    seconds_per_image: float | None = None

    @property
    def images_per_second(self) -> float | None:
        """One over the seconds; None where they are not known."""
        return round(1 / self.seconds_per_image, 4) if self.seconds_per_image else None


def total_rate(replicas: Iterable[Estimates]) -> float | None:
    """Images per second of pipelines beside each other; None where that of one is not known."""
    rates = [one.images_per_second for one in replicas]
    return None if None in rates else round(sum(rate for rate in rates if rate is not None), 4)


class Faster(Record):
    """A faster way to execute the same request on the same machine, and the overrides that plan it.

    `exactness` is what it does to the picture of the plan that it is offered with. `times_faster` are seconds of the
    plan over its own.
    """

    runtime: Execution
    split: Split
    exactness: Exactness
    seconds_per_image: float
    times_faster: float
    overrides: list[str]


class Stage(Record):
    """What a request does on the same GPUs at a stretch: its phases, where, and seconds of a request."""

    phases: list[str]
    places: list[Place]
    seconds: float


class OverlapUse(Record):
    """What one slot holds where stages overlap: bytes that wait there of other requests, and the peak with them."""

    slot: int
    waiting_bytes: int
    peak_bytes: int


class Overlap(Record):
    """How the stages of several requests overlap: so many requests at once, each stage alone on its places.

    `seconds_per_image` are those from one image to the next while requests come one after the other.
    """

    in_flight: int
    stages: list[Stage]
    slots: list[OverlapUse]
    seconds_per_image: float
    images_per_second: float


class KnobPrice(Record):
    """What a knob that is on saves on the GPU that it helps most, and what it costs; None where that is not known."""

    bytes_saved: int
    bytes_per_image: int
    seconds_per_image: float | None


class Tile(Record):
    """Tiles of the VAE in pixels, as `AutoencoderDC.enable_tiling` takes them."""

    height: int
    width: int
    stride_height: int
    stride_width: int


class RunnerUp(Record):
    """A placement that also fits, and what it would cost; `fullness` as `Plan.fullness`, since schema 1.3.

    `units` are those beyond the first of their component.
    """

    device_map: dict[Component, Place]
    worst_utilisation: float
    bytes_per_image: int
    knobs: list[str] = []
    seconds_per_image: float | None = None
    fullness: float | None = None
    units: dict[str, Place] = {}


class Miss(Record):
    """A candidate that does not fit, by the fewest bytes; `units` as of a `RunnerUp`."""

    device_map: dict[Component, Place]
    knobs: list[str]
    shortfall_bytes: int
    message: str
    units: dict[str, Place] = {}


class Considered(Record):
    """How many placements were looked at, each under `settings` sets of knobs, and how many of these candidates fit."""

    placements: int
    feasible: int
    runners_up: list[RunnerUp]
    settings: int = 1
    closest: Miss | None = None


class RejectionCount(Record):
    """How many candidates one reason ruled out on one GPU; the closest miss in words and bytes."""

    reason: str
    gpu: int
    count: int
    closest: str
    closest_shortfall_bytes: int


class Replica(Record):
    """One pipeline of several beside each other: what of a plan is its own. Slots are those of the machine.

    A plan is the first one, with what all of them share. `vae_band_count` are the bands of rows that the VAE takes an
    image in; None where it takes it whole. `graphed_calls` are those besides `forward` that are launched from graphs,
    such as `vae.decode`. `rows` are those of tokens that each unit of the denoising loop computes, where the split
    deals them; `layers` are the blocks of the first unit of each component that is dealt by layers.
    """

    slots: list[Slot]
    home: Place
    device_map: dict[Component, Place]
    components: dict[Component, PlacedComponent]
    knobs: list[str]
    transfers: list[Transfer]
    estimates: Estimates
    considered: Considered
    rejections: list[RejectionCount]
    diagnostics: list[Diagnostic]
    knob_prices: dict[str, KnobPrice] = {}
    vae_tile: Tile | None = None
    vae_band_count: int | None = None
    units: dict[str, PlacedUnit] = {}
    runtime: Execution = "eager"
    split: Split = "none"
    rows: list[int] = []
    graphed_calls: list[str] = []
    layers: dict[Component, int] = {}
    exactness: Exactness | None = None
    faster: list[Faster] = []
    overlap: Overlap | None = None
