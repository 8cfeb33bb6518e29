"""What each component needs for a workload: weights (exact), activations per phase and crossings (estimated).

Activation peaks and work are functions of the request fitted to rehearsals (`needs.py`), evaluated here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..declare.formats import Format
from ..declare.pipelines import PHASES, Component, Crossing, Phase, PipelineDescription
from ..declare.spec import Knob
from ..declare.workload import Workload
from ..facts.allocator import ENCODE_WORKSPACE
from ..facts.checkpoint import Checkpoint
from .needs import Measure, needs_of

VaeMode = Literal["plain", "vae_slicing", "vae_tiling"]
"""How the VAE works: all images at once, one at a time, or one at a time in tiles."""
VAE_KNOBS: tuple[Knob, ...] = ("encode_once", "vae_slicing", "vae_tiling")
"""Knobs that change what the VAE needs."""
VAE_TILE = (1024, 1024, 896, 896)
"""Height and width of a tile and its strides in pixels, as `AutoencoderDC.enable_tiling` takes them. Tiles of 512
left artifacts in flat areas (https://github.com/huggingface/diffusers/issues/10510)."""


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
    phases.
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

    @property
    def activation_bytes(self) -> int:
        """The largest of its phases."""
        return max(self.activations.values(), default=0)


@dataclass(frozen=True)
class PipelineProfile:
    """All components for one workload, and the tensors that flow between them.

    Attributes:
        pipeline: which pipeline it is.
        control_rows: copies of the control image that the pipeline makes, the first one included.
        vae_under: what the VAE needs under sets of its knobs; tiling is never without slicing.
    """

    pipeline: PipelineDescription
    components: Mapping[Component, ComponentProfile]
    crossings: tuple[Crossing, ...]
    steps: int
    control_rows: int = 1
    vae_under: Mapping[frozenset[Knob], ComponentProfile] = field(default_factory=dict)

    def under(self, knobs: Iterable[Knob]) -> PipelineProfile:
        """Return the profile with `knobs` turned on; splitting ControlNet off changes nothing here."""
        knobs = set(knobs) | ({"vae_slicing"} if "vae_tiling" in knobs else set())
        parts, crossings = dict(self.components), self.crossings
        vae, text_encoder = self.pipeline.of("vae"), self.pipeline.of("text_encoder")
        parts[vae] = self.vae_under.get(frozenset(knobs.intersection(VAE_KNOBS)), parts[vae])
        if "text_encoder_offload" in knobs:
            parts[text_encoder] = replace(parts[text_encoder], resident=False)
        if "encode_once" in knobs:
            crossings = tuple(
                replace(one, bytes_each=one.bytes_each // self.control_rows)
                if one.tensor in self.pipeline.repeated
                else one
                for one in crossings
            )
        return replace(self, components=parts, crossings=crossings)


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

    def profiled(name: Component, knobs: Iterable[Knob] = ()) -> ComponentProfile:
        phases = [phase for phase in PHASES if phase in needs[name]]
        return ComponentProfile(
            name,
            facts[name].class_name,
            formats[name],
            facts[name].weights_bytes(formats[name]),
            {phase: _activation(needs[name][phase], _VaeCall.of(workload, phase, knobs)) for phase in phases},
            {phase: _work(needs[name][phase], _VaeCall.of(workload, phase, knobs)) for phase in phases},
            unsplit_bytes=facts[name].unsplit_bytes(formats[name]),
            workspaces=_workspaces(formats[name], workload, knobs) if name == vae else {},
        )

    ways: tuple[set[Knob], ...] = (set(), {"vae_slicing"}, {"vae_slicing", "vae_tiling"})
    once: tuple[set[Knob], ...] = (set(), {"encode_once"})
    sets = [frozenset(one | way) for one in once for way in ways]
    crossings = pipeline.crossings(
        {name: one.config for name, one in facts.items()},
        workload,
        {name: form.dtype for name, form in formats.items()},
    )
    parts = {name: profiled(name) for name in facts}
    waiting = _waiting_in_decode(pipeline, needs[denoiser], workload, crossings)
    home = parts[denoiser]
    parts[denoiser] = replace(home, activations={"decode": waiting, **home.activations})
    return PipelineProfile(
        pipeline,
        parts,
        crossings,
        workload.steps,
        workload.rows,
        {knobs: profiled(vae, knobs) for knobs in sets},
    )


def _waiting_in_decode(
    pipeline: PipelineDescription,
    needs: Mapping[Phase, Mapping[str, Any]],
    workload: Workload,
    crossings: Iterable[Crossing],
) -> int:
    """Bytes that the pipeline still holds at home while the VAE decodes: embeddings, as in prepare, and residuals.

    Nothing is allocated there then, so that measuring does not see it.
    """
    constant, per_image, *_ = (float(value) for value in needs["prepare"]["activation_bytes"])
    residuals = sum(one.bytes_each for one in crossings if one.tensor in pipeline.waiting)
    return round(constant + per_image * workload.batch) + residuals


def _workspaces(form: Format, workload: Workload, knobs: Iterable[Knob]) -> dict[Phase, int]:
    """Bytes that cuDNN takes for the VAE's convolutions: for a float32 encode; one image at a time takes one's."""
    if form.dtype != "float32":
        return {}
    call = _VaeCall.of(workload, "prepare", knobs)
    rows = call.rows if call.mode == "plain" else 1
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
class _VaeCall:
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
    def of(cls, workload: Workload, phase: Phase, knobs: Iterable[Knob]) -> _VaeCall:
        mode: VaeMode = "vae_tiling" if "vae_tiling" in knobs else "vae_slicing" if "vae_slicing" in knobs else "plain"
        each = workload.rows // workload.batch if phase == "prepare" else 1
        rows = 1 if phase == "prepare" and "encode_once" in knobs else workload.batch * each
        return cls(workload.height, workload.width, rows / each, rows, mode)

    @property
    def pixels_at_once(self) -> int:
        """Pixels of what passes in one go: an image, or a tile of it."""
        if self.mode == "vae_tiling":
            return min(self.height, VAE_TILE[0]) * min(self.width, VAE_TILE[1])
        return self.height * self.width


def _activation(needs: Mapping[str, Any], call: _VaeCall) -> int:
    """Peak in bytes. Sliced, one image at a time; tiled, one tile of it, and what collecting the tiles adds."""
    height, width, pixels = call.height, call.width, call.height * call.width
    sliced = call.mode != "plain" and call.rows > 1
    tile = call.pixels_at_once
    peak = linear(needs["sliced_bytes" if sliced else "activation_bytes"], call.batch, tile)
    if tile < pixels:
        constant, per_pixel, per_image_pixel = needs["tiling_bytes"]
        images = max(1, call.batch)
        collected = constant + (per_pixel + per_image_pixel * images) * covered_pixels(height, width)
        peak += collected * call.batch / images
    return max(0, round(peak))


def _work(needs: Mapping[str, Any], call: _VaeCall) -> Work:
    """FLOPs and bytes grow with the pixels computed (tiles overlap), operations with the number of calls."""
    pixels, calls = call.height * call.width, 1
    if call.mode != "plain":
        calls = call.rows
    if call.mode == "vae_tiling" and max(call.height, call.width) > VAE_TILE[0]:
        pixels = covered_pixels(call.height, call.width)
        calls *= len(tiles(call.height)) * len(tiles(call.width))
    counts = {key: round(linear(needs[key], call.batch, pixels)) for key in _QUANTITIES}
    return Work(operations=needs["operations"] * calls, calls=calls, **counts)


_QUANTITIES = ("flops", "product_bytes", "other_bytes")
