"""What a pipeline description says: the components of one diffusers pipeline class, their calls, what crosses between.

A description is data and pure functions of the request. Everything that is particular to a pipeline class is in its
description; the rest of the package reads it and names no component.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from ..workload import Request, Workload
from .crossing import PHASES as PHASES
from .crossing import Configs as Configs
from .crossing import Crossing as Crossing
from .crossing import Crossings as Crossings
from .crossing import Phase as Phase
from .layers import Layers as Layers
from .row_bands import Bands as Bands
from .row_bands import BandWork as BandWork
from .row_bands import Exchanges as Exchanges

Role = Literal["text_encoder", "vae", "denoiser", "controlnet"]
"""What a component does in any pipeline; policies speak of roles. The denoising loop lives with the `denoiser`."""
Library = Literal["diffusers", "transformers"]


@dataclass(frozen=True)
class Call:
    """A method of a component that tensors enter and leave.

    Attributes:
        method: its name.
        phase: the phase that it belongs to; None for one that the pipeline does not use.
        output: what reports call the result.
        input: what reports call the first positional input; others keep their argument's name.
        keeps: the result stays where it was made, and is not pushed to the denoiser's device.
        factors: named arguments that are numbers which do nothing but multiply the results.
        besides: named inputs that the pipeline gives besides the first one, where it gives no others.
        reads: fields of the result that the pipeline reads, where it reads no others.
        spares: named arguments, and their values, with which the call does not make what is not read.
        graphed: whether the call may be a CUDA graph, for methods other than `forward`, of which the component says so.
    """

    method: str
    phase: Phase | None
    output: str
    input: str = ""
    keeps: bool = False
    factors: tuple[str, ...] = ()
    besides: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    spares: tuple[tuple[str, Any], ...] = ()
    graphed: bool = False

    @property
    def exchanges(self) -> Exchanges:
        """What units of an autoencoder that take some rows of an image each exchange in this call."""
        made_of = "decoded" if self.phase == "decode" else self.input.removesuffix("_image")
        return Exchanges(f"{made_of}_edge_rows", f"{made_of}_attention_sums", f"{made_of}_keys")

    def is_pipelines_own(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether these are the arguments of a call that the pipeline itself makes, which needs `reads` alone."""
        return bool(self.reads) and len(args) == 1 and set(kwargs) == set(self.besides)


@dataclass(frozen=True)
class LayeredResults:
    """How a component makes its results: result i is `projections[i]` of what `blocks[i]` gives, times an argument.

    Attributes:
        blocks: the attribute that lists the blocks, which run one after the other.
        projections: the attribute that lists the projections, as many as results.
        scale: the argument.
    """

    blocks: str
    projections: str
    scale: str


@dataclass(frozen=True)
class SteadyChain:
    """Two layers that compute the same in every step: `last` gets the result of `first`, and nothing else does.

    Attributes:
        argument: the named input of the call that `first` works on, cast to the dtype of the call.
        first: name of the first layer in the component.
        last: name of the second one; its result has the shape of the first one's.
        numbers: how many of them the result has for each row of a step, by the component's config.
    """

    argument: str
    first: str
    last: str
    numbers: Callable[[Mapping[str, Any], Workload], int]


@dataclass(frozen=True)
class ComponentDescription:
    """One component of a pipeline.

    Attributes:
        name: as diffusers names it.
        role: what it does.
        library: where its class is from.
        class_name: of its module.
        config_keys: what planning reads of its config.
        calls: its methods that tensors enter and leave.
        aliases: names that configs give to the class.
        unquantized: why its weights cannot be quantised; empty where they can.
        fragile: why float16 is documented not to be safe for it; empty where it is.
        layered: how its results can be had one by one, before the call ends; None where they cannot.
        compiled: attributes that `runtime=compiled` compiles: a module, or a list of alike blocks, each by itself.
        chains: layers whose work depends on no step.
        demands: keys of its config, and the value that the pipeline needs there.
        graphed: whether its forward may be a CUDA graph: it launches the same kernels for all values of its inputs.
        layers: how two GPUs can hold some of its blocks each; None where they cannot.
    """

    name: str
    role: Role
    library: Library
    class_name: str
    config_keys: tuple[str, ...]
    calls: tuple[Call, ...]
    aliases: tuple[str, ...] = ()
    unquantized: str = ""
    fragile: str = ""
    layered: LayeredResults | None = None
    compiled: tuple[str, ...] = ()
    graphed: bool = False
    chains: tuple[SteadyChain, ...] = ()
    demands: tuple[tuple[str, Any], ...] = ()
    layers: Layers | None = None

    def call(self, method: str) -> Call:
        """The call of this method."""
        return next(call for call in self.calls if call.method == method)


