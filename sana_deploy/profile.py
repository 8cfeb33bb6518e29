"""What each component needs for a workload: weights (exact) and activations per phase (estimated, rough).

The activation figures here are rules of thumb from the widest layers of each architecture. They are marked
`estimated` wherever they are printed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .checkpoint import Checkpoint, ComponentFacts
from .spec import DTYPE_BYTES, VAE_FACTOR, Component, Dtype, Workload

Phase = Literal["encode", "prepare", "denoise", "decode"]
PHASES: tuple[Phase, ...] = ("encode", "prepare", "denoise", "decode")
"""Text encoding, control image into latents, the denoising loop, latents into pixels; one after the other."""

MAX_TOKENS = 300
"""SANA's prompt length in tokens, the pipeline's `max_sequence_length`."""
INSTRUCTION_TOKENS = 198
"""Estimate of the instruction that the pipeline puts before the prompt: its words and punctuation marks."""


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


def profile_pipeline(checkpoint: Checkpoint, workload: Workload, dtypes: Mapping[Component, Dtype]) -> PipelineProfile:
    """Profile every component of `checkpoint` for `workload` in the given dtypes."""
    facts = checkpoint.components
    activations = _activations(facts, workload, dtypes)
    components = {
        name: ComponentProfile(name, part.class_name, dtypes[name], part.weights_bytes(dtypes[name]), activations[name])
        for name, part in facts.items()
    }
    return PipelineProfile(components, _crossings(facts, workload, dtypes), workload.steps)


def _activations(
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
    tokens = MAX_TOKENS + INSTRUCTION_TOKENS - 2
    width = 6 * int(text["hidden_size"]) + 3 * int(text["intermediate_size"])
    encoder_channels = int(vae["encoder_block_out_channels"][0])
    decoder_channels = int(vae["decoder_block_out_channels"][0])
    denoisers: dict[Component, dict[Phase, int]] = {}
    for name in ("transformer", "controlnet"):
        inner = int(facts[name].config["num_attention_heads"]) * int(facts[name].config["attention_head_dim"])
        kept = int(facts[name].config["num_layers"]) if name == "controlnet" else 0
        live = 6 * 2 * float(facts[name].config["mlp_ratio"]) / 2.5 + 8 + 2 * kept
        denoisers[name] = {"denoise": int(live * inner * cells * images * halves * item[name])}
    return {
        "text_encoder": {"encode": width * tokens * item["text_encoder"]},
        "vae": {
            "prepare": 7 * encoder_channels * pixels * images * halves * item["vae"],
            "decode": 7 * decoder_channels * pixels * images * item["vae"],
        },
        **denoisers,
    }


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
    return (
        Crossing("input_ids", "transformer", "text_encoder", 2 * 8 * (MAX_TOKENS + INSTRUCTION_TOKENS), False),
        Crossing("prompt_embeds", "text_encoder", "transformer",
                 hidden * text * (MAX_TOKENS + INSTRUCTION_TOKENS), False),
        Crossing("control_image", "transformer", "vae", pixels * rows * vae, False),
        Crossing("control_latents", "vae", "transformer", channels * cells * rows * vae, False),
        Crossing("hidden_states", "transformer", "controlnet", channels * cells * rows * net, True),
        Crossing("encoder_hidden_states", "transformer", "controlnet", MAX_TOKENS * hidden * rows * net, True),
        Crossing("encoder_attention_mask", "transformer", "controlnet", MAX_TOKENS * rows * 8, True),
        Crossing("controlnet_cond", "transformer", "controlnet", channels * cells * rows * vae, True),
        Crossing("timestep", "transformer", "controlnet", rows * 4, True),
        Crossing("controlnet_block_samples", "controlnet", "transformer", residual * cells * rows * net, True),
        Crossing("latents", "transformer", "vae", channels * cells * workload.batch * vae, False),
    )  # fmt: skip
