"""What each component needs for a workload: weights (exact), activations per phase and crossings (estimated).

Activation peaks and work are functions of the request, calibrated on rehearsals (`needs.py`) and evaluated here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from ..declare.formats import DTYPE_BYTES, Format
from ..declare.hardware import Split
from ..declare.knobs import BANDS
from ..declare.pipelines import PHASES, Component, Crossing, Phase, PipelineDescription
from ..declare.runtime import Execution
from ..declare.workload import Workload
from ..facts.allocator import ENCODE_WORKSPACE
from ..facts.checkpoint import Checkpoint
from ..facts.component import ComponentFacts
from .needs import Measure, needs_of
from .passing import Passing, VaeMode, Work, activation_bytes, work_of
from .units import Unit


@dataclass(frozen=True)
class ComponentProfile:
    """One component: its format, bytes of weights, and per phase where it works, bytes of activations and work.

    `unsplit_bytes` are what blocks of a GPU's memory have beyond the weights in them, `workspaces` what libraries take
    in a phase. `resident` is False where the weights wait on the CPU and are on the GPU only in the component's own
    phases. `execution` is how its `forward` executes, `graph_phases` are those in which its other calls are launched
    from graphs. `units` are those of the component, whose kernels one thread launches. `steady_bytes` are results that
    its graphs read and do not compute, since they are the same in every step. `pixel_bytes` are images that it decoded,
    and what the pipeline makes of them.
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
    graph_phases: tuple[Phase, ...] = ()
    steady_bytes: int = 0
    pixel_bytes: int = 0

    @property
    def activation_bytes(self) -> int:
        """The largest of its phases."""
        return max(self.activations.values(), default=0)

    @property
    def graphed(self) -> bool:
        """Whether its `forward` is launched from graphs, on a GPU: what is compiled is, in the denoising loop alone."""
        return self.execution == "graphs" or (self.execution == "compiled" and "denoise" in self.activations)


@dataclass(frozen=True)
class PipelineProfile:
    """All components for one workload, and the tensors that flow between them.

    Attributes:
        pipeline: which pipeline it is.
        image_rows: rows of a request's image that pass the VAE, copies that the pipeline makes included.
        vae_under: what the VAE needs in each mode.
        vae_mode: the mode that `components` has it in.
        band_count: the bands that it takes where it works in bands.
        further: units beyond the first of their component, and what each needs; its component's profile is then what
            the first one needs. `crossings` name units.
        rows: that each unit of the denoising loop computes, the first one's first, where rows are dealt; see
            `PipelineDescription.bands`. Teams come one after the other.
        teams: of units, each of which computes all rows: of a half of guidance, where there are two.
        fixed: the GPU of each unit that was profiled for that GPU.
        further_vae_under: what further units of the VAE need in each mode, where it has some.
        dealt: blocks of the first unit of each component that is dealt by layers; its units work in turn.
    """

    pipeline: PipelineDescription
    components: Mapping[Component, ComponentProfile]
    crossings: tuple[Crossing, ...]
    steps: int
    image_rows: int = 0
    vae_under: Mapping[VaeMode, ComponentProfile] = field(default_factory=dict)
    vae_mode: VaeMode = field(default_factory=VaeMode, compare=False)
    band_count: int = field(default=1, compare=False)
    further: Mapping[Unit, ComponentProfile] = field(default_factory=dict)
    rows: tuple[int, ...] = ()
    teams: int = 1
    fixed: Mapping[str, int] = field(default_factory=dict)
    further_vae_under: Mapping[VaeMode, Mapping[Unit, ComponentProfile]] = field(default_factory=dict)
    dealt: Mapping[Component, int] = field(default_factory=dict)

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
        if self.rows:
            return "rows" if self.teams == 1 else "guidance+rows"
        if self.dealt:
            return "layers"
        return "guidance" if self.further else "none"

    @property
    def execution(self) -> Execution:
        """How the components of the denoising loop execute."""
        return self.components[self.pipeline.denoiser].execution

    def with_vae(self, **mode: Any) -> PipelineProfile:
        """Return the profile with the VAE in another mode, e.g. `sliced=True`; what is not named stays."""
        vae, changed = self.pipeline.of("vae"), replace(self.vae_mode, **mode)
        needs = self.vae_under.get(changed, self.components[vae])
        further = {**self.further, **self.further_vae_under.get(changed, {})}
        return replace(self, components={**self.components, vae: needs}, vae_mode=changed, further=further)


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
    modes = VaeMode.all(BANDS if all("banded" in one for one in needs[vae].values()) else ())
    whole = profiled(facts[vae], formats[vae], needs[vae], workload, VaeMode())
    under = {mode: replace(whole, **_in_mode(pipeline, formats[vae], needs[vae], workload, mode)) for mode in modes}
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
    return ComponentProfile(
        facts.name,
        facts.class_name,
        form,
        facts.weights_bytes(form),
        unsplit_bytes=facts.unsplit_bytes(form),
        steady_bytes=_steady_bytes(pipeline, facts, form, workload, share),
        pixel_bytes=0 if mode is None else _pixel_bytes(form, workload),
        **_in_mode(pipeline, form, needs, workload, mode, share),
    )


def _steady_bytes(
    pipeline: PipelineDescription, facts: ComponentFacts, form: Format, workload: Workload, share: float
) -> int:
    """Bytes of what a component computes once for all steps of a request."""
    each = sum(chain.numbers(facts.config, workload) for chain in pipeline.by_name[facts.name].chains)
    return round(each * pipeline.rows(workload) * share) * DTYPE_BYTES[form.dtype]


def _pixel_bytes(form: Format, workload: Workload) -> int:
    """Bytes of decoded images, with the two tensors that the pipeline makes while it scales them to 0 to 1."""
    return 3 * 3 * workload.batch * workload.height * workload.width * DTYPE_BYTES[form.dtype]


def _in_mode(
    pipeline: PipelineDescription,
    form: Format,
    needs: Mapping[Phase, Mapping[str, Any]],
    workload: Workload,
    mode: VaeMode | None,
    share: float = 1.0,
) -> dict[str, Any]:
    """What of a component's profile depends on how images pass it; see `profile_component`."""
    calls = {
        phase: Passing.of(pipeline, workload, phase, mode or VaeMode(), share) for phase in PHASES if phase in needs
    }
    return {
        "activations": {phase: activation_bytes(needs[phase], call) for phase, call in calls.items()},
        "work": {phase: work_of(needs[phase], call) for phase, call in calls.items()},
        "workspaces": {} if mode is None else _workspaces(pipeline, form, workload, mode),
    }


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
    call = Passing.of(pipeline, workload, "prepare", mode)
    rows = 1 if mode.sliced else call.rows
    return {"prepare": ENCODE_WORKSPACE * rows * call.pixels_at_once}