@dataclass(frozen=True)
class SchedulerDescription:
    """The scheduler that checkpoints come with.

    Attributes:
        class_name: in diffusers.
        settings: that it is given.
        only: the pipeline works with no other class.
    """

    class_name: str
    settings: tuple[tuple[str, Any], ...] = ()
    only: bool = False

    def make(self, library: Any) -> Any:
        """Make one; `library` is diffusers, which this package does not import here."""
        return getattr(library, self.class_name)(**dict(self.settings))


@dataclass(frozen=True)
class ImageInput:
    """The image that a request has beside its prompt, `workload.control_image`.

    Attributes:
        title: what messages call it.
        optional: a call may go without it.
        each_row: it passes the VAE once for each row of a step; else once for a request, whose images share it.
    """

    title: str
    optional: bool
    each_row: bool


@dataclass(frozen=True)
class PipelineDescription:
    """Everything that is particular to one pipeline class of diffusers.

    Attributes:
        class_name: of the pipeline in diffusers.
        title: what messages call it.
        components: in the order of plans and tables.
        scheduler: what checkpoints come with.
        crossings: tensors that cross between components.
        steady: arguments of the denoiser's and the ControlNet's calls that stay the same from step to step.
        repeated: crossings that hold a control image once for every row of a step.
        waiting: crossings whose last tensors the pipeline still holds in decode.
        apart: components that are also published in a repository of their own (`model.components`).
        extended: such a component -> the pipeline class that this one becomes with it.
        arguments: what a call of the pipeline gets for a request, given its image, if it has one; without what the
            caller adds (a generator, callbacks, the form of the output).
        together: the same for several requests that are drawn in one call, a picture each, given an image each.
            They share their scales; the workload's batch is their number.
        reads: keys of a request that it reads beside prompt, guidance and seed.
        image: the image of a request; None where it has none.
        rows_each: rows of a step for each image, without and with guidance.
        steps: denoising steps of a request that does not say.
        most_steps: steps beyond which the model was not made for; None where it is made for any number.
        steps_run: steps that a workload runs.
        casts_prompt: the pipeline casts the prompt embeddings to the dtype of the denoiser in each step, and reads
            nothing else off their dtype.
        second_half: tensors that the denoiser's unit 1 gets and gives where it computes half of the rows of a guided
            step; None where halves cannot be computed apart.
        undivided: why they cannot, in a sentence.
        bands: what units of the denoising loop take that compute some rows of the image each; None where they cannot.
    """

    class_name: str
    title: str
    components: tuple[ComponentDescription, ...]
    scheduler: SchedulerDescription
    crossings: Crossings
    arguments: Callable[[Request, Workload, Any], dict[str, Any]]
    together: Callable[[Sequence[Request], Workload, Sequence[Any]], dict[str, Any]]
    steady: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    extended: tuple[tuple[str, str], ...] = ()
    reads: tuple[str, ...] = ()
    image: ImageInput | None = None
    rows_each: tuple[int, int] = (1, 2)
    steps: int = 20
    most_steps: int | None = None
    steps_run: Callable[[Workload], int] = lambda workload: workload.steps
    casts_prompt: bool = False
    second_half: Crossings | None = None
    undivided: str = ""
    bands: Bands | None = None

    @property
    def counts_guidance(self) -> bool:
        """Whether guidance changes the rows of a step, and so what is needed."""
        return len(set(self.rows_each)) > 1

    def rows(self, workload: Workload) -> int:
        """Rows of a denoising step."""
        return workload.batch * self.rows_each[workload.guided]

    def image_rows(self, workload: Workload) -> int:
        """Rows of the image that pass the VAE, copies included; 0 where a request has none."""
        if self.image is None:
            return 0
        return self.rows(workload) if self.image.each_row else 1

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Components in the order of plans and tables."""
        return tuple(part.name for part in self.components)

    @cached_property
    def by_name(self) -> Mapping[str, ComponentDescription]:
        """Components by name."""
        return {part.name: part for part in self.components}

    @cached_property
    def phase_of(self) -> Mapping[str, Phase]:
        """`component.method` -> the phase that the call belongs to."""
        return {
            f"{part.name}.{call.method}": call.phase for part in self.components for call in part.calls if call.phase
        }

    def find(self, role: Role) -> str | None:
        """The component of a role; None where the pipeline has none."""
        return next((part.name for part in self.components if part.role == role), None)

    def of(self, role: Role) -> str:
        """The component of a role that every pipeline has.

        Raises:
            LookupError: this one has not.
        """
        name = self.find(role)
        if name is None:
            raise LookupError(f"a {self.title} has no {role}")
        return name

    @cached_property
    def looped(self) -> tuple[str, ...]:
        """Components that work in every denoising step, in the order of plans."""
        return tuple(part.name for part in self.components if any(call.phase == "denoise" for call in part.calls))

    @cached_property
    def second_units(self) -> tuple[str, ...]:
        """The units that the second half of guidance has: one of each component of the denoising loop."""
        return () if self.second_half is None else tuple(f"{name}.1" for name in self.looped)

    @property
    def denoiser(self) -> str:
        """The component that the denoising loop lives with."""
        return self.of("denoiser")
