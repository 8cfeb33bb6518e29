"""What each component needs for a workload: weights (exact), activations per phase and crossings (estimated).

Activation peaks come from functions fitted to rehearsals, shipped for the catalogued architectures and `tiny`
(`fit.py`); components of another shape get rules of thumb from their widest layers, and the plan says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from . import catalogue
from .checkpoint import Checkpoint, ComponentFacts
from .spec import DTYPE_BYTES, VAE_FACTOR, Component, Dtype, Workload

Phase = Literal["encode", "prepare", "denoise", "decode"]
PHASES: tuple[Phase, ...] = ("encode", "prepare", "denoise", "decode")
"""Text encoding, control image into latents, the denoising loop, latents into pixels; one after the other."""

MAX_TOKENS = 300
"""SANA's prompt length in tokens, the pipeline's `max_sequence_length`."""
INSTRUCTION_TOKENS = 199
"""Estimate of the instruction that the pipeline puts before the prompt: its words and punctuation marks."""
INSTRUCTION_BYTES = 1058
"""The same for a byte-level vocabulary such as `tiny`'s."""


@dataclass(frozen=True)
class ComponentProfile:
    """One component: its dtype, bytes of weights, and bytes of activations in each phase where it works."""

    name: Component
    class_name: str
    dtype: Dtype
    weights_bytes: int
    activations: Mapping[Phase, int]

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


@dataclass(frozen=True)
class PipelineProfile:
    """All components for one workload, and the tensors that flow between them."""

    components: Mapping[Component, ComponentProfile]
    crossings: tuple[Crossing, ...]
    steps: int
    rough: tuple[Component, ...] = ()


def profile_pipeline(checkpoint: Checkpoint, workload: Workload, dtypes: Mapping[Component, Dtype]) -> PipelineProfile:
    """Profile every component of `checkpoint` for `workload` in the given dtypes."""
    facts = checkpoint.components
    rules = _rules_of_thumb(facts, workload, dtypes)
    fits = catalogue.fitted()
    activations = {
        name: _evaluate(fits[part.shapes_digest], workload, dtypes[name]) if part.shapes_digest in fits else rules[name]
        for name, part in facts.items()
    }
    components = {
        name: ComponentProfile(name, part.class_name, dtypes[name], part.weights_bytes(dtypes[name]), activations[name])
        for name, part in facts.items()
    }
    rough = tuple(name for name, part in facts.items() if part.shapes_digest not in fits)
    return PipelineProfile(components, _crossings(facts, workload, dtypes), workload.steps, rough)


def _evaluate(fits: catalogue.Fits, workload: Workload, dtype: Dtype) -> dict[Phase, int]:
    """Evaluate the fits of one component: constant + batch x (per_image + per_image_pixel x pixels); see fit.py."""
    pixels, found = workload.height * workload.width, {}
    for phase in PHASES:
        if phase in fits:
            constant, per_image, per_pixel = fits[phase][dtype]["guided" if workload.guided else "unguided"]
            found[phase] = max(0, round(constant + workload.batch * (per_image + per_pixel * pixels)))
    return found


def _rules_of_thumb(
    facts: Mapping[Component, ComponentFacts], workload: Workload, dtypes: Mapping[Component, Dtype]
) -> dict[Component, dict[Phase, int]]:
    """Estimate activation peaks in bytes: (live tensors of the widest layer) x (its elements) x (item size).

    The counts of live tensors are rough. Encoding runs the prompt once and the negative prompt once, the control
    image passes the VAE once per image and guidance half, the denoiser sees both halves at once.
    """
    item = {name: DTYPE_BYTES[dtype] for name, dtype in dtypes.items()}
    images, halves = workload.batch, 2 if workload.guided else 1
    pixels = workload.height * workload.width
    cells = pixels // VAE_FACTOR**2
    text, vae = facts["text_encoder"].config, facts["vae"].config
    tokens = _prompt_tokens(facts)
    width = 6 * int(text["hidden_size"]) + 3 * int(text["intermediate_size"])
    encoder_channels = int(vae["encoder_block_out_channels"][0])
    decoder_channels = int(vae["decoder_block_out_channels"][0])
    denoisers: dict[Component, dict[Phase, int]] = {}
    residuals = int(facts["controlnet"].config["num_layers"])
    for name in ("transformer", "controlnet"):
        inner = int(facts[name].config["num_attention_heads"]) * int(facts[name].config["attention_head_dim"])
        live = 12 * float(facts[name].config["mlp_ratio"]) / 2.5 + 8 + residuals * (2 if name == "controlnet" else 1)
        denoisers[name] = {"denoise": int(live * inner * cells * images * halves * item[name])}
    return {
        "text_encoder": {"encode": width * tokens * item["text_encoder"]},
        "vae": {
            "prepare": 7 * encoder_channels * pixels * images * halves * item["vae"],
            "decode": 7 * decoder_channels * pixels * images * item["vae"],
        },
        **denoisers,
    }


def _prompt_tokens(facts: Mapping[Component, ComponentFacts]) -> int:
    """Length of the padded prompt with its instruction: the pipeline cuts both to the instruction + 300 - 2 tokens."""
    byte_level = int(facts["text_encoder"].config["vocab_size"]) < 1000
    return (INSTRUCTION_BYTES if byte_level else INSTRUCTION_TOKENS) + MAX_TOKENS - 2


def _crossings(
    facts: Mapping[Component, ComponentFacts], workload: Workload, dtypes: Mapping[Component, Dtype]
) -> tuple[Crossing, ...]:
    """List the tensors between components, in bytes; the denoising loop lives with the transformer."""
    item = {name: DTYPE_BYTES[dtype] for name, dtype in dtypes.items()}
    rows = workload.batch * (2 if workload.guided else 1)
    cells = workload.height * workload.width // VAE_FACTOR**2
    channels = int(facts["vae"].config["latent_channels"])
    hidden = int(facts["text_encoder"].config["hidden_size"])
    text, vae, net = item["text_encoder"], item["vae"], item["controlnet"]
    heads = facts["controlnet"].config
    residual = int(heads["num_attention_heads"]) * int(heads["attention_head_dim"]) * int(heads["num_layers"])
    pixels = 3 * workload.height * workload.width
    tokens = _prompt_tokens(facts) + (MAX_TOKENS if workload.guided else 0)
    return (
        Crossing("input_ids", "transformer", "text_encoder", 8 * tokens, False),
        Crossing("attention_mask", "transformer", "text_encoder", 8 * tokens, False),
        Crossing("prompt_embeds", "text_encoder", "transformer", hidden * text * tokens, False),
        Crossing("control_image", "transformer", "vae", pixels * rows * vae, False),
        Crossing("control_latents", "vae", "transformer", channels * cells * rows * vae, False),
        Crossing("hidden_states", "transformer", "controlnet", channels * cells * rows * net, True),
        Crossing("encoder_hidden_states", "transformer", "controlnet", MAX_TOKENS * hidden * rows * net, True),
        Crossing("encoder_attention_mask", "transformer", "controlnet", MAX_TOKENS * rows * 8, True),
        Crossing("controlnet_cond", "transformer", "controlnet", channels * cells * rows * vae, True),
        Crossing("timestep", "transformer", "controlnet", rows * 8, True),
        Crossing("controlnet_block_samples", "controlnet", "transformer", residual * cells * rows * net, True),
        Crossing("latents", "transformer", "vae", channels * cells * workload.batch * vae, False),
    )  # fmt: skip
