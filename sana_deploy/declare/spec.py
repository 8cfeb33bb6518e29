"""What a user declares: frozen pydantic models, one per config group, and `DeploySpec` over them.

Groups with variants are discriminated unions: `model` by `kind`, `hardware` by `strategy`, `machine` by `kind`.
Sizes are pixels, counts are counts, times are not declared here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from .._models import Declared
from .._units import parse_bytes
from ..errors import InvalidSpecError
from .explain import first_error
from .formats import Dtype, Format, Quantization
from .hardware import Hardware
from .pipelines import ALWAYS, DEFAULT, PIPELINES, Component, PipelineDescription, PipelineName, UnitName
from .runtime import Runtime
from .sizes import Size, Sizes
from .workload import DeclaredWorkload, Side

Stage = Literal["compile", "resolve", "apply", "generate"]
STAGES: tuple[Stage, ...] = ("compile", "resolve", "apply", "generate")
Fidelity = Literal["shapes", "numbers"]
"""What a rehearsal computes with: shapes alone, or real arithmetic on the CPU."""


class Overrides(Declared):
    """Other sources for components that are also published apart: a folder, or OWNER/NAME[@REVISION]."""

    controlnet: str | None = None

    def given(self) -> dict[Component, str]:
        """Component -> source, where one is named."""
        return {name: source for name, source in self if source is not None}


class TinyModel(Declared):
    """The generated checkpoint: same architecture, small seeded random weights.

    `resolution`, here and below, is the side in pixels that the workload defaults to. `pipeline` is the class in
    diffusers; None takes the one that the checkpoint names.
    """

    kind: Literal["tiny"]
    pipeline: PipelineName | None = None
    cache_dir: str | None = None
    resolution: Side = 1024
    components: Overrides = Overrides()


class CatalogueModel(Declared):
    """A published architecture whose configs ship with this package; `source` says where the weights are."""

    kind: Literal["catalogue"]
    pipeline: PipelineName | None = None
    name: Literal[
        "sana_600m", "sana_600m_512", "sana_1600m", "sana_1600m_512", "sana_1600m_2k", "sana_1600m_4k",
        "sana15_1600m", "sana15_4800m", "sana_sprint_600m", "sana_sprint_1600m",
        "sana_600m_controlnet", "sana_1600m_controlnet",
    ]  # fmt: skip
    source: str | None = None
    revision: str | None = None
    variant: str | None = None
    allow_pickle: bool = False
    resolution: Side = 1024
    components: Overrides = Overrides()


class CheckpointModel(Declared):
    """Any diffusers folder or hub repository with the components of a pipeline of the SANA family."""

    kind: Literal["checkpoint"]
    pipeline: PipelineName | None = None
    source: str
    revision: str | None = None
    variant: str | None = None
    allow_pickle: bool = False
    resolution: Side = 1024
    components: Overrides = Overrides()


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
        if lack := self._lack(ALWAYS):
            raise ValueError(lack)
        for part in (part for one in PIPELINES.values() for part in one.components):
            if part.unquantized and self.quantization.get(part.name):
                raise ValueError(f"{part.unquantized}: leave quantization.{part.name} out")
        return self

    def of(self, pipeline: PipelineDescription) -> Precision:
        """What it says of the components of `pipeline`.

        Raises:
            InvalidSpecError: it has no dtype for one of them.
        """
        if lack := self._lack(pipeline.names):
            raise InvalidSpecError(lack, where="precision")
        parts = {
            key: {name: value for name, value in getattr(self, key).items() if name in pipeline.names}
            for key in ("components", "quantization")
        }
        return Precision.model_validate({**self.model_dump(), **parts})

    def _lack(self, names: Sequence[Component]) -> str:
        missing = [name for name in names if name not in self.components]
        if not missing or self.name == "auto":
            return ""
        return f"components has no dtype for {', '.join(missing)}; every component needs one"

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
        """Which pipeline is declared; `of` settles it where the checkpoint says so."""
        return PIPELINES[self.model.pipeline] if self.model.pipeline else DEFAULT

    def of(self, pipeline: PipelineDescription) -> DeploySpec:
        """Return the declaration for a pipeline: what it says of components that this one has, and its own steps.

        Raises:
            InvalidSpecError: it says nothing of a component that this one has.
        """
        workload = self.workload
        if "steps" not in workload.model_fields_set:
            workload = workload.model_copy(update={"steps": pipeline.steps})
        settled = {
            "model": self.model.model_copy(update={"pipeline": pipeline.class_name}),
            "hardware": self.hardware.of(pipeline),
            "precision": self.precision.of(pipeline),
            "workload": workload,
        }
        return self.model_copy(update=settled)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> DeploySpec:
        """Validate a composed configuration.

        Raises:
            InvalidSpecError: naming the first offending key, the rule it breaks, and the nearest known word.
        """
        try:
            spec = cls.model_validate(values)
        except ValidationError as problem:
            raise first_error(problem) from None
        if spec.model.pipeline:
            spec.of(spec.pipeline)
        return spec


@cache
def component_mappings() -> frozenset[str]:
    """Keys that hold a value for each component, e.g. `precision.components`."""
    return frozenset(
        f"{group}.{name}"
        for group, field in DeploySpec.model_fields.items()
        for model in get_args(field.annotation) or (field.annotation,)
        for name, inner in (getattr(model, "model_fields", None) or {}).items()
        if get_origin(inner.annotation) is dict and get_args(inner.annotation)[0] in (Component, UnitName)
    )
