"""What each component needs for a workload: weights (exact), activations per phase and crossings (estimated).

Activation peaks and work are functions of the request fitted to rehearsals (`needs.py`), evaluated here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..declare.spec import DTYPE_BYTES, VAE_FACTOR, Component, Dtype, Format, Knob, Workload
from ..facts.allocator import ENCODE_WORKSPACE
from ..facts.checkpoint import Checkpoint
from ..facts.component import ComponentFacts
from .needs import Told, needs_of

Phase = Literal["encode", "prepare", "denoise", "decode"]
PHASES: tuple[Phase, ...] = ("encode", "prepare", "denoise", "decode")
"""Text encoding, control image into latents, the denoising loop, latents into pixels; one after the other."""

VaeMode = Literal["plain", "vae_slicing", "vae_tiling"]
"""How the VAE works: all images at once, one at a time, or one at a time in tiles."""
VAE_KNOBS: tuple[Knob, ...] = ("encode_once", "vae_slicing", "vae_tiling")
"""Knobs that change what the VAE needs."""
VAE_TILE = (1024, 1024, 896, 896)
"""Height and width of a tile and its strides in pixels, as `AutoencoderDC.enable_tiling` takes them. Tiles of 512
left artifacts in flat areas (https://github.com/huggingface/diffusers/issues/10510)."""

MAX_TOKENS = 300
"""SANA's prompt length in tokens, the pipeline's `max_sequence_length`."""
INSTRUCTION_TOKENS = 199
"""Estimate of the instruction that the pipeline puts before the prompt: its words and punctuation marks."""
INSTRUCTION_BYTES = 1058
"""The same for a byte-level vocabulary such as `tiny`'s."""


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
class Crossing:
    """A tensor that leaves `src` and enters `dst` (a component, or `home`): bytes each time it does."""

    tensor: str
    src: Component
    dst: Component
    bytes_each: int
    per_step: bool

    def times(self, steps: int) -> int:
        """How often it crosses in a request of `steps` denoising steps."""
        return steps if self.per_step else 1

    @property
    def phase(self) -> Phase:
        """The phase that waits for it."""
        if self.per_step:
            return "denoise"
        return _PHASE_OF_CROSSING.get(self.tensor, "encode")


_PHASE_OF_CROSSING: Mapping[str, Phase] = {
    "control_image": "prepare", "control_latents": "prepare", "controlnet_cond": "denoise", "latents": "decode",
    "encoder_hidden_states": "denoise", "encoder_attention_mask": "denoise",
}  # fmt: skip


@dataclass(frozen=True)
class PipelineProfile:
    """All components for one workload, and the tensors that flow between them.

    Attributes:
        control_rows: copies of the control image that the pipeline makes, the first one included.
        vae_under: what the VAE needs under sets of its knobs; tiling is never without slicing.
    """

    components: Mapping[Component, ComponentProfile]
    crossings: tuple[Crossing, ...]
    steps: int
    control_rows: int = 1
    vae_under: Mapping[frozenset[Knob], ComponentProfile] = field(default_factory=dict)

    def under(self, knobs: Iterable[Knob]) -> PipelineProfile:
        """Return the profile with `knobs` turned on; splitting ControlNet off changes nothing here."""
        knobs = set(knobs) | ({"vae_slicing"} if "vae_tiling" in knobs else set())
        parts, crossings = dict(self.components), self.crossings
        parts["vae"] = self.vae_under.get(frozenset(knobs.intersection(VAE_KNOBS)), parts["vae"])
        if "text_encoder_offload" in knobs:
            parts["text_encoder"] = replace(parts["text_encoder"], resident=False)
        if "encode_once" in knobs:
            crossings = tuple(
                replace(one, bytes_each=one.bytes_each // self.control_rows) if one.tensor in _REPEATED else one
                for one in crossings
            )
        return replace(self, components=parts, crossings=crossings)


def profile_pipeline(
    checkpoint: Checkpoint, workload: Workload, formats: Mapping[Component, Format], told: Told | None = None
) -> PipelineProfile:
    """Profile every component of `checkpoint` for `workload` in the given formats.

    Args:
        told: told of the progress where the checkpoint must be measured first; see `needs.py`.
    """
    facts = checkpoint.components
    needs = needs_of(checkpoint, formats, workload.guided, told)

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
            workspaces=_workspaces(formats[name], workload, knobs) if name == "vae" else {},
        )

    ways: tuple[set[Knob], ...] = (set(), {"vae_slicing"}, {"vae_slicing", "vae_tiling"})
    once: tuple[set[Knob], ...] = (set(), {"encode_once"})
    sets = [frozenset(one | way) for one in once for way in ways]
    crossings = _crossings(facts, workload, {name: form.dtype for name, form in formats.items()})
    parts = {name: profiled(name) for name in facts}
    waiting = _waiting_in_decode(needs["transformer"], workload, crossings)
    home = parts["transformer"]
    parts["transformer"] = replace(home, activations={"decode": waiting, **home.activations})
    return PipelineProfile(
        parts,
        crossings,
        workload.steps,
        workload.rows,
        {knobs: profiled("vae", knobs) for knobs in sets},
    )


def _waiting_in_decode(needs: Mapping[str, Any], workload: Workload, crossings: Iterable[Crossing]) -> int:
    """Bytes that the pipeline still holds at home while the VAE decodes: embeddings, as in prepare, and residuals.

    Nothing is allocated there then, so that measuring does not see it.
    """
    constant, per_image, *_ = (float(value) for value in needs["prepare"]["activation_bytes"])
    residuals = sum(one.bytes_each for one in crossings if one.tensor == "controlnet_block_samples")
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
_REPEATED = ("control_image", "control_latents")
"""Crossings that `encode_once` makes with one row of each image."""


def _prompt_tokens(facts: Mapping[Component, ComponentFacts]) -> int:
    """Length of the padded prompt with its instruction: the pipeline cuts both to the instruction + 300 - 2 tokens."""
    byte_level = int(facts["text_encoder"].config["vocab_size"]) < 1000
    return (INSTRUCTION_BYTES if byte_level else INSTRUCTION_TOKENS) + MAX_TOKENS - 2


def _crossings(
    facts: Mapping[Component, ComponentFacts], workload: Workload, dtypes: Mapping[Component, Dtype]
) -> tuple[Crossing, ...]:
    """List the tensors between components, in bytes; the denoising loop lives with the transformer."""
    item = {name: DTYPE_BYTES[dtype] for name, dtype in dtypes.items()}
    rows = workload.rows
    cells = workload.height * workload.width // VAE_FACTOR**2
    channels = int(facts["vae"].config["latent_channels"])
    hidden = int(facts["text_encoder"].config["hidden_size"])
    text, vae, net = item["text_encoder"], item["vae"], item["controlnet"]
    heads = facts["controlnet"].config
    residual = int(heads["num_attention_heads"]) * int(heads["attention_head_dim"]) * int(heads["num_layers"])
    pixels = 3 * workload.height * workload.width
    # The pipeline casts the prompt embeddings anew in each step, unless they can be cast before (`load.py`).
    recast = dtypes["controlnet"] not in (dtypes["text_encoder"], dtypes["transformer"])
    tokens = _prompt_tokens(facts) + (MAX_TOKENS if workload.guided else 0)
    return (
        Crossing("input_ids", "transformer", "text_encoder", 8 * tokens, False),
        Crossing("attention_mask", "transformer", "text_encoder", 8 * tokens, False),
        Crossing("prompt_embeds", "text_encoder", "transformer", hidden * text * tokens, False),
        Crossing("control_image", "transformer", "vae", pixels * rows * vae, False),
        Crossing("control_latents", "vae", "transformer", channels * cells * rows * vae, False),
        Crossing("hidden_states", "transformer", "controlnet", channels * cells * rows * net, True),
        Crossing("encoder_hidden_states", "transformer", "controlnet", MAX_TOKENS * hidden * rows * net, recast),
        Crossing("encoder_attention_mask", "transformer", "controlnet", MAX_TOKENS * rows * 8, False),
        Crossing("controlnet_cond", "transformer", "controlnet", channels * cells * rows * vae, False),
        Crossing("timestep", "transformer", "controlnet", rows * 8, True),
        Crossing("controlnet_block_samples", "controlnet", "transformer", residual * cells * rows * net, True),
        Crossing("latents", "transformer", "vae", channels * cells * workload.batch * vae, False),
    )  # fmt: skip
