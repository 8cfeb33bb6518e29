"""What a user declares: frozen pydantic models, one per config group, and `DeploySpec` over them.

Groups with variants are discriminated unions: `model` by `kind`, `hardware` by `strategy`, `machine` by `kind`.
Sizes are pixels, counts are counts, times are not declared here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from .._models import Declared
from .._units import parse_bytes
from .explain import first_error
from .formats import Dtype, Format, Quantization
from .knobs import KNOBS, Knob, MapKnob, clash, ordered
from .pipelines import DEFAULT, Component, PipelineDescription
from .runtime import Runtime
from .sizes import Size, Sizes
from .workload import DeclaredWorkload, Side

Stage = Literal["compile", "resolve", "apply", "generate"]
STAGES: tuple[Stage, ...] = ("compile", "resolve", "apply", "generate")
Objective = Literal["balance", "latency", "fit"]
Fidelity = Literal["shapes", "numbers"]
"""What a rehearsal computes with: shapes alone, or real arithmetic on the CPU."""
OnDecodeOom = Literal["tile", "raise"]
"""When the VAE runs out of memory in decode: decode once more in tiles and say so, or give up."""
GpuIndex = Annotated[int, Field(ge=0, le=1023)]


class Overrides(Declared):
    """Other sources for components that are also published apart: a folder, or OWNER/NAME[@REVISION]."""

    controlnet: str | None = None

    def given(self) -> dict[Component, str]:
        """Component -> source, where one is named."""
        return {name: source for name, source in self if source is not None}


class TinyModel(Declared):
    """The generated checkpoint: same architecture, small seeded random weights.

    `resolution`, here and below, is the side in pixels that the workload defaults to.
    """

    kind: Literal["tiny"]
    cache_dir: str | None = None
    resolution: Side = 1024
    components: Overrides = Overrides()


class CatalogueModel(Declared):
    """A published architecture whose configs ship with this package; `source` says where the weights are."""

    kind: Literal["catalogue"]
    name: Literal["sana_600m_controlnet", "sana_1600m_controlnet"]
    source: str | None = None
    revision: str | None = None
    variant: str | None = None
    allow_pickle: bool = False
    resolution: Side = 1024
    components: Overrides = Overrides()


class CheckpointModel(Declared):
    """Any diffusers folder or hub repository with the components of a SANA ControlNet pipeline."""

    kind: Literal["checkpoint"]
    source: str
    revision: str | None = None
    variant: str | None = None
    allow_pickle: bool = False
    resolution: Side = 1024
    components: Overrides = Overrides()


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


class Precision(Declared):
    """The dtype of each component, which keep quantised weights, and what to do about risky or emulated dtypes.

    `audit` compares every component, and the image, with a float32 run of the same request.

    The policy named `auto` may leave components open; compiling fills them in.
    """

    name: str
    components: dict[Component, Dtype]
    quantization: dict[Component, Quantization | None] = {}
    allow_emulated: bool = False
    strict: bool = False
    audit: bool = False

    @field_validator("components", mode="before")
    @classmethod
    def _left_open(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("name") != "auto" or not isinstance(value, Mapping):
            return value
        return {name: dtype for name, dtype in value.items() if dtype is not None}

    @model_validator(mode="after")
    def _complete(self) -> Precision:
        missing = [name for name in DEFAULT.names if name not in self.components]
        if missing and self.name != "auto":
            raise ValueError(f"components has no dtype for {', '.join(missing)}; every component needs one")
        for part in DEFAULT.components:
            if part.unquantized and self.quantization.get(part.name):
                raise ValueError(f"{part.unquantized}: leave quantization.{part.name} out")
        return self

    @property
    def formats(self) -> dict[Component, Format]:
        """Dtype and quantization of each component that has a dtype."""
        return {name: Format(dtype, self.quantization.get(name)) for name, dtype in self.components.items()}


class PresentMachine(Declared):
    """The GPUs of this host, as CUDA_VISIBLE_DEVICES shows them."""

    kind: Literal["present"]


class VirtualMachine(Declared):
    """GPUs that are not there, by name or by memory; see `facts/virtual_machine.py` for the words.

    Attributes:
        memory: another size for every GPU, e.g. `8GiB`.
        used: what other programs hold, for all GPUs alike or one size per GPU.
        fidelity: `shapes` (no data), `numbers` (real arithmetic on the CPU), or `auto` by the model's size.
    """

    kind: Literal["virtual"]
    gpus: str | list[str]
    memory: Size | None = None
    used: Sizes | None = None
    fidelity: Literal["auto", Fidelity] = "auto"

    @property
    def memory_bytes(self) -> int | None:
        """`memory` in bytes; None where each GPU has its own."""
        return None if self.memory is None else parse_bytes(self.memory)

    @property
    def used_bytes(self) -> int | list[int]:
        """`used` in bytes."""
        if isinstance(self.used, list):
            return [parse_bytes(text) for text in self.used]
        return 0 if self.used is None else parse_bytes(self.used)


class Resolve(Declared):
    """How a plan is bound to the GPUs present; nothing of it is planned.

    Attributes:
        allow: staleness to accept, by name: `library_versions`, or `checkpoint_content` (other values in weights,
            tokenizer or scheduler of the same architecture).
        bind: slot index -> UUID of the GPU that it must get; None leaves the choice.
        machine: virtual GPUs to rehearse a saved plan on, in the words of `machine.gpus`; None takes the plan's.
        verify: read every byte of weights that lie in folders, to keep or to compare; else samples of every tensor.
    """

    allow: list[Literal["library_versions", "checkpoint_content"]] = []
    bind: dict[str, str] | None = None
    machine: str | None = None
    verify: bool = False

    @field_validator("bind", mode="before")
    @classmethod
    def _plain_keys(cls, value: Any) -> Any:
        return {str(key): uuid for key, uuid in value.items()} if isinstance(value, Mapping) else value


Model = Annotated[TinyModel | CatalogueModel | CheckpointModel, Field(discriminator="kind")]
MachineSpec = Annotated[PresentMachine | VirtualMachine, Field(discriminator="kind")]
Hardware = Annotated[SingleGpu | MultiGpuBalanced | CustomMap, Field(discriminator="strategy")]


class DeploySpec(Declared):
    """Everything a user declares for one deployment."""

    model: Model
    hardware: Hardware
    precision: Precision
    machine: MachineSpec
    workload: DeclaredWorkload
    runtime: Runtime = Runtime()
    resolve: Resolve = Resolve()
    until: Stage = "generate"
    output: Literal["text", "json"] = "text"
    plan_file: str | None = None

    @property
    def pipeline(self) -> PipelineDescription:
        """Which pipeline is declared."""
        return DEFAULT

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> DeploySpec:
        """Validate a composed configuration.

        Raises:
            InvalidSpecError: naming the first offending key, the rule it breaks, and the nearest known word.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as problem:
            raise first_error(problem) from None


@cache
def component_mappings() -> frozenset[str]:
    """Keys that hold a value for each component, e.g. `precision.components`."""
    return frozenset(
        f"{group}.{name}"
        for group, field in DeploySpec.model_fields.items()
        for model in get_args(field.annotation) or (field.annotation,)
        for name, inner in (getattr(model, "model_fields", None) or {}).items()
        if get_origin(inner.annotation) is dict and get_args(inner.annotation)[0] is Component
    )
