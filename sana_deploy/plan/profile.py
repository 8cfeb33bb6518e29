"""What each component needs for a workload: weights (exact), activations per phase and crossings (estimated).

Activation peaks and work are functions of the request, calibrated on rehearsals (`needs.py`) and evaluated here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from ..declare.formats import Format
from ..declare.hardware import Split
from ..declare.pipelines import PHASES, Component, Crossing, Phase, PipelineDescription
from ..declare.runtime import Execution
from ..declare.workload import Workload
from ..facts.allocator import ENCODE_WORKSPACE
from ..facts.checkpoint import Checkpoint
from ..facts.component import ComponentFacts
from .needs import Measure, needs_of
from .units import Unit

VAE_TILE = (1024, 1024, 896, 896)
"""Height and width of a tile and its strides in pixels, as `AutoencoderDC.enable_tiling` takes them. Tiles of 512
left artifacts in flat areas (https://github.com/huggingface/diffusers/issues/10510)."""


@dataclass(frozen=True)
class VaeMode:
    """How images pass the VAE: all at once, or one at a time (`sliced`), and then in tiles (`tiled`).

    A control image that is repeated passes as often as there are copies, or `once`.
    """

    once: bool = False
    sliced: bool = False
    tiled: bool = False

    @classmethod
    def all(cls) -> tuple[VaeMode, ...]:
        """Every mode; tiling is never without slicing."""
        return tuple(cls(once, *way) for once in (False, True) for way in ((False, False), (True, False), (True, True)))


@dataclass(frozen=True)
class Work:
    """What a component computes in one phase (in denoise: in one step).

    Attributes:
        operations: kernels launched, by all calls.
        flops: floating point operations, 2 per multiply-add.
        product_bytes: read and written by the operations that have FLOPs.
        other_bytes: read and written by all others.
        calls: passes one after the other that this is cut into.
    """

    operations: int = 0
    flops: int = 0
    product_bytes: int = 0
    other_bytes: int = 0
    calls: int = 1


@dataclass(frozen=True)
class ComponentProfile:
    """One component: its format, bytes of weights, and per phase where it works, bytes of activations and work.

    `unsplit_bytes` are what blocks of a GPU's memory have beyond the weights in them, `workspaces` what libraries take
    in a phase. `resident` is False where the weights wait on the CPU and are on the GPU only in the component's own
    phases. `execution` is how it executes. `units` are those of the component, whose kernels one thread
    launches.
    """

    name: Component
    class_name: str
    format: Format
    weights_bytes: int
    activations: Mapping[Phase, int]
    work: Mapping[Phase, Work] = field(default_factory=dict)
    resident: bool = True
    unsplit_bytes: int = 0
    workspaces: Mapping[Phase, int] = field(default_factory=dict)
    execution: Execution = "eager"
    units: int = 1

    @property
    def activation_bytes(self) -> int:
        """The largest of its phases."""
        return max(self.activations.values(), default=0)

    @property
    def graphed(self) -> bool:
        """Whether its calls are launched from graphs, on a GPU: what is compiled is, in the denoising loop alone."""
        return self.execution == "graphs" or (self.execution == "compiled" and "denoise" in self.activations)


@dataclass(frozen=True)
class PipelineProfile:
    """All components for one workload, and the tensors that flow between them.

    Attributes:
        pipeline: which pipeline it is.
        image_rows: rows of a request's image that pass the VAE, copies that the pipeline makes included.
        vae_under: what the VAE needs in each mode.
        vae_mode: the mode that `components` has it in.
        further: units beyond the first of their component, and what each needs; its component's profile is then what
            the first one needs. `crossings` name units.
    """

    pipeline: PipelineDescription
    components: Mapping[Component, ComponentProfile]
    crossings: tuple[Crossing, ...]
    steps: int
    image_rows: int = 0
    vae_under: Mapping[VaeMode, ComponentProfile] = field(default_factory=dict)
    vae_mode: VaeMode = field(default_factory=VaeMode, compare=False)
    further: Mapping[Unit, ComponentProfile] = field(default_factory=dict)

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """What gets a place: one unit per component in the order of plans, then the further ones."""
        return (*(Unit(name) for name in self.pipeline.names), *self.further)

    @cached_property
    def parts(self) -> Mapping[str, ComponentProfile]:
        """What each unit needs, by its name."""
        return {**self.components, **{unit.name: part for unit, part in self.further.items()}}

    @property
    def split(self) -> Split:
        """How one image is spread over GPUs."""
        return "guidance" if self.further else "none"

    @property
    def execution(self) -> Execution:
        """How the components of the denoising loop execute."""
        return self.components[self.pipeline.denoiser].execution

    def with_vae(self, **mode: bool) -> PipelineProfile:
        """Return the profile with the VAE in another mode, e.g. `sliced=True`; what is not named stays."""
        vae, changed = self.pipeline.of("vae"), replace(self.vae_mode, **mode)
        needs = self.vae_under.get(changed, self.components[vae])
        return replace(self, components={**self.components, vae: needs}, vae_mode=changed)


def profile_pipeline(
    checkpoint: Checkpoint, workload: Workload, formats: Mapping[Component, Format], measure: Measure
) -> PipelineProfile:
    """Profile every component of `checkpoint` for `workload` in the given formats.

    Args:
        measure: measures a checkpoint whose needs are not known; see `needs.py`.
    """
    facts, pipeline = checkpoint.components, checkpoint.pipeline
    vae, denoiser = pipeline.of("vae"), pipeline.denoiser
    needs = needs_of(checkpoint, formats, workload.guided, measure)
    crossings = pipeline.crossings(
        {name: one.config for name, one in facts.items()},
        workload,
        {name: form.dtype for name, form in formats.items()},
    )
    profiled = partial(profile_component, pipeline)
    under = {mode: profiled(facts[vae], formats[vae], needs[vae], workload, mode) for mode in VaeMode.all()}
    parts = {
        name: under[VaeMode()] if name == vae else profiled(one, formats[name], needs[name], workload)
        for name, one in facts.items()
    }
    if pipeline.waiting:
        waiting, home = _waiting_in_decode(pipeline, needs[denoiser], workload, crossings), parts[denoiser]
        parts[denoiser] = replace(home, activations={"decode": waiting, **home.activations})
    return PipelineProfile(
        pipeline, parts, crossings, pipeline.steps_run(workload), pipeline.image_rows(workload), under
    )


def profile_component(
    pipeline: PipelineDescription,
    facts: ComponentFacts,
    form: Format,
    needs: Mapping[Phase, Mapping[str, Any]],
    workload: Workload,
    mode: VaeMode | None = None,
    share: float = 1.0,
) -> ComponentProfile:
    """Profile one component.

    Args:
        needs: of the component, by phase.
        mode: the VAE's, None for any other.
        share: of the rows of a request, what passes it.
    """
    calls = {phase: _Call.of(pipeline, workload, phase, mode or VaeMode(), share) for phase in PHASES if phase in needs}
    return ComponentProfile(
        facts.name,
        facts.class_name,
        form,
        facts.weights_bytes(form),
        {phase: _activation(needs[phase], call) for phase, call in calls.items()},
        {phase: _work(needs[phase], call) for phase, call in calls.items()},
        unsplit_bytes=facts.unsplit_bytes(form),
        workspaces={} if mode is None else _workspaces(pipeline, form, workload, mode),
    )


def _waiting_in_decode(
    pipeline: PipelineDescription,
    needs: Mapping[Phase, Mapping[str, Any]],
    workload: Workload,
    crossings: Iterable[Crossing],
) -> int:
    """Bytes that the pipeline still holds at home while the VAE decodes: embeddings, as in prepare, and residuals.

    Nothing is allocated there then. Where no residuals wait, what is live when decode begins is measured.
    """
    constant, per_image, *_ = (float(value) for value in needs["prepare"]["activation_bytes"])
    residuals = sum(one.bytes_each for one in crossings if one.tensor in pipeline.waiting)
    return round(constant + per_image * workload.batch) + residuals


def _workspaces(pipeline: PipelineDescription, form: Format, workload: Workload, mode: VaeMode) -> dict[Phase, int]:
    """Bytes that cuDNN takes for the VAE's convolutions: for a float32 encode; one image at a time takes one's."""
    if form.dtype != "float32" or pipeline.image is None:
        return {}
    call = _Call.of(pipeline, workload, "prepare", mode)
    rows = 1 if mode.sliced else call.rows
    return {"prepare": ENCODE_WORKSPACE * rows * call.pixels_at_once}


def linear(coefficients: Sequence[float], batch: float, pixels: int) -> float:
    """constant + per_image x batch + per_pixel x pixels + per_image_pixel x batch x pixels."""
    constant, per_image, per_pixel, per_image_pixel = coefficients
    return constant + per_image * batch + per_pixel * pixels + per_image_pixel * batch * pixels


def tiles(side: int) -> list[int]:
    """Lengths in pixels of the tiles that cover `side`, as `AutoencoderDC.tiled_decode` cuts them."""
    return [min(VAE_TILE[0], side - start) for start in range(0, side, VAE_TILE[2])]


def covered_pixels(height: int, width: int) -> int:
    """Pixels that the tiles of one image have together: more than it has, since tiles overlap."""
    return sum(tiles(height)) * sum(tiles(width))


@dataclass(frozen=True)
class _Call:
    """How much of a request passes a component in one phase, and how; only the VAE works otherwise than plainly.

    Attributes:
        batch: images, in those that the needs count: with guidance they count a control image as two rows.
        rows: images that really pass.
    """

    height: int
    width: int
    batch: float
    rows: int
    mode: VaeMode

    @classmethod
    def of(
        cls, pipeline: PipelineDescription, workload: Workload, phase: Phase, mode: VaeMode, share: float = 1.0
    ) -> _Call:
        rows, images = workload.batch, float(workload.batch)
        if phase == "prepare":
            whole = pipeline.image_rows(workload)
            rows = 1 if mode.once else whole
            images = workload.batch * rows / whole
        return cls(workload.height, workload.width, share * images, rows, mode)

    @property
    def pixels_at_once(self) -> int:
        """Pixels of what passes in one go: an image, or a tile of it."""
        if self.mode.tiled:
            return min(self.height, VAE_TILE[0]) * min(self.width, VAE_TILE[1])
        return self.height * self.width


def _activation(needs: Mapping[str, Any], call: _Call) -> int:
    """Peak in bytes. Sliced, one image at a time; tiled, one tile of it, and what collecting the tiles adds."""
    height, width, pixels = call.height, call.width, call.height * call.width
    sliced = call.mode.sliced and call.rows > 1
    tile = call.pixels_at_once
    peak = linear(needs["sliced_bytes" if sliced else "activation_bytes"], call.batch, tile)
    if tile < pixels:
        constant, per_pixel, per_image_pixel = needs["tiling_bytes"]
        images = max(1, call.batch)
        collected = constant + (per_pixel + per_image_pixel * images) * covered_pixels(height, width)
        peak += collected * call.batch / images
    return max(0, round(peak))


def _work(needs: Mapping[str, Any], call: _Call) -> Work:
    """FLOPs and bytes grow with the pixels computed (tiles overlap), operations with the number of calls."""
    pixels, calls = call.height * call.width, 1
    if call.mode.sliced:
        calls = call.rows
    if call.mode.tiled and max(call.height, call.width) > VAE_TILE[0]:
        pixels = covered_pixels(call.height, call.width)
        calls *= len(tiles(call.height)) * len(tiles(call.width))
    counts = {key: round(linear(needs[key], call.batch, pixels)) for key in _QUANTITIES}
    return Work(operations=needs["operations"] * calls, calls=calls, **counts)


_QUANTITIES = ("flops", "product_bytes", "other_bytes")
